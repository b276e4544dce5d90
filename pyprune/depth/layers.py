"""Methods that remove whole layers in one go: a function each, from a model to what goes and why,
and a row in the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor

from pyprune.calibration.tokens import Batch, TokenSet, first_sequences
from pyprune.depth import criteria
from pyprune.depth.addons import AddOns, OneAddOn, apply_add_ons, check_add_ons
from pyprune.depth.budget import Budget, parameter_count, units_of
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import Decision, Step, calibration_facts, name_of
from pyprune.depth.given import Given
from pyprune.depth.graph import KINDS, Branch, ResidualGraph
from pyprune.depth.hidden import angular_distances, block_influence, token_states
from pyprune.depth.laco import Merge, collapse
from pyprune.depth.registry import depth_method
from pyprune.depth.segments import fisher_partition, group_count, linear_cka, segment_order
from pyprune.depth.streamline import Start, replace_window, window_similarity
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


@dataclass(frozen=True)
class ShortGptOptions(AddOns):
    """keep_first, keep_last: layers at the ends that stay. And the add-ons `compensate`, `refit`,
    `ridge`."""

    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.keep_first, self.keep_last) < 0:
            raise UserError(
                f"keep_first, keep_last: expected 0 or more, got {self.keep_first} and "
                f"{self.keep_last}"
            )


@dataclass(frozen=True)
class ShortenedOptions(AddOns):
    """criterion: what a layer is worth: ppl (the perplexity without it), taylor or magnitude.
    plus: the first four and last two layers go last. And the add-ons."""

    criterion: Literal["ppl", "taylor", "magnitude"] = "ppl"
    plus: bool = True


@dataclass(frozen=True)
class SegmentOptions(AddOns):
    """segments: how many; none: as many as lower the loss by more than 5 % each. most: of them,
    with none. tokens: that the CKA looks at. criterion: within a segment: ppl, influence or taylor.
    And the add-ons."""

    segments: int | None = None
    most: int = 7
    tokens: int = 256
    criterion: Literal["ppl", "influence", "taylor"] = "ppl"


@dataclass(frozen=True)
class LacoOptions(OneAddOn):
    """fold: layers that become one. interval: layers to step down after a fold. lowest, highest:
    the range of layers that may go or be folded into, both included; none: the last. threshold: the
    least similarity of the final states, before and after, at which a fold is kept. merge: what
    becomes of the weights: rdsc (the first layer's and all differences from it, the paper's
    equation), last (the last layer's) or mean. sentences: calibration sequences that are compared.
    And one of the add-ons `compensate` and `refit` (with `ridge`), see `laco`."""

    fold: int = 4
    interval: int = 1
    lowest: int = 0
    highest: int | None = None
    threshold: float = 0.65
    merge: Merge = "rdsc"
    sentences: int = 5


@dataclass(frozen=True)
class StreamlineOptions(OneAddOn):
    """epochs: over the calibration text; 0 only initialises. learning_rate: at its peak. start:
    weights that the replacement begins with: first, last or best of the window. epochs=0 with
    start=first is plain pruning. And one of the add-ons `compensate` and `refit` (with `ridge`),
    see `streamline`."""

    epochs: int = 1
    learning_rate: float = 2e-4
    start: Start = "best"


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


@layer_method(
    "shortgpt",
    title="ShortGPT: layers of least Block Influence",
    paper="arXiv 2403.03853",
    options=ShortGptOptions,
)
def shortgpt(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: ShortGptOptions,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """ShortGPT: the layers of least Block Influence, at once."""
    layers = len(graph.layouts)
    free = range(options.keep_first, layers - options.keep_last)
    if len(free) < layers and not enough(free):
        raise _too_much(len(free), layers)  # before the model runs for it
    influence = block_influence(graph.adapter, batches)
    order = [i for i in criteria.removal_order(influence) if i in free]
    removed = _first(order, enough, layers)
    return _with_add_ons(graph, batches, options, removed, "1 - cosine", influence)


@layer_method(
    "angular",
    title="Window of layers of least angular distance",
    paper="arXiv 2403.17887",
    options=AddOns,
)
def angular(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: AddOns,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """Gromov et al.: the window of consecutive layers of least angular distance, the smallest
    width that is enough; never the whole model. Ties go to the lower window."""
    layers = len(graph.layouts)
    distances = angular_distances(graph.adapter, batches)
    for width in range(1, layers):
        start = int(distances.diagonal(width).argmin())
        removed = tuple(range(start, start + width))
        if enough(removed):
            return _with_add_ons(graph, batches, options, removed, "angle / pi", None)
    raise _too_much(layers - 1, layers)


@layer_method(
    "shortened-llama",
    title="Shortened LLaMA: layers by perplexity, Taylor+ or magnitude+",
    paper="arXiv 2402.02834",
    options=ShortenedOptions,
)
def shortened(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: ShortenedOptions,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """Shortened LLaMA: a ranking of single layers by what their removal, or their weights, say."""
    importance = _criterion(graph, batches, options.criterion)
    order = criteria.removal_order(importance, plus=options.plus)
    removed = _first(order, enough, len(order))
    return _with_add_ons(graph, batches, options, removed, options.criterion, importance)


@layer_method(
    "segments",
    title="Generic layer pruning: CKA, Fisher partition, choice per segment",
    paper="arXiv 2406.07929",
    options=SegmentOptions,
)
def segments(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: SegmentOptions,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """Generic layer pruning: CKA between the layers' outputs, exact Fisher partition of its column
    sums, and the least important layers of each segment in turn."""
    states = token_states(graph.adapter, batches, options.tokens)[1:]
    values = linear_cka(states).sum(0)
    if options.segments is None:
        most = min(max(1, options.most), len(values))
        count = group_count(fisher_partition(values, most)[1])
    else:
        count = options.segments
    starts, _ = fisher_partition(values, count)
    importance = _criterion(graph, batches, options.criterion)
    removed = _first(segment_order(importance, starts), enough, len(values))
    choice = _with_add_ons(graph, batches, options, removed, options.criterion, importance)
    found = {"kind": "segments", "starts": starts}
    return replace(choice, transforms=(*choice.transforms, found))


@layer_method("reverse", title="Last layers first", paper="arXiv 2411.15558", options=AddOns)
def reverse(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: AddOns,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """The last layers, last first: the baseline to beat."""
    importance = criteria.reverse(len(graph.layouts))
    removed = _first(criteria.removal_order(importance), enough, len(importance))
    return _with_add_ons(graph, batches, options, removed, "depth from the end", importance)


@layer_method(
    "laco",
    title="LaCo: layers folded into one before them",
    paper="arXiv 2402.11187",
    options=LacoOptions,
)
def laco(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: LacoOptions,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """LaCo: folds until it is enough. UserError if the threshold ends it before that.

    The add-ons come after the search, which folds and accepts as published, and use all of the
    text. A gap is what was folded into the layer before it. refit: the MLP of that layer, as
    merged, is fitted to the stream that the last folded layer gave in the model as given.
    compensate: the size of that stream over the size of the merged layer's output.
    """
    if options.sentences < 1:
        raise UserError(f"sentences: expected at least 1, got {options.sentences}")
    few = first_sequences(batches, options.sentences)
    given = Given() if options.wanted else None
    folds = collapse(
        graph,
        few,
        fold=options.fold,
        interval=options.interval,
        lowest=options.lowest,
        highest=options.highest,
        threshold=options.threshold,
        merge=options.merge,
        enough=enough,
        given=given,
    )
    removed = tuple(i for fold in folds for i in fold.removed)
    if not removed or not enough(removed):
        raise UserError(
            f"LaCo: expected to remove more, but only {len(removed)} layers could be folded at a "
            f"similarity above {options.threshold:g}; a lower threshold or another fold may do"
        )
    transforms = tuple({"kind": "fold", "merge": options.merge, **asdict(f)} for f in folds)
    choice = _with_add_ons(graph, batches, options, removed, "cosine of final states", None, given)
    return replace(choice, transforms=(*transforms, *choice.transforms))


@layer_method(
    "llm-streamline",
    title="LLM-Streamline: a window replaced by one trained layer",
    paper="arXiv 2403.19135",
    options=StreamlineOptions,
)
def streamline(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: StreamlineOptions,
    enough: Enough,
    progress: Progress | None = None,
) -> LayerChoice:
    """LLM-Streamline: of the windows of n + 1 layers the one that changes direction least becomes
    one trained layer; the smallest n that is enough. Ties go to the lower window.

    The add-ons come after the training, for the n layers that the replacement stands before, and
    are measured against the model as given. refit: the replacement's MLP is fitted to what is left
    of the error that it was trained on, in closed form (the sequences that choose the ridge are
    held out of this fit, not of the training). compensate: the size of the window's output over
    that of the replacement's, which a mean squared error trains to be too small. Untrained, both
    are what they are for layers removed otherwise.
    """
    layers = len(graph.layouts)
    for n in range(1, layers):
        windows = [tuple(range(first, first + n)) for first in range(1, layers - n + 1)]
        if not any(map(enough, windows)):
            continue  # before the model runs for it
        start = int(window_similarity(graph, batches, n + 1).argmax())
        removed = windows[start]
        if not enough(removed):
            continue
        given = Given()
        if options.wanted:
            given.hold(list(graph.adapter.blocks[start].parameters()))
        result = replace_window(
            graph,
            batches,
            start,
            start + 1 + n,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            final_rate=options.learning_rate / 4,
            start=options.start,
            say=progress,
        )
        trained = {"kind": "replacement", **asdict(result)}
        choice = _with_add_ons(graph, batches, options, removed, "cosine of windows", None, given)
        return replace(choice, transforms=(trained, *choice.transforms))
    raise _too_much(layers - 1, layers)


def _criterion(graph: ResidualGraph, batches: Sequence[Batch], name: str) -> Tensor:
    if name == "ppl":
        return criteria.removal_losses(graph, batches).exp()
    if name == "taylor":
        return criteria.taylor(graph, batches)
    if name == "influence":
        return block_influence(graph.adapter, batches)
    return criteria.magnitude(graph)


def _first(order: Sequence[int], enough: Enough, layers: int) -> tuple[int, ...]:
    """The shortest beginning of `order` that is enough and leaves a layer."""
    for count in range(1, min(len(order), layers - 1) + 1):
        if enough(order[:count]):
            return tuple(order[:count])
    raise _too_much(min(len(order), layers - 1), layers)


def _too_much(most: int, layers: int) -> UserError:
    return UserError(
        f"expected a target within reach of the {most} of {layers} layers that may go, got more"
    )


def _with_add_ons(
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
