"""What a structural search decided: which branches go, in which order, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pyprune.calibration.tokens import TokenSet
from pyprune.depth.graph import KINDS, Branch
from pyprune.errors import UserError

# What a run's report says once for the decision and itself.
SHARED = ("model", "config", "calibration")


@dataclass(frozen=True)
class Step:
    """One removal.

    unit: the branches that went together (two for a whole layer). score: of the model after it, in
    the decision's `objective`. parameters: the model has afterwards. evaluations: candidates that
    were scored for it. candidates: their scores by name ("A3", "M3", "A3+M3"); what a lazy search
    did not look at is missing, and in its first step what it looked at only in part of the text is
    an estimate.
    """

    unit: tuple[Branch, ...]
    score: float | None = None
    parameters: int | None = None
    evaluations: int = 0
    candidates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """back: branches that came back; out: those that went instead. score: of the model after it.
    evaluations: sets that were scored to find it."""

    back: tuple[Branch, ...]
    out: tuple[Branch, ...]
    score: float
    evaluations: int = 0

    def __str__(self) -> str:
        """ "back A3, M7; out M5"."""
        sides = (("back", self.back), ("out", self.out))
        return "; ".join(f"{word} {', '.join(map(str, unit))}" for word, unit in sides if unit)


@dataclass(frozen=True)
class Refinement:
    """How exchanges improved a greedy list.

    starts: score of each list that was found, by name: "branches", "layers" (missing where whole
    layers cannot reach the target). start: the one that was improved. exchanges: in order.
    evaluations: sets scored beyond those that the decision's steps count.
    """

    start: str
    starts: Mapping[str, float]
    exchanges: tuple[Exchange, ...] = ()
    evaluations: int = 0


@dataclass(frozen=True)
class DepthDecision:
    """Removals in order, with what is needed to repeat or apply them.

    method; unit: "block" (a branch) or "layer"; layers: how many the model has; steps. refinement:
    where the steps are not those of a greedy search but what exchanges made of them.
    objective: what the scores are, e.g. "perplexity". compare: what was least of the unit that a
    round removed, "score" or "rate" (see `GreedyOptions`); "" of methods without rounds. dense:
    the objective before any removal.
    importance: score of every candidate alone, by name, as the method ranks it.
    calibration: source, sha256, tokens, seqlen, sequences. config: `StructureConfig.to_dict`.
    transforms: what the method changed in the kept weights, for the record.
    notes: anything a reader should know (audits that disagreed).
    """

    method: str
    unit: str
    layers: int
    steps: tuple[Step, ...]
    objective: str = ""
    compare: str = ""
    dense: float | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    model: str = ""
    refinement: Refinement | None = None

    def __post_init__(self) -> None:
        removed = [branch for step in self.steps for branch in step.unit]
        for kind, layer in removed:
            if kind not in KINDS or not 0 <= layer < self.layers:
                raise UserError(
                    f"decision: expected attention or mlp of layers 0 to {self.layers - 1}, "
                    f"got {kind} of layer {layer}"
                )
        if len(set(removed)) != len(removed):
            raise UserError("decision: expected every branch to be removed once, got one twice")

    @property
    def removed(self) -> list[Branch]:
        """All removed branches in order."""
        return [branch for step in self.steps for branch in step.unit]

    @property
    def evaluations(self) -> int:
        more = self.refinement.evaluations if self.refinement is not None else 0
        return sum(step.evaluations for step in self.steps) + more

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: what `from_dict` takes back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DepthDecision:
        """The inverse of `to_dict`, also after JSON. UserError if it is something else."""
        try:
            given = dict(values)
            steps = tuple(
                Step(**{**step, "unit": tuple(Branch(*branch) for branch in step["unit"])})
                for step in given.pop("steps")
            )
            if given.get("refinement") is not None:
                given["refinement"] = _refinement(given["refinement"])
            for key in ("transforms", "notes"):
                given[key] = tuple(given.get(key, ()))
            return cls(steps=steps, **given)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"decision: expected one, got something else: {error!r}") from error


def _refinement(values: Mapping[str, Any]) -> Refinement:
    exchanges = []
    for exchange in values["exchanges"]:
        sides = {key: tuple(Branch(*b) for b in exchange[key]) for key in ("back", "out")}
        exchanges.append(Exchange(**{**exchange, **sides}))
    return Refinement(**{**values, "exchanges": tuple(exchanges)})


def name_of(unit: tuple[Branch, ...]) -> str:
    """ "A3", "M3", or "A3+M3" for a whole layer."""
    return "+".join(str(branch) for branch in unit)


def calibration_facts(tokens: TokenSet) -> dict[str, Any]:
    """What identifies the calibration text in a decision."""
    return {
        "source": tokens.source,
        "sha256": tokens.sha256,
        "tokens": tokens.tokens,
        "seqlen": tokens.seqlen,
        "sequences": tokens.nsamples,
    }
