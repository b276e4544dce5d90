"""Joins allocations, which know numbers, to the matrices of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.allocation import Allocation, AlphaPruning, EcoflapOptions, Owl
from pyprune.allocation.besa import BesaOptions, Learned, Ranked, learn_block
from pyprune.allocation.ecoflap import sparsities_by_importance
from pyprune.calibration.backward import PassOptions
from pyprune.calibration.group import BlockVisit, Group
from pyprune.calibration.importance import gradient_sums
from pyprune.calibration.store import BlockStore
from pyprune.calibration.tokens import Batch, TokenSet, first_sequences
from pyprune.calibration.zeroth import Perturbed, directional_differences
from pyprune.config import PruneConfig
from pyprune.layer_pruner import LayerPruner, check_finite, layer_inputs
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef
from pyprune.patterns import Pattern, Unstructured, pruned_count
from pyprune.progress import CountProgress


class DenseBlocks:
    """Targets of AlphaPruning and OWL, from a look at the dense blocks one by one."""

    def __init__(self, config: PruneConfig) -> None:
        maker = {"alphapruning": AlphaPruning, "owl": Owl}[config.allocation]
        self._allocation: Allocation = maker(config.allocation_strength)
        self._config = config
        self._norms: dict[str, Tensor] = {}
        self.needs_inputs = self._allocation.needs_inputs

    def keep_norms(self, group: Group) -> None:
        """What a walk with column norms hands over, if `needs_inputs`."""
        inputs = layer_inputs(group.statistic, group.linears[0].name)
        if inputs is not None:
            self._norms.update((ref.name, inputs.squared_norms.sqrt()) for ref in group.linears)

    def targets(self, adapter: Adapter, store: BlockStore) -> dict[str, Pattern]:
        """A target for every layer.

        Raises LayerError for weights that are NaN or infinite.
        """
        names, sizes = [], []
        for i in range(len(adapter.blocks)):
            linears = adapter.linears(i)
            if not linears:  # all of its layers are excluded
                continue
            store.load(i)
            weights = [(r.weight().float(), self._norms.get(r.name)) for r in linears]
            for ref, (w, _) in zip(linears, weights, strict=True):
                check_finite(ref.name, w)
            self._allocation.measure(weights)
            names.append([ref.name for ref in linears])
            sizes.append(sum(ref.weight().numel() for ref in linears))
            store.release(i)
        sparsities = self._allocation.sparsities(self._config.target().sparsity, sizes)
        return _targets(self._config, names, sparsities)


def _targets(
    config: PruneConfig, names: Sequence[Sequence[str]], sparsities: Sequence[float]
) -> dict[str, Pattern]:
    return {
        name: Unstructured(sparsity, config.scope)
        for group, sparsity in zip(names, sparsities, strict=True)
        for name in group
    }


def targets_by_loss(
    config: PruneConfig,
    adapter: Adapter,
    tokens: TokenSet,
    device: torch.device,
    progress: CountProgress | None = None,
) -> dict[str, Pattern]:
    """Targets of ECoFLaP, from the dense model, all of it in memory.

    Raises UserError and LayerError: see `directional_differences`, `gradient_sums` and
    `sparsities_by_importance`.
    """
    options = config.own_allocation()
    assert isinstance(options, EcoflapOptions)
    target = config.target().sparsity
    shown = tokens.batches
    if options.samples is not None:
        shown = first_sequences(shown, options.samples)
    groups = [
        Perturbed(name, i, refs)
        for i in range(len(adapter.blocks))
        for name, refs in _groups(adapter, i, options.granularity)
    ]
    score = _zeroth_scores if options.order == "zeroth" else _first_scores
    scores = score(config, options, adapter, groups, shown, device, progress)
    sizes = [sum(ref.weight().numel() for ref in group.linears) for group in groups]
    sparsities = sparsities_by_importance(scores, sizes, target, options.cap(target))
    return _targets(config, [[ref.name for ref in g.linears] for g in groups], sparsities)


def _groups(adapter: Adapter, i: int, granularity: str) -> list[tuple[str, list[LinearRef]]]:
    linears = adapter.linears(i)
    if granularity == "layer":
        return [(ref.name, [ref]) for ref in linears]
    return [(adapter.block_names[i], linears)] if linears else []


def _zeroth_scores(
    config: PruneConfig,
    options: EcoflapOptions,
    adapter: Adapter,
    groups: Sequence[Perturbed],
    batches: Sequence[Batch],
    device: torch.device,
    progress: CountProgress | None,
) -> list[float]:
    slopes = directional_differences(
        adapter,
        groups,
        batches,
        epsilon=options.epsilon,
        noises=options.noises,
        seed=options.seed,
        device=device,
        progress=progress,
    )
    power = {"gradient": 0, "weight-gradient": 1, "squared": 2}[options.score]
    if not power:
        return slopes
    return [
        slope**power * sum(float(ref.weight().double().abs().pow(power).sum()) for ref in g.linears)
        for slope, g in zip(slopes, groups, strict=True)
    ]


def _first_scores(
    config: PruneConfig,
    options: EcoflapOptions,
    adapter: Adapter,
    groups: Sequence[Perturbed],
    batches: Sequence[Batch],
    device: torch.device,
    progress: CountProgress | None,
) -> list[float]:
    sums = gradient_sums(
        adapter,
        batches,
        PassOptions(config.gradient_checkpointing, device),
        power=2 if options.score == "squared" else 1,
        weighted=options.score != "gradient",
        progress=progress,
    )
    return [sum(sums[ref.name] for ref in group.linears) for group in groups]


class BlockLearner:
    """BESA during a walk: `prepare` learns the masks of the block that is about to be pruned and
    gives them to the `pruner`, whose method ranks the weights and changes what is kept.

    A matrix that the method cannot judge there (an expert that saw too few tokens) is left to the
    pruner, at the target sparsity, and the others make up the block's exact count.
    """

    def __init__(self, config: PruneConfig, pruner: LayerPruner) -> None:
        options = config.own_allocation()
        assert isinstance(options, BesaOptions)
        self._options = options
        self._sparsity = config.target().sparsity
        self._pruner = pruner
        self.learned: list[Learned] = []

    def prepare(self, visit: BlockVisit) -> None:
        matrices: list[Ranked] = []
        count = total = 0
        for group in visit.groups:
            inputs = layer_inputs(group.statistic, group.linears[0].name)
            for ref in group.linears:
                total += ref.weight().numel()
                judged = self._pruner.judge(ref, inputs)
                if judged is None:
                    count -= pruned_count(ref.weight().numel(), self._sparsity)
                else:
                    matrices.append(Ranked.of(ref.name, ref.weight(), *judged))
        count += pruned_count(total, self._sparsity)
        if not matrices:
            return
        learned = learn_block(
            visit.name, matrices, visit.run, visit.tokens, count, self._options, visit.tell
        )
        self.learned.append(learned)
        for name, mask in learned.masks.items():
            self._pruner.choose(name, mask)

    def notes(self) -> tuple[str, ...]:
        """For the report."""
        ratios = [found.ratio for found in self.learned]
        if not ratios:
            return ()
        kept = sum(found.learned >= found.uniform for found in self.learned)
        return (
            "besa: squared error of the blocks' outputs on the calibration text over that of "
            f"uniform sparsity: {sum(ratios) / len(ratios):.3f} on average, "
            f"{min(ratios):.3f} to {max(ratios):.3f}; {kept} of {len(ratios)} stay uniform",
        )
