"""SLEB (Song et al., ICML 2024, arXiv 2402.09025): whole layers, greedily by perplexity."""

from __future__ import annotations

from dataclasses import dataclass

from pyprune.depth.budget import units_of
from pyprune.depth.decision import DepthDecision
from pyprune.depth.greedy import Greedy, GreedyOptions
from pyprune.depth.registry import DepthTask, depth_method
from pyprune.methods.options import Natural


@dataclass(frozen=True)
class SlebOptions(GreedyOptions):
    """protect_first, protect_last: layers that are left alone (one at either end, as published).
    And those of `GreedyOptions`."""

    protect_first: Natural = 1
    protect_last: Natural = 1


@depth_method(
    "sleb",
    title="SLEB: whole layers, greedily by perplexity",
    paper="arXiv 2402.09025",
    options=SlebOptions,
    unit="layer",
)
def sleb(task: DepthTask) -> DepthDecision:
    """BlockPruner's search with both branches of a layer as one candidate."""
    options: SlebOptions = task.config.own_options()
    layers = range(options.protect_first, len(task.graph.layouts) - options.protect_last)
    allowed = [branch for branch in task.graph.branches if branch.layer in layers]
    return Greedy(task, options, units_of(allowed, layers=True)).decision()
