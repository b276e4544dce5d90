"""Greedy removal of branches or layers: one search, three ways of finding each round's best."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pyprune.calibration.tokens import Batch
from pyprune.checkpoint import check_writable, replace_file, writing
from pyprune.depth.addons import AddOns, apply_add_ons, check_add_ons
from pyprune.depth.budget import Budget, Unit, branches_of
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import DepthDecision, Refinement, Step, name_of
from pyprune.depth.finite import NotFiniteError
from pyprune.depth.graph import Branch
from pyprune.depth.registry import DepthTask
from pyprune.depth.score import ObjectiveName, Scorer, or_inf
from pyprune.depth.walkdown import WalkDown
from pyprune.errors import UserError
from pyprune.methods.options import Count, Natural, OptionError
from pyprune.models.fingerprint import fingerprint
from pyprune.models.stock import parameter_count

Mode = Literal["exact", "fast", "naive"]
Compare = Literal["auto", "score", "rate"]
# Halving begins with one of so many parts of the batches.
PARTS = 4


@dataclass(frozen=True)
class GreedyOptions(AddOns):
    """mode: exact (every candidate in every round), fast (lazy greedy with audits), naive (a full
    forward per candidate: the reference). objective: perplexity, kl to the dense model, or auto
    (perplexity, unless a method says otherwise). compare: what is least of the unit that a round
    removes: score (the objective after its removal, as published), rate (the rise of the mean loss
    over what the removal saves) or auto (rate where the target is a share of parameters
    or latency, score where units are counted).
    every: score each n-th token (1: all). memory_mb: for cached hidden states and live streams;
    more of it saves time. width: streams that run at once. audit_every: fast looks at everything in
    every n-th round (0: never). looks: candidates that fast scores in a round. state: a file that
    the search continues from after an interruption. And the add-ons `compensate`, `refit`, `ridge`.
    """

    mode: Mode = "exact"
    objective: Literal["auto", "perplexity", "kl"] = "auto"
    compare: Compare = "auto"
    every: Count = 1
    memory_mb: Count = 2048
    width: Count = 4
    audit_every: Natural = 8
    looks: Count = 4
    state: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state is not None:
            folder = Path(self.state).absolute().parent
            if not folder.is_dir():
                raise OptionError(
                    f"state: expected a file in an existing directory, got {self.state}"
                )
            check_writable(folder, "state")

    def scored(self, config: StructureConfig) -> ObjectiveName:
        """What `objective` comes to for `config`."""
        return "perplexity" if self.objective == "auto" else self.objective

    def compared(self, config: StructureConfig) -> Compare:
        """What `compare` comes to for the target of `config`: score or rate."""
        if self.compare != "auto":
            return self.compare
        return "score" if config.counted else "rate"


# What neither the search nor its result depends on.
NOT_OF_THE_SEARCH = (
    "state", "memory_mb", "width", "refine", "exchange_limit", "margin",
    *(f.name for f in fields(AddOns)),
)  # fmt: skip
# What a state file can be of another one of.
WORDS = {
    "tokens": "calibration text",
    "config": "configuration",
    "units": "choice of candidates (--fill)",
}
# Improves a list: (search that has run, its steps) -> steps, and how they were found.
Refine = Callable[["Greedy", list[Step]], tuple[list[Step], Refinement]]


def rate(rise: float, cost: float) -> float:
    """What a removal costs for what it saves: `rise` of the mean loss over `cost` (parameters,
    seconds or units, but no more than the target still needs). The least is best.

    The greedy rule of covering problems (Wolsey, Combinatorica 2, 1982: costs cut off at what is
    missing). Of a removal that lowers the loss the two are multiplied, so that there too lower is
    better and larger is better; NaN stays NaN.
    """
    if rise <= 0:
        return rise * cost
    return rise / cost if cost > 0 else math.inf


def replace_text(file: Path, text: str) -> None:
    """Writes a whole state file at once: an interruption leaves the one before it. UserError for
    what the file system refuses."""
    with writing("state", file.parent):
        replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))


def in_parts(batches: Sequence[Batch]) -> list[Batch]:
    """The batches, cut into smaller ones where they are fewer than `PARTS`: all sequences in one
    batch would leave halving nothing to halve."""
    if len(batches) >= PARTS:
        return list(batches)
    parts = -(-PARTS // len(batches))
    found: list[Batch] = []
    for batch in batches:
        count = len(batch.input_ids)
        rows = -(-count // parts)
        found += [batch.rows(slice(at, at + rows)) for at in range(0, count, rows)]
    return found


@dataclass
class _Found:
    """The winner of a round, and how it was found."""

    unit: Unit
    score: float
    evaluations: int
    candidates: dict[str, float]
    note: str = ""


@dataclass
class Greedy:
    """Removes the best unit, again and again, until the budget is reached.

    units: all candidates, in the order in which ties are broken: the first one wins. A candidate
    with a NaN score never does. Units may share branches: once one goes, those that overlap it are
    no candidates any more. shares: a search that has run, whose budget, scorer and caches this one
    goes on with, from the dense model.
    """

    task: DepthTask
    options: GreedyOptions
    units: Sequence[Unit]
    removed: list[Unit] = field(default_factory=list)
    shares: Greedy | None = None
    dense: float = field(init=False)
    remarks: list[str] = field(default_factory=list)  # for the decision, from elsewhere

    def __post_init__(self) -> None:
        check_add_ons(self.task.graph, self.options)
        self.compare = self.options.compared(self.task.config)
        self.objective = self.options.scored(self.task.config)
        if self.shares is None:
            batches, every = self.task.tokens.batches, self.options.every
            self.budget = Budget.of(self.task.graph, self.task.config, self.units, batches[0])
            if self.options.mode == "fast":
                batches = in_parts(batches)
            self.scorer = Scorer(self.task.graph, batches, self.objective, every)
            memory = self.options.memory_mb << 20
            self.walk = WalkDown(
                self.task.graph, self.scorer, memory, self.options.width, len(self.units)
            )
        else:
            other = self.shares
            self.budget, self.scorer, self.walk = other.budget, other.scorer, other.walk
        self.walk.tick = self._tick
        # By name, the mean loss above its reference, when last looked at.
        self.stale: dict[str, float] = {}
        self._stales: list[dict[str, float]] = []  # what was known after every step
        self._notes: dict[int, str] = {}  # of rounds, from 1

    def run(self) -> list[Step]:
        """The steps, in order; continues from the state file, if the options name one."""
        if self.shares is not None:
            self.dense = self.shares.dense
            gone = [branch.position for branch in self.shares._branches]
            self.walk.forget_after(min(gone, default=len(self.task.graph.branches)))
            self.walk.forget_streams()
        elif self.options.mode == "naive":
            self.dense = self.scorer.score_naive([])
        else:
            # Before anything is removed: the states that this caches are the dense model's.
            self.dense = self.walk.reference([])
        self._check_score("the dense model", self.dense)
        steps = self._resume()
        self.score = steps[-1].score if steps and steps[-1].score is not None else self.dense
        while not self.budget.reached(self._branches):
            found = self._round(len(steps))
            self._remove(found.unit)
            self.score = found.score
            steps.append(self._step(found))
            if found.note:
                self._notes[len(steps)] = found.note
            self._save(steps)
            self._say(len(steps))
        return steps

    @property
    def notes(self) -> list[str]:
        """Of rounds that a reader should know of."""
        return [f"round {number}: {note}" for number, note in self._notes.items()]

    def decision(self, refine: Refine | None = None) -> DepthDecision:
        """The search, what improves its list, if anything, and the add-ons, which change the
        model's weights in place."""
        steps = first = self.run()
        refinement = None
        if refine is not None:
            steps, refinement = refine(self, first)
        gone = {branch for step in steps for branch in step.unit}
        done = apply_add_ons(self.task.graph, gone, self.scorer.batches, self.options)
        return self.task.decision(
            steps,
            objective=self.objective,
            compare=self.compare,
            dense=self.dense,
            importance=dict(first[0].candidates) if first else {},
            transforms=done,
            refinement=refinement,
            notes=(*self.notes, *self.remarks),
        )

    # ---- one round

    @property
    def _branches(self) -> set[Branch]:
        return branches_of(self.removed)

    def _left(self) -> list[Unit]:
        gone, most = self._branches, len(self.task.graph.branches) - 1
        left = [u for u in self.units if not gone & set(u) and len(gone) + len(u) <= most]
        if not left:
            raise UserError(
                f"expected a target that leaves one branch, got {self.budget.target:g} "
                f"({self.budget.spent(self._branches):g} is all that can go)"
            )
        return left

    def _round(self, number: int) -> _Found:
        left = self._left()
        if self.options.mode == "naive":
            return self._best(left, self._naive(left))
        every = self.options.audit_every
        full = self.options.mode == "exact" or (every > 0 and number > 0 and number % every == 0)
        if self.options.mode == "fast" and not full:
            return self._lazy(left)
        guess = self._guess(left) if self.options.mode == "fast" else None
        found = self._best(left, self.walk.score(left, self._branches))
        if guess is not None and guess != found.unit:
            found.note = f"audit: {name_of(found.unit)} was best, not {name_of(guess)}"
        self._remember(left, list(found.candidates.values()))
        return found

    def _naive(self, left: Sequence[Unit]) -> list[float]:
        """A full forward for every candidate."""
        scores = []
        for k, unit in enumerate(left):
            scores.append(self.scorer.score_naive(self._branches | set(unit)))
            self._tick(k + 1, len(left))
        return scores

    def _best(self, left: Sequence[Unit], scores: Sequence[float]) -> _Found:
        keys = [self._key(u, s, self._rise(s)) for u, s in zip(left, scores, strict=True)]
        best: int | None = None
        for k, key in enumerate(keys):
            if not math.isnan(key) and (best is None or key < keys[best]):
                best = k
        if best is None:
            raise NotFiniteError("calibration: every removal gives NaN; expected finite scores")
        names = {name_of(unit): score for unit, score in zip(left, scores, strict=True)}
        return _Found(left[best], scores[best], len(left), names)

    def _key(self, unit: Unit, score: float, rise: float) -> float:
        """What is compared."""
        if self.compare == "score":
            return score
        return rate(rise, self.budget.cost(unit, self._branches))

    def _rise(self, score: float) -> float:
        """Of the mean loss above that of what is left: comparable between rounds."""
        mean = self.scorer.mean_of(score)
        return mean if mean == math.inf else mean - self.scorer.mean_of(self.score)

    # ---- the lazy round

    def _remember(self, units: Sequence[Unit], scores: Sequence[float]) -> None:
        for unit, score in zip(units, scores, strict=True):
            self.stale[name_of(unit)] = or_inf(self._rise(score))

    def _stale_key(self, unit: Unit) -> float:
        """By what was last seen of it."""
        rise = self.stale[name_of(unit)]
        return self._key(unit, rise, rise)

    def _guess(self, left: Sequence[Unit]) -> Unit | None:
        known = [unit for unit in left if name_of(unit) in self.stale]
        return min(known, key=self._stale_key, default=None)

    def _lazy(self, left: Sequence[Unit]) -> _Found:
        """Looks again at the candidates that cost least when last seen, `looks` of them, and takes
        the best.

        What a removal costs mostly grows as more is removed, so an old cost is a bound from below
        (Minoux's lazy greedy); not a certain one, and to look on until it holds would take most of
        a full round: that is what audits are for. The first costs come from successive halving: all
        candidates on a few batches, the better half on twice as many, until the batches are all in
        use.
        """
        seen: dict[str, float] = {}
        estimates: dict[str, float] = {}
        evaluations = 0
        if not self.stale:
            evaluations, seen = self._halving(left)
            mean = self.scorer.mean_of(self.score)
            estimates = {u: self.scorer.of_mean(mean + rise) for u, rise in self.stale.items()}
        order = sorted(range(len(left)), key=lambda k: self._stale_key(left[k]))
        if name_of(left[order[0]]) not in seen and len(seen) < self.options.looks:
            some = [left[k] for k in order if name_of(left[k]) not in seen][: self.options.looks]
            scores = self.walk.score(some, self._branches)
            self._remember(some, scores)
            seen |= {name_of(u): s for u, s in zip(some, scores, strict=True)}
            evaluations += len(some)
        units = [unit for unit in left if name_of(unit) in seen]
        found = self._best(units, [seen[name_of(unit)] for unit in units])
        return _Found(found.unit, found.score, evaluations, estimates | seen)

    def _halving(self, left: Sequence[Unit]) -> tuple[int, dict[str, float]]:
        """Costs of all candidates; those that reached the last stage were seen on everything."""
        total = len(self.scorer.batches)
        units, batches, evaluations = list(left), max(1, total // PARTS), 0
        dense = self.score
        while True:
            self.score = self.walk.reference([], batches)
            scores = self.walk.score(units, self._branches, batches)
            self._remember(units, scores)
            evaluations += len(units)
            if batches == total:
                break
            rank = sorted(range(len(units)), key=lambda k: self._stale_key(units[k]))
            units = [units[k] for k in sorted(rank[: max(1, len(units) // 2)])]
            batches = min(total, 2 * batches)
        self.score = dense
        return evaluations, {name_of(u): s for u, s in zip(units, scores, strict=True)}

    # ---- bookkeeping

    def _remove(self, unit: Unit) -> None:
        self.removed.append(unit)
        self.stale.pop(name_of(unit), None)
        self.walk.accept(unit)

    def _step(self, found: _Found) -> Step:
        graph = self.task.graph
        left = parameter_count(graph.model) - graph.removed_parameters(self._branches)
        return Step(found.unit, found.score, left, found.evaluations, found.candidates)

    def _check_score(self, what: str, score: float) -> None:
        if not math.isfinite(score):
            raise NotFiniteError(f"calibration: {what} scores {score}; expected a finite number")

    def _say(self, steps: int) -> None:
        removed = name_of(self.removed[-1])
        self._tell(f"removed {removed} ({steps}), score {self.score:.4g}")

    def _tick(self, done: int, total: int) -> None:
        self._tell(f"removal {len(self.removed) + 1}: {done}/{total}")

    def _tell(self, words: str) -> None:
        if self.task.progress is not None:
            share = min(1.0, self.budget.spent(self._branches) / self.budget.target)
            self.task.progress(words, share, 1.0)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a state file must agree with. How much goes does not matter: a greedy list is a
        prefix of any longer one, but for what was chosen when the target had cut off costs."""
        values = self.task.config.to_dict()
        for name in ("ratio", "count", "by", "fill", "device"):
            values.pop(name)
        for name in NOT_OF_THE_SEARCH:
            values["method_options"].pop(name, None)
        cost = self.budget.kind if self.compare == "rate" else None
        resolved = {"compare": self.compare, "objective": self.objective, "cost": cost}
        values["method_options"] |= resolved
        return {
            "model": fingerprint(self.task.graph.model),
            "tokens": self.task.tokens.sha256,
            "config": values,
            "units": len(self.units),
        }

    def check_identity(self, identity: Mapping[str, Any], file: str | Path) -> None:
        """Raises UserError if `file`, which holds `identity`, is of another search."""
        for name, own in self.identity.items():
            if identity.get(name) != own:
                what = WORDS.get(name, "model")
                raise UserError(f"state: {file} is of another {what}")

    def _save(self, steps: Sequence[Step]) -> None:
        if self.options.state is None:
            return
        so_far = DepthDecision(
            self.task.config.method, "", len(self.task.graph.layouts), tuple(steps)
        )
        self._stales.append(dict(self.stale))
        text = json.dumps(
            {
                "identity": self.identity,
                "target": self.budget.target,
                "seconds": [[*branch, value] for branch, value in self.budget.seconds.items()],
                "total": self.budget.total,
                "stale": self._stales,
                "notes": list(self._notes.items()),
                "decision": so_far.to_dict(),
            }
        )
        replace_text(Path(self.options.state), text)

    def _resume(self) -> list[Step]:
        if self.options.state is None or not Path(self.options.state).exists():
            return []
        try:
            held = json.loads(Path(self.options.state).read_text(encoding="utf-8"))
            identity, decision = dict(held["identity"]), held["decision"]
            target, stales = float(held["target"]), [dict(known) for known in held["stale"]]
            notes = {int(number): str(note) for number, note in held["notes"]}
            seconds = {Branch(kind, layer): s for kind, layer, s in held["seconds"]}
            total = float(held["total"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"state: cannot continue from {self.options.state}: {error!r}"
            ) from error
        self.check_identity(identity, self.options.state)
        if self.budget.kind == "latency" and seconds:  # measured anew, they would differ
            self.budget = replace(self.budget, seconds=seconds, total=total)
        lesser = replace(self.budget, target=min(target, self.budget.target))
        steps: list[Step] = []
        for step in DepthDecision.from_dict(decision).steps:
            if self.budget.reached(self._branches):
                break
            same = self.compare == "score" or target == self.budget.target
            if not same and lesser.cuts(self._left(), self._branches):
                break
            self._remove(step.unit)
            steps.append(step)
        self._stales = stales[: len(steps)]
        self.stale = dict(self._stales[-1]) if steps else {}
        # The file may be of a search that went further than this one will.
        self._notes = {number: note for number, note in notes.items() if number <= len(steps)}
        return steps
