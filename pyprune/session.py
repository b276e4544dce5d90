"""One run over one model: what is looked at whole, then the walk that prunes block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune.allocate import BlockLearner, DenseBlocks, targets_by_loss
from pyprune.allocation import ALLOCATIONS
from pyprune.calibration.backward import PassOptions
from pyprune.calibration.gradient_stats import GradientStatistic
from pyprune.calibration.gradients import collect_gradients
from pyprune.calibration.progress import WalkProgress
from pyprune.calibration.stats import GramStatistic, NormStatistic, Statistic
from pyprune.calibration.tokens import TokenSet
from pyprune.calibration.walk import BlockStore, BlockVisit, Group, WalkEvent, walk
from pyprune.config import PruneConfig
from pyprune.layer_pruner import LayerPruner
from pyprune.measure import Measure
from pyprune.methods.base import StatisticKind
from pyprune.models.adapter import Adapter
from pyprune.patterns import Pattern
from pyprune.progress import CountProgress
from pyprune.report import LayerReport

STATISTICS: dict[StatisticKind | None, Callable[[int, torch.device], Statistic] | None] = {
    None: None,
    "norms": NormStatistic,
    "gram": GramStatistic,
}


def needs_of(config: PruneConfig) -> StatisticKind | None:
    return config.find_method().needs(config.options())


@dataclass(frozen=True)
class Look:
    """What was taken from the dense model, whole, before the walk: statistics of gradients by
    layer, and targets by layer that the loss decided."""

    gradients: Mapping[str, GradientStatistic] = field(default_factory=dict)
    targets: Mapping[str, Pattern] = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    layers: Sequence[LayerReport]
    notes: tuple[str, ...]


def _by_loss(config: PruneConfig) -> bool:
    return ALLOCATIONS[config.allocation].source == "model"


def looks_at_whole(config: PruneConfig) -> bool:
    """Whether the whole model has to be in memory before the walk."""
    return config.find_method().gradient is not None or _by_loss(config)


def look_at_whole(
    config: PruneConfig,
    adapter: Adapter,
    tokens: TokenSet | None,
    device: torch.device,
    measure: Measure,
    progress: WalkProgress | None,
) -> Look:
    """What the method's backward pass over the dense model accumulates, and what an allocation
    finds in the losses, where they are needed."""
    factory = config.find_method().gradient
    if not looks_at_whole(config) or tokens is None:
        return Look()
    blocks = len(adapter.blocks)

    def telling(name: str) -> CountProgress:
        def told(done: int, total: int) -> None:
            if progress is not None:
                progress(WalkEvent("whole", 0, blocks, name, done, total))

        return told

    targets: Mapping[str, Pattern] = {}
    gradients: Mapping[str, GradientStatistic] = {}
    if _by_loss(config):
        with measure.phase("allocation"):
            targets = targets_by_loss(config, adapter, tokens, device, telling("allocation"))
    if factory is not None:
        with measure.phase("gradients"):
            gradients = collect_gradients(
                adapter,
                tokens,
                factory(config.options()),
                PassOptions(config.gradient_checkpointing, device),
                telling("gradients"),
            )
    return Look(gradients, targets)


@dataclass(frozen=True)
class Session:
    """A run over one model, whose blocks come from `store`."""

    config: PruneConfig
    adapter: Adapter
    tokens: TokenSet | None
    store: BlockStore
    device: torch.device
    measure: Measure
    progress: WalkProgress | None
    look: Look
    masks: Mapping[str, Tensor]

    def run(self) -> Pruned:
        """Prunes every block; for a global scope, and for an allocation, after passes that only
        look."""
        config = self.config
        pruner = LayerPruner(config, self.look.gradients, self.masks, self._targets())
        if pruner.selection is not None:
            self._walk(pruner.count_group, _LookOnly(self.store), needs_of(config))
            with self.measure.phase("selection"):
                self._refine(pruner)
        if ALLOCATIONS[config.allocation].source != "blocks":
            self._walk(pruner.prune_group, self.store, needs_of(config))
            return Pruned(pruner.reports, pruner.notes())
        learner = BlockLearner(config, pruner)
        needs = needs_of(config) or "norms"
        self._walk(pruner.prune_group, self.store, needs, learner.prepare)
        return Pruned(pruner.reports, (*learner.notes(), *pruner.notes()))

    def _targets(self) -> dict[str, Pattern]:
        """Of the layers that an allocation gives a target of their own before the walk."""
        if ALLOCATIONS[self.config.allocation].source not in ("weights", "norms"):
            return dict(self.look.targets)
        blocks = DenseBlocks(self.config)
        if blocks.needs_inputs:
            self._walk(blocks.keep_norms, _LookOnly(self.store), "norms")
        with self.measure.phase("allocation"):
            return blocks.targets(self.adapter, self.store)

    def _refine(self, pruner: LayerPruner) -> None:
        for i in range(len(self.adapter.blocks)):
            self.store.load(i)
            for ref in self.adapter.linears(i):
                pruner.refine(ref)
            self.store.release(i)

    def _walk(
        self,
        visit: Callable[[Group], None],
        store: BlockStore,
        needs: StatisticKind | None,
        prepare: Callable[[BlockVisit], None] | None = None,
    ) -> None:
        walked = walk(
            self.adapter,
            [] if self.tokens is None else self.tokens.batches,
            statistic=STATISTICS[needs],
            prune_group=visit,
            store=store,
            mode=self.config.walk,
            device=self.device,
            spill=self.config.spill,
            progress=self.progress,
            prepare_block=prepare,
        )
        for phase, seconds in walked.seconds.items():
            self.measure.add(phase, seconds)


class _LookOnly:
    """A store whose blocks stay as they are."""

    def __init__(self, store: BlockStore) -> None:
        self.load_rest = store.load_rest
        self.load = store.load
        self.flush = self.release = store.release
