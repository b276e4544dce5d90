"""BlockPruner (Zhong et al., ACL 2025 Findings, arXiv 2406.10594), exact or lazy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyprune.calibration.tokens import TokenSet
from pyprune.depth.budget import units_of
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import Decision
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.greedy import Greedy, Mode, check_greedy
from pyprune.depth.registry import Progress, depth_method
from pyprune.depth.score import ObjectiveName
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter


@dataclass(frozen=True)
class BlockPrunerOptions:
    """blocks: which branches may go: mixed, attention or mlp. protect_first, protect_last: layers
    that are left alone. mode: exact (every candidate in every round), fast (lazy greedy with
    audits), naive (a full forward per candidate: the reference). objective: perplexity, or kl to
    the dense model. every: score each n-th token (1: all). memory_mb: for cached hidden states and
    live streams. width: streams that run at once. audit_every: fast looks at everything in every
    n-th round (0: never). looks: candidates that fast scores at a time. state: a file that the
    search continues from after an interruption.
    """

    blocks: Literal["mixed", "attention", "mlp"] = "mixed"
    protect_first: int = 0
    protect_last: int = 0
    mode: Mode = "exact"
    objective: ObjectiveName = "perplexity"
    every: int = 1
    memory_mb: int = 2048
    width: int = 4
    audit_every: int = 8
    looks: int = 4
    state: str | None = None

    def __post_init__(self) -> None:
        check_greedy(self)
        check_protected(self.protect_first, self.protect_last)


def check_protected(first: int, last: int) -> None:
    """Raises UserError for negative numbers of protected layers."""
    if first < 0 or last < 0:
        raise UserError(f"options: expected 0 or more protected layers, got {first} and {last}")


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
    options: BlockPrunerOptions = config.method_options()
    graph = ResidualGraph(model, adapter)
    graph.check()
    layers = range(options.protect_first, len(graph.layouts) - options.protect_last)
    kinds = ("attention", "mlp") if options.blocks == "mixed" else (options.blocks,)
    allowed = [b for kind in kinds for b in graph.branches if b.kind == kind and b.layer in layers]
    search = Greedy(graph, tokens, config, options, units_of(allowed, layers=False), progress)
    return search.decision("blockpruner", "block")
