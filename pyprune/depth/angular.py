"""Gromov et al. (arXiv 2403.17887): the window of layers of least angular distance."""

from __future__ import annotations

from collections.abc import Sequence

from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import AddOns
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.hidden import angular_distances
from pyprune.depth.layers import Enough, LayerChoice, layer_method, too_much, with_add_ons
from pyprune.progress import Progress


@layer_method(
    "angular",
    title="Window of layers of least angular distance",
    paper="arXiv 2403.17887",
    options=AddOns,
)
def angular(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: AddOns,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """Gromov et al.: the window of consecutive layers of least angular distance, the smallest
    width that is enough; never the whole model. Ties go to the lower window."""
    layers = len(graph.layouts)
    distances = angular_distances(graph.adapter, batches)
    for width in range(1, layers):
        start = int(distances.diagonal(width).argmin())
        removed = tuple(range(start, start + width))
        if enough(removed):
            return with_add_ons(graph, batches, options, removed, "angle / pi", None)
    raise too_much(layers - 1, layers)
