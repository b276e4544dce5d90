"""Prune&Comp (arXiv 2507.18212): what gaps leave missing of the stream's size is made up for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyprune.calibration.tokens import Batch
from pyprune.depth.given import Given
from pyprune.depth.graph import Branch, ResidualGraph, gaps
from pyprune.depth.hidden import real_tokens
from pyprune.depth.writers import norm_after, writers
from pyprune.errors import UserError

# How far the output may be from what scaling the stream itself gives: norms have an epsilon.
TOLERANCE = 2e-3


def streams(graph: ResidualGraph, batch: Batch) -> Iterator[Tensor]:
    """The residual stream before every branch, and after the last: 2 L + 1 times float32 [n, d],
    n real tokens."""
    state, context = graph.start(batch)
    yield real_tokens(state.total, batch)
    for branch in graph.branches:
        state = graph.run(branch, state, context)
        yield real_tokens(state.total, batch)


def size_ratios(
    graph: ResidualGraph, found: Sequence[tuple[int, int]], batches: Sequence[Batch]
) -> list[float]:
    """E[|x_end| / |x_first|] over all tokens, for every gap: what its removal leaves to make up
    for. UserError where a state is all zeros."""
    sums, count = [0.0] * len(found), 0
    for batch in batches:
        norms = [_sizes(x) for x in streams(graph, batch)]
        for i, (first, end) in enumerate(found):
            sums[i] += float((norms[end] / norms[first]).sum())
        count += len(norms[0])
    return [total / count for total in sums]


@torch.no_grad()
def size_factors(
    graph: ResidualGraph,
    removed: Collection[Branch],
    found: Sequence[tuple[int, int]],
    batches: Sequence[Batch],
    given: Given,
) -> dict[int, float]:
    """What the stream has to be multiplied by at each of the gaps `found`: first position of the
    gap -> E[|x_end| / |x_first|] over all tokens.

    As published both sizes are those of the model before anything went. Where a method has changed
    weights besides (`given` holds some), x_end is of the model as given, and x_first of the model
    as it will be: with the weights of now, without `removed`, earlier gaps made up for.
    """
    if not given:
        ratios = size_ratios(graph, found, batches)
        return dict(zip((first for first, _ in found), ratios, strict=True))
    factors: dict[int, float] = {}
    for first, end in found:
        total, count = 0.0, 0
        for batch in batches:
            begin = graph.start(batch)
            with given.back():
                after = graph.advance((0, end), *begin)
            before = graph.advance((0, first), *begin, removed, factors)
            large, small = (_sizes(real_tokens(state.total, batch)) for state in (after, before))
            total += float((large / small).sum())
            count += len(large)
        factors[first] = total / count
    return factors


def _sizes(rows: Tensor) -> Tensor:
    """Their norms, float64 [n]. UserError where one is 0."""
    sizes = rows.double().square().sum(1).sqrt()
    if not bool((sizes > 0).all()):
        raise UserError("a hidden state is all zeros: its size cannot be compensated")
    return sizes


@torch.no_grad()
def compensate(
    graph: ResidualGraph,
    removed: Collection[Branch],
    batches: Sequence[Batch],
    factors: Mapping[int, float] | None = None,
) -> list[float]:
    """Prune&Comp (arXiv 2507.18212): makes up for the size that gaps leave missing, in place;
    returns the factors, gap by gap.

    The paper multiplies everything before a gap by its factor, embeddings included. Divided instead
    is everything after it (the last linear maps of those branches, or the norms after them where
    there are some): the stream differs by a scale, which every norm that reads it takes away, and
    tied embeddings stay tied. The branches to remove are still there, and must be removed
    afterwards. factors: by the first position of their gaps, None: of all gaps of the model as
    given, E[|x_after| / |x_before|]; see `size_factors`. Raises UserError if the output depends on
    the scale; the model must not be used after it.
    """
    found = gaps(removed, len(graph.layouts))
    if factors is None:
        factors = size_factors(graph, removed, found, batches, Given())
    if not factors:
        return []
    ends = dict(found)
    expected = _output(graph, removed, batches[0], factors)
    for branch in graph.branches:
        factor = math.prod(f for first, f in factors.items() if ends[first] <= branch.position)
        if factor != 1 and branch not in removed:
            _scale_branch(graph, branch, 1 / factor)
    off = (_output(graph, removed, batches[0], {}) - expected).norm() / expected.norm()
    if not off <= max(TOLERANCE, 10 * torch.finfo(next(graph.model.parameters()).dtype).eps):
        raise UserError(
            f"{type(graph.model).__name__}: its output depends on the scale of the residual stream "
            f"(off by {float(off):.1e}): compensation is not possible"
        )
    return list(factors.values())


def _output(
    graph: ResidualGraph, removed: Collection[Branch], batch: Batch, factors: Mapping[int, float]
) -> Tensor:
    """The decoder's output [n, d] without `removed`, the stream multiplied at these positions."""
    state = graph.advance((0, len(graph.branches)), *graph.start(batch), removed, factors)
    return real_tokens(graph.finish(state.total, batch), batch)


def _scale_branch(graph: ResidualGraph, branch: Branch, factor: float) -> None:
    norm = norm_after(graph, branch)
    if norm is not None:
        _scale_norm(norm, factor)
        return
    for parameter in writers(graph, branch):
        parameter.mul_(factor)


def _scale_norm(norm: nn.Module, factor: float) -> None:
    """Whether the norm multiplies by its weight or by 1 + it (Gemma) is tried out."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    probe = torch.linspace(-1.0, 2.0, weight.numel(), device=weight.device).to(weight.dtype)[None]
    expected = norm(probe) * factor
    old = weight.clone()
    for scaled in (old * factor, (1 + old) * factor - 1):
        weight.copy_(scaled)
        if torch.allclose(norm(probe), expected, rtol=1e-2, atol=1e-5):
            break
    for name, parameter in norm.named_parameters(recurse=False):
        if name == "bias":
            parameter.mul_(factor)
