"""Progress on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

# What is told of progress (and `calibration.progress.WalkProgress`): steps of any kind, as
# `ProgressBar.step` takes them: (what happens, done, total or None).
Progress = Callable[[str, float, float | None], None]
# (done, total) of one thing, which the caller names.
CountProgress = Callable[[int, int], None]
# A line of text before each step that takes long.
LineProgress = Callable[[str], None]

# Seconds between two lines where there is no terminal: a log should show life, not scroll away.
LINE_INTERVAL = 10.0
# Those that are shown, the innermost last.
_SHOWN: list[ProgressBar] = []
_WORDS = {"block": "next block", "batch": "calibrating", "linear": "pruning"}


def tell(words: str) -> None:
    """Something that takes long begins: the progress bar that is shown says so, if there is one."""
    if _SHOWN:
        _SHOWN[-1].note(words)


class Event(Protocol):
    """What the bar shows of a `calibration.walk.WalkEvent`."""

    @property
    def kind(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


class ProgressBar:
    """A context manager that shows steps, and by `walked` those of a walk over blocks."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._last = time.monotonic()
        self._task: TaskID | None = None
        self._bar = RichProgress(
            TextColumn("{task.fields[title]}"),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> ProgressBar:
        _SHOWN.append(self)
        self._bar.start()
        self._task = self._bar.add_task("starting", total=None, title=self._title)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _SHOWN.remove(self)
        if not self._bar.disable:  # rich 13 would end even a bar that it never drew with a newline
            self._bar.stop()

    def walked(self, event: Event) -> None:
        """Block, phase and layer of a walk, or a step of the whole model."""
        words = f"block {min(event.block + 1, event.blocks)}/{event.blocks}"
        done: float = event.done
        total: float = event.total
        if event.kind == "whole":
            words = f"{event.name} {event.done}/{event.total}"
        elif event.kind != "block":
            words = f"{words} {_WORDS[event.kind]} {event.name} {event.done}/{event.total}"
            done, total = event.block, event.blocks
        self.step(words, done, total)

    def note(self, words: str) -> None:
        """A step that takes long begins, of which nothing will be heard: a line of it at once."""
        self._last = -math.inf
        self.step(words)

    def step(self, words: str, done: float = 0, total: float | None = None) -> None:
        """`done` of `total` steps are through; total None: nobody knows."""
        if self._task is not None:
            self._bar.update(self._task, description=words, completed=done, total=total)
        if not self._console.is_terminal and time.monotonic() - self._last >= LINE_INTERVAL:
            self._last = time.monotonic()
            self._console.print(f"{self._title}: {words}", markup=False, highlight=False)
