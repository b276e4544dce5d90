"""BlockPruner (Zhong et al., ACL 2025 Findings, arXiv 2406.10594), exact or lazy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyprune.calibration.tokens import TokenSet
from pyprune.depth.budget import units_of
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import Decision
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.greedy import Greedy, GreedyOptions
from pyprune.depth.registry import depth_method
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.progress import Progress


@dataclass(frozen=True)
class BlockPrunerOptions(GreedyOptions):
    """blocks: which branches may go: mixed, attention or mlp. protect_first, protect_last: layers
    that are left alone. And those of `GreedyOptions`."""

    blocks: Literal["mixed", "attention", "mlp"] = "mixed"
    protect_first: int = 0
    protect_last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_protected(self.protect_first, self.protect_last)


def check_protected(first: int, last: int) -> None:
    """Raises UserError for negative numbers of protected layers."""
    if first < 0 or last < 0:
        raise UserError(
            f"protect_first, protect_last: expected 0 or more layers, got {first} and {last}"
        )


@depth_method(
    "blockpruner",
    title="BlockPruner: attention and MLP branches, greedily by perplexity",
    paper="arXiv 2406.10594",
    options=BlockPrunerOptions,
)
def blockpruner(
    model: Any,
    adapter: Adapter,
    tokens: TokenSet,
    config: StructureConfig,
    progress: Progress | None = None,
) -> Decision:
    """Candidates in the order of the paper's code, by which ties go: attention branches by
    ascending layer, then MLPs (depth.md 1 (c) 3)."""
    options: BlockPrunerOptions = config.own_options()
    graph = ResidualGraph(model, adapter)
    graph.check()
    layers = range(options.protect_first, len(graph.layouts) - options.protect_last)
    kinds = ("attention", "mlp") if options.blocks == "mixed" else (options.blocks,)
    allowed = [b for kind in kinds for b in graph.branches if b.kind == kind and b.layer in layers]
    search = Greedy(graph, tokens, config, options, units_of(allowed, layers=False), progress)
    return search.decision("blockpruner", "block")
