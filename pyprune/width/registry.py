"""The table of methods that narrow layers; what `pyprune.depth.registry` is for depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyprune.errors import UserError
from pyprune.registry import MethodRow, MethodTable

if TYPE_CHECKING:
    from pyprune.calibration.tokens import TokenSet
    from pyprune.progress import Progress
    from pyprune.width.config import WidthConfig
    from pyprune.width.decision import WidthDecision

Prune = Callable[..., "WidthDecision"]

# Modules of pyprune.width that register methods, one a line.
MODULES = (
    "wanda_sp",
    "flap",
    "multipruner",
    "slicegpt",
    "disp",
    "surgeon",
)


@dataclass(frozen=True)
class WidthMethod(MethodRow):
    """A row of the table.

    prune: `(model, tokens, config, progress) -> WidthDecision`. It changes the model in place and
        leaves it such that it saves and loads as an ordinary one of its family.
    in_shots: `prune` also takes `state`, the directory of what it needs to go on after its last
        shot, or None.
    """

    prune: Prune
    in_shots: bool = False


WIDTH_METHODS: MethodTable[WidthMethod] = MethodTable("pyprune.width", MODULES)


def width_method(
    name: str, *, title: str, paper: str, options: type, removes: str, in_shots: bool = False
) -> Callable[[Prune], Prune]:
    """Registers the decorated function under `name`."""

    def register(prune: Prune) -> Prune:
        WIDTH_METHODS.add(WidthMethod(name, title, paper, options, removes, prune, in_shots))
        return prune

    return register


def run_width(
    model: Any,
    tokens: TokenSet,
    config: WidthConfig,
    progress: Progress | None = None,
    state: str | Path | None = None,
) -> WidthDecision:
    """Runs the method that `config` names on a model in memory, which is narrower afterwards.
    state: see `WidthMethod`; UserError for a method that is not in shots. Where it finds NaN or
    infinity, the error says after which module of the model they begin."""
    from pyprune.depth.finite import NotFiniteError, located
    from pyprune.depth.graph import ResidualGraph
    from pyprune.models.adapter import Adapter

    method = WIDTH_METHODS.find(config.method)
    if state is not None and not method.in_shots:
        raise UserError(f"state: {config.method} is not pruned in shots, expected none")
    more = {"state": state} if method.in_shots else {}
    try:
        return method.prune(model, tokens, config, progress, **more)
    except NotFiniteError as error:
        graph = ResidualGraph(model, Adapter.of(model))
        raise located(error, graph, tokens.batches) from error
