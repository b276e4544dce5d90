"""The last layers, the baseline of arXiv 2411.15558."""

from __future__ import annotations

from pyprune.depth import criteria
from pyprune.depth.addons import AddOns
from pyprune.depth.layers import LayerChoice, LayerTask, layer_method


@layer_method("reverse", title="Last layers first", paper="arXiv 2411.15558", options=AddOns)
def reverse(task: LayerTask) -> LayerChoice:
    """The last layers, last first: the baseline to beat."""
    importance = criteria.reverse(len(task.graph.layouts))
    removed = task.first_enough(criteria.removal_order(importance))
    return LayerChoice(removed, "depth from the end", tuple(importance.tolist()))
