"""ExactOBS: greedy optimal brain surgeon on every row of a layer, nothing approximated but greed.

The best that is known for the layer's output error, at a price of R C^3 / 8 multiply-adds for half
the weights: for layers that are narrow enough, and on sampled rows (`methods.oracle`) to see how
far faster methods are from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyprune.methods import sparsegpt
from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution, given
from pyprune.methods.greedy import GreedyPlan
from pyprune.methods.options import Count
from pyprune.methods.update import masked, reconstructed, without_dead
from pyprune.patterns import NM, Pattern


@dataclass(frozen=True)
class ExactObsOptions:
    """max_columns: layers with more inputs are refused, for what it costs."""

    max_columns: Count = 4096


def exactobs(
    w: Tensor,
    inputs: LayerInputs | None,
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
    mask: Tensor | None,
) -> Solution:
    """One weight of a row after the other, always the one with the least w^2 / [H^-1]_jj of the
    weights as they are by then (Frantar & Alistarh 2022, algorithm 1); a layer's budget is shared
    by one heap over its rows (section 4). Then the exact least squares of what is kept.
    See `Solver`; `ops.obs_greedy`, `ops.obs_reconstruct`.
    """
    inputs = given("exactobs", inputs)
    factor = inputs.factor(options)
    alive = without_dead(w, factor)
    if mask is None:
        scope = "row" if isinstance(pattern, NM) else pattern.scope or METHOD.default_scope
        mask = exact_mask(alive, factor.u, pattern, scope, preserve)
    solution = reconstructed(alive, masked(alive, mask), inputs, options)
    return replace(solution, weight=torch.where(factor.dead & mask, w, solution.weight))


def exact_mask(
    w: Tensor, u: Tensor, pattern: Pattern, scope: str, preserve: Tensor | None = None
) -> Tensor:
    """The kept weights of rows `w [R, C]` with `H^-1 = u^T u`."""
    if scope not in ("row", "layer"):
        raise ValueError(f"exactobs: scope {scope} expects the mask that was selected, got none")
    inverse = (u.mT @ u).to(w.dtype)
    groups = len(w) if scope == "row" else 1
    plan = GreedyPlan(len(w), w.shape[1], pattern, groups, preserve)
    return plan.mask(*plan.trace(w, inverse))


def most_columns(options: MethodOptions) -> int:
    """The widest layer that is not refused."""
    return options.own_as(ExactObsOptions).max_columns


METHOD = Method(
    name="exactobs",
    title="exact greedy OBS of every row (small layers)",
    paper="Frantar & Alistarh 2022, arXiv 2208.11580",
    statistic="gram",
    scopes=("row", "layer", "global"),
    updates_weights=True,
    solve=exactobs,
    column_scale=sparsegpt.column_scale,
    options_type=ExactObsOptions,
    most_columns=most_columns,
)
