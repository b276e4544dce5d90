"""Where a walk is and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import torch

Phase = Literal["forward", "statistics", "prune", "load", "flush"]


@dataclass(frozen=True)
class WalkEvent:
    """Progress: `done` of `total` blocks, matrices of the block, or batches are through; or steps
    that the whole model takes, before or instead of a walk ("whole").

    `block` of `blocks` is the current one; `name` is the block's, the matrix's, for batches that of
    the matrix where they wait, and for the whole model what happens to it.
    """

    kind: Literal["block", "linear", "batch", "whole"]
    block: int
    blocks: int
    name: str
    done: int
    total: int


WalkProgress = Callable[[WalkEvent], None]


@dataclass
class WalkReport:
    """What the walk cost.

    Attributes:
        seconds: by phase; see `PhaseClock`.
        held_bytes: the most that the tensors handed over by waiting batches took in memory.
        spilled_bytes: written to host memory or disk in all.
        passes: forwards of a block per batch, on average.
        tokens: real tokens seen.
    """

    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(get_args(Phase), 0.0))
    held_bytes: int = 0
    spilled_bytes: int = 0
    passes: float = 0.0
    tokens: int = 0


# Moments on a GPU that are kept before the elapsed time between them is read, which waits for it.
MOMENTS = 4096


class PhaseClock:
    """Charges each moment to one phase: an inner phase interrupts the outer one.

    On a GPU the moments are events in its queue, so that a phase is charged what the GPU spent on
    it, whoever waits on the host; `settle` then completes `seconds`.
    """

    def __init__(self, seconds: dict[Phase, float], device: torch.device) -> None:
        self._seconds = seconds
        self._device = device
        self._phase: Phase | None = None
        self._since = time.perf_counter()
        self._moments: list[tuple[Phase | None, torch.cuda.Event]] = []

    @contextmanager
    def charge(self, phase: Phase) -> Iterator[None]:
        outer = self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def settle(self) -> None:
        """Adds what is not yet in `seconds`."""
        if not self._moments:
            return
        self._moments[-1][1].synchronize()
        for (phase, begin), (_, end) in pairwise(self._moments):
            if phase is not None:
                self._seconds[phase] += begin.elapsed_time(end) * 1e-3
        del self._moments[:-1]

    def _switch(self, phase: Phase | None) -> Phase | None:
        outer, self._phase = self._phase, phase
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._moments.append((phase, event))
            if len(self._moments) > MOMENTS:
                self.settle()
            return outer
        now = time.perf_counter()
        if outer is not None:
            self._seconds[outer] += now - self._since
        self._since = now
        return outer
