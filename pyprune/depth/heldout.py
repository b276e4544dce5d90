"""Calibration text that nothing is fitted to, and what it says of a change before a gap."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.calibration.tokens import Batch
from pyprune.depth.given import Given
from pyprune.depth.graph import Branch, ResidualGraph, State
from pyprune.depth.score import Scorer, or_inf

HELD_OUT = 4  # every so many-th sequence is held out
# What is added to rows that a branch adds, float64 [n, d] -> [n, d].
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """Sequences that run together. held: which of their tokens are held out, bool [B, T]; no
    padding is."""

    batch: Batch
    held: Tensor

    def held_rows(self) -> Tensor:
        """Of the real tokens, in the order of `real_tokens`, bool [n]."""
        mask = self.batch.attention_mask
        return self.held.flatten() if mask is None else self.held[mask != 0]


def parts_of(batches: Sequence[Batch]) -> list[Part]:
    """The batches, what is held out of each by itself: every `HELD_OUT`-th sequence, the last of
    fewer. Of a single sequence it is the last quarter, in one part with the rest."""
    period = min(HELD_OUT, sum(len(batch.input_ids) for batch in batches))
    parts, seen = [], 0
    for batch in batches:
        ids, real = batch.input_ids, batch.real
        if period == 1:
            late = real.cumsum(1) > real.sum(1, keepdim=True) * (HELD_OUT - 1) // HELD_OUT
            parts.append(Part(batch, real & late))
            continue
        held = torch.arange(seen, seen + len(ids), device=ids.device) % period == period - 1
        seen += len(ids)
        for rows in (~held, held):
            if rows.any():
                parts.append(Part(batch.rows(rows), real[rows] & held[rows, None]))
    return parts


class HeldOut:
    """The loss of held-out tokens: KL of the model's prediction of them from that of the model as
    given, the mean over sequences of each one's mean.

    Kept of the model as given are the decoder's outputs for these tokens. One batch's streams are
    in memory at a time.
    """

    def __init__(self, graph: ResidualGraph, parts: Sequence[Part], given: Given) -> None:
        """Raises UserError if no token is `predicted`."""
        used = [part for part in parts if part.held.any()]
        self.graph = graph
        with given.back():
            counted = [part.held for part in used]
            self.scorer = Scorer(graph, [part.batch for part in used], "kl", counted=counted)

    @staticmethod
    def predicted(parts: Sequence[Part]) -> bool:
        """Whether a held-out token has one before it: nothing can be said of others."""
        return any(bool(part.held[:, 1:].any()) for part in parts)

    def losses(
        self,
        start: int,
        removed: Collection[Branch],
        factors: Mapping[int, float] | None,
        changes: Sequence[Change],
    ) -> list[float]:
        """With each of `changes` of what the branch before the gap at position `start` adds.
        `removed`, `factors`: as in `ResidualGraph.advance`. A loss can be NaN."""
        graph, last = self.graph, self.graph.branches[start - 1]
        rows: list[list[Tensor]] = [[] for _ in changes]
        for i, batch in enumerate(self.scorer.batches):
            first, context = graph.start(batch)
            before = graph.advance((0, start - 1), first, context, removed, factors)
            after = graph.run(last, before, context)
            for found, total in zip(rows, _changed(before, after, changes), strict=True):
                state = graph.skip(last, State(before.read, total))
                rest = (start, len(graph.branches))
                state = graph.advance(rest, state, context, removed, factors)
                found.append(self.scorer.rows(i, state.total))
        return [self.scorer.total(found)[0] for found in rows]


def _changed(before: State, after: State, changes: Sequence[Change]) -> Iterator[Tensor]:
    """The stream after a branch with each change of what the branch adds."""
    added = (after.total.double() - before.total.double()).flatten(0, 1)
    for change in changes:
        yield after.total + change(added).view_as(after.total).to(after.total.dtype)


def unchanged(rows: Tensor) -> Tensor:
    """No change: 0 for every row."""
    return torch.zeros_like(rows)


def least(losses: Sequence[float]) -> int:
    """Which is least, the first of equals; NaN is as bad as infinity."""
    known = [or_inf(loss) for loss in losses]
    return known.index(min(known))
