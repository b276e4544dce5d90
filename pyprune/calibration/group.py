"""What the walk hands over: matrices to be pruned, and the block that they are part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pyprune.calibration.stats import Statistic
from pyprune.models.linears import LinearRef
from pyprune.progress import CountProgress


@dataclass(eq=False)
class Group:
    """Matrices to be pruned together.

    Attributes:
        linears: those that read the same tensor, or one expert.
        statistic: of that tensor; None if the walk collects none. `tokens` is 0 for an expert that
            no token was routed to.
        block: index of their block.
        seconds: spent on the statistic (an expert's share is equal).
        peers: of an expert, the groups of all experts in turn, itself included: their statistics
            are complete by then, so that several can be solved at once.
    """

    linears: list[LinearRef]
    statistic: Statistic | None
    block: int
    seconds: float = 0.0
    peers: list[Group] = field(default_factory=list, repr=False)


@dataclass(frozen=True, eq=False)
class BlockVisit:
    """A block that is about to be pruned, while every batch waits at its entry.

    Attributes:
        name: of the block.
        groups: its matrices, with the statistics of their inputs in the block as it is, dense.
        tokens: real tokens of each batch.
        run: `run(k, weights)` is the block's output on batch `k` for its real tokens, `[t, d]`,
            with the matrices `[R, C]` in `weights`, by `LinearRef.name`, in the place of its own
            (None: all its own). Gradients flow to `weights` where they are enabled.
        tell: reports progress, what is done and in all.
    """

    name: str
    groups: Sequence[Group]
    tokens: Sequence[int]
    run: Callable[[int, Mapping[str, Tensor] | None], Tensor]
    tell: CountProgress
