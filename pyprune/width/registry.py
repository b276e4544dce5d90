"""The table of methods that narrow layers; what `pyprune.depth.registry` is for depth."""

from __future__ import annotations

import math
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
class WidthTask:
    """What a method is given. model: to be changed in place; parameters: that it has before.
    progress: told what happens. state: for methods in shots the directory of what they need to go
    on after the last one, or None."""

    model: Any
    tokens: TokenSet
    config: WidthConfig
    parameters: int
    progress: Progress | None = None
    state: str | Path | None = None

    @property
    def target(self) -> int:
        """Parameters that have to go at least."""
        return math.ceil(self.config.ratio * self.parameters)

    def decision(self, after: int, **found: Any) -> WidthDecision:
        """The method's, with what is said of every run. after: parameters that the model has now.
        found: other fields of it."""
        from pyprune.depth.decision import calibration_facts
        from pyprune.width.decision import WidthDecision

        return WidthDecision(
            method=self.config.method,
            parameters=(self.parameters, after),
            calibration=calibration_facts(self.tokens),
            config=self.config.to_dict(),
            **found,
        )


Prune = Callable[[WidthTask], "WidthDecision"]


@dataclass(frozen=True)
class WidthMethod(MethodRow):
    """A row of the table.

    prune: changes the model in place and leaves it such that it saves and loads as an ordinary one
        of its family.
    in_shots: whether it uses `WidthTask.state`.
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
    from pyprune.models.stock import parameter_count

    method = WIDTH_METHODS.find(config.method)
    if state is not None and not method.in_shots:
        raise UserError(f"state: {config.method} is not pruned in shots, expected none")
    task = WidthTask(model, tokens, config, parameter_count(model), progress, state)
    try:
        return method.prune(task)
    except NotFiniteError as error:
        graph = ResidualGraph(model, Adapter.of(model))
        raise located(error, graph, tokens.batches) from error
