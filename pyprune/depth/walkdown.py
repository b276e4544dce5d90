"""Scores many candidates in one sweep over the branches.

All candidates agree with the reference (what is left of the model) up to the branch that they leave
out. So the reference goes down the model once, and at each candidate's branch a stream splits off
that skips it; every branch then runs on all live streams together. The scores are those of a full
forward per candidate, for half the work, and every weight is read once per sweep.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pyprune.depth.budget import Unit
from pyprune.depth.graph import Branch, Context, ResidualGraph, State
from pyprune.depth.score import Scorer


class WalkDown:
    """Sweeps over the batches of `scorer`, with the reference's states cached between sweeps.

    memory: bytes for hidden states, half for the cache and half for live streams. Where the cache
    is too small only every s-th position is kept; where streams do not fit, the candidates go in
    groups, each from the reference's state where the last one ended: the same work, weights read
    more often. width: streams that run through a branch at once.
    """

    def __init__(self, graph: ResidualGraph, scorer: Scorer, memory: int, width: int) -> None:
        self.graph = graph
        self.scorer = scorer
        self.width = width
        parameter = next(iter(graph.model.parameters()))
        config = graph.model.config.get_text_config()
        size = config.hidden_size * parameter.element_size()
        tokens = [batch.input_ids.numel() for batch in scorer.batches]
        self._streams = [max(1, memory // 2 // (2 * n * size)) for n in tokens]
        whole = 2 * len(graph.branches) * sum(tokens) * size
        self.stride = max(1, -(-whole // max(1, memory // 2)))
        self._cache: list[dict[int, State]] = [{} for _ in tokens]
        self._contexts: tuple[int, dict[int, Context]] = (-1, {})

    def forget_after(self, position: int) -> None:
        """The branch at `position` has been removed: cached states behind it are no longer true."""
        for states in self._cache:
            for at in [at for at in states if at > position]:
                del states[at]

    @torch.no_grad()
    def score(
        self, units: Sequence[Unit], removed: Collection[Branch], batches: int | None = None
    ) -> list[float]:
        """Score of the model without `removed` and without each of `units`, in their order.

        batches: only the first so many, for a rough look; None: all.
        """
        order = sorted(range(len(units)), key=lambda k: units[k][0].position)
        count = len(self.scorer.batches) if batches is None else batches
        rows = []
        for i in range(count):
            found = self._batch(i, [units[k] for k in order], removed)
            back = torch.empty_like(found)
            back[order] = found
            rows.append(back)
        return self.scorer.total(rows)

    @torch.no_grad()
    def reference(self, removed: Collection[Branch], batches: int | None = None) -> float:
        """Score of the model without `removed`."""
        count = len(self.scorer.batches) if batches is None else batches
        rows = []
        for i in range(count):
            position, state = self._nearest(i, len(self.graph.branches))
            state = self._advance(i, state, position, len(self.graph.branches), removed)
            rows.append(self.scorer.rows(i, state.total))
        return self.scorer.total(rows)[0]

    def _batch(self, i: int, units: Sequence[Unit], removed: Collection[Branch]) -> Tensor:
        """Row means [len(units), B] for one batch; units by position."""
        found = []
        for at in range(0, len(units), self._streams[i]):
            group = units[at : at + self._streams[i]]
            position, state = self._nearest(i, group[0][0].position)
            state = self._advance(i, state, position, group[0][0].position, removed)
            found.append(self.scorer.rows(i, self._group(i, group, state, removed)))
        return torch.cat(found)

    def _group(
        self, i: int, units: Sequence[Unit], reference: State, removed: Collection[Branch]
    ) -> Tensor:
        """Last layer's outputs [len(units) * B, T, d]; `reference` is at the first unit."""
        joining: dict[int, State] = {}
        leaving = {unit[0].position: unit for unit in units}
        last = units[-1][0].position
        streams: list[State] = []
        for branch in self.graph.branches[units[0][0].position :]:
            position = branch.position
            if position in joining:
                streams.append(joining.pop(position))
            if position in leaving:
                unit = leaving[position]
                split = reference
                for skipped in unit:
                    split = self.graph.skip(skipped, split)
                joining[unit[-1].position + 1] = split
            goes_on = position < last
            if goes_on:
                streams.append(reference)
            streams = self._step(i, branch, streams, removed)
            if goes_on:
                reference = streams.pop()
                self._keep(i, position + 1, reference)
        streams += [joining[p] for p in sorted(joining)]
        return torch.cat([state.total for state in streams])

    def _step(
        self, i: int, branch: Branch, streams: list[State], removed: Collection[Branch]
    ) -> list[State]:
        if branch in removed:
            return [self.graph.skip(branch, state) for state in streams]
        rows = len(self.scorer.batches[i].input_ids)
        after: list[State] = []
        for at in range(0, len(streams), self.width):
            some = streams[at : at + self.width]
            totals = torch.cat([s.total for s in some])
            same = all(s.read is s.total for s in some)
            state = State(totals if same else torch.cat([s.read for s in some]), totals)
            ran = self.graph.run(branch, state, self._context(i, len(some)))
            together = ran.read is ran.total
            for k in range(len(some)):
                total = ran.total[k * rows : (k + 1) * rows]
                read = total if together else ran.read[k * rows : (k + 1) * rows]
                after.append(State(read, total))
        return after

    def _advance(
        self, i: int, state: State, position: int, target: int, removed: Collection[Branch]
    ) -> State:
        """The reference's state before the branch at `target`."""
        for branch in self.graph.branches[position:target]:
            (state,) = self._step(i, branch, [state], removed)
            self._keep(i, branch.position + 1, state)
        return state

    def _nearest(self, i: int, position: int) -> tuple[int, State]:
        """The cached state at or before `position`."""
        states = self._cache[i]
        if 0 not in states:
            states[0], _ = self.graph.start(self.scorer.batches[i])
        at = max(p for p in states if p <= position)
        return at, states[at]

    def _keep(self, i: int, position: int, state: State) -> None:
        # Cloned: a stream is a view into the tensor of all of them.
        if position % self.stride == 0 and position not in self._cache[i]:
            total = state.total.clone()
            read = total if state.read is state.total else state.read.clone()
            self._cache[i][position] = State(read, total)

    def _context(self, i: int, copies: int) -> Context:
        if self._contexts[0] != i:
            self._contexts = (i, {})
        contexts = self._contexts[1]
        if copies not in contexts:
            _, contexts[copies] = self.graph.start(self.scorer.batches[i], copies)
        return contexts[copies]
