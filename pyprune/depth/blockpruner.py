"""BlockPruner (Zhong et al., ACL 2025 Findings, arXiv 2406.10594), exact or lazy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

from pyprune.depth.budget import Unit, units_of
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import DepthDecision
from pyprune.depth.exchange import refined
from pyprune.depth.graph import Branch
from pyprune.depth.greedy import Greedy, GreedyOptions
from pyprune.depth.registry import DepthTask, depth_method
from pyprune.depth.score import ObjectiveName
from pyprune.errors import UserError
from pyprune.methods.options import Count, Natural, at_least


@dataclass(frozen=True)
class BlockPrunerOptions(GreedyOptions):
    """blocks: what may go: attention or mlp branches, mixed (both, one by one, as published) or
    pairs (also two neighbours at once: a whole layer, or an MLP and the next layer's attention).
    refine: exchange (improve the list by exchanges, see `pyprune.depth.exchange`), none (as
    published) or auto (exchange where rates are compared); with exchanges, objective=auto is kl.
    exchange_limit: sets of branches that are scored for them at most. margin: standard errors, over
    calibration sequences, that an exchange has to gain; 0: any gain will do. protect_first,
    protect_last: layers that are left alone. And those of `GreedyOptions`."""

    blocks: Literal["mixed", "attention", "mlp", "pairs"] = "mixed"
    refine: Literal["auto", "exchange", "none"] = "auto"
    exchange_limit: Count = 320
    margin: Annotated[float, at_least(0)] = 2.0
    protect_first: Natural = 0
    protect_last: Natural = 0

    def refined(self, config: StructureConfig) -> bool:
        """Whether there are exchanges for the target of `config`."""
        if self.refine != "auto":
            return self.refine == "exchange"
        return self.compared(config) == "rate" and not config.counted

    def scored(self, config: StructureConfig) -> ObjectiveName:
        """With exchanges kl: so many sets are compared that perplexity of a short text would fit to
        its chances."""
        return "kl" if self.objective == "auto" and self.refined(config) else super().scored(config)


@depth_method(
    "blockpruner",
    title="BlockPruner: attention and MLP branches, greedily by perplexity",
    paper="arXiv 2406.10594",
    options=BlockPrunerOptions,
)
def blockpruner(task: DepthTask) -> DepthDecision:
    """Candidates in the order of the paper's code, by which ties go: attention branches by
    ascending layer, then MLPs; then pairs.

    Neither pairs nor rates are the paper's (`-O compare=score` is). Two neighbours can cost less
    together than the sum of what either costs alone, and a pair is a whole layer less once
    re-packed.
    """
    graph, config = task.graph, task.config
    options: BlockPrunerOptions = config.own_options()
    layers = range(options.protect_first, len(graph.layouts) - options.protect_last)
    kinds = ("attention", "mlp") if options.blocks in ("mixed", "pairs") else (options.blocks,)
    inner = [b for b in graph.branches if b.layer in layers and config.allows(b)]
    allowed = [b for kind in kinds for b in inner if b.kind == kind]
    units = units_of(allowed, layers=False)
    if options.blocks == "pairs":
        if config.counted:
            raise UserError(
                "method_options: blockpruner blocks: expected a share of parameters or latency "
                "with pairs, got a count"
            )
        units += neighbours(allowed)
    if options.refined(config) and config.counted:
        raise UserError(
            "method_options: blockpruner refine: expected a share of parameters or latency with "
            "exchange, got a count"
        )
    search = Greedy(task, options, units)
    limit, margin = options.exchange_limit, options.margin
    refine = partial(refined, allowed=allowed, limit=limit, margin=margin)
    return search.decision(refine if options.refined(config) else None)


def neighbours(branches: Collection[Branch]) -> list[Unit]:
    """Pairs of `branches` that follow each other, in order: an attention and its MLP, or an MLP and
    the next layer's attention."""
    ordered = sorted(branches, key=lambda branch: branch.position)
    return [(a, b) for a, b in pairwise(ordered) if b.position == a.position + 1]
