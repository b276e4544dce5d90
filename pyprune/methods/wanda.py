"""Wanda: weights and activations. A weight counts as much as what it adds to the output."""

from __future__ import annotations

from torch import Tensor

from pyprune.methods.base import LayerInputs, Method, MethodOptions, given
from pyprune.methods.update import ScoreMethod


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
    """`[C]`: L2 norm of each input over the calibration tokens (Sun et al. 2023, eq. 1). Inputs
    that were always zero score zero, so their weights go first."""
    return given("wanda", inputs).squared_norms.sqrt()


METHOD = Method(
    name="wanda",
    title="smallest |w| times input norm",
    paper="Sun et al. 2023, arXiv 2306.11695",
    statistic="norms",
    scopes=("row", "layer", "global"),
    updates_weights=False,
    solve=ScoreMethod(column_scale, "row").solve,
    column_scale=column_scale,
    updates=("none", "sequential", "iterative"),
    score_mass=True,
)
