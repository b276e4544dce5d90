"""SparseGPT: optimal brain surgeon over a fixed column order, choosing as it goes."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution
from pyprune.methods.update import sequential, swept_solution, without_dead
from pyprune.patterns import NM, Pattern


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
    """`[C]`: 1 / sqrt(diag(H^-1)). With it a weight's squared score is twice the loss of removing
    that weight alone from the dense layer (OBS saliency): what a choice made before any sweep, the
    global one, can go by. 0 for inputs that were always zero."""
    factor = _given(inputs).factor(options)
    return torch.where(factor.dead, 0, ops.inverse_diagonal(factor.u).rsqrt())


def _given(inputs: LayerInputs | None) -> LayerInputs:
    if inputs is None:
        raise ValueError("sparsegpt: expected calibration inputs, got none")
    return inputs


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
    See `Solver`; `ops.obs_sweep` for each scope's rule.
    """
    inputs = _given(inputs)
    if mask is not None:
        return sequential(w, mask, inputs, options)
    factor = inputs.factor(options)
    alive = without_dead(w, factor)
    if isinstance(pattern, NM):
        swept = ops.obs_sweep(
            alive,
            factor.u,
            nm=(pattern.n, pattern.m),
            preserve=preserve,
            block_size=options.block_size,
        )
    else:
        scope = pattern.scope or "block"
        if scope == "global":
            raise ValueError("sparsegpt: scope global expects the mask that was selected, got none")
        swept = ops.obs_sweep(
            alive,
            factor.u,
            sparsity=pattern.sparsity,
            scope=scope,
            preserve=preserve,
            block_size=options.block_size,
            reference_count=options.reference_count,
        )
    return swept_solution(w, swept, factor, inputs)


METHOD = Method(
    name="sparsegpt",
    title="blockwise OBS: choose, then compensate",
    paper="Frantar & Alistarh 2023, arXiv 2301.00774",
    statistic="gram",
    scopes=("block", "row", "layer", "global"),
    updates_weights=True,
    solve=sparsegpt,
    column_scale=column_scale,
    reference_scope="block",
)
