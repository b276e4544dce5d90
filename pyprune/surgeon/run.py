"""LLM Surgeon over a whole model (van der Ouderaa et al. 2024, arXiv 2312.17244).

A shot takes the Kronecker factors of every matrix by a backward pass over the calibration text,
finds one threshold for the costs of all of them, and corrects what is kept. Nothing is written
before all factors are known: the curvature is that of one model. The model is in memory as a whole,
with the activations of one sequence; factors beyond `factor_memory` wait on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyprune.calibration.autograd import on_device
from pyprune.calibration.backward import PassOptions
from pyprune.calibration.factors import collect_factors
from pyprune.calibration.gradient_stats import KroneckerFactors
from pyprune.calibration.progress import WalkProgress
from pyprune.calibration.tokens import TokenSet
from pyprune.calibration.walk import WalkEvent
from pyprune.config import PruneConfig
from pyprune.errors import LayerError, UserError
from pyprune.layer_pruner import minimum_tokens
from pyprune.measure import Measure
from pyprune.methods.base import LayerInputs
from pyprune.methods.kronecker import Curvature
from pyprune.methods.structure_budget import select_structures
from pyprune.methods.surgeon import METHOD, SurgeonOptions, curvature
from pyprune.models.adapter import Adapter
from pyprune.ops.obs_factor import NotPositiveDefiniteError
from pyprune.patterns import NM, pruned_count
from pyprune.report import LayerReport
from pyprune.surgeon.matrix import Matrix
from pyprune.surgeon.select import Weights
from pyprune.surgeon.state import Record, ShotsDone, State
from pyprune.surgeon.store import GIB, FactorStore, grouped

# Cost of rows and columns that were removed before: below all others.
GONE = -1.0
# Share of the weights by which less may be gone than was asked for before the report says why:
# whole rows and columns do not add up to every number.
SHORT = 0.01
STORED_AS_ZEROS = (
    "rows and columns that are gone are stored as zeros in matrices of the old shape: nothing is "
    "smaller or faster by itself (llm-surgeon-width cuts channels and heads out)"
)


@dataclass(frozen=True)
class _Judged:
    """What a matrix's factors say about its parts; dampings of A and G that did.

    row, column: `[R]` and `[C]`, scales of its weights or costs of its rows and columns.
    """

    row: Tensor
    column: Tensor
    damping: tuple[float, float]


@dataclass(frozen=True)
class _Plan:
    """What of a matrix goes: weights (`mask [R, C]`, True = kept), or rows and columns (indices).
    None of it for a matrix that keeps what it has."""

    mask: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None


class Surgeon:
    """One run over the model behind `adapter`, in place.

    state: where the run is saved after every shot, and taken up again. After an error within a shot
    the model may be half changed; the state is that of the shot before.
    """

    def __init__(
        self,
        config: PruneConfig,
        adapter: Adapter,
        tokens: TokenSet,
        *,
        device: torch.device,
        measure: Measure,
        progress: WalkProgress | None = None,
        state: State | None = None,
    ) -> None:
        self.config, self.adapter, self.tokens = config, adapter, tokens
        self.device, self.measure, self.told, self.state = device, measure, progress, state
        self.options = config.options()
        self.own = self.options.own_as(SurgeonOptions)
        self.target = config.target()
        self.groups_of = self.own.groups(self.target)
        self.matrices = Matrix.all(adapter)
        self.done = ShotsDone(records={matrix.name: Record() for matrix in self.matrices})
        self._check()

    def _check(self) -> None:
        if self.config.preserve_zeros and self.own.of_structures:
            raise UserError(
                "preserve_zeros: expected structure element or 2:4, rows and columns are "
                f"corrected as a whole, got {self.own.structure}"
            )
        if self.groups_of is not None:
            for matrix in self.matrices:
                if matrix.shape[1] % self.groups_of.m:
                    raise LayerError(
                        matrix.name,
                        f"expected a number of inputs that {self.groups_of.m} divides for "
                        f"{self.groups_of}, got {matrix.shape[1]} "
                        f"(leave it out with --exclude {matrix.name!r})",
                    )
        if self.own.corrections:
            from pyprune.trainable import require_peft

            require_peft()
            if len(self.tokens.batches) < 2:
                raise UserError(
                    "method_options: llm-surgeon corrections: expected two batches of text or "
                    "more, one of them to be held out, got 1 (lower --batch-size)"
                )
            if all(matrix.ref.index is not None for matrix in self.matrices):
                raise UserError(
                    "method_options: llm-surgeon corrections: expected a matrix that is not one of "
                    "fused experts, which are not trained, got none"
                )

    def run(self) -> list[LayerReport]:
        """All shots that are not done yet; the reports, in the order of the blocks."""
        if self.state is not None:
            done = self.state.load(self.parameters())
            self.done = done if done.shots else self.done
        for shot in range(self.done.shots + 1, self.own.shots + 1):
            self._shot(shot)
            if self.own.corrections:
                self._correct(shot)
            self.done.shots = shot
            if self.state is not None:
                with self.measure.phase("state"):
                    self.state.save(self.done, self.parameters())
        return [self._report(matrix) for matrix in self.matrices]

    def parameters(self) -> dict[str, Tensor]:
        """All that may change, by the model's names, as it is now (a pass may move the model)."""
        found: dict[str, Tensor] = {}
        for matrix in self.matrices:
            found |= matrix.parameters()
        return found

    def notes(self) -> tuple[str, ...]:
        """What the user should know of the run as a whole."""
        notes = list(self.done.notes)
        if self.own.of_structures:
            notes.append(STORED_AS_ZEROS)
        zeros = {matrix.name: matrix.zeros() for matrix in self.matrices}
        sizes = {matrix.name: matrix.ref.weight().numel() for matrix in self.matrices}
        empty = [name for name, count in zeros.items() if count == sizes[name]]
        if empty:
            notes.append(
                f"{len(empty)} of {len(zeros)} matrices have no weight left, the first is "
                f"{empty[0]} (-O cap=0.9 would leave something of every one)"
            )
        gone = sum(zeros.values()) / sum(sizes.values())
        if gone < self.target.sparsity - SHORT:
            notes.append(
                f"{gone:.1%} of the weights are zero, {self.target.sparsity:.1%} were asked for: "
                "the cap or matrices that are kept as they were leave no more"
            )
        return tuple(notes)

    # One shot.

    def _shot(self, shot: int) -> None:
        sparsity = self.target.sparsity * shot / self.own.shots
        refined = self.own.kronecker == "nearest"
        blocks = self._blocks()
        groups = grouped(blocks, self.own.factor_memory * GIB, copies=2 if refined else 1)
        judged: dict[str, _Judged] = {}
        with FactorStore(len(groups) > 1, self.device) as store:
            for number, group in enumerate(groups):
                factors = self._collect(group, shot, number, len(groups))
                with self.measure.phase("costs"):
                    for matrix in group:
                        found = self._judge(matrix, factors[matrix.name], shot)
                        if found is not None:
                            judged[matrix.name] = found
                with self.measure.phase("factors"):
                    store.put_factors(factors)
                del factors
            with self.measure.phase("threshold"):
                plans = self._choose(judged, sparsity)
            with self.measure.phase("update"):
                for matrix in self.matrices:
                    factors_of = store.take_factors(matrix.name)
                    if matrix.name in plans:
                        self._cut(matrix, factors_of, judged[matrix.name], plans[matrix.name])

    def _blocks(self) -> list[list[Matrix]]:
        by_name = {matrix.name: matrix for matrix in self.matrices}
        blocks = range(len(self.adapter.blocks))
        return [[by_name[ref.name] for ref in self.adapter.linears(i)] for i in blocks]

    def _collect(
        self, group: list[Matrix], shot: int, part: int, parts: int
    ) -> dict[str, KroneckerFactors]:
        told = self.told
        name = f"factors of shot {shot}/{self.own.shots}"

        def tell(done: int, total: int) -> None:
            if told is not None:
                blocks, through = len(self.adapter.blocks), part * total + done
                told(WalkEvent("whole", 0, blocks, name, through, parts * total))

        with self.measure.phase("factors"):
            return collect_factors(
                self.adapter,
                self.tokens,
                [matrix.ref for matrix in group],
                PassOptions(
                    checkpointing=self.config.gradient_checkpointing,
                    device=self.device,
                    fisher_samples=self.own.fisher_samples,
                    seed=self.config.calibration.seed + shot,
                ),
                biases={matrix.name for matrix in group if matrix.biased},
                refinements=self.own.refinements if self.own.kronecker == "nearest" else 0,
                progress=tell,
            )

    def _judge(self, matrix: Matrix, factors: KroneckerFactors, shot: int) -> _Judged | None:
        """None, and a reason in its record, for a matrix that keeps what it has."""
        record = self.done.records[matrix.name]
        record.tokens = factors.tokens
        record.dead_inputs = int((factors.a.diagonal() == 0).sum())
        record.kept = record.kept or self._unknown(matrix, factors, shot)
        if record.kept:
            return None
        w = matrix.read(self.device)
        with _naming(matrix):
            there = curvature(w, factors, self.options).settled()
            if self.own.of_structures:
                row, column = there.structure_costs(w)
                # What is gone goes again, before what is dead and costs as little.
                row[~(w != 0).any(1)], column[~(w != 0).any(0)] = GONE, GONE
            else:
                row, column = there.element_scales()
            record.damping, record.gradient_damping = there.used
            return _Judged(row, column[: matrix.shape[1]], there.used)

    def _unknown(self, matrix: Matrix, factors: KroneckerFactors, shot: int) -> str:
        """Why the matrix cannot be judged, if it cannot: no input or no gradient but zero in the
        dense model, so that all of it would go for nothing, and another text may need it.

        One that dies in a later shot does so because what it reads, or what reads it, is gone: it
        goes for nothing.
        """
        needed = 1.0
        if matrix.ref.index is not None:
            needed = minimum_tokens(matrix.shape[1], self.groups_of or self.target)
        if factors.tokens < needed:
            return (
                f"saw {factors.tokens} of the {needed:.0f} tokens that {self.config.method} "
                "needs: kept as it was"
            )
        silent = factors.silent() if shot == 1 else ""
        return silent and f"{self.config.method} found no {silent} but zero: kept as it was"

    # The choice.

    def _choose(self, judged: Mapping[str, _Judged], sparsity: float) -> dict[str, _Plan]:
        if self.own.of_structures:
            return self._choose_structures(judged, sparsity)
        if not judged:
            return {}
        weights = Weights(self.config.preserve_zeros)
        for matrix in self.matrices:
            if matrix.name in judged:
                found = judged[matrix.name]
                weights.add(matrix.ref.weight(), found.row, found.column)
        cap, elements = self.own.cap, sum(m.ref.weight().numel() for m in self.matrices)
        # Matrices that are kept count, with the zeros that they have.
        kept = [matrix for matrix in self.matrices if matrix.name not in judged]
        if self.groups_of is None:
            pruned = pruned_count(elements, sparsity) - sum(matrix.zeros() for matrix in kept)
            masks = weights.masks(pruned, cap)
        else:
            pattern = self.groups_of
            share = min(1.0, sparsity / max(pattern.sparsity, 1e-9))
            pruned = pruned_count(elements // pattern.m, share)
            pruned -= sum(_free_groups(matrix, pattern) for matrix in kept)
            masks = weights.group_masks(pruned, cap, pattern)
        return {name: _Plan(mask) for name, mask in zip(judged, masks, strict=True)}

    def _choose_structures(
        self, judged: Mapping[str, _Judged], sparsity: float
    ) -> dict[str, _Plan]:
        rows, columns = [], []
        for matrix in self.matrices:
            if matrix.name in judged:
                row, column = judged[matrix.name].row.cpu(), judged[matrix.name].column.cpu()
            else:
                w = matrix.ref.weight().cpu() != 0
                row, column = (torch.where(w.any(1 - axis), torch.inf, GONE) for axis in (0, 1))
            rows.append(row if "rows" in self.own.structure else torch.full_like(row, torch.inf))
            wanted = "columns" in self.own.structure
            columns.append(column if wanted else torch.full_like(column, torch.inf))
        gone = select_structures(rows, columns, sparsity, self.own.cap)
        return {
            matrix.name: _Plan(rows=p.to(self.device), columns=q.to(self.device))
            for matrix, (p, q) in zip(self.matrices, gone, strict=True)
            if matrix.name in judged
        }

    # The update.

    def _cut(self, matrix: Matrix, factors: KroneckerFactors, judged: _Judged, plan: _Plan) -> None:
        w = matrix.read(self.device)
        own = replace(self.own, gradient_damping=judged.damping[1])
        options = replace(self.options, damping=judged.damping[0], own=own)
        record = self.done.records[matrix.name]
        with _naming(matrix):
            if plan.mask is not None:
                mask = plan.mask.to(self.device)
                if matrix.biased:
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                inputs = LayerInputs(factors.a.diagonal(), factors.tokens)
                solution = METHOD.solve(
                    w, inputs.with_gradient(factors), self.target, options, None, mask
                )
                new, loss = solution.weight, solution.loss or 0.0
                record.iterations, record.gap = solution.iterations, solution.gap
                record.notes = list(solution.notes)
            else:
                assert plan.rows is not None and plan.columns is not None
                there: Curvature = curvature(w, factors, options)
                new = there.without_structures(w, plan.rows, plan.columns, self.own.update)
                loss = there.loss(new - w)
        record.loss += loss
        matrix.write(new)

    # Between shots.

    def _correct(self, shot: int) -> None:
        """Low-rank training of all matrices on the calibration text; zeros stay zero."""
        from pyprune.heal import HealConfig, heal_model

        wanted = self.config.calibration
        config = HealConfig(
            rank=self.own.correction_rank,
            alpha=2.0 * self.own.correction_rank,
            dropout=0.0,
            steps=self.own.corrections,
            learning_rate=self.own.correction_rate,
            training=replace(wanted, seed=wanted.seed + shot),
        )
        names = {matrix.name for matrix in self.matrices}
        model: nn.Module = self.adapter.model
        with self.measure.phase("corrections"), on_device(model, self.device):
            report = heal_model(model, self.tokens, config, only=names)
        self.done.notes.append(
            f"corrections after shot {shot}: loss {report.loss_before:.4f} before, "
            f"{report.loss_after:.4f} after (nats per token of a held-out calibration batch)"
        )

    def _report(self, matrix: Matrix) -> LayerReport:
        record, zeros = self.done.records[matrix.name], matrix.zeros()
        elements = matrix.ref.weight().numel()
        structure = "" if self.groups_of is not None else f" {self.own.structure}"
        return LayerReport(
            name=matrix.name,
            shape=matrix.shape,
            pattern=f"{self.target}{structure}",
            method=self.config.method,
            sparsity=zeros / elements,
            zeros=zeros,
            elements=elements,
            tokens=record.tokens,
            damping=record.damping,
            loss=None if record.kept else record.loss,
            iterations=record.iterations,
            gap=record.gap,
            dead_inputs=record.dead_inputs,
            notes=self._noted(record),
        )

    def _noted(self, record: Record) -> tuple[str, ...]:
        if record.kept:
            return (record.kept,)
        used, asked = record.gradient_damping, self.own.g_damping
        if used is None or used == asked:
            return tuple(record.notes)
        damping = f"the gradients' factor took damping {used:g} instead of {asked:g}"
        return (damping, *record.notes)


def _free_groups(matrix: Matrix, pattern: NM) -> int:
    """Groups of the matrix that are N:M already."""
    zero = (matrix.ref.weight() == 0).reshape(-1, pattern.m)
    return int((zero.sum(1) >= pattern.m - pattern.n).sum())


@contextmanager
def _naming(matrix: Matrix) -> Iterator[None]:
    try:
        yield
    except NotPositiveDefiniteError as error:
        raise LayerError(matrix.name, str(error)) from error
