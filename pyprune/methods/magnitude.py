"""Magnitude: the smallest weights go, whatever they multiply."""

from pyprune.methods.base import LayerInputs, Method, MethodOptions
from pyprune.methods.update import ScoreMethod


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> None:
    """Every column counts the same."""


METHOD = Method(
    name="magnitude",
    title="smallest |w|",
    paper="Han et al. 2015, arXiv 1506.02626",
    statistic=None,
    scopes=("layer", "row", "global"),
    updates_weights=False,
    solve=ScoreMethod(column_scale, "layer").solve,
    column_scale=column_scale,
    updates=("none", "sequential", "iterative"),
    reference_scope="layer",
)
