"""What methods that remove whole layers in one go have in common: each is a function from a model
to what goes and why, in a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from pyprune.calibration.tokens import Batch, TokenSet
from pyprune.depth.addons import AddOns, apply_add_ons, check_add_ons
from pyprune.depth.budget import Budget, parameter_count, units_of
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import Decision, Step, calibration_facts, name_of
from pyprune.depth.given import Given
from pyprune.depth.graph import KINDS, Branch, ResidualGraph
from pyprune.depth.registry import depth_method
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.progress import Progress

# Told the layers removed so far: whether that is enough.
Enough = Callable[[Sequence[int]], bool]
Choose = Callable[[ResidualGraph, Sequence[Batch], Any, Enough, Progress | None], "LayerChoice"]
Function = TypeVar("Function", bound=Choose)


@dataclass(frozen=True)
class LayerChoice:
    """removed: layers, in order. importance: per layer, larger = keep, in units of `objective`;
    empty where a method ranks windows. transforms: what was changed in the weights that stay."""

    removed: tuple[int, ...]
    objective: str
    importance: tuple[float, ...] = ()
    transforms: tuple[dict[str, Any], ...] = ()


def layer_method(
    name: str, *, title: str, paper: str, options: type
) -> Callable[[Function], Function]:
    """Registers the decorated function as a row of the table of methods."""

    def register(choose: Function) -> Function:
        depth_method(name, title=title, paper=paper, options=options, unit="layer")(
            partial(_search, name, choose)
        )
        return choose

    return register


def _search(
    name: str,
    choose: Choose,
    model: Any,
    adapter: Adapter,
    tokens: TokenSet,
    config: StructureConfig,
    progress: Progress | None = None,
) -> Decision:
    """What `choose` removes, as a decision."""
    graph = ResidualGraph(model, adapter)
    graph.check()
    check_add_ons(graph, config.own_options())
    units = units_of(graph.branches, layers=True)
    batches = [batch.to(graph.device) for batch in tokens.batches]
    budget = Budget.of(graph, config, units, batches[0])
    size = parameter_count(model)

    def enough(removed: Sequence[int]) -> bool:
        return budget.reached([units[i] for i in removed])

    choice = choose(graph, batches, config.own_options(), enough, progress)
    steps: list[Step] = []
    for i in choice.removed:
        gone = [branch for step in steps for branch in step.unit] + [*units[i]]
        score = choice.importance[i] if choice.importance else None
        steps.append(Step(units[i], score, size - graph.removed_parameters(gone)))
    return Decision(
        method=name,
        unit="layer",
        layers=len(units),
        steps=tuple(steps),
        objective=choice.objective,
        importance=dict(zip(map(name_of, units), choice.importance, strict=False)),
        calibration=calibration_facts(tokens),
        config=config.to_dict(),
        transforms=choice.transforms,
    )


def first_enough(order: Sequence[int], enough: Enough, layers: int) -> tuple[int, ...]:
    """The shortest beginning of `order` that is enough and leaves a layer."""
    for count in range(1, min(len(order), layers - 1) + 1):
        if enough(order[:count]):
            return tuple(order[:count])
    raise too_much(min(len(order), layers - 1), layers)


def too_much(most: int, layers: int) -> UserError:
    return UserError(
        f"expected a target within reach of the {most} of {layers} layers that may go, got more"
    )


def with_add_ons(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: AddOns,
    removed: tuple[int, ...],
    objective: str,
    importance: Tensor | None,
    given: Given | None = None,
) -> LayerChoice:
    values = () if importance is None else tuple(importance.tolist())
    gone = [Branch(kind, i) for i in removed for kind in KINDS]
    done = apply_add_ons(graph, gone, batches, options, given)
    return LayerChoice(removed, objective, values, done)
