"""LLM Surgeon (van der Ouderaa et al. 2024, arXiv 2312.17244) for what a stock model can be rid of:
channels and KV groups.

A unit hands its activations to the residual stream through columns of one matrix, its writer. To
remove it is to remove these columns, so its cost is theirs, and the writer's other columns take
over what they can: exactly the paper's update for columns. What else the unit owns then does
nothing and goes for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from pyprune.calibration.backward import PassOptions
from pyprune.calibration.factors import collect_factors
from pyprune.calibration.gradient_stats import KroneckerFactors
from pyprune.errors import LayerError, UserError
from pyprune.layer_pruner import minimum_tokens
from pyprune.methods.kronecker import Curvature
from pyprune.methods.options import Count, Natural, Positive, within
from pyprune.ops.obs_factor import NotPositiveDefiniteError
from pyprune.patterns import Unstructured
from pyprune.surgeon.matrix import Matrix
from pyprune.surgeon.state import Record, ShotsDone, State
from pyprune.surgeon.store import GIB, FactorStore, grouped
from pyprune.width.apply import remove
from pyprune.width.decision import WidthDecision
from pyprune.width.registry import WidthTask, width_method
from pyprune.width.select import (
    UnitOptions,
    best,
    check_reachable,
    globally,
    prunable,
    uniform_sizes,
)
from pyprune.width.structure import Group, Widths

# Score of units that went in an earlier shot: below all costs.
GONE = -1.0


@dataclass(frozen=True)
class SurgeonWidthOptions(UnitOptions):
    """structure: uniform (equally many units per layer, so that the stock model is smaller by all
    that is removed) or adaptive (one threshold for the cost per parameter of all units; a stock
    model is cut to its widest layer only).
    shots: the curvature is taken anew before each; shot t of T goes to t / T of the ratio.
    update: of the writers: joint, the optimum, or none. damping, gradient_damping: fractions of the
    mean diagonal added to the factors of the inputs and of the gradients.
    factor_memory, fisher_samples: as in llm-surgeon. And those of `UnitOptions`.
    """

    structure: Literal["uniform", "adaptive"] = "uniform"
    shots: Count = 5
    update: Literal["joint", "none"] = "joint"
    damping: Annotated[float, within(0, 1)] = 0.01
    gradient_damping: Annotated[float, within(0, 1)] = 0.01
    factor_memory: Positive = 8.0
    fisher_samples: Natural = 0


@width_method(
    "llm-surgeon-width",
    title="LLM Surgeon: channels and heads by Kronecker-factored Fisher information, in shots",
    paper="arXiv 2312.17244",
    options=SurgeonWidthOptions,
    removes="channels and heads",
    in_shots=True,
)
@torch.no_grad()
def surgeon_width(task: WidthTask) -> WidthDecision:
    """Removed units stay as zeros between the shots and are cut at the end."""
    options: SurgeonWidthOptions = task.config.own_options()
    widths = Widths.of(task.model)
    groups = prunable(widths, options.units)
    # Not after the shots that are within reach.
    check_reachable(widths, groups, task.target)
    if options.structure == "uniform":
        uniform_sizes(widths, groups, task.target, options.multiple)
    saved = None
    if task.state is not None:
        saved = State(task.state, task.model, task.config, task.tokens)
    run = _Shots(task, widths, groups, options)
    if saved is not None:
        done = saved.load(run.tensors())
        run.done = done if done.shots else run.done
    for shot in range(run.done.shots + 1, options.shots + 1):
        run.shot(shot, math.ceil(task.target * shot / options.shots))
        if saved is not None:
            saved.save(run.done, run.tensors())
    losses = {name: record.loss for name, record in run.done.records.items() if record.loss}
    return remove(
        task,
        widths,
        run.kept(),
        notes=[f"{name}: {r.kept}" for name, r in run.done.records.items() if r.kept],
        transforms=[{"columns of writers corrected": losses}] if losses else [],
        scores=run.first,
        objective="cost, nats per token",
    )


class _Shots:
    """done: shots, and of each group's writer the rise of the loss that the curvature predicts, or
    why it cannot be judged (`Record.kept`). gone: `[units]` bool, of each group. first: `[units]`,
    scores in the first shot."""

    def __init__(
        self,
        task: WidthTask,
        widths: Widths,
        groups: Sequence[Group],
        options: SurgeonWidthOptions,
    ) -> None:
        self.task, self.widths, self.groups, self.options = task, widths, groups, options
        self.device = next(widths.model.parameters()).device
        self.done = ShotsDone(records={group.name: Record() for group in groups})
        self.gone: dict[str, Tensor] = {
            group.name: torch.zeros(group.units, dtype=torch.bool) for group in groups
        }
        self.first: dict[str, Tensor] = {
            group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups
        }

    def kept(self) -> dict[str, Tensor]:
        """The units that stay: none that ever went, though the last shot may need fewer channels
        gone than one before it that took fewer heads."""
        return {name: (~gone).nonzero()[:, 0] for name, gone in self.gone.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that shots change."""
        names = {id(p): name for name, p in self.widths.model.named_parameters()}
        found = {f"gone.{name}": gone for name, gone in self.gone.items()}
        found |= {f"first.{name}": scores for name, scores in self.first.items()}
        for group in self.groups:
            found |= Matrix(group.writer).parameters()
            for part in group.slices:
                parameter: Tensor = getattr(part.module, part.parameter)
                found[names[id(parameter)]] = parameter.detach()
        return found

    def shot(self, number: int, target: int) -> None:
        """Removes units until `target` parameters are gone in all."""
        matrices = [[Matrix(group.writer)] for group in self.groups]
        parts = grouped(matrices, self.options.factor_memory * GIB)
        by_name = {group.name: group for group in self.groups}
        scores: dict[str, Tensor] = {}
        with FactorStore(len(parts) > 1, self.device) as store:
            for index, part in enumerate(parts):
                factors = self._collect(part, number, index, len(parts))
                for matrix in part:
                    group = by_name[matrix.name]
                    scores[group.name] = self._scores(group, matrix, factors[matrix.name], number)
                store.put_factors(factors)
                del factors
            if number == 1:
                self.first = scores
            kept = self._choose(scores, target)
            for group, units in self.widths.removed(kept):
                if group.name in by_name:
                    factors_of = store.take_factors(group.name)
                    self._remove(group, units, factors_of)
        self.widths.mask(kept)
        self.done.shots = number

    def _collect(
        self, part: list[Matrix], number: int, index: int, parts: int
    ) -> dict[str, KroneckerFactors]:
        say = self.task.progress

        def told(done: int, total: int) -> None:
            if say is not None:
                words = f"factors of shot {number}/{self.options.shots}"
                say(words, index * total + done, parts * total)

        return collect_factors(
            self.widths.adapter,
            self.task.tokens,
            [matrix.ref for matrix in part],
            PassOptions(
                device=self.device,
                fisher_samples=self.options.fisher_samples,
                seed=self.task.config.calibration.seed + number,
            ),
            biases={matrix.name for matrix in part if matrix.biased},
            progress=told,
        )

    def _curvature(self, w: Tensor, matrix: Matrix, factors: KroneckerFactors) -> Curvature:
        a, g = factors.normalised()
        there = Curvature.of(
            w,
            a,
            g,
            a_damping=self.options.damping,
            g_damping=self.options.gradient_damping,
            bias=factors.bias,
        )
        try:
            return there.settled()
        except NotPositiveDefiniteError as error:
            raise LayerError(matrix.name, str(error)) from error

    def _scores(
        self, group: Group, matrix: Matrix, factors: KroneckerFactors, number: int
    ) -> Tensor:
        """`[units]`: their costs; larger = stays."""
        w = matrix.read(self.device)
        why = self._why_unknown(group, factors, number)
        self.done.records[group.name].kept = why
        if why:
            scores = group.per_unit(w[:, : group.columns.numel()].square().sum(0)).sum(1)
            if self.options.structure == "adaptive":
                scores = torch.full_like(scores, math.inf)
        else:
            columns = group.columns.to(self.device)
            scores = self._curvature(w, matrix, factors).unit_costs(w, columns)
        return torch.where(self.gone[group.name], GONE, scores.double().cpu())

    def _why_unknown(self, group: Group, factors: KroneckerFactors, number: int) -> str:
        if self.done.records[group.name].kept:
            return self.done.records[group.name].kept
        needed = 1.0
        if group.writer.index is not None:
            needed = minimum_tokens(group.columns.numel(), Unstructured(0.0))
        judged = "judged by its weights alone and not corrected"
        if self.options.structure == "adaptive":  # weights are not to be compared with costs
            judged = "kept as it was"
        if factors.tokens < needed:
            return f"too few tokens, {judged}"
        silent = factors.silent() if number == 1 else ""
        return silent and f"no {silent} but zero, {judged}"

    def _choose(self, scores: Mapping[str, Tensor], target: int) -> dict[str, Tensor]:
        if self.options.structure == "uniform":
            sizes = uniform_sizes(self.widths, self.groups, target, self.options.multiple)
            return best(scores, sizes)
        known = [group for group in self.groups if not self.done.records[group.name].kept]
        if not known:
            raise UserError(
                "method_options: llm-surgeon-width structure: expected uniform where no module can "
                "be judged (more calibration text?), got adaptive"
            )
        gone = self.widths.removed_parameters(
            {name: units for name, units in self.kept().items() if self.done.records[name].kept}
        )
        per_parameter = {g.name: scores[g.name] / g.unit_parameters for g in known}
        return globally(self.widths, known, per_parameter, target - gone)

    def _remove(self, group: Group, units: Tensor, factors: KroneckerFactors) -> None:
        """Corrects the writer for the columns of `units`, in place."""
        self.gone[group.name][units] = True
        record = self.done.records[group.name]
        if not len(units) or record.kept or self.options.update == "none":
            return
        matrix = Matrix(group.writer)
        w = matrix.read(self.device)
        there = self._curvature(w, matrix, factors)
        columns = group.columns[units].flatten().to(self.device)
        new = there.without_structures(w, columns[:0], columns)
        record.loss += there.loss(new - w)
        matrix.write(new)
