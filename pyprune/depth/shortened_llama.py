"""Shortened LLaMA (arXiv 2402.02834): layers by perplexity, Taylor+ or magnitude+."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import AddOns
from pyprune.depth.criteria import importance_by, removal_order
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.layers import Enough, LayerChoice, first_enough, layer_method, with_add_ons
from pyprune.progress import Progress


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
def shortened(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: ShortenedOptions,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """Shortened LLaMA: a ranking of single layers by what their removal, or their weights, say."""
    importance = importance_by(options.criterion, graph, batches)
    order = removal_order(importance, plus=options.plus)
    removed = first_enough(order, enough, len(order))
    return with_add_ons(graph, batches, options, removed, options.criterion, importance)
