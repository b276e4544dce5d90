"""What a structural search decided: which branches go, in which order, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyprune.depth.graph import KINDS, Branch
from pyprune.errors import UserError

DECISION = "pruning.json"
SCHEMA = 1


@dataclass(frozen=True)
class Step:
    """One removal.

    unit: the branches that went together (two for a whole layer). score: of the model after it, in
    the decision's `objective`. parameters: the model has afterwards. evaluations: candidates that
    were scored for it. candidates: their scores by name ("A3", "M3", "A3+M3"); what a lazy search
    did not look at is missing.
    """

    unit: tuple[Branch, ...]
    score: float | None = None
    parameters: int | None = None
    evaluations: int = 0
    candidates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """Removals in order, with what is needed to repeat or apply them.

    method; unit: "block" (a branch) or "layer"; layers: how many the model has; steps.
    objective: what the scores are, e.g. "perplexity". dense: the objective before any removal.
    importance: score of every candidate alone, by name, as the method ranks it.
    calibration: source, sha256, tokens, seqlen, sequences. config: `StructureConfig.to_dict`.
    transforms: what the method changed in the kept weights, for the record.
    notes: anything a reader should know (audits that disagreed, measured latencies).
    """

    method: str
    unit: str
    layers: int
    steps: tuple[Step, ...]
    objective: str = ""
    dense: float | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    model: str = ""

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
        return sum(step.evaluations for step in self.steps)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> Decision:
        """The inverse of `to_json`. UserError if it is something else."""
        try:
            values = json.loads(text)
            schema = values.pop("schema")
            if schema != SCHEMA:
                raise UserError(f"decision: expected schema {SCHEMA}, got {schema!r}")
            steps = tuple(
                Step(**{**step, "unit": tuple(Branch(*branch) for branch in step["unit"])})
                for step in values.pop("steps")
            )
            for key in ("transforms", "notes"):
                values[key] = tuple(values[key])
            return cls(steps=steps, **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"decision: expected a decision file, got something else: {error!r}"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Decision:
        """Reads a decision file, or the one in a pruned model's directory."""
        file = Path(path)
        if file.is_dir():
            file = file / DECISION
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"decision: cannot read {file}: {error}") from error


def name_of(unit: tuple[Branch, ...]) -> str:
    """ "A3", "M3", or "A3+M3" for a whole layer."""
    return "+".join(str(branch) for branch in unit)
