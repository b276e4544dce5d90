"""SLEB (Song et al., ICML 2024, arXiv 2402.09025): whole layers, greedily by perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyprune.calibration.tokens import TokenSet
from pyprune.depth.blockpruner import check_protected
from pyprune.depth.budget import units_of
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import Decision
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.greedy import Greedy, GreedyOptions
from pyprune.depth.registry import depth_method
from pyprune.models.adapter import Adapter
from pyprune.progress import Progress


@dataclass(frozen=True)
class SlebOptions(GreedyOptions):
    """protect_first, protect_last: layers that are left alone (one at either end, as published).
    And those of `GreedyOptions`."""

    protect_first: int = 1
    protect_last: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_protected(self.protect_first, self.protect_last)


@depth_method(
    "sleb",
    title="SLEB: whole layers, greedily by perplexity",
    paper="arXiv 2402.09025",
    options=SlebOptions,
    unit="layer",
)
def sleb(
    model: Any,
    adapter: Adapter,
    tokens: TokenSet,
    config: StructureConfig,
    progress: Progress | None = None,
) -> Decision:
    """BlockPruner's search with both branches of a layer as one candidate."""
    options: SlebOptions = config.own_options()
    graph = ResidualGraph(model, adapter)
    graph.check()
    layers = range(options.protect_first, len(graph.layouts) - options.protect_last)
    allowed = [branch for branch in graph.branches if branch.layer in layers]
    search = Greedy(graph, tokens, config, options, units_of(allowed, layers=True), progress)
    return search.decision("sleb", "layer")
