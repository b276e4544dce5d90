"""Magnitude: the smallest weights go, whatever they multiply."""

from __future__ import annotations

from torch import Tensor

from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution, given
from pyprune.methods.selection import reference_threshold_mask, select_mask
from pyprune.methods.update import iterative, solve_by_score
from pyprune.patterns import Pattern, scope_of


def magnitude(
    w: Tensor,
    inputs: LayerInputs | None,
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
    mask: Tensor | None,
) -> Solution:
    """Score |w|, compared over the layer unless the pattern says otherwise. See `Solver`."""
    if mask is None and options.update == "iterative":
        inputs = given("update iterative", inputs)
        return iterative(w, None, inputs, pattern, options, preserve)
    if mask is None and options.reference_count:
        mask = reference_threshold_mask(w, pattern.sparsity)
        mask = mask if preserve is None else mask & preserve
    if mask is None:
        scope = scope_of(pattern, METHOD.default_scope)
        mask = select_mask(w, pattern, scope=scope, preserve=preserve)
    return solve_by_score(w, inputs, options, mask)


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> None:
    """Every column counts the same."""


METHOD = Method(
    name="magnitude",
    title="smallest |w|",
    paper="Han et al. 2015, arXiv 1506.02626",
    statistic=None,
    scopes=("layer", "row", "global"),
    updates_weights=False,
    solve=magnitude,
    column_scale=column_scale,
    updates=("none", "sequential", "iterative"),
    reference_scope="layer",
)
