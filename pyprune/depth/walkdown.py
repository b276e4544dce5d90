"""Scores many candidates in one sweep over the branches.

All candidates agree with the reference (what is left of the model) up to the first branch that they
leave out, or put back. So the reference goes down the model once, and at that branch a stream
splits off for the candidate; every branch then runs on all live streams together. The scores are
those of a full forward per candidate, for half the work, and every weight is read once per sweep.

Once a branch is removed, the streams of candidates before it are what they were up to that branch:
the next sweep goes on with them from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pyprune.depth.budget import Unit
from pyprune.depth.graph import Branch, Context, ResidualGraph, State
from pyprune.depth.score import Scorer
from pyprune.progress import CountProgress

# Positions at which a sweep keeps its streams for the next one, at most.
CHECKPOINTS = 16
Change = Callable[[Branch], AbstractContextManager[object]]
REFERENCE: Unit = ()  # the stream that skips nothing


class WalkDown:
    """Sweeps over the batches of `scorer`, with states cached between sweeps.

    memory: bytes for hidden states, half for the cache and half for live streams. In the cache the
    reference comes first; if it does not fit, only every s-th position is kept. What is left of it
    says at how many positions streams are kept. Where live streams do not fit, the candidates go in
    groups, each from the reference's state where the last one ended: the same work, weights read
    more often. width: streams that run through a branch at once. units: candidates that there are
    at most; None: one a branch. change: within `change(branch)`
    the model's branch is what a candidate makes of it; None: candidates leave theirs out. tick:
    told how many batches of how many a sweep is through with.
    """

    def __init__(
        self,
        graph: ResidualGraph,
        scorer: Scorer,
        memory: int,
        width: int,
        units: int | None = None,
        change: Change | None = None,
    ) -> None:
        self.graph = graph
        self.scorer = scorer
        self.width = width
        self.change = change
        parameter = next(iter(graph.model.parameters()))
        config = graph.model.config.get_text_config()
        # A state is two tensors before the MLP of a parallel layer.
        size = config.hidden_size * parameter.element_size()
        size *= 1 + any(layout.parallel for layout in graph.layouts)
        tokens = [batch.input_ids.numel() for batch in scorer.batches]
        branches, cache = len(graph.branches), max(1, memory // 2)
        whole = branches * sum(tokens) * size  # a state of all batches at every position
        self._room = [max(1, memory // 2 // (n * size)) for n in tokens]
        self.stride = -(-whole // cache)
        # At a position there is a stream of each candidate before it: half of them on average.
        streams = whole * (branches if units is None else units) // (2 * branches)
        fitting = (cache - whole) // max(1, streams)
        self.checkpoints = max(0, min(CHECKPOINTS, branches - 1, fitting))
        step = branches / (self.checkpoints + 1)
        self._kept_at = {round(k * step) for k in range(1, self.checkpoints + 1)}
        self._cache: list[dict[int, State]] = [{} for _ in tokens]
        self._streams: list[dict[Unit, dict[int, State]]] = [{} for _ in tokens]
        self._contexts: tuple[int, dict[int, Context]] = (-1, {})
        self._keeping = True
        self.tick: CountProgress = lambda done, total: None

    def forget_after(self, position: int) -> None:
        """The branch at `position` is no longer what it was: cached states behind it are no longer
        true."""
        for states in [*self._cache, *(s for unit in self._streams for s in unit.values())]:
            for at in [at for at in states if at > position]:
                del states[at]

    def accept(self, unit: Unit) -> None:
        """What `unit` stands for has been done: the reference is from now on what its streams were
        in the last sweep, as far as they were kept."""
        own = [streams.pop(unit, {}) for streams in self._streams]
        self.forget_after(unit[0].position)
        for cache, states in zip(self._cache, own, strict=True):
            cache |= states

    def forget_streams(self) -> None:
        """Other units will be asked for from now on: room for theirs."""
        for streams in self._streams:
            streams.clear()

    def score(
        self, units: Sequence[Unit], removed: Collection[Branch], batches: int | None = None
    ) -> list[float]:
        """Score of the model without `removed` and without each of `units`, in their order.

        batches: only the first so many, for a rough look; None: all.
        """
        return self.scorer.total(self.rows(units, removed, batches))

    @torch.no_grad()
    def rows(
        self,
        units: Sequence[Unit],
        removed: Collection[Branch],
        batches: int | None = None,
        *,
        keep: bool = True,
    ) -> list[Tensor]:
        """Row means of the model without `removed` but for each of `units`, in their order, [S, B]
        for every batch: of a unit's branches those that are there go as well, those of `removed`
        are there again.

        units: branches by position. keep: whether these units will be asked for again, when more is
        removed.
        """
        self._keeping = keep
        order = sorted(range(len(units)), key=lambda k: units[k][0].position)
        count = len(self.scorer.batches) if batches is None else batches
        rows = []
        for i in range(count):
            found = self._batch(i, [units[k] for k in order], removed)
            back = torch.empty_like(found)
            back[order] = found
            rows.append(back)
            self.tick(i + 1, count)
        return rows

    def reference(self, removed: Collection[Branch], batches: int | None = None) -> float:
        """Score of the model without `removed`."""
        return self.scorer.total(self.reference_rows(removed, batches))[0]

    @torch.no_grad()
    def reference_rows(
        self, removed: Collection[Branch], batches: int | None = None
    ) -> list[Tensor]:
        """Row means of the model without `removed`, [1, B] for every batch."""
        count = len(self.scorer.batches) if batches is None else batches
        rows = []
        for i in range(count):
            state = self._reach(i, len(self.graph.branches), removed)
            rows.append(self.scorer.rows(i, state.total))
        return rows

    def _batch(self, i: int, units: Sequence[Unit], removed: Collection[Branch]) -> Tensor:
        """Row means [len(units), B] for one batch; units by position."""
        found = []
        for at in range(0, len(units), self._room[i]):
            group = units[at : at + self._room[i]]
            found.append(self.scorer.rows(i, self._group(i, group, removed)))
        return torch.cat(found)

    def _group(self, i: int, units: Sequence[Unit], removed: Collection[Branch]) -> Tensor:
        """Last layer's outputs [len(units) * B, T, d], in the order of `units`."""
        joining: dict[int, dict[Unit, State]] = {}
        for unit in units:
            states = self._streams[i].get(unit)
            if states:
                joining.setdefault(max(states), {})[unit] = states[max(states)]
        held = {unit for streams in joining.values() for unit in streams}
        leaving: dict[int, list[Unit]] = {}
        for unit in units:
            if unit not in held:
                leaving.setdefault(unit[0].position, []).append(unit)
        if leaving:
            joining.setdefault(min(leaving), {})[REFERENCE] = self._reach(i, min(leaving), removed)
        last = max(leaving, default=-1)
        live: dict[Unit, State] = {}
        for branch in self.graph.branches[min(joining) :]:
            position = branch.position
            live |= joining.pop(position, {})
            if position in leaving:
                live |= dict.fromkeys(leaving[position], live[REFERENCE])
            if position == last:
                del live[REFERENCE]
            live = self._step(i, branch, live, removed)
            self._keep(i, position + 1, live)
        for streams in joining.values():
            live |= streams  # those that were kept behind the last branch
        return torch.cat([live[unit].total for unit in units])

    def _step(
        self, i: int, branch: Branch, live: Mapping[Unit, State], removed: Collection[Branch]
    ) -> dict[Unit, State]:
        """All streams after `branch`: those that it is left out of, and those that it ran on."""
        gone = branch in removed
        own = {unit: live[unit] for unit in live if branch in unit}
        others = {unit: live[unit] for unit in live if branch not in unit}
        after = self._each(i, branch, others, not gone)
        if own and self.change is not None:
            with self.change(branch):
                after |= self._each(i, branch, own, True)
        else:
            after |= self._each(i, branch, own, gone)
        return {unit: after[unit] for unit in live}

    def _each(
        self, i: int, branch: Branch, streams: Mapping[Unit, State], through: bool
    ) -> dict[Unit, State]:
        """Streams after `branch`, which ran on them or (not `through`) was left out."""
        if not through:
            return {unit: self.graph.skip(branch, state) for unit, state in streams.items()}
        return dict(zip(streams, self._ran(i, branch, [*streams.values()]), strict=True))

    def _ran(self, i: int, branch: Branch, streams: list[State]) -> list[State]:
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

    def _reach(self, i: int, position: int, removed: Collection[Branch]) -> State:
        """The reference's state before the branch at `position`, from the nearest cached one."""
        states = self._cache[i]
        if 0 not in states:
            states[0], _ = self.graph.start(self.scorer.batches[i])
        at = max(p for p in states if p <= position)
        state = states[at]
        for branch in self.graph.branches[at:position]:
            reference = self._step(i, branch, {REFERENCE: state}, removed)
            state = reference[REFERENCE]
            self._keep(i, branch.position + 1, reference)
        return state

    def _keep(self, i: int, position: int, streams: Mapping[Unit, State]) -> None:
        """Caches what is wanted of the states before the branch at `position`."""
        for unit, state in streams.items():
            if unit == REFERENCE:
                if position % self.stride == 0 and position not in self._cache[i]:
                    self._cache[i][position] = _cloned(state)
            elif self._keeping and position in self._kept_at:
                self._streams[i].setdefault(unit, {})[position] = _cloned(state)

    def _context(self, i: int, copies: int) -> Context:
        if self._contexts[0] != i:
            self._contexts = (i, {})
        contexts = self._contexts[1]
        if copies not in contexts:
            _, contexts[copies] = self.graph.start(self.scorer.batches[i], copies)
        return contexts[copies]


def _cloned(state: State) -> State:
    """Its own memory: a stream is a view into the tensor of all of them."""
    total = state.total.clone()
    return State(total if state.read is state.total else state.read.clone(), total)
