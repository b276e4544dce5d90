"""Width pruning of a model in memory, and from a checkpoint to a narrower one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pyprune.calibration.configured import configured_tokens
from pyprune.checkpoint import (
    Checkpoint,
    check_output,
    copy_auxiliary,
    output_directory,
    write_report,
)
from pyprune.checkpoint.output import AUXILIARY_BYTES, MAX_SHARD_SIZE, REPORT
from pyprune.depth.registry import Progress
from pyprune.devices import find_device
from pyprune.errors import UserError
from pyprune.families import Family, Run
from pyprune.measure import Measure
from pyprune.report import SCHEMA, RunReport, model_name, source_name, versions, with_notes
from pyprune.width.config import WidthConfig
from pyprune.width.decision import WidthDecision
from pyprune.width.registry import (
    HEADERS,
    describe,
    find_width_method,
    load_width_methods,
    run_width,
)

# What a run's report says once for the decision and itself.
_SHARED = ("config", "calibration")


@dataclass(frozen=True)
class WidthReport:
    """The outcome of `prune_width`.

    model: its name. earlier: the report of the source's own pruning, if it had one.
    """

    model: str
    decision: WidthDecision
    versions: Mapping[str, str]
    earlier: Mapping[str, Any] = field(default_factory=dict)
    run: RunReport = field(default_factory=RunReport)

    def to_dict(self) -> dict[str, Any]:
        decision = self.decision.to_dict()
        before, after = decision.pop("parameters")
        wanted = decision.pop("wanted")
        return {
            "schema": SCHEMA,
            "model": self.model,
            **{key: decision.pop(key) for key in _SHARED},
            "versions": dict(self.versions),
            "parameters": {
                "before": before,
                "after": after,
                "zeros": after - wanted,
                "removed_share": 1 - wanted / before,
                "realised_share": 1 - after / before,
            },
            "notes": decision.pop("notes"),
            "decision": decision,
            **({"earlier": dict(self.earlier)} if self.earlier else {}),
            "run": dataclasses.asdict(self.run),
        }

    def table(self) -> Table:
        """For a terminal: sizes before and after, and what is left."""
        decision = self.decision
        before, after = decision.parameters
        ratio = f"ratio {decision.config['ratio']:g}"
        table = Table("", "before", "after", title=f"{self.model}: {decision.method}, {ratio}")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, (old, new) in decision.sizes.items():
            table.add_row(name, f"{old:,}", f"{new:,}")
        table.add_row("parameters", f"{before:,}", f"{after:,} ({1 - after / before:.1%} less)")
        if decision.zeroed:
            table.add_row("without the zeros", "", f"{decision.wanted:,}")
        return with_notes(table, decision.notes)

    def card(self) -> str:
        """The README.md of the pruned checkpoint (Markdown with the hub's YAML header)."""
        decision, text = self.decision, self.decision.calibration
        row = find_width_method(decision.method)
        lines = [
            "---",
            "library_name: transformers",
            f"base_model: {json.dumps(self.model, ensure_ascii=False)}",
            "base_model_relation: finetune",
            "tags:",
            "- pruned",
            f"- {decision.method}",
            "---",
            "",
            f"# {self.model}, pruned: {decision.method}",
            "",
            f"{decision.summary()} An ordinary model of its family, which any loader reads.",
            "",
            f"- Method: {decision.method}, {row.title} ({row.paper})",
            f"- Calibration: {text['source']}, {text['tokens']:,} tokens in {text['sequences']} "
            f"sequences of up to {text['seqlen']}, sha256 `{text['sha256']}`",
            *(f"- {name}: {version}" for name, version in self.versions.items()),
            *(f"- Note: {note}" for note in decision.notes),
            "",
            "Configuration and removed units are in `pyprune.json`.",
            "",
        ]
        return "\n".join(lines)


def prune_width(
    model: Any,
    tokenizer_or_batches: object,
    config: WidthConfig,
    progress: Progress | None = None,
) -> WidthReport:
    """Removes channels and heads from a transformers model in memory, in place.

    Args:
        model: a causal language model; it stays on its device.
        tokenizer_or_batches: a tokenizer, with which `config.calibration` is read; or the batches
            themselves, see `calibration.batches.as_token_set`.
        config: what to do. Its device and dtype are a checkpoint's business: expected "auto".
        progress: called with (what happens, done, total or None).

    Returns:
        The report. `model` is an ordinary, narrower model of its class: it saves, loads and
        generates as any other.

    Raises:
        UserError: the request, the data or the architecture make it impossible. The model may have
            been changed then.
    """
    for name in ("device", "dtype"):
        if getattr(config, name) != "auto":
            raise UserError(
                f"{name}: expected auto for a model in memory, got {getattr(config, name)!r}"
            )
    return _prune(model, tokenizer_or_batches, config, progress, Measure())


def _prune(
    model: Any, data: object, config: WidthConfig, progress: Progress | None, measure: Measure
) -> WidthReport:
    with measure.phase("tokens"):
        tokens = configured_tokens(data, config.calibration, model.config)
    training = model.training
    model.eval()
    try:
        with measure.phase("prune"):
            decision = run_width(model, tokens, config, progress)
    finally:
        model.train(training)
    run = RunReport(measure.total(), measure.peak_rss_bytes(), measure.peak_cuda_bytes())
    return WidthReport(model_name(model), decision, versions(), run=run)


def prune_width_checkpoint(
    source: str | Path,
    out: str | Path,
    config: WidthConfig,
    progress: Progress | None = None,
    *,
    batches: object = None,
    trust_remote_code: bool = False,
) -> WidthReport:
    """`prune_width` from a checkpoint into a new directory, in the checkpoint's own dtype. The
    model is held in memory.

    Args:
        source: a Hugging Face directory with safetensors, or a hub id.
        out: a directory that does not exist or is empty. It appears when everything is written.
        batches: token ids to calibrate on; None reads `config.calibration` with the checkpoint's
            own tokenizer.
        trust_remote_code: run the model code that comes with the checkpoint, if any; it is copied
            into `out` then.

    Returns:
        The report, which is in `out` as pyprune.json too.

    Raises:
        UserError: see `prune_width`, `Checkpoint.open` and `output_directory`. Nothing is left at
            `out`.
    """
    measure = Measure()
    check_output(out)
    with measure.phase("open"):
        checkpoint = Checkpoint.open(source, trust_remote_code=trust_remote_code)
        data = checkpoint.tokenizer() if batches is None else batches
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        model: Any = checkpoint.load_model(find_device(config.device), dtype)
    report = _prune(model, data, config, progress, measure)
    # Not model.to: it would round the rotary frequencies and other buffers too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(checkpoint.dtype)
    model.config.dtype = checkpoint.dtype
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    with output_directory(out, needed=needed + AUXILIARY_BYTES) as folder:
        with measure.phase("write"):
            copy_auxiliary(checkpoint, folder, index=False)
            model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        report = replace(
            report,
            model=source_name(source),
            earlier=_earlier(checkpoint.path),
            run=replace(report.run, seconds=measure.total()),
        )
        write_report(folder, report.to_dict(), report.card())
    return report


def _earlier(source: Path) -> dict[str, Any]:
    file = source / REPORT
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _run(run: Run) -> WidthReport:
    run.needs_none("state", "preserve_mask")
    if run.pictures is not None:
        raise UserError("report: expected none, pictures are drawn of removed branches and layers")
    return prune_width_checkpoint(
        run.source,
        run.out,
        run.config,
        run.bar.step,
        trust_remote_code=run.trust_remote_code,
    )


FAMILY = Family(
    title="channels and heads",
    methods=load_width_methods,
    config=WidthConfig,
    targets={"ratio": ()},
    run=_run,
    headers=HEADERS,
    describe=describe,
)
