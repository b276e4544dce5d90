"""What methods that remove whole layers in one go have in common: each is a function from a model
to what goes and why, in a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any

from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import apply_add_ons, check_add_ons
from pyprune.depth.budget import Budget, branches_of, units_of
from pyprune.depth.decision import DepthDecision, Step, name_of
from pyprune.depth.given import Given
from pyprune.depth.graph import KINDS, Branch, ResidualGraph
from pyprune.depth.registry import DepthTask, depth_method
from pyprune.errors import UserError
from pyprune.models.stock import parameter_count
from pyprune.progress import Progress

# Told the layers removed so far: whether that is enough.
Enough = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class LayerTask:
    """What a method is given. batches: on the model's device. options: its own. progress: told what
    happens."""

    graph: ResidualGraph
    batches: Sequence[Batch]
    options: Any
    enough: Enough
    progress: Progress | None = None

    def first_enough(self, order: Sequence[int]) -> tuple[int, ...]:
        """The shortest beginning of `order` that is enough and leaves a layer."""
        most = min(len(order), len(self.graph.layouts) - 1)
        for count in range(1, most + 1):
            if self.enough(order[:count]):
                return tuple(order[:count])
        raise too_much(most, len(self.graph.layouts))


@dataclass(frozen=True)
class LayerChoice:
    """removed: layers, in order. importance: per layer, larger = keep, in units of `objective`;
    empty where a method ranks windows. transforms: what was changed in the weights that stay.
    given: their values from before, for the add-ons."""

    removed: tuple[int, ...]
    objective: str
    importance: tuple[float, ...] = ()
    transforms: tuple[dict[str, Any], ...] = ()
    given: Given | None = field(default=None, compare=False)


Choose = Callable[[LayerTask], LayerChoice]


def layer_method(name: str, *, title: str, paper: str, options: type) -> Callable[[Choose], Choose]:
    """Registers the decorated function as a row of the table of methods; the add-ons come after
    it."""

    def register(choose: Choose) -> Choose:
        @wraps(choose)
        def complete(task: LayerTask) -> LayerChoice:
            choice = choose(task)
            gone = [Branch(kind, i) for i in choice.removed for kind in KINDS]
            done = apply_add_ons(task.graph, gone, task.batches, task.options, choice.given)
            return replace(choice, transforms=choice.transforms + done)

        depth_method(name, title=title, paper=paper, options=options, unit="layer")(
            partial(_search, complete)
        )
        return complete

    return register


def _search(choose: Choose, task: DepthTask) -> DepthDecision:
    """What `choose` removes, as a decision."""
    graph, options = task.graph, task.config.own_options()
    check_add_ons(graph, options)
    units = units_of(graph.branches, layers=True)
    batches = [batch.to(graph.device) for batch in task.tokens.batches]
    budget = Budget.of(graph, task.config, units, batches[0])
    size = parameter_count(graph.model)

    def enough(removed: Sequence[int]) -> bool:
        return budget.reached(branches_of(units[i] for i in removed))

    choice = choose(LayerTask(graph, batches, options, enough, task.progress))
    gone: list[Branch] = []
    steps: list[Step] = []
    for i in choice.removed:
        gone += units[i]
        score = choice.importance[i] if choice.importance else None
        steps.append(Step(units[i], score, size - graph.removed_parameters(gone)))
    return task.decision(
        steps,
        objective=choice.objective,
        importance=dict(zip(map(name_of, units), choice.importance, strict=False)),
        transforms=choice.transforms,
    )


def too_much(most: int, layers: int) -> UserError:
    return UserError(
        f"expected a target within reach of the {most} of {layers} layers that may go, got more"
    )
