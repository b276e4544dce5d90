"""LaCo (arXiv 2402.11187): folding layers into one before them, as long as the output is alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from pyprune.calibration.tokens import Batch
from pyprune.depth.criteria import run_layer
from pyprune.depth.given import Given
from pyprune.depth.graph import Context, ResidualGraph, State
from pyprune.depth.hidden import real_tokens
from pyprune.errors import UserError

Merge = Literal["rdsc", "last", "mean"]


@dataclass(frozen=True)
class Fold:
    """Layers `layer` + 1 .. `last` (those still there) went into `layer`; similarity: afterwards,
    mean cosine of the output with the original model's."""

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
    *,
    fold: int = 4,
    interval: int = 1,
    lowest: int = 0,
    highest: int | None = None,
    threshold: float = 0.65,
    merge: Merge = "rdsc",
    enough: Callable[[list[int]], bool] | None = None,
    given: Given | None = None,
) -> list[Fold]:
    """Folds in place, from the top down; the layers named as removed must be removed afterwards.

    fold: layers that become one (C of the paper; m = C - 1 go). interval: layers to step down
    after an accepted fold (I). lowest, highest: range of layers, both included (highest None: the
    last; the paper's H is one more).
    threshold: T; a fold is kept if its similarity, the mean over sequences of the cosine between
    flattened final (normed) states, padding excluded, is above it. enough: told all removed layers,
    whether to stop. Norms are never merged. The prefix up to a folded layer is always the original,
    so it runs once for all trials, and no model is copied. given: is told the weights that the
    accepted folds changed, as they were.
    """
    layers = len(graph.layouts)
    top = layers - 1 if highest is None else highest
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
        _merge_into(graph, layer, gone, merge)
        rest = [i for i in left[at:] if i not in gone]
        similarity = _similarity(graph, runs, layer, rest)
        if not similarity > threshold:
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
