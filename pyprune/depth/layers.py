"""Methods that remove whole layers: one function each, from a model to what goes and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyprune.calibration.tokens import Batch
from pyprune.depth import addons, criteria
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.hidden import angular_distances, block_influence, token_states
from pyprune.depth.laco import Merge, collapse
from pyprune.depth.segments import fisher_partition, group_count, linear_cka, segment_order
from pyprune.depth.streamline import Start, replace_window, window_similarity
from pyprune.errors import UserError

# Told the layers removed so far: whether that is enough.
Enough = Callable[[Sequence[int]], bool]
Say = Callable[[str, float, float | None], None] | None


@dataclass(frozen=True)
class LayerChoice:
    """removed: layers, in order. importance: per layer, larger = keep, in units of `objective`;
    empty where a method ranks windows. transforms: what was changed in the weights that stay."""

    removed: tuple[int, ...]
    objective: str
    importance: tuple[float, ...] = ()
    transforms: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class AddOns:
    """compensate: scale what comes before a gap to the size after it (Prune&Comp). refit: fit the
    MLP before a gap to the stream after it by least squares (ReplaceMe), with a ridge of `ridge`
    times the mean squared MLP output, towards no change. With both, the refit comes first and
    compensation is left to gaps that have no MLP before them."""

    compensate: bool = False
    refit: bool = False
    ridge: float = 1e-3


@dataclass(frozen=True)
class ShortGptOptions(AddOns):
    """keep_first, keep_last: layers at the ends that stay. And the add-ons `compensate`, `refit`,
    `ridge`."""

    keep_first: int = 0
    keep_last: int = 0


@dataclass(frozen=True)
class ShortenedOptions(AddOns):
    """criterion: ppl, taylor or magnitude. plus: the first four and last two layers go last. And
    the add-ons."""

    criterion: Literal["ppl", "taylor", "magnitude"] = "ppl"
    plus: bool = True


@dataclass(frozen=True)
class SegmentOptions(AddOns):
    """segments: how many; None: as many as lower the loss by more than 5 % each, up to
    `most`. tokens: for the CKA. criterion: within a segment: ppl, influence or taylor. And the
    add-ons."""

    segments: int | None = None
    most: int = 7
    tokens: int = 256
    criterion: Literal["ppl", "influence", "taylor"] = "ppl"


@dataclass(frozen=True)
class LacoOptions:
    """fold: layers that become one. interval, lowest, highest, threshold, merge: see
    `pyprune.depth.laco.collapse`. sentences: calibration sequences that are compared."""

    fold: int = 4
    interval: int = 1
    lowest: int = 0
    highest: int | None = None
    threshold: float = 0.65
    merge: Merge = "rdsc"
    sentences: int = 5


@dataclass(frozen=True)
class StreamlineOptions:
    """epochs over the calibration text; 0 only initialises. learning_rate: at its peak. start:
    weights that the replacement begins with: first, last or best of the window."""

    epochs: int = 1
    learning_rate: float = 2e-4
    start: Start = "best"


def shortgpt(
    graph: ResidualGraph, batches: Sequence[Batch], options: ShortGptOptions, enough: Enough
) -> LayerChoice:
    """ShortGPT: the layers of least Block Influence, at once."""
    if min(options.keep_first, options.keep_last) < 0:
        raise UserError("keep_first, keep_last: expected 0 or more")
    influence = block_influence(graph.adapter, batches)
    layers = len(influence)
    free = range(options.keep_first, layers - options.keep_last)
    order = [i for i in criteria.removal_order(influence) if i in free]
    removed = _first(order, enough, layers)
    return _with_add_ons(graph, batches, options, removed, "1 - cosine", influence)


def angular(
    graph: ResidualGraph, batches: Sequence[Batch], options: AddOns, enough: Enough
) -> LayerChoice:
    """Gromov et al.: the window of consecutive layers of least angular distance, the smallest
    width that is enough; never the whole model. Ties go to the lower window."""
    layers = len(graph.layouts)
    for width in range(1, layers):
        distances = angular_distances(graph.adapter, batches, width)
        start = int(distances.argmin())
        removed = tuple(range(start, start + width))
        if enough(removed):
            return _with_add_ons(graph, batches, options, removed, "angle / pi", None)
    raise _too_much(layers - 1, layers)


def shortened(
    graph: ResidualGraph, batches: Sequence[Batch], options: ShortenedOptions, enough: Enough
) -> LayerChoice:
    """Shortened LLaMA: a ranking of single layers by what their removal, or their weights, say."""
    importance = _criterion(graph, batches, options.criterion)
    order = criteria.removal_order(importance, plus=options.plus)
    removed = _first(order, enough, len(order))
    return _with_add_ons(graph, batches, options, removed, options.criterion, importance)


def segments(
    graph: ResidualGraph, batches: Sequence[Batch], options: SegmentOptions, enough: Enough
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
    return LayerChoice(
        choice.removed, choice.objective, choice.importance, (*choice.transforms, found)
    )


def reverse(
    graph: ResidualGraph, batches: Sequence[Batch], options: AddOns, enough: Enough
) -> LayerChoice:
    """The last layers, last first: the baseline to beat."""
    importance = criteria.reverse(len(graph.layouts))
    removed = _first(criteria.removal_order(importance), enough, len(importance))
    return _with_add_ons(graph, batches, options, removed, "depth from the end", importance)


def laco(
    graph: ResidualGraph, batches: Sequence[Batch], options: LacoOptions, enough: Enough
) -> LayerChoice:
    """LaCo: folds until it is enough. UserError if the threshold ends it before that."""
    few = _sequences(batches, options.sentences)
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
    )
    removed = tuple(i for fold in folds for i in fold.removed)
    if not removed or not enough(removed):
        raise UserError(
            f"LaCo: expected to remove more, but only {len(removed)} layers could be folded at a "
            f"similarity above {options.threshold:g}; a lower threshold or another fold may do"
        )
    transforms = tuple({"kind": "fold", "merge": options.merge, **asdict(f)} for f in folds)
    return LayerChoice(removed, "cosine of final states", (), transforms)


def streamline(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: StreamlineOptions,
    enough: Enough,
    say: Say = None,
) -> LayerChoice:
    """LLM-Streamline: of the windows of n + 1 layers the one that changes direction least becomes
    one trained layer; the smallest n that is enough. Ties go to the lower window."""
    layers = len(graph.layouts)
    for n in range(1, layers):
        start = int(window_similarity(graph, batches, n + 1).argmax())
        removed = tuple(range(start + 1, start + 1 + n))
        if not enough(removed):
            continue
        result = replace_window(
            graph,
            batches,
            start,
            start + 1 + n,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            final_rate=options.learning_rate / 4,
            start=options.start,
            say=say,
        )
        return LayerChoice(
            removed, "cosine of windows", (), ({"kind": "replacement", **asdict(result)},)
        )
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
    return UserError(f"expected a target that at most {most} of {layers} layers reach, got more")


def _with_add_ons(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: AddOns,
    removed: tuple[int, ...],
    objective: str,
    importance: Tensor | None,
) -> LayerChoice:
    transforms: list[dict[str, Any]] = []
    left = set(removed)
    found = addons.gaps(removed, len(graph.layouts))
    if options.compensate and options.refit:
        left = {i for start, end in found if start == 0 for i in range(start, end)}
    if options.compensate and left:
        factors = addons.compensate(graph, left, batches)
        transforms.append({"kind": "compensate", "factors": factors})
    if options.refit:
        fits = addons.refit(graph, removed, batches, options.ridge)
        transforms += [{"kind": "refit", **fit} for fit in fits]
    values = () if importance is None else tuple(importance.tolist())
    return LayerChoice(removed, objective, values, tuple(transforms))


def _sequences(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first `count` sequences."""
    if count < 1:
        raise UserError(f"sentences: expected at least 1, got {count}")
    few: list[Batch] = []
    for batch in batches:
        room = count - sum(len(b.input_ids) for b in few)
        if room > 0:
            mask = batch.attention_mask
            few.append(Batch(batch.input_ids[:room], None if mask is None else mask[:room]))
    return few


def moved(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """The batches on `device`."""
    return [
        Batch(*(None if x is None else x.to(device) for x in (b.input_ids, b.attention_mask)))  # type: ignore[arg-type]
        for b in batches
    ]  # fmt: skip
