"""ShortGPT (arXiv 2403.03853): the layers of least Block Influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import AddOns
from pyprune.depth.criteria import removal_order
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.hidden import block_influence
from pyprune.depth.layers import (
    Enough,
    LayerChoice,
    first_enough,
    layer_method,
    too_much,
    with_add_ons,
)
from pyprune.errors import UserError
from pyprune.progress import Progress


@dataclass(frozen=True)
class ShortGptOptions(AddOns):
    """keep_first, keep_last: layers at the ends that stay. And the add-ons `compensate`, `refit`,
    `ridge`."""

    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.keep_first, self.keep_last) < 0:
            raise UserError(
                f"keep_first, keep_last: expected 0 or more, got {self.keep_first} and "
                f"{self.keep_last}"
            )


@layer_method(
    "shortgpt",
    title="ShortGPT: layers of least Block Influence",
    paper="arXiv 2403.03853",
    options=ShortGptOptions,
)
def shortgpt(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: ShortGptOptions,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """ShortGPT: the layers of least Block Influence, at once."""
    layers = len(graph.layouts)
    free = range(options.keep_first, layers - options.keep_last)
    if len(free) < layers and not enough(free):
        raise too_much(len(free), layers)  # before the model runs for it
    influence = block_influence(graph.adapter, batches)
    order = [i for i in removal_order(influence) if i in free]
    removed = first_enough(order, enough, layers)
    return with_add_ons(graph, batches, options, removed, "1 - cosine", influence)
