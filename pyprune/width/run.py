"""Width pruning of a model in memory, and from a checkpoint to a narrower one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from pyprune.calibration.configured import configured_tokens
from pyprune.calibration.tokens import TokenSet
from pyprune.config import check_call
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.score import perplexities
from pyprune.families import Family, Run
from pyprune.measure import Measure
from pyprune.models.adapter import Adapter
from pyprune.models.running import evaluation
from pyprune.pictures import check_pictures
from pyprune.progress import Progress
from pyprune.registry import HEADERS, MethodRow
from pyprune.report import RunReport, model_name, versions, with_notes
from pyprune.structural import (
    StructuralReport,
    calibration_fact,
    check_in_memory,
    model_card,
    prune_loaded,
)
from pyprune.surroundings import in_memory, undisturbed
from pyprune.width.config import WidthConfig
from pyprune.width.decision import WidthDecision
from pyprune.width.plot import draw
from pyprune.width.registry import WIDTH_METHODS, run_width

# What a run's report says once for the decision and itself.
_SHARED = ("config", "calibration")


@dataclass(frozen=True, repr=False)
class WidthReport(StructuralReport):
    """The outcome of `prune_width`. model: its name."""

    model: str
    decision: WidthDecision

    def __repr__(self) -> str:
        return f"<WidthReport of {self.model}: {self.decision.method}, {self.decision.summary()}>"

    def named(self, name: str) -> WidthReport:
        return replace(self, model=name)

    def to_dict(self) -> dict[str, Any]:
        decision = self.decision.to_dict()
        before, after = decision.pop("parameters")
        return self.sections(
            {"model": self.model, **{key: decision.pop(key) for key in _SHARED}},
            before=before,
            after=after,
            nonzero=decision.pop("wanted"),
            notes=decision.pop("notes"),
            decision=decision,
        )

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
        # An untied head is more than what zeros in stock shapes save.
        change = f"{abs(1 - after / before):.1%} {'less' if after <= before else 'more'}"
        table.add_row("parameters", f"{before:,}", f"{after:,} ({change})")
        if decision.zeroed:
            table.add_row("without the zeros", "", f"{decision.wanted:,}")
        return with_notes(table, decision.notes)

    def card(self) -> str:
        decision = self.decision
        return model_card(
            self.model,
            WIDTH_METHODS.find(decision.method),
            f"{decision.summary()} An ordinary model of its family, which any loader reads.",
            [
                calibration_fact(decision.calibration),
                *(f"{name}: {version}" for name, version in self.versions.items()),
            ],
            decision.notes,
            "Configuration and removed units",
        )


@undisturbed()
def prune_width(
    model: Any,
    tokenizer_or_batches: object,
    config: WidthConfig,
    progress: Progress | None = None,
    *,
    state: str | Path | None = None,
    curve: bool = False,
) -> WidthReport:
    """Removes channels and heads from a transformers model in memory, in place.

    Args:
        model: a causal language model; it stays on its device.
        tokenizer_or_batches: a tokenizer, with which `config.calibration` is read; or the batches
            themselves, see `calibration.batches.as_token_set`.
        config: what to do. Its device and dtype are a checkpoint's business: expected "auto".
        progress: called with (what happens, done, total or None).
        state: for a method in shots, a directory for what an interrupted run needs to go on after
            its last shot. Given again, with the model as it was before pruning, the run ends with
            the same bytes.
        curve: whether to measure perplexity before and after, see `WidthDecision.curve`.

    Returns:
        The report. `model` is an ordinary, narrower model of its class: it saves, loads and
        generates as any other.

    Raises:
        UserError: the request, the data or the architecture make it impossible. The model may have
            been changed then.
    """
    check_call(config, WidthConfig, progress)
    check_in_memory(config)
    model = in_memory(model, structure=True)
    return _prune(model, tokenizer_or_batches, config, progress, Measure(), state, curve)


def _prune(
    model: Any,
    data: object,
    config: WidthConfig,
    progress: Progress | None,
    measure: Measure,
    state: str | Path | None,
    curve: bool,
) -> WidthReport:
    with measure.phase("tokens"):
        tokens = configured_tokens(data, config.calibration, model.config)
    with evaluation(model):
        before = _perplexity(model, tokens) if curve else math.nan
        with measure.phase("prune"):
            decision = run_width(model, tokens, config, progress, state)
        if curve and not decision.curve:
            with measure.phase("curve"):
                after = _perplexity(model, tokens)
            ends = ("dense", decision.parameters[0], before), ("pruned", decision.wanted, after)
            decision = replace(decision, curve=ends)
    run = RunReport.of(measure)
    return WidthReport(model_name(model), decision, versions=versions(), run=run)


def _perplexity(model: Any, tokens: TokenSet) -> float:
    return perplexities(ResidualGraph(model, Adapter.of(model)), tokens.batches)[0]


@undisturbed()
def prune_width_checkpoint(
    source: str | Path,
    out: str | Path,
    config: WidthConfig,
    progress: Progress | None = None,
    *,
    batches: object = None,
    state: str | Path | None = None,
    trust_remote_code: bool = False,
    curve: bool = False,
) -> WidthReport:
    """`prune_width` from a checkpoint into a new directory, in the checkpoint's dtypes. The
    model is held in memory.

    Args:
        source: a Hugging Face directory with safetensors, or a hub id.
        out: a directory that does not exist or is empty. It appears when everything is written.
        batches: token ids to calibrate on; None reads `config.calibration` with the checkpoint's
            own tokenizer.
        state: see `prune_width`.
        trust_remote_code: run the model code that comes with the checkpoint, if any; it is copied
            into `out` then.
        curve: see `prune_width`.

    Returns:
        The report, which is in `out` as pyprune.json too.

    Raises:
        UserError: see `prune_width`, `Checkpoint.open` and `output_directory`. Nothing is left at
            `out`.
    """
    check_call(config, WidthConfig, progress)

    def prune(model: Any, data: object, measure: Measure) -> WidthReport:
        return _prune(model, data, config, progress, measure, state, curve)

    return prune_loaded(
        source, out, config, prune, batches=batches, trust_remote_code=trust_remote_code
    )


def _run(run: Run) -> WidthReport:
    run.needs_none("preserve_mask")
    if not WIDTH_METHODS.find(run.config.method).in_shots:
        run.needs_none("state")
    if run.pictures is not None:
        check_pictures(run.pictures)
    report = prune_width_checkpoint(
        run.source,
        run.out,
        run.config,
        run.bar.step,
        state=run.state,
        trust_remote_code=run.trust_remote_code,
        curve=run.pictures is not None,
    )
    if run.pictures is not None:
        draw(report.model, report.decision, run.pictures)
    return report


FAMILY = Family(
    title="channels and heads",
    methods=WIDTH_METHODS.load,
    config=WidthConfig,
    call="prune_width",
    targets={"ratio": ()},
    run=_run,
    headers=HEADERS,
    describe=MethodRow.describe,
)
