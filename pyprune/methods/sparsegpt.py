"""SparseGPT: optimal brain surgeon over a fixed column order, choosing as it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from pyprune import ops
from pyprune.errors import UserError
from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution, factors_of, given
from pyprune.methods.options import Bound
from pyprune.methods.update import sequential, swept_solution, without_dead
from pyprune.ops.obs_factor import ObsFactor
from pyprune.patterns import NM, Pattern

BITS = Bound("0 (off) or 2 to 8", lambda bits: bits == 0 or 2 <= bits <= 8)


@dataclass(frozen=True)
class SparseGptOptions:
    """quantise_bits: round the kept weights in the same sweep to 2^bits values per output row (a
    min-max grid of the dense row), 2 to 8 bits; 0: do not. The checkpoint holds the rounded values
    in its own dtype, not the codes."""

    quantise_bits: Annotated[int, BITS] = 0


def quantise_bits(options: MethodOptions) -> int:
    return options.own_as(SparseGptOptions).quantise_bits


def check(pattern: Pattern, options: MethodOptions) -> None:
    if quantise_bits(options) and options.reconstruct:
        raise UserError(
            "reconstruct: expected off with quantise_bits, the reconstructed weights would leave "
            "the grid"
        )


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
    """`[C]`: 1 / sqrt(diag(H^-1)). With it a weight's squared score is twice the loss of removing
    that weight alone from the dense layer (OBS saliency): what a choice made before any sweep, the
    global one, can go by. 0 for inputs that were always zero."""
    factor = given("sparsegpt", inputs).factor(options)
    return torch.where(factor.dead, 0, ops.inverse_diagonal(factor.u).rsqrt())


def sparsegpt(
    w: Tensor,
    inputs: LayerInputs | None,
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
    mask: Tensor | None,
) -> Solution:
    """Columns from left to right: the lowest w^2 / U_jj^2 of a block of columns over all rows (or
    of an N:M group, row or layer) go, and their error moves to the columns on the right
    (Frantar & Alistarh 2023, algorithm 1), with H^-1 = U^T U of the damped Gram matrix.
    See `Solver`; `ops.obs_sweep` for each scope's rule, and for the kept weights on a grid.
    """
    inputs = given("sparsegpt", inputs)
    if mask is not None:
        return sequential(w, mask, inputs, options, _grid(w, options))
    forced = None if preserve is None else preserve[None]
    return solve_stack(w[None], [inputs], pattern, options, forced)[0]


def _grid(w: Tensor, options: MethodOptions) -> ops.RowGrid | None:
    bits = quantise_bits(options)
    return ops.row_grid(w, bits) if bits else None


def solve_stack(
    w: Tensor,
    inputs: Sequence[LayerInputs],
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
) -> list[Solution]:
    """Experts, or linears of one shape that read the same inputs, in one sweep. See
    `StackSolver`."""
    factor, grid = factors_of(inputs, options), _grid(w, options)
    rule: dict[str, Any] = {"nm": (pattern.n, pattern.m)} if isinstance(pattern, NM) else {}
    if not isinstance(pattern, NM):
        if pattern.scope == "global":
            raise ValueError("sparsegpt: scope global expects the mask that was selected, got none")
        rule = {"sparsity": pattern.sparsity, "scope": pattern.scope or "block"}
        rule["reference_count"] = options.reference_count
    swept = ops.obs_sweep(
        without_dead(w, factor),
        factor.u.to(w.dtype),  # statistics are fp32
        **rule,
        preserve=preserve,
        block_size=options.block_size,
        grid=grid,
    )
    return [
        swept_solution(
            w[b],
            ops.ObsSweep(*(t[b] for t in swept)),
            ObsFactor(*(t[b % len(t)] for t in factor)),
            some,
            None if grid is None else ops.RowGrid(*(t[b] for t in grid)),
        )
        for b, some in enumerate(inputs)
    ]


METHOD = Method(
    name="sparsegpt",
    title="blockwise OBS: choose, then compensate",
    paper="Frantar & Alistarh 2023, arXiv 2301.00774",
    statistic="gram",
    scopes=("block", "row", "layer", "global"),
    updates_weights=True,
    reconstructs=True,
    rounds=lambda options: quantise_bits(options) > 0,
    solve=sparsegpt,
    column_scale=column_scale,
    reference_scope="block",
    options_type=SparseGptOptions,
    check_own=check,
    solve_stack=solve_stack,
)
