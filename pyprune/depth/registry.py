"""The table of methods that remove branches and layers.

A module of this package adds itself with one `@depth_method(...)` line; its name in `MODULES` is
what makes it known without importing torch's models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyprune.registry import MethodRow, MethodTable

if TYPE_CHECKING:
    from pyprune.calibration.tokens import TokenSet
    from pyprune.depth.config import StructureConfig
    from pyprune.depth.decision import DepthDecision, Step
    from pyprune.depth.graph import ResidualGraph
    from pyprune.models.adapter import Adapter
    from pyprune.progress import Progress

# Modules of pyprune.depth that register methods, one a line.
MODULES = (
    "blockpruner",
    "sleb",
    "llmdrop",
    "shortgpt",
    "angular",
    "shortened_llama",
    "segments",
    "reverse",
    "laco",
    "streamline",
)
UNITS = {"block": "attention and MLP branches", "layer": "layers"}


@dataclass(frozen=True)
class DepthTask:
    """What a method is given. graph: of the model, checked. progress: told what happens."""

    graph: ResidualGraph
    tokens: TokenSet
    config: StructureConfig
    progress: Progress | None = None

    def decision(self, steps: Sequence[Step], **found: Any) -> DepthDecision:
        """The method's, with what is said of every run. found: other fields of it."""
        from pyprune.depth.decision import DepthDecision, calibration_facts

        return DepthDecision(
            method=self.config.method,
            unit=DEPTH_METHODS.find(self.config.method).unit,
            layers=len(self.graph.layouts),
            steps=tuple(steps),
            calibration=calibration_facts(self.tokens),
            config=self.config.to_dict(),
            **found,
        )


Search = Callable[[DepthTask], "DepthDecision"]


@dataclass(frozen=True)
class DepthMethod(MethodRow):
    """A row of the table.

    search: may change kept weights in place (and says so in `DepthDecision.transforms`), never the
        structure: removing what the decision lists is the caller's (`ResidualGraph.skipping`,
        `drop_layers`).
    unit: "block" (a branch) or "layer", what `count` counts.
    """

    search: Search
    unit: str


DEPTH_METHODS: MethodTable[DepthMethod] = MethodTable("pyprune.depth", MODULES)


def depth_method(
    name: str, *, title: str, paper: str, options: type, unit: str = "block"
) -> Callable[[Search], Search]:
    """Registers the decorated search function under `name`."""

    def register(search: Search) -> Search:
        DEPTH_METHODS.add(DepthMethod(name, title, paper, options, UNITS[unit], search, unit))
        return search

    return register


def run_search(
    model: Any,
    adapter: Adapter,
    tokens: TokenSet,
    config: StructureConfig,
    progress: Progress | None = None,
) -> DepthDecision:
    """Runs the method that `config` names on a model in memory. Where it finds NaN or infinity, the
    error says after which module of the model they begin."""
    from pyprune.depth.finite import NotFiniteError, located
    from pyprune.depth.graph import ResidualGraph

    search = DEPTH_METHODS.find(config.method).search
    graph = ResidualGraph(model, adapter)
    graph.check()
    try:
        return search(DepthTask(graph, tokens, config, progress))
    except NotFiniteError as error:
        raise located(error, graph, tokens.batches) from error
