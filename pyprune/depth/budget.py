"""How much has to go, and whether it has."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from pyprune.calibration.tokens import Batch
from pyprune.depth.config import StructureConfig
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.registry import DEPTH_METHODS
from pyprune.errors import UserError
from pyprune.models.stock import parameter_count

Unit = tuple[Branch, ...]
BudgetKind = Literal["count", "params", "latency"]
REPEATS = 5  # timed runs of each branch; the median counts


@dataclass(frozen=True)
class Budget:
    """A target for removals.

    target: share of `total` (parameters or seconds), or a number of units. seconds: of each branch,
    where latency is the measure. branches: in a unit that counts as one.
    """

    graph: ResidualGraph
    kind: BudgetKind
    target: float
    total: float
    seconds: dict[Branch, float]
    branches: int = 1

    @classmethod
    def of(
        cls, graph: ResidualGraph, config: StructureConfig, units: Sequence[Unit], batch: Batch
    ) -> Budget:
        """What `config` asks for. units: all that the method could remove; of those that overlap
        the first ones count. batch: timed, when latency is the measure.

        Raises:
            UserError: more is asked for than can go while one branch stays.
        """
        seconds: dict[Branch, float] = {}
        units = _disjoint(units)
        kind: BudgetKind
        if config.count is not None:
            kind, target, total = "count", float(config.count), float(len(units))
        elif config.by == "count":
            total = float(len(units))
            kind, target = "count", max(1.0, math.floor(total * config.ratio + 0.5))  # type: ignore[operator]
        elif config.by == "latency":
            seconds, total = branch_seconds(graph, batch)
            kind, target = "latency", float(config.ratio or 0)
        else:
            total = float(parameter_count(graph.model))
            kind, target = "params", float(config.ratio or 0)
        of_layers = DEPTH_METHODS.find(config.method).unit == "layer"
        budget = cls(graph, kind, target, total, seconds, 2 if of_layers else 1)
        budget._check(units, "layers" if of_layers else "branches")
        return budget

    def spent(self, removed: Collection[Branch]) -> float:
        """What the removal of these branches saves: a share, or a number of units."""
        return self.saved(removed) / self._whole

    def cost(self, unit: Unit, removed: Collection[Branch]) -> float:
        """What `unit` would save after `removed`, in the budget's own unit: parameters, seconds, or
        units. No more than is still needed: beyond the target nothing is gained."""
        return min(self._saving(unit, removed), self.needed(removed))

    def cuts(self, units: Sequence[Unit], removed: Collection[Branch]) -> bool:
        """Whether any of `units` would save more than is needed after `removed`."""
        needed = self.needed(removed)
        return any(self._saving(unit, removed) > needed for unit in units)

    def _saving(self, unit: Unit, removed: Collection[Branch]) -> float:
        return self.saved({*removed, *unit}) - self.saved(removed)

    def needed(self, removed: Collection[Branch]) -> float:
        """What is missing after `removed`, in the budget's own unit."""
        return max(0.0, self.target * self._whole - self.saved(removed))

    @property
    def _whole(self) -> float:
        """What the target is a share of; 1 where it is a number of units."""
        return 1.0 if self.kind == "count" else self.total

    def saved(self, branches: Collection[Branch]) -> float:
        """What the removal of `branches` saves, in the budget's own unit."""
        if self.kind == "count":
            return len(branches) / self.branches
        if self.kind == "latency":
            return math.fsum(self.seconds[branch] for branch in branches)
        return float(self.graph.removed_parameters(branches))

    def reached(self, removed: Collection[Branch]) -> bool:
        return self.needed(removed) <= 0

    def _check(self, units: Sequence[Unit], what: str) -> None:
        everything = sum(map(len, units)) == len(self.graph.branches)
        most = branches_of(units[1:] if everything else units)
        if not most or not self.reached(most):
            words = {"count": what, "params": "of the parameters", "latency": "of the latency"}
            can = self.spent(most) if most else 0.0
            shown = f"{can:.0f}" if self.kind == "count" else f"{can:.3f}"
            there = len(self.graph.branches) // self.branches
            why = f"{len(units)} of {there} {what} may go"
            if everything:
                why = f"of {len(units)} {what}, and one branch has to stay"
            raise UserError(
                f"expected to remove at most {shown} {words[self.kind]} ({why}), "
                f"got {self.target:g}"
            )


def branches_of(units: Iterable[Unit]) -> set[Branch]:
    return {branch for unit in units for branch in unit}


def _disjoint(units: Sequence[Unit]) -> list[Unit]:
    """Without those that share a branch with an earlier one."""
    found: list[Unit] = []
    taken: set[Branch] = set()
    for unit in units:
        if not taken & set(unit):
            found.append(unit)
            taken |= set(unit)
    return found


def units_of(branches: Collection[Branch], *, layers: bool) -> list[Unit]:
    """Branches one by one, or pairs that make up a layer, in order."""
    if not layers:
        return [(branch,) for branch in branches]
    return [(Branch("attention", i), Branch("mlp", i)) for i in sorted({b.layer for b in branches})]


@torch.no_grad()
def branch_seconds(graph: ResidualGraph, batch: Batch) -> tuple[dict[Branch, float], float]:
    """Median seconds of each branch on `batch`, and of the whole model (its head included)."""
    batch = batch.to(graph.device)
    state, context = graph.start(batch)
    seconds: dict[Branch, float] = {}
    for branch in graph.branches:
        times = []
        for _ in range(REPEATS):
            started = _now(graph.device)
            after = graph.run(branch, state, context)
            times.append(_now(graph.device) - started)
        seconds[branch] = median(times)
        state = after
    times = []
    for _ in range(REPEATS):
        started = _now(graph.device)
        graph.logits(graph.finish(state.total, batch), batch.input_ids)
        times.append(_now(graph.device) - started)
    return seconds, sum(seconds.values()) + median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
