"""Exchanges: what a greedy list gains when some of it comes back and other branches go instead.

Greedy removal is short-sighted: what a branch costs depends on what goes after it, and nothing that
has gone comes back. So the better of two greedy lists, of single branches and of whole layers, is
improved by local search at the same target. Every accepted exchange lowers the objective: the
result is no worse than either list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from pyprune.depth.budget import Budget, Unit, branches_of, units_of
from pyprune.depth.decision import Exchange, Refinement, Step, name_of
from pyprune.depth.graph import KINDS, Branch
from pyprune.depth.greedy import Greedy, GreedyOptions, replace_text
from pyprune.depth.score import or_inf
from pyprune.errors import UserError
from pyprune.models.stock import parameter_count

# Branches of a kind that exchanges are made of, on either side; so many of them freely combined,
# more of a kind only the best first.
BREADTH, MOST = 6, 4
# Exchanges that are scored together; after so many without a gain the search ends.
TOGETHER, PATIENCE = 8, 32
# Branches of a kind that `fast` scores as further removals.
FAST_BREADTH = 10
# Exchanges that are looked through, in order of what they promise, for some that meet the target.
RANKED = 4096
Removed = frozenset[Branch]


def refined(
    search: Greedy, steps: list[Step], allowed: Collection[Branch], limit: int, margin: float
) -> tuple[list[Step], Refinement]:
    """Improves `steps`, which `search` has found over single branches, by exchanges.

    allowed: branches that may go. limit: of sets that are scored for it. margin: see `LocalSearch`.

    Returns:
        The steps to the best set that was found: those of the list it started from, as far as they
        stay, then what exchanges brought, each with the score after it. And how it was found.
    """
    lists = {"branches": steps}
    layers = _over_layers(search, allowed)
    if layers is not None:
        found = layers.run()
        lists["layers"] = found
        search.remarks += [f"over layers, {note}" for note in layers.notes]
    scores = {name: _score(of) for name, of in lists.items()}
    start = min(scores, key=lambda name: scores[name])  # the first of equals
    known = Known.of(search, at=_set(list(lists.values())[-1]))
    local = LocalSearch(search, allowed, known, lists[start], limit, margin)
    local.run()
    final = local.steps()
    spent = sum(step.evaluations for of in lists.values() for step in of) + len(known.asked)
    spent -= sum(step.evaluations for step in final)
    return final, Refinement(start, scores, tuple(local.exchanges), spent)


def _over_layers(search: Greedy, allowed: Collection[Branch]) -> Greedy | None:
    """The same search over whole layers; None where these cannot reach the target."""
    whole = [b for b in allowed if all(Branch(kind, b.layer) in allowed for kind in KINDS)]
    units = units_of(whole, layers=True)
    size = [search.budget.saved(unit) for unit in units]
    most = list(units)
    if 2 * len(units) == len(search.task.graph.branches):  # one has to stay, whichever it is
        del most[size.index(max(size))]
    if not most or not search.budget.reached(branches_of(most)):
        return None
    options = replace(search.options, state=beside(search.options, "layers"))
    return Greedy(search.task, options, units, shares=search)


def beside(options: GreedyOptions, name: str) -> str | None:
    """The file next to the state file that holds what belongs to `name`."""
    return None if options.state is None else f"{options.state}.{name}"


def _set(steps: Sequence[Step]) -> Removed:
    return frozenset(branches_of(step.unit for step in steps))


def _score(steps: Sequence[Step]) -> float:
    score = steps[-1].score
    assert score is not None  # of a search over rounds
    return score


def _ordered(branches: Collection[Branch]) -> Unit:
    return tuple(sorted(branches, key=lambda branch: branch.position))


@dataclass
class Known:
    """Losses without sets of branches, each found once and kept in a file next to the state.

    asked: in the order in which they were wanted, also those that the file knew. So a search that
    goes on from the file asks for the same and takes the same way.
    """

    search: Greedy
    at: Removed  # what the cached states of the search are without
    file: Path | None
    held: dict[str, list[float]] = field(default_factory=dict)  # of every sequence
    asked: dict[Removed, float] = field(default_factory=dict)  # scores

    @classmethod
    def of(cls, search: Greedy, at: Removed) -> Known:
        name = beside(search.options, "exchanges")
        known = cls(search, at, None if name is None else Path(name))
        search.walk.forget_streams()
        if known.file is not None and known.file.exists():
            known._load(known.file)
        return known

    def scores(self, sets: Sequence[Removed], base: Removed) -> list[float]:
        """The objective without each of `sets`, which differ little from `base`."""
        new = [s for s in dict.fromkeys(sets) if s not in self.asked]
        missing = [s for s in new if name_of(_ordered(s)) not in self.held]
        if missing:
            found = self._found(missing, base)
            names = [name_of(_ordered(s)) for s in missing]
            self.held |= dict(zip(names, found.tolist(), strict=True))
            self._save()
        for s in new:
            self.asked[s] = self.search.scorer.of_mean(float(self.losses(s).mean()))
        return [self.asked[s] for s in sets]

    def losses(self, removed: Removed) -> Tensor:
        """Mean loss of every calibration sequence without a set that has been asked for."""
        return torch.tensor(self.held[name_of(_ordered(removed))], dtype=torch.float64)

    def _found(self, sets: Sequence[Removed], base: Removed) -> Tensor:
        """Mean losses [sets, sequences]."""
        search = self.search
        count = search.scorer.counted
        if search.options.mode == "naive":
            return torch.cat([count(search.scorer.all_naive(s)) for s in sets])
        if base != self.at:
            search.walk.forget_after(min(branch.position for branch in base ^ self.at))
            self.at = base
        flips = [_ordered(s ^ base) for s in sets]
        found: dict[Unit, Tensor] = {}
        # Streams of single branches are what the next look goes on with.
        single, others = [f for f in flips if len(f) == 1], [f for f in flips if len(f) > 1]
        for some, keep in ((single, True), (others, False)):
            if some:
                losses = count(search.walk.rows(some, base, keep=keep))
                found |= dict(zip(some, losses, strict=True))
        if () in flips:
            found[()] = count(search.walk.reference_rows(base))[0]
        return torch.stack([found[flip] for flip in flips])

    def _load(self, file: Path) -> None:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            identity = dict(values["identity"])
            self.held = {name: [float(x) for x in of] for name, of in values["losses"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"state: cannot continue from {file}: {error!r}") from error
        self.search.check_identity(identity, file)

    def _save(self) -> None:
        if self.file is None:
            return
        text = json.dumps({"identity": self.search.identity, "losses": self.held})
        replace_text(self.file, text)


class LocalSearch:
    """Exchanges branches until none of those looked at lowers the objective.

    Each look scores every removed branch put back and every other one gone as well. The sums of
    such differences rank the exchanges that meet the target; the foremost are scored, and the best
    of them is made if it lowers the objective surely: by `margin` standard errors of the mean of
    what the calibration sequences gain. So many sets are compared that the best of them owes some
    of its score to chance, and a short text would be fitted. The differences then serve on until
    they find nothing, when they are measured anew.

    A set meets the target if it saves enough and nothing of it could come back: no more goes than
    has to. Only a start may be larger, where putting more back would raise the objective.

    Attributes:
        exchanges: those made, in order.
    """

    def __init__(
        self,
        search: Greedy,
        allowed: Collection[Branch],
        known: Known,
        start: Sequence[Step],
        limit: int,
        margin: float,
    ) -> None:
        self.search, self.known, self.start = search, known, start
        search.walk.tick = lambda done, total: self._tell(f", batch {done}/{total}")
        self.limit, self.margin = limit, margin
        self.allowed = sorted(allowed, key=lambda branch: branch.position)
        self.exchanges: list[Exchange] = []
        self._now, self._score = _set(start), _score(start)
        (self._score,) = known.scores([self._now], known.at)
        budget = search.budget
        self._cost = {branch: budget.saved([branch]) for branch in self.allowed}
        self._need = budget.needed([])
        # What the loss falls by when a branch comes back, and rises by when one goes as well.
        self._gains: dict[Branch, float] = {}
        self._rises: dict[Branch, float] = {}
        # When last seen, for `fast`. What the list over branches removed it knows no more: that is
        # looked at first.
        self._last = {b: search.stale.get(str(b), -math.inf) for b in self.allowed}

    def run(self) -> None:
        fresh, misses = False, PATIENCE
        while len(self.known.asked) < self.limit:
            if misses >= (PATIENCE if fresh else TOGETHER):
                if fresh or not self._look():
                    break
                fresh, misses = True, 0
            some = self._ranked(min(TOGETHER, self.limit - len(self.known.asked)))
            scores = self.known.scores(some, self._now)
            better = [k for k, after in enumerate(some) if self._lowers(after)]
            if better:
                best = min(better, key=lambda k: scores[k])
                self._make(some[best], scores[best])
                fresh, misses = False, 0
            else:
                misses = misses + len(some) if some else PATIENCE
            self._tell()

    def steps(self) -> list[Step]:
        """To the set at the end."""
        if not self.exchanges:
            return list(self.start)
        units = [tuple(b for b in step.unit if b in self._now) for step in self.start]
        listed = set().union(*units)
        for exchange in self.exchanges:
            units += [(b,) for b in exchange.out if b in self._now and b not in listed]
            listed |= set(exchange.out)
        units = [unit for unit in units if unit]
        same = 0
        while same < min(len(units), len(self.start)) and units[same] == self.start[same].unit:
            same += 1
        prefixes = [frozenset(b for u in units[: k + 1] for b in u) for k in range(len(units))]
        scores = self.known.scores(prefixes[same:], self._now)
        graph = self.search.task.graph
        size = parameter_count(graph.model)
        return list(self.start[:same]) + [
            Step(unit, score, size - graph.removed_parameters(prefix))
            for unit, prefix, score in zip(units[same:], prefixes[same:], scores, strict=True)
        ]

    def _lowers(self, after: Removed) -> bool:
        """Whether a set that has been asked for surely has a lower score than the present one. To
        put back what need not go is no choice among many: there any gain will do."""
        if not self.known.asked[after] < self._score:
            return False
        if after < self._now:
            return True
        gains = self.known.losses(self._now) - self.known.losses(after)
        if len(gains) < 2:
            return True
        return bool(gains.mean() > self.margin * gains.std() / math.sqrt(len(gains)))

    def _look(self) -> bool:
        """Scores all single changes; False where that would be more than the limit."""
        back = [b for b in self.allowed if b in self._now]
        out = [b for b in self.allowed if b not in self._now]
        if self.search.options.mode == "fast":
            out = [b for kind in KINDS for b in self._least(out, kind)]
        sets = [self._now - {b} for b in back] + [self._now | {b} for b in out]
        if len(self.known.asked.keys() | set(sets)) > self.limit:
            return False
        scores = self.known.scores(sets, self._now)
        now = self.search.scorer.mean_of(self._score)
        changes = [self.search.scorer.mean_of(score) - now for score in scores]
        self._gains = dict(zip(back, [-change for change in changes[: len(back)]], strict=True))
        self._rises = dict(zip(out, changes[len(back) :], strict=True))
        self._last |= self._rises
        self._tell()
        return True

    def _least(self, branches: Sequence[Branch], kind: str) -> list[Branch]:
        of_kind = [branch for branch in branches if branch.kind == kind]
        return sorted(of_kind, key=lambda b: or_inf(self._last[b]))[:FAST_BREADTH]

    def _make(self, after: Removed, score: float) -> None:
        back, out = _ordered(self._now - after), _ordered(after - self._now)
        spent = len(self.known.asked) - sum(e.evaluations for e in self.exchanges)
        self.exchanges.append(Exchange(back, out, score, spent))
        self._rises |= {b: self._gains.pop(b) for b in back}
        self._gains |= {b: self._rises.pop(b) for b in out}
        self._now, self._score = after, score

    # ---- which exchanges

    def _ranked(self, count: int) -> list[Removed]:
        """Sets that meet the target, by what the single changes promise of them."""
        found: list[Removed] = []
        for after in self._promising():
            if after in self.known.asked and not self._lowers(after):
                continue
            if after not in found and self._meets(after):
                found.append(after)
                if len(found) == count:
                    break
        return found

    def _promising(self) -> Iterator[Removed]:
        backs, saved, gained = self._sides({b: -g for b, g in self._gains.items()})
        outs, saving, rising = self._sides(self._rises)
        before = self.search.budget.saved(self._now)
        smallest = min(self._cost.values())
        after = before - saved[:, None] + saving[None, :]
        promise = gained[:, None] + rising[None, :]
        # Norms that two branches share are in no single cost: the sets are checked one by one.
        open_ = (after > self._need - smallest / 10) & (saved[:, None] > 0)
        promise = torch.where(open_, promise, math.inf)
        order = promise.flatten().sort(stable=True)
        for value, index in zip(
            order.values[:RANKED].tolist(), order.indices[:RANKED].tolist(), strict=True
        ):
            if value == math.inf:
                return
            row, column = divmod(index, len(outs))
            yield (self._now - set(backs[row])) | set(outs[column])

    def _sides(self, changes: dict[Branch, float]) -> tuple[list[Unit], Tensor, Tensor]:
        """Sets of branches whose changes of the loss are the least, what they save and change."""
        best: list[Unit] = []
        for kind in KINDS:
            of_kind = [b for b in changes if b.kind == kind and math.isfinite(changes[b])]
            best.append(tuple(sorted(of_kind, key=lambda b: (changes[b], b.layer))[:BREADTH]))
        pool = [b for of_kind in best for b in of_kind]
        sides = [unit for n in range(MOST + 1) for unit in combinations(pool, n)]
        sides += [of_kind[:n] for of_kind in best for n in range(MOST + 1, len(of_kind) + 1)]
        saved = [math.fsum(self._cost[b] for b in unit) for unit in sides]
        change = [math.fsum(changes[b] for b in unit) for unit in sides]
        return sides, torch.tensor(saved).double(), torch.tensor(change).double()

    def _meets(self, after: Removed) -> bool:
        return meets(self.search.budget, after, len(self.search.task.graph.branches))

    def _tell(self, more: str = "") -> None:
        if self.search.task.progress is not None:
            words = f"{len(self.exchanges)} exchanges, score {self._score:.4g}{more}"
            self.search.task.progress(words, len(self.known.asked), self.limit)


def meets(budget: Budget, removed: Removed, branches: int) -> bool:
    """Whether `removed`, not all of `branches`, reaches the target and nothing of it could stay."""
    if not removed or len(removed) >= branches or not budget.reached(removed):
        return False
    return not any(budget.reached(removed - {b}) for b in removed)
