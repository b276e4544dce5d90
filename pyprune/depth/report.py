"""What a structural run did: kept with the model as `pyprune.json`, shown as a table, summarised in
the model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from pyprune.depth.decision import SHARED, Decision, Step, name_of
from pyprune.depth.registry import find_depth_method
from pyprune.depth.repack import Packing
from pyprune.report import SCHEMA, RunReport, with_notes


@dataclass(frozen=True)
class StructureReport:
    """The outcome of `prune_structure`.

    parameters: of the model before and after, tied ones once, with the zeros that fill halves.
    zeros: how many of those after are such zeros. curve: parameters that count (without such zeros)
    and perplexity on the calibration text, from the dense model on; empty unless asked for.
    earlier: the report of the source's own pruning, if it had one.
    """

    decision: Decision
    packing: Packing
    parameters: tuple[int, int]
    zeros: int
    versions: Mapping[str, str]
    curve: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()
    earlier: Mapping[str, Any] = field(default_factory=dict)
    run: RunReport = field(default_factory=RunReport)

    @property
    def removed_share(self) -> float:
        """Of all parameters, by what was removed: zeros that fill halves count as removed."""
        before, after = self.parameters
        return 1 - (after - self.zeros) / before

    @property
    def realised_share(self) -> float:
        """Of all parameters, by what the file and the runtime are rid of."""
        return 1 - self.parameters[1] / self.parameters[0]

    def to_dict(self) -> dict[str, Any]:
        decision = self.decision.to_dict()
        notes = [*decision.pop("notes"), *self.notes]
        return {
            "schema": SCHEMA,
            **{key: decision.pop(key) for key in SHARED},
            "versions": dict(self.versions),
            "parameters": {
                "before": self.parameters[0],
                "after": self.parameters[1],
                "zeros": self.zeros,
                "removed_share": self.removed_share,
                "realised_share": self.realised_share,
            },
            "notes": notes,
            "decision": decision,
            "packing": dataclasses.asdict(self.packing),
            "curve": [list(point) for point in self.curve],
            **({"earlier": dict(self.earlier)} if self.earlier else {}),
            "run": dataclasses.asdict(self.run),
        }

    @property
    def all_notes(self) -> list[str]:
        return [*self.decision.notes, *self.notes]

    def table(self) -> Table:
        """For a terminal: the removals in order, and what is left."""
        before, after = self.parameters
        config = self.decision.config
        given = "ratio" if config["count"] is None else "count"
        table = Table(
            "", "removed", self.decision.objective or "score", "parameters", "share removed",
            title=f"{self.decision.model}: {self.decision.method}, {given} {config[given]:g}",
        )  # fmt: skip
        for column in table.columns[2:]:
            column.justify = "right"
        if self.decision.dense is not None:
            table.add_row("", "", f"{self.decision.dense:.4g}", f"{before:,}", "")
        for i, step in enumerate(self.decision.steps, 1):
            table.add_row(str(i), name_of(step.unit), *_cells(step, before))
        table.add_section()
        layers = f"{self.packing.before} -> {len(self.packing.pairs)} layers"
        table.add_row("saved", layers, "", f"{after:,}", f"{self.realised_share:.1%}")
        return with_notes(table, self.all_notes)

    def card(self) -> str:
        """The README.md of the pruned checkpoint (Markdown with the hub's YAML header)."""
        decision, (before, after) = self.decision, self.parameters
        row = find_depth_method(decision.method)
        removed = ", ".join(name_of(step.unit) for step in decision.steps)
        text = decision.calibration
        lines = [
            "---",
            "library_name: transformers",
            f"base_model: {json.dumps(decision.model, ensure_ascii=False)}",
            "base_model_relation: finetune",
            "tags:",
            "- pruned",
            f"- {decision.method}",
            "---",
            "",
            f"# {decision.model}, pruned: {decision.method}",
            "",
            f"{self.removed_share:.2%} of {before:,} parameters are removed. An ordinary model of "
            f"its family with {len(self.packing.pairs)} layers (before: {self.packing.before}) and "
            f"{after:,} parameters, which any loader reads.",
            "",
            f"- Method: {decision.method}, {row.title} ({row.paper})",
            f"- Removed, in this order (A: attention, M: MLP, by layer from 0): {removed}",
        ]
        if self.packing.zeros:
            halves = ", ".join(map(str, self.packing.zeros))
            lines.append(
                f"- All zero, since a layer has both halves: {halves} of the new layers "
                f"({self.zeros:,} parameters)"
            )
        lines.append(
            f"- Calibration: {text['source']}, {text['tokens']:,} tokens in {text['sequences']} "
            f"sequences of up to {text['seqlen']}, sha256 `{text['sha256']}`"
        )
        lines += [f"- Changed in what is left: {t['kind']}" for t in decision.transforms]
        lines += [f"- {name}: {version}" for name, version in self.versions.items()]
        lines += [f"- Note: {note}" for note in self.all_notes]
        lines += ["", "Configuration, scores and order are in `pyprune.json`.", ""]
        return "\n".join(lines)


def _cells(step: Step, before: int) -> tuple[str, str, str]:
    score = "" if step.score is None else f"{step.score:.4g}"
    if step.parameters is None:
        return score, "", ""
    return score, f"{step.parameters:,}", f"{1 - step.parameters / before:.1%}"
