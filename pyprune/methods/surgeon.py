"""LLM Surgeon: the weights, N:M groups, rows or columns whose removal costs the loss least by a
Kronecker-factored Fisher information, with the optimal correction of all others, in shots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from pyprune.calibration.gradient_stats import GradientFactory, KroneckerFactors
from pyprune.errors import UserError
from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution, given_gradient
from pyprune.methods.kronecker import ITERATIONS, TOLERANCE, Corrected, Curvature, Update
from pyprune.methods.options import Count, Natural, Positive, within
from pyprune.methods.selection import select_mask
from pyprune.patterns import NM, Pattern

Structure = Literal["element", "2:4", "rows", "columns", "rows-columns"]
# Damping of G that the paper uses for weights and N:M groups, and for rows and columns.
ELEMENT_DAMPING, STRUCTURE_DAMPING = 0.1, 0.01


@dataclass(frozen=True)
class SurgeonOptions:
    """structure: what goes. With a pattern N:M it is groups of it, and `element` may stay. `2:4`
    with a sparsity turns that share (at most a half) of the weights into 2:4 groups, the cheapest
    groups first.
    shots: after each one the curvature is taken anew, on the model as it is then; shot t of T
        removes t / T of the sparsity.
    update: of what is kept: `joint`, the optimum; `grouped`, the paper's approximation of it, to
        compare with; or none.
    tolerance: how far above the least loss the joint update of weights and N:M groups may end, as
        a fraction of it, by estimate. iterations: most conjugate gradient steps on the way.
    gradient_damping: as `damping`, of the gradients' factor; none: 0.1 for weights and N:M, 0.01
        for rows and columns, as in the paper.
    cap: most of one matrix that may go: of its weights or N:M groups, of its rows and its columns.
    kronecker: `independent` factors, or those `nearest` to the Fisher information.
    refinements: steps towards the nearest, each two more passes over the text.
    factor_memory: GiB that factors may take at once. If those of all layers need more, they are
        made in several passes over the text and wait on disk.
    fisher_samples: 0: gradients of the text's own tokens (the empirical Fisher information, as in
        the paper). S > 0: of S tokens drawn from the model at each place, with a backward pass
        each; `calibration.seed` and the shot say which.
    corrections: steps of low-rank training after each shot, on the calibration text; what is
        pruned stays so, and fused experts stay as the shot left them. correction_rank,
        correction_rate: their rank and learning rate.
    """

    structure: Structure = "element"
    shots: Count = 5
    update: Update = "joint"
    tolerance: Annotated[float, within(0, 1, "[)")] = TOLERANCE
    iterations: Count = ITERATIONS
    gradient_damping: Annotated[float | None, within(0, 1)] = None
    cap: Annotated[float, within(0, 1, "(]")] = 1.0
    kronecker: Literal["independent", "nearest"] = "independent"
    refinements: Count = 2
    factor_memory: Positive = 8.0
    fisher_samples: Natural = 0
    corrections: Natural = 0
    correction_rank: Count = 8
    correction_rate: Positive = 1e-4

    @property
    def of_structures(self) -> bool:
        """Whether whole rows or columns go."""
        return self.structure in ("rows", "columns", "rows-columns")

    @property
    def g_damping(self) -> float:
        if self.gradient_damping is not None:
            return self.gradient_damping
        return STRUCTURE_DAMPING if self.of_structures else ELEMENT_DAMPING

    def groups(self, pattern: Pattern) -> NM | None:
        """The N:M that groups of weights take, if any."""
        if isinstance(pattern, NM):
            return pattern
        return NM(2, 4) if self.structure == "2:4" else None


def check(pattern: Pattern, options: MethodOptions) -> None:
    """Raises UserError for a structure that does not go with the pattern."""
    own = options.own_as(SurgeonOptions)
    if isinstance(pattern, NM):
        if own.structure not in ("element", str(pattern)):
            raise UserError(
                f"pattern: structure {own.structure} takes a sparsity, got pattern {pattern}"
            )
    elif own.structure == "2:4" and pattern.sparsity > 0.5:
        raise UserError(f"sparsity: structure 2:4 expected at most 0.5, got {pattern.sparsity:g}")
    if options.reconstruct:
        raise UserError("reconstruct: llm-surgeon has an update of its own, expected none")


def curvature(w: Tensor, factors: KroneckerFactors, options: MethodOptions) -> Curvature:
    """Of the weights `w [R, C]`, the bias as last column if `factors` have it."""
    a, g = factors.normalised()
    return Curvature.of(
        w,
        a,
        g,
        a_damping=options.damping,
        g_damping=options.own_as(SurgeonOptions).g_damping,
        bias=factors.bias,
    )


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
    """`[R, C]`: ([G^-1]_ii [A^-1]_jj)^-1/2. |w| times it orders the weights as their costs do
    (eq. 5)."""
    factors = given_gradient("llm-surgeon", inputs, KroneckerFactors)
    rows, columns = factors.g.shape[0], factors.a.shape[0]
    whole = factors.g.new_ones(rows, columns)
    row_scale, scale = curvature(whole, factors, options).element_scales()
    return torch.outer(row_scale, scale)


def surgeon(
    w: Tensor,
    inputs: LayerInputs | None,
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
    mask: Tensor | None,
) -> Solution:
    """One shot on one matrix: its cheapest weights go and all others are corrected. See `Solver`.

    A `mask` comes with dampings that are known to do. The loss is that of `Curvature.loss`.
    """
    factors = given_gradient("llm-surgeon", inputs, KroneckerFactors)
    own = options.own_as(SurgeonOptions)
    there = curvature(w, factors, options)
    if mask is None:
        there = there.settled()
        rows, columns = there.element_scales()
        scores = w.abs() * rows[:, None] * columns
        scope = "layer" if isinstance(pattern, NM) else pattern.scope or "layer"
        mask = select_mask(scores, pattern, scope=scope, preserve=preserve)
    new = there.without_elements(
        w, mask, own.update, iterations=own.iterations, tolerance=own.tolerance
    )
    return Solution(
        new.weight,
        mask,
        damping=there.a_damping,
        loss=new.loss,
        iterations=new.iterations,
        # JSON knows no infinity: with a few iterations there may be no estimate.
        gap=new.gap if new.gap is not None and math.isfinite(new.gap) else None,
        notes=_stopped_early(new, own),
    )


def _stopped_early(new: Corrected, own: SurgeonOptions) -> tuple[str, ...]:
    if new.gap is None or new.gap <= own.tolerance:
        return ()
    left = f"about {new.gap:.1%}" if math.isfinite(new.gap) else "too early to tell how far"
    return (
        f"joint update stopped after {new.iterations} iterations, {left} above the least loss "
        f"instead of {own.tolerance:.1%} (-O iterations=N allows more)",
    )


def gradient(options: MethodOptions) -> GradientFactory:
    return KroneckerFactors


METHOD = Method(
    name="llm-surgeon",
    title="least cost by Kronecker-factored Fisher information, all layers together, in shots",
    paper="van der Ouderaa et al. 2024, arXiv 2312.17244",
    statistic=None,
    scopes=("global",),
    updates_weights=True,
    solve=surgeon,
    column_scale=column_scale,
    gradient=gradient,
    options_type=SurgeonOptions,
    check_own=check,
)
