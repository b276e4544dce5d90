"""ReplaceMe (arXiv 2505.02819): the branch before a gap is fitted to the stream after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Conv1D

from pyprune.calibration.tokens import Batch
from pyprune.depth.given import Given
from pyprune.depth.graph import Branch, ResidualGraph, gaps
from pyprune.depth.heldout import Change, HeldOut, Part, least, parts_of, unchanged
from pyprune.depth.hidden import real_tokens
from pyprune.depth.ridge import LADDER, Moments, Solutions, check_ridge
from pyprune.depth.writers import writers
from pyprune.errors import UserError
from pyprune.models.experts import is_fused, is_transposed


@torch.no_grad()
def refit(
    graph: ResidualGraph,
    removed: Collection[Branch],
    batches: Sequence[Batch],
    ridge: float | None = None,
    given: Given | None = None,
    factors: Mapping[int, float] | None = None,
) -> list[dict[str, Any]]:
    """ReplaceMe (arXiv 2505.02819, section 3.2), for gaps of branches: what the branch before each
    gap p..q-1 adds is multiplied by the matrix T that minimises |M T - (x_q - u)|^2 +
    lambda |T - I|^2, in place. Before a gap of whole layers that branch is an MLP, as published.

    u: the stream before that branch and M what it adds, in the model as pruned (earlier gaps
    refitted); x_q: of the model as given. Padding excluded. The Gram matrix and the solve are
    float64; lambda = ridge x mean diagonal of M'M, and pulls to the identity (the paper pulls to
    zero). A gap with nothing before it is left, and so is one after a branch that adds nothing (the
    zeros of an earlier re-packing).

    ridge: None chooses it for each gap by the loss of held-out tokens in the model as pruned, later
    gaps as they are (`HeldOut`, `choose_ridge`); T = I is one of the choices. The squared error
    does not say what a map does to the model: rows count by their size, and a few huge states,
    which attention rests on, can be nearly all of it; fitting them can move all others away.
    Weighted by 1 / |x_q|^2 they come off worst instead. Perplexity rises both ways (measured).

    given: weights that a method has changed since; refitted ones are added to it. factors: of gaps
    that are compensated, by their first position: in the model as pruned the stream is multiplied
    there (`compensate` comes afterwards).

    Returns per gap {"branch", "removed", "ridge", "held_out", "before", "after"}: names; the ridge,
    None if T = I was best; [held-out loss of T = I, of the T that the other sequences give] (None
    if the ridge was given, and if no held-out token can be predicted: T = I then); relative squared
    errors of the stream at the gap's end on this text. The branches to remove must be removed
    afterwards.
    """
    check_ridge(ridge)
    found = [gap for gap in gaps(removed, len(graph.layouts)) if gap[0] > 0]
    gone = set(removed)
    for start, _ in found:
        writers(graph, graph.branches[start - 1])  # refused before anything is changed
    given = Given() if given is None else given
    parts = parts_of(batches)
    by_loss = found and ridge is None and HeldOut.predicted(parts)
    held_out = HeldOut(graph, parts, given) if by_loss else None
    report = []
    for start, end in found:
        last = graph.branches[start - 1]
        fitted, held, scale = moments_of(graph, gone, (start, end), parts, given, factors)
        both, used, losses = fitted + held, ridge, None
        change = None if ridge is None else both.solve(ridge)
        if held_out is not None:
            measure = partial(held_out.losses, start, gone, factors)
            used, change, losses = choose_ridge(fitted, held, measure)
        if change is None:
            change = torch.zeros_like(both.gram)
        given.hold(writers(graph, last))
        if change.any():
            multiply_branch(graph, last, change)
        report.append(
            {
                "branch": str(last),
                "removed": "+".join(map(str, graph.branches[start:end])),
                "ridge": used,
                "held_out": losses,
                "before": float(both.error) / scale,
                "after": both.error_of(change) / scale,
            }
        )
    return report


def choose_ridge(
    fitted: Moments, held: Moments, losses: Callable[[Sequence[Change]], list[float]]
) -> tuple[float | None, Tensor | None, list[float]]:
    """The ridge whose map, of the sequences that are not held out, has the least loss on those that
    are; W for it; the losses without a map and with that one. None, None where no map is better
    than none, which wins ties; of equals the larger ridge.

    W is made from all sequences unless that has a higher loss on the held-out ones, though it has
    seen them: so the loss there never rises.
    """
    if not fitted.unit > 0:
        none = losses([unchanged])
        return None, None, none * 2
    solutions = Solutions(fitted)
    found = losses([unchanged, *(partial(solutions.change_of, ridge=r) for r in LADDER)])
    best = least(found)
    if best == 0:
        return None, None, [found[0]] * 2
    ridge = LADDER[best - 1]
    change = (fitted + held).solve(ridge)
    (again,) = losses([lambda rows: rows @ change])
    if least([again, found[best]]) != 0:
        change = fitted.solve(ridge)
    return ridge, change, [found[0], found[best]]


def moments_of(
    graph: ResidualGraph,
    gone: set[Branch],
    gap: tuple[int, int],
    parts: Sequence[Part],
    given: Given,
    factors: Mapping[int, float] | None,
) -> tuple[Moments, Moments, float]:
    """Of the tokens to fit and of those held out, with the sum of |x_q|^2 over both."""
    start, end = gap
    sums: list[Any] = [None, None]
    scale = 0.0
    for part in parts:
        batch = part.batch
        first, context = graph.start(batch)
        with given.back():
            target = real_tokens(graph.advance((0, end), first, context).total, batch)
        state = graph.advance((0, start - 1), first, context, gone, factors)
        u = real_tokens(state.total, batch)
        state = graph.run(graph.branches[start - 1], state, context)
        m = real_tokens(state.total, batch) - u
        missing = target - u - m
        held = part.held_rows()
        for k, rows in enumerate((~held, held)):
            moments = Moments.of(m[rows], missing[rows])
            sums[k] = moments if sums[k] is None else sums[k] + moments
        scale += float(target.double().square().sum())
    return sums[0], sums[1], scale


def multiply_branch(graph: ResidualGraph, branch: Branch, change: Tensor) -> None:
    """Right-multiplies what the branch adds by I + `change`."""
    width = len(change)
    transform = change + torch.eye(width, dtype=change.dtype, device=change.device)
    block = graph.adapter.blocks[branch.layer]
    modules = {id(p): m for m in block.modules() for p in m.parameters(recurse=False)}
    for parameter in writers(graph, branch):
        value, module = parameter.double(), modules[id(parameter)]
        fused = is_fused(module)
        bias = fused and value.dim() == 2  # [experts, d]
        transposed = is_transposed(module) if fused else isinstance(module, Conv1D)
        if value.dim() == 1 or bias or transposed:
            value = value @ transform
        elif value.shape[-2] == width:  # [d, f], or [experts, d, f]
            value = transform.T @ value
        else:
            raise UserError(f"{branch}: unknown shape {tuple(value.shape)} of its last linear map")
        parameter.copy_(value)
