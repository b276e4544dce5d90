"""ShortGPT (arXiv 2403.03853): the layers of least Block Influence."""

from __future__ import annotations

from dataclasses import dataclass

from pyprune.depth.addons import AddOns
from pyprune.depth.criteria import removal_order
from pyprune.depth.hidden import block_influence
from pyprune.depth.layers import LayerChoice, LayerTask, layer_method, too_much
from pyprune.methods.options import Natural


@dataclass(frozen=True)
class ShortGptOptions(AddOns):
    """keep_first, keep_last: layers at the ends that stay. And the add-ons `compensate`, `refit`,
    `ridge`."""

    keep_first: Natural = 0
    keep_last: Natural = 0


@layer_method(
    "shortgpt",
    title="ShortGPT: layers of least Block Influence",
    paper="arXiv 2403.03853",
    options=ShortGptOptions,
)
def shortgpt(task: LayerTask) -> LayerChoice:
    """ShortGPT: the layers of least Block Influence, at once."""
    options: ShortGptOptions = task.options
    layers = len(task.graph.layouts)
    free = range(options.keep_first, layers - options.keep_last)
    if len(free) < layers and not task.enough(free):
        raise too_much(len(free), layers)  # before the model runs for it
    influence = block_influence(task.graph.adapter, task.batches)
    removed = task.first_enough([i for i in removal_order(influence) if i in free])
    return LayerChoice(removed, "1 - cosine", tuple(influence.tolist()))
