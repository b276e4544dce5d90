"""What can be done for a model whose branches or layers are about to go, without changing its
architecture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pyprune.calibration.tokens import Batch
from pyprune.depth.compensate import compensate, size_factors
from pyprune.depth.given import Given
from pyprune.depth.graph import Branch, ResidualGraph, gaps
from pyprune.depth.refit import refit
from pyprune.depth.writers import norm_after, writers
from pyprune.methods.options import POSITIVE, OptionError


@dataclass(frozen=True)
class AddOns:
    """compensate: make up for the size that a gap leaves missing (Prune&Comp). refit: fit the
    branch before a gap to the stream after it by least squares (ReplaceMe). With both, gaps are
    refitted, and compensation is left to one that has no branch before it. ridge: of the refit,
    towards no change, times the mean squared output; none: chosen by the loss of held-out text."""

    compensate: bool = False
    refit: bool = False
    ridge: Annotated[float | None, POSITIVE] = None

    def __post_init__(self) -> None:
        if self.ridge is not None and not self.refit:
            raise OptionError(f"ridge: expected none without refit, got {self.ridge:g}")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.compensate or self.refit


@dataclass(frozen=True)
class OneAddOn(AddOns):
    """`AddOns` of a method that leaves a layer before every gap, so that with both nothing would be
    left to compensation: UserError."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compensate and self.refit:
            raise OptionError(
                "compensate, refit: expected one of them, got both; a layer stands before every "
                "gap, and once it is refitted nothing is left to compensate"
            )


def check_add_ons(graph: ResidualGraph, options: AddOns) -> None:
    """Raises UserError where the model's branches cannot have what `options` ask for: before a
    search, which may take hours, not after it."""
    for branch in graph.branches if options.wanted else ():
        if options.refit or norm_after(graph, branch) is None:
            writers(graph, branch)


def apply_add_ons(
    graph: ResidualGraph,
    removed: Collection[Branch],
    batches: Sequence[Batch],
    options: AddOns,
    given: Given | None = None,
) -> tuple[dict[str, Any], ...]:
    """What `options` ask for, in place, before `removed` go; what was done.

    given: what the method has changed in the weights that stay, with their values from before.
    Everything is then measured against that model, see `size_factors` and `refit`.
    """
    given = Given() if given is None else given
    found = gaps(removed, len(graph.layouts)) if options.compensate else []
    if options.refit:
        found = [gap for gap in found if gap[0] == 0]
    factors = size_factors(graph, removed, found, batches, given) if found else {}
    done: list[dict[str, Any]] = []
    if factors:
        done.append({"kind": "compensate", "factors": list(factors.values())})
    if options.refit:
        fits = refit(graph, removed, batches, options.ridge, given, factors)
        done += [{"kind": "refit", **fit} for fit in fits]
    if factors:
        compensate(graph, removed, batches, factors)
    return tuple(done)
