"""Shortened LLaMA (arXiv 2402.02834): layers by perplexity, Taylor+ or magnitude+."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyprune.depth.addons import AddOns
from pyprune.depth.criteria import importance_by, removal_order
from pyprune.depth.layers import LayerChoice, LayerTask, layer_method


@dataclass(frozen=True)
class ShortenedOptions(AddOns):
    """criterion: what a layer is worth: ppl (the perplexity without it), taylor or magnitude.
    plus: the first four and last two layers go last. And the add-ons."""

    criterion: Literal["ppl", "taylor", "magnitude"] = "ppl"
    plus: bool = True


@layer_method(
    "shortened-llama",
    title="Shortened LLaMA: layers by perplexity, Taylor+ or magnitude+",
    paper="arXiv 2402.02834",
    options=ShortenedOptions,
)
def shortened(task: LayerTask) -> LayerChoice:
    """Shortened LLaMA: a ranking of single layers by what their removal, or their weights, say."""
    options: ShortenedOptions = task.options
    importance = importance_by(options.criterion, task.graph, task.batches)
    removed = task.first_enough(removal_order(importance, plus=options.plus))
    return LayerChoice(removed, options.criterion, tuple(importance.tolist()))
