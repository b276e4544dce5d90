"""What a structural run did: kept with the model as `pyprune.json`, shown as a table, summarised in
the model card."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from pyprune.depth.decision import SHARED, DepthDecision, Refinement, Step, name_of
from pyprune.depth.registry import DEPTH_METHODS
from pyprune.depth.repack import Packing
from pyprune.report import with_notes
from pyprune.structural import StructuralReport, calibration_fact, model_card


@dataclass(frozen=True, repr=False)
class StructureReport(StructuralReport):
    """The outcome of `prune_structure`.

    parameters: of the model before and after, tied ones once, with the zeros that fill halves, or
    that pad what DeciLM has only in certain sizes.
    zeros: how many of those after are such zeros. curve: parameters that count (without such zeros)
    and perplexity on the calibration text, from the dense model on; empty unless asked for.
    """

    decision: DepthDecision
    packing: Packing
    parameters: tuple[int, int]
    zeros: int
    curve: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<StructureReport of {self.decision.model}: {self.decision.method}, "
            f"{self.packing.before} -> {len(self.packing.pairs)} layers, "
            f"{self.realised_share:.1%} of the parameters less>"
        )

    def named(self, name: str) -> StructureReport:
        return replace(self, decision=replace(self.decision, model=name))

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
        before, after = self.parameters
        return self.sections(
            {key: decision.pop(key) for key in SHARED},
            before=before,
            after=after,
            nonzero=after - self.zeros,
            notes=notes,
            decision=decision,
            packing=dataclasses.asdict(self.packing),
            curve=[list(point) for point in self.curve],
        )

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
        if self.decision.refinement is not None:
            for words, score in _refined(self.decision.refinement):
                table.add_row("", words, f"{score:.4g}", "", "")
            table.add_section()
        layers = f"{self.packing.before} -> {len(self.packing.pairs)} layers"
        table.add_row("saved", layers, "", f"{after:,}", f"{self.realised_share:.1%}")
        return with_notes(table, self.all_notes)

    def card(self) -> str:
        decision, (before, after) = self.decision, self.parameters
        removed = ", ".join(name_of(step.unit) for step in decision.steps)
        facts = [f"Removed, in this order (A: attention, M: MLP, by layer from 0): {removed}"]
        deci = decision.config["fill"] == "deci"
        if deci and self.zeros:
            facts.append(f"Padding: {self.zeros:,} parameters")
        elif self.packing.zeros and not deci:
            halves = ", ".join(map(str, self.packing.zeros))
            facts.append(
                f"All zero, since a layer has both halves: {halves} of the new layers "
                f"({self.zeros:,} parameters)"
            )
        if decision.refinement is not None:
            lines = [f"{words} ({score:.4g})" for words, score in _refined(decision.refinement)]
            facts.append(f"How it was found, with the {decision.objective}: {'; '.join(lines)}")
        facts.append(calibration_fact(decision.calibration))
        facts += [f"Changed in what is left: {t['kind']}" for t in decision.transforms]
        facts += [f"{name}: {version}" for name, version in self.versions.items()]
        return model_card(
            decision.model,
            DEPTH_METHODS.find(decision.method),
            f"{self.removed_share:.2%} of {before:,} parameters are removed. "
            f"{'A DeciLM model' if deci else 'An ordinary model of its family'} with "
            f"{len(self.packing.pairs)} layers (before: {self.packing.before}) and {after:,} "
            f"parameters{'' if deci else ', which any loader reads'}.",
            facts,
            self.all_notes,
            "Configuration, scores and order",
        )


def _refined(refinement: Refinement) -> list[tuple[str, float]]:
    """The lists and then the exchanges, in words, and the score of each."""
    lines = []
    for name, score in refinement.starts.items():
        used = ", from here" if name == refinement.start else ""
        lines.append((f"greedy over {name}{used}", score))
    return lines + [(str(exchange), exchange.score) for exchange in refinement.exchanges]


def _cells(step: Step, before: int) -> tuple[str, str, str]:
    score = "" if step.score is None else f"{step.score:.4g}"
    if step.parameters is None:
        return score, "", ""
    return score, f"{step.parameters:,}", f"{1 - step.parameters / before:.1%}"
