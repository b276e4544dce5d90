"""The last layers, the baseline of arXiv 2411.15558."""

from __future__ import annotations

from collections.abc import Sequence

from pyprune.calibration.tokens import Batch
from pyprune.depth import criteria
from pyprune.depth.addons import AddOns
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.layers import Enough, LayerChoice, first_enough, layer_method, with_add_ons
from pyprune.progress import Progress


@layer_method("reverse", title="Last layers first", paper="arXiv 2411.15558", options=AddOns)
def reverse(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: AddOns,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """The last layers, last first: the baseline to beat."""
    importance = criteria.reverse(len(graph.layouts))
    removed = first_enough(criteria.removal_order(importance), enough, len(importance))
    return with_add_ons(graph, batches, options, removed, "depth from the end", importance)
