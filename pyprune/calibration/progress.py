"""Where a walk is and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

Phase = Literal["forward", "statistics", "prune", "load", "flush"]


@dataclass(frozen=True)
class WalkEvent:
    """Progress: `done` of `total` blocks, matrices of the block, or batches are through.

    `block` of `blocks` is the current one; `name` is the block's, the matrix's, or for batches that
    of the matrix where they wait.
    """

    kind: Literal["block", "linear", "batch"]
    block: int
    blocks: int
    name: str
    done: int
    total: int


@dataclass
class WalkReport:
    """What the walk cost.

    Attributes:
        seconds: by phase, on the host's clock (work queued on a GPU is charged to whoever waits).
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


class PhaseClock:
    """Charges each moment to one phase: an inner phase interrupts the outer one."""

    def __init__(self, seconds: dict[Phase, float]) -> None:
        self._seconds = seconds
        self._phase: Phase | None = None
        self._since = 0.0

    @contextmanager
    def charge(self, phase: Phase) -> Iterator[None]:
        outer = self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, phase: Phase | None) -> Phase | None:
        now = time.perf_counter()
        if self._phase is not None:
            self._seconds[self._phase] += now - self._since
        outer, self._phase, self._since = self._phase, phase, now
        return outer
