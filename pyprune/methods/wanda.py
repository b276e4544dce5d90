"""Wanda: weights and activations. A weight counts as much as what it adds to the output."""

from __future__ import annotations

from torch import Tensor

from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution, given
from pyprune.methods.selection import score_mass_mask, select_mask
from pyprune.methods.update import iterative, solve_by_score
from pyprune.patterns import Pattern, scope_of


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
    """`[C]`: L2 norm of each input over the calibration tokens."""
    return given("wanda", inputs).squared_norms.sqrt()


def wanda(
    w: Tensor,
    inputs: LayerInputs | None,
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
    mask: Tensor | None,
) -> Solution:
    """Score |w_ij| ||x_j||_2, compared within the output row unless the pattern says otherwise
    (Sun et al. 2023, eq. 1). Inputs that were always zero score zero, so their weights go first.
    See `Solver`.
    """
    if mask is not None:
        return solve_by_score(w, inputs, options, mask)
    scale = column_scale(inputs, options).to(w.dtype)
    if options.update == "iterative" and inputs is not None:
        return iterative(w, scale, inputs, pattern, options, preserve)
    if options.score_mass:
        mask = score_mass_mask(w, pattern.sparsity, scale=scale, preserve=preserve)
    else:
        scope = scope_of(pattern, METHOD.default_scope)
        mask = select_mask(w, pattern, scale=scale, scope=scope, preserve=preserve)
    return solve_by_score(w, inputs, options, mask)


METHOD = Method(
    name="wanda",
    title="smallest |w| times input norm",
    paper="Sun et al. 2023, arXiv 2306.11695",
    statistic="norms",
    scopes=("row", "layer", "global"),
    updates_weights=False,
    solve=wanda,
    column_scale=column_scale,
    updates=("none", "sequential", "iterative"),
    score_mass=True,
)
