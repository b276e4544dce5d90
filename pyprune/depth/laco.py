"""LaCo (arXiv 2402.11187): folding layers into one before them, as long as the output is alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from pyprune.calibration.tokens import Batch, first_sequences
from pyprune.depth.addons import OneAddOn
from pyprune.depth.criteria import run_layer
from pyprune.depth.given import Given
from pyprune.depth.graph import Context, ResidualGraph, State
from pyprune.depth.hidden import real_tokens
from pyprune.depth.layers import Enough, LayerChoice, LayerTask, layer_method
from pyprune.errors import UserError
from pyprune.methods.options import Count

Merge = Literal["rdsc", "last", "mean"]


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
    sentences: Count = 5


@layer_method(
    "laco",
    title="LaCo: layers folded into one before them",
    paper="arXiv 2402.11187",
    options=LacoOptions,
)
def laco(task: LayerTask) -> LayerChoice:
    """LaCo: folds until it is enough. UserError if the threshold ends it before that.

    The add-ons come after the search, which folds and accepts as published, and use all of the
    text. A gap is what was folded into the layer before it. refit: the MLP of that layer, as
    merged, is fitted to the stream that the last folded layer gave in the model as given.
    compensate: the size of that stream over the size of the merged layer's output.
    """
    options: LacoOptions = task.options
    few = first_sequences(task.batches, options.sentences)
    given = Given() if options.wanted else None
    folds = collapse(task.graph, few, options, task.enough, given)
    removed = tuple(i for fold in folds for i in fold.removed)
    if not removed or not task.enough(removed):
        raise UserError(
            f"LaCo: expected to remove more, but only {len(removed)} layers could be folded at a "
            f"similarity above {options.threshold:g}; a lower threshold or another fold may do"
        )
    transforms = tuple({"kind": "fold", "merge": options.merge, **asdict(f)} for f in folds)
    return LayerChoice(removed, "cosine of final states", (), transforms, given)


@dataclass(frozen=True)
class Fold:
    """The `removed` layers went into `layer`; similarity: afterwards, mean cosine of the
    output with the original model's."""

    layer: int
    removed: tuple[int, ...]
    similarity: float


def merged(own: Tensor, later: Sequence[Tensor], merge: Merge) -> Tensor:
    """The matrix that stands for `own` and `later`, in that order.

    rdsc: own + sum(later - own), the paper's equation 1. last: the last one, which is what the
    published code computes, since it subtracts the matrix that it is changing, so that the sum
    telescopes. mean: of all. For one later matrix rdsc and last agree.
    """
    if merge == "last":
        return later[-1].clone()
    total = torch.stack([w.double() for w in later]).sum(0)
    if merge == "mean":
        return ((own.double() + total) / (len(later) + 1)).to(own.dtype)
    return (own.double() + total - len(later) * own.double()).to(own.dtype)


@torch.no_grad()
def collapse(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    options: LacoOptions,
    enough: Enough | None = None,
    given: Given | None = None,
) -> list[Fold]:
    """Folds in place, from the top down; the layers named as removed must be removed afterwards.

    Of the paper's symbols C is `options.fold` (m = C - 1 layers go), I is `interval`, H is one more
    than `highest`, T is `threshold`: a fold is kept if its similarity, the mean over sequences of
    the cosine between flattened final (normed) states, padding excluded, is above it. enough: told
    all removed layers, whether to stop. Norms are never merged. The prefix up to a folded layer is
    always the original, so it runs once for all trials, and no model is copied. given: is told the
    weights that the accepted folds changed, as they were.
    """
    layers = len(graph.layouts)
    fold, interval, lowest = options.fold, options.interval, options.lowest
    top = layers - 1 if options.highest is None else options.highest
    if fold < 2 or interval < 1 or not 0 <= lowest <= top < layers:
        raise UserError(
            f"LaCo: expected fold >= 2, interval >= 1 and 0 <= lowest <= highest < {layers}, "
            f"got {fold}, {interval}, {lowest}, {top}"
        )
    runs = [_prefix(graph, batch) for batch in batches]
    left = list(range(layers))
    folds: list[Fold] = []
    at = top + 1 - fold
    while at >= lowest:
        gone = left[at + 1 : at + fold]
        if not gone:
            at -= 1
            continue
        layer = left[at]
        matrices = _matrices(graph, layer)
        old = [p.clone() for p in matrices]
        _merge_into(graph, layer, gone, options.merge)
        rest = [i for i in left[at:] if i not in gone]
        similarity = _similarity(graph, runs, layer, rest)
        if not similarity > options.threshold:
            for parameter, value in zip(matrices, old, strict=True):
                parameter.copy_(value)
            at -= 1
            continue
        if given is not None:
            given.hold(matrices, old)
        folds.append(Fold(layer, tuple(gone), similarity))
        left = [i for i in left if i not in gone]
        if enough is not None and enough(sorted(set(range(layers)) - set(left))):
            break
        at -= interval
        if at >= len(left):
            at = len(left) - 1 - fold
    return folds


@dataclass(frozen=True)
class _Run:
    """Of the original model on one batch: the states before every layer, and its final one."""

    batch: Batch
    context: Context
    states: list[State]
    final: list[Tensor]


def _prefix(graph: ResidualGraph, batch: Batch) -> _Run:
    state, context = graph.start(batch)
    states = []
    for layer in range(len(graph.layouts)):
        states.append(state)
        state = run_layer(graph, layer, state, context)
    return _Run(batch, context, states, _final(graph, state.total, batch))


def _final(graph: ResidualGraph, hidden: Tensor, batch: Batch) -> list[Tensor]:
    """One flat vector per sequence."""
    finished = graph.finish(hidden, batch)
    rows = []
    for i in range(len(finished)):
        here = slice(i, i + 1)
        rows.append(real_tokens(finished[here], batch.rows(here)).double().flatten())
    return rows


def _similarity(graph: ResidualGraph, runs: list[_Run], layer: int, rest: list[int]) -> float:
    cosines = []
    for run in runs:
        state = run.states[layer]
        for i in rest:
            state = run_layer(graph, i, state, run.context)
        for ours, theirs in zip(
            _final(graph, state.total, run.batch), run.final, strict=True
        ):  # of each sequence
            cosines.append(float(F.cosine_similarity(ours, theirs, dim=0)))
    return sum(cosines) / len(cosines)


def _matrices(graph: ResidualGraph, layer: int) -> list[Tensor]:
    """Weights and biases of the layer's linear maps (fused experts too), no norms."""
    found: list[Tensor] = []
    for module in graph.adapter.blocks[layer].modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear | Conv1D) or any(p.dim() > 1 for p in own):
            found += own
    return found


def _merge_into(graph: ResidualGraph, layer: int, gone: list[int], merge: Merge) -> None:
    own = _matrices(graph, layer)
    others = [_matrices(graph, i) for i in gone]
    shapes = [[p.shape for p in ps] for ps in (own, *others)]
    if any(s != shapes[0] for s in shapes):
        raise UserError(f"LaCo: layers {layer} and {gone} are built differently: cannot be merged")
    for i, parameter in enumerate(own):
        parameter.copy_(merged(parameter, [ps[i] for ps in others], merge))
