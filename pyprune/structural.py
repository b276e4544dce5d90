"""What the methods that remove structure have in common, whether it is branches, layers, channels
or heads: their reports, and the way from a checkpoint to a smaller one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pyprune.checkpoint import Checkpoint, Originals, check_output, write_report
from pyprune.checkpoint.output import changed_model, earlier_report, save_stock
from pyprune.config import RunConfig
from pyprune.devices import find_device
from pyprune.errors import UserError
from pyprune.measure import Measure
from pyprune.registry import MethodRow
from pyprune.report import SCHEMA, CalibrationReport, RunReport, card_head, source_name


@dataclass(frozen=True, kw_only=True)
class StructuralReport(ABC):
    """The outcome of a run.

    versions: of what it depends on. earlier: the report of the source's own pruning, if it had one.
    run: time and memory.
    """

    versions: Mapping[str, str]
    earlier: Mapping[str, Any] = field(default_factory=dict)
    run: RunReport = field(default_factory=RunReport)

    @abstractmethod
    def named(self: Report, name: str) -> Report:
        """The same of a model of this name."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """pyprune.json."""

    @abstractmethod
    def card(self) -> str:
        """The README.md of the pruned checkpoint (Markdown with the hub's YAML header)."""

    def sections(self, shared: Mapping[str, Any], *, after: int, nonzero: int, before: int,
                 **own: Any) -> dict[str, Any]:  # fmt: skip
        """pyprune.json. shared: model, config and calibration. before, after: parameters of the
        model; nonzero: without zeros that only fill shapes. own: what only this kind has."""
        return {
            "schema": SCHEMA,
            **shared,
            "versions": dict(self.versions),
            "parameters": {
                "before": before,
                "after": after,
                "zeros": after - nonzero,
                "removed_share": 1 - nonzero / before,
                "realised_share": 1 - after / before,
            },
            **own,
            **({"earlier": dict(self.earlier)} if self.earlier else {}),
            "run": dataclasses.asdict(self.run),
        }


Report = TypeVar("Report", bound=StructuralReport)


def model_card(
    model: str,
    method: MethodRow,
    summary: str,
    facts: Sequence[str],
    notes: Sequence[str],
    closing: str,
) -> str:
    """summary: a paragraph. facts, notes: list items. closing: what is in pyprune.json."""
    lines = [
        *card_head(model, (method.name,), method.name),
        summary,
        "",
        f"- Method: {method.name}, {method.title} ({method.paper})",
        *(f"- {fact}" for fact in facts),
        *(f"- Note: {note}" for note in notes),
        "",
        f"{closing} are in `pyprune.json`.",
        "",
    ]
    return "\n".join(lines)


def calibration_fact(text: Mapping[str, Any]) -> str:
    """text: source, sha256, tokens, seqlen, sequences."""
    return CalibrationReport(**text).fact()


def check_in_memory(config: RunConfig) -> None:
    """Raises UserError if the configuration of a run asks for what only a checkpoint can have: a
    model in memory stays where and as it is."""
    for name in ("device", "dtype"):
        if getattr(config, name) != "auto":
            raise UserError(
                f"{name}: expected auto for a model in memory, got {getattr(config, name)!r}"
            )


def prune_loaded(
    source: str | Path,
    out: str | Path,
    config: RunConfig,
    prune: Callable[[Any, object, Measure], Report],
    *,
    batches: object,
    trust_remote_code: bool,
    save: Callable[[Any, Path], None] = save_stock,
) -> Report:
    """From a checkpoint into a new directory, in the checkpoint's own dtypes; the model is held in
    memory.

    prune: `(model, tokenizer or batches, measure) -> report`; changes the model in place. save:
    see `changed_model`.

    Raises UserError: see `Checkpoint.open` and `output_directory`; what `prune` raises. Nothing is
    left at `out`.
    """
    measure = Measure()
    check_output(out)
    with measure.phase("open"):
        checkpoint = Checkpoint.open(source, trust_remote_code=trust_remote_code)
        earlier = earlier_report(checkpoint)
        data = checkpoint.tokenizer() if batches is None else batches
        model = checkpoint.load_model(find_device(config.device), config.torch_dtype)
        originals = Originals(checkpoint, model)
    report = prune(model, data, measure)
    with ExitStack() as stack:
        with measure.phase("write"):
            folder = stack.enter_context(changed_model(checkpoint, originals, model, out, save))
        run = replace(report.run, seconds=measure.total())
        report = replace(report.named(source_name(source)), earlier=earlier, run=run)
        write_report(folder, report.to_dict(), report.card())
    return report
