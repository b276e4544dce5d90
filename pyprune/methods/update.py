"""What the kept weights do about the pruned ones: optimal brain surgeon sweeps around a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.base import LayerInputs, MethodOptions, Solution, given
from pyprune.methods.selection import reference_threshold_mask, score_mass_mask, select_mask
from pyprune.ops.obs_factor import ObsFactor
from pyprune.patterns import NM, Pattern, scope_of


def masked(w: Tensor, mask: Tensor) -> Solution:
    """The pruned weights set to zero, the others as they were."""
    return Solution(weight=torch.where(mask, w, 0), mask=mask)


def without_dead(w: Tensor, factor: ObsFactor) -> Tensor:
    """`w` `[..., R, C]` with zeros for the weights of inputs that were zero for every token. They
    lose nothing, so they rank first; the factor knows nothing of them, so they must not spread any
    error."""
    return torch.where(factor.dead.unsqueeze(-2), 0, w)


def swept_solution(
    w: Tensor,
    swept: ops.ObsSweep,
    factor: ObsFactor,
    inputs: LayerInputs,
    grid: ops.RowGrid | None = None,
) -> Solution:
    """The answer of a sweep over `without_dead(w, factor)`.

    Of the dead inputs' weights those that the mask keeps have their value back, on the `grid` of
    the others. SparseGPT's code zeroes them all, which is more than was asked for, and another
    text may need them.
    """
    values = w if grid is None else ops.round_to_grid(w, grid)
    return Solution(
        weight=torch.where(factor.dead & swept.mask, values, swept.weight),
        mask=swept.mask,
        damping=float(factor.damping),
        loss=float(swept.loss.sum(dtype=torch.float64)) / inputs.tokens,
    )


def sequential(
    w: Tensor,
    mask: Tensor,
    inputs: LayerInputs,
    options: MethodOptions,
    grid: ops.RowGrid | None = None,
) -> Solution:
    """One OBS sweep from left to right with a finished mask: each pruned weight's error (on a
    `grid` each weight's) is spread over the columns to its right (Frantar & Alistarh 2023, eq. 3
    and 4)."""
    factor = inputs.factor(options)
    swept = ops.obs_sweep(
        without_dead(w, factor),
        factor.u.to(w.dtype),
        mask=mask,
        block_size=options.block_size,
        grid=grid,
    )
    return swept_solution(w, swept, factor, inputs, grid)


def iterative(
    w: Tensor,
    scale: Tensor | None,
    inputs: LayerInputs,
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
) -> Solution:
    """The sweep of `sequential`, with the scores |w| * scale of each panel of columns taken after
    the update by the panels to its left.

    A panel is one N:M group, or `block_size` columns, in each of which every row loses its share
    (the shares add up to the exact count of the row). Wanda's ablation code compares all rows of a
    panel with each other instead; rows have their own scale, so here each competes with itself.
    """
    factor = inputs.factor(options)
    rule: dict[str, Any] = (
        {"nm": (pattern.n, pattern.m)}
        if isinstance(pattern, NM)
        else {"sparsity": pattern.sparsity, "scope": "row"}
    )
    swept = ops.obs_sweep(
        without_dead(w, factor),
        factor.u.to(w.dtype),  # statistics are fp32
        **rule,
        preserve=preserve,
        block_size=options.block_size,
        column_scale=w.new_ones(w.shape[1]) if scale is None else scale,
    )
    return swept_solution(w, swept, factor, inputs)


# A row is done when its squared output error is proven to be within this fraction of the least
# possible one. The proof is generous: on twelve matrices of SmolLM2-135M rows stopped within 5e-4.
TOLERANCE = 3e-2


def reconstructed(
    w: Tensor, solution: Solution, inputs: LayerInputs, options: MethodOptions
) -> Solution:
    """`solution` with the best weights for its mask; see `ops.obs_reconstruct`. `w` `[R, C]` are
    the weights before pruning. It starts from what the method made of them."""
    if inputs.gram is None:
        raise ValueError("reconstruct: expected the Gram matrix, got column norms")
    factor = inputs.factor(options)
    solved = ops.obs_reconstruct(
        w, inputs.gram, solution.mask, start=solution.weight, factor=factor, tolerance=TOLERANCE
    )
    notes = solution.notes
    late = int((~solved.converged(TOLERANCE)).sum())
    if late:
        worst = float(solved.gap.max())
        notes += (
            f"reconstruction stopped after {int(solved.iterations.max())} iterations in {late} of "
            f"{len(w)} rows, within {worst:.1%} of the least error instead of {TOLERANCE:.1%}",
        )
    return replace(
        solution,
        weight=solved.weight,
        damping=float(factor.damping),
        loss=float(solved.loss.sum()) / 2 / inputs.tokens,
        notes=notes,
    )


@dataclass(frozen=True)
class ScoreMethod:
    """A method that is its scores |w| * column_scale, compared within `default_scope` unless the
    pattern says otherwise. column_scale: as in `Method`."""

    column_scale: Callable[[LayerInputs | None, MethodOptions], Tensor | None]
    default_scope: str

    def solve(
        self,
        w: Tensor,
        inputs: LayerInputs | None,
        pattern: Pattern,
        options: MethodOptions,
        preserve: Tensor | None,
        mask: Tensor | None,
    ) -> Solution:
        """See `Solver`."""
        if mask is None:
            scale = self.column_scale(inputs, options)
            scale = None if scale is None else scale.to(w.dtype)
            if options.update == "iterative":
                seen = given("update iterative", inputs)
                return iterative(w, scale, seen, pattern, options, preserve)
            if options.score_mass:
                mask = score_mass_mask(w, pattern.sparsity, scale=scale, preserve=preserve)
            elif options.reference_count:
                scores = w if scale is None else w.abs() * scale
                mask = reference_threshold_mask(scores, pattern.sparsity)
                mask = mask if preserve is None else mask & preserve
            else:
                scope = scope_of(pattern, self.default_scope)
                mask = select_mask(w, pattern, scale=scale, scope=scope, preserve=preserve)
        if options.update == "none":
            return masked(w, mask)
        return sequential(w, mask, given(f"update {options.update}", inputs), options)
