"""Gromov et al. (arXiv 2403.17887): the window of layers of least angular distance."""

from __future__ import annotations

from pyprune.depth.addons import AddOns
from pyprune.depth.hidden import angular_distances
from pyprune.depth.layers import LayerChoice, LayerTask, layer_method, too_much


@layer_method(
    "angular",
    title="Window of layers of least angular distance",
    paper="arXiv 2403.17887",
    options=AddOns,
)
def angular(task: LayerTask) -> LayerChoice:
    """Gromov et al.: the window of consecutive layers of least angular distance, the smallest
    width that is enough; never the whole model. Ties go to the lower window."""
    layers = len(task.graph.layouts)
    distances = angular_distances(task.graph.adapter, task.batches)
    for width in range(1, layers):
        start = int(distances.diagonal(width).argmin())
        removed = tuple(range(start, start + width))
        if task.enough(removed):
            return LayerChoice(removed, "angle / pi")
    raise too_much(layers - 1, layers)
