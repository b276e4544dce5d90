"""EigenDamage of a model in memory, and from a checkpoint to a dense one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from pyprune.calibration.configured import configured_tokens
from pyprune.checkpoint import (
    Checkpoint,
    Originals,
    check_output,
    output_directory,
    write_parameters,
    write_report,
)
from pyprune.checkpoint.names import Piece, map_names
from pyprune.checkpoint.output import AUXILIARY_BYTES
from pyprune.config import check_call
from pyprune.devices import find_device
from pyprune.eigendamage.config import METHOD, EigenDamageConfig, EigenDamageOptions
from pyprune.eigendamage.layers import EigenLayer, damage
from pyprune.errors import UserError
from pyprune.families import Family, Run
from pyprune.layer_pruner import select_linears
from pyprune.measure import Measure
from pyprune.models.adapter import Adapter
from pyprune.progress import Progress
from pyprune.registry import HEADERS, MethodRow
from pyprune.report import (
    SCHEMA,
    CalibrationReport,
    RunReport,
    alike,
    model_name,
    source_name,
    versions,
    with_notes,
)
from pyprune.sparse.convert import write_factored
from pyprune.sparse.factored import FactoredLinear
from pyprune.structural import model_card
from pyprune.surroundings import in_memory, undisturbed

STORED_DENSE = (
    "what is left is stored as dense matrices: nothing is smaller or faster by itself (thin "
    "factors, -O factored=true, are)"
)
# Share of the entries by which less may go than was asked for before the report says why: whole
# directions do not add up to every number.
SHORT = 0.01
ROW = MethodRow(
    METHOD,
    title="OBD in the eigenbasis of the Kronecker-factored Fisher information",
    paper="Wang et al. 2019, arXiv 1905.05934",
    options=EigenDamageOptions,
    removes="directions or entries of the rotated weights; the result is dense",
)


@dataclass(frozen=True, repr=False)
class EigenDamageReport:
    """The outcome of `prune_eigendamage`.

    sparsity: share of the rotated entries that went. predicted_loss: nats per predicted token.
    """

    model: str
    config: EigenDamageConfig
    layers: tuple[EigenLayer, ...]
    calibration: CalibrationReport
    versions: Mapping[str, str] = field(default_factory=versions)
    notes: tuple[str, ...] = ()
    run: RunReport = field(default_factory=RunReport)

    def __repr__(self) -> str:
        return (
            f"<EigenDamageReport of {self.model}: {self.sparsity:.1%} of the entries of "
            f"{len(self.layers)} matrices removed>"
        )

    @property
    def sparsity(self) -> float:
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return sum(layer.removed for layer in self.layers) / total

    @property
    def factored(self) -> int:
        """Matrices that are two thin ones now."""
        return sum(layer.form == "factored" for layer in self.layers)

    @property
    def predicted_loss(self) -> float:
        return sum(layer.loss for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "config": self.config.to_dict(),
            "versions": dict(self.versions),
            "calibration": dataclasses.asdict(self.calibration),
            "sparsity": self.sparsity,
            "predicted_loss": self.predicted_loss,
            "notes": list(self.notes),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "run": dataclasses.asdict(self.run),
        }

    def table(self) -> Table:
        """For a terminal: a row per kind of matrix (the same place in every block), means of what
        is left, and below them what has to be said. `pyprune.json` has every layer."""
        title = Text(
            f"{self.model}: {METHOD}, {self.sparsity:.1%} removed, "
            f"{self.predicted_loss:.3g} nats per token predicted"
        )
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
        table.add_column("matrices", min_width=12, overflow="fold")
        for name in ("shape", "outputs\nleft", "inputs\nleft", "removed", "thin factors\n/ dense"):
            table.add_column(name, justify="right", no_wrap=True)
        for kind, (rows, columns), layers in alike(self.layers):
            entries = len(layers) * rows * columns
            table.add_row(
                f"{len(layers)} {kind}",
                f"{rows}x{columns}",
                f"{fmean(layer.rows for layer in layers):.0f}",
                f"{fmean(layer.columns for layer in layers):.0f}",
                f"{sum(layer.removed for layer in layers) / entries:.1%}",
                f"{sum(layer.factored_parameters for layer in layers) / entries:.2f}",
            )
        of_layers = [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]
        return with_notes(table, [*self.notes, *of_layers])

    def card(self) -> str:
        """The README.md of the pruned checkpoint (Markdown with the hub's YAML header)."""
        return model_card(
            self.model,
            ROW,
            f"{self.sparsity:.1%} of the entries of all matrices removed in their "
            f"Kronecker-factored eigenbases ({self.config.own_options().unit}), {self._stored()}",
            [
                self.calibration.fact(),
                *(f"{name}: {version}" for name, version in self.versions.items()),
            ],
            self.notes,
            "The full configuration and a report per layer",
        )

    def _stored(self) -> str:
        if not self.factored:
            return (
                "stored as dense matrices. An ordinary model of its family, which any loader reads."
            )
        return (
            f"{self.factored} of {len(self.layers)} stored as products of two thin ones: "
            "`import pyprune` before loading it, or `pyprune decompress` it."
        )


@undisturbed()
def prune_eigendamage(
    model: nn.Module,
    tokenizer_or_batches: object,
    config: EigenDamageConfig,
    progress: Progress | None = None,
) -> EigenDamageReport:
    """Prunes the decoder blocks of a transformers model in memory, in place.

    Args:
        model: a causal language model; for the backward passes it goes to `config.device`.
        tokenizer_or_batches: a tokenizer, with which `config.calibration` is read; or the batches
            themselves, see `calibration.batches.as_token_set`.
        config: what to do. Its dtype is a checkpoint's business: expected "auto".
        progress: called with (what happens, done, total).

    Raises:
        UserError: the request, the data or a layer (LayerError, named) make it impossible; see
            `damage`.
    """
    check_call(config, EigenDamageConfig, progress)
    if config.dtype != "auto":
        raise UserError(f"dtype: expected auto for a model in memory, got {config.dtype!r}")
    model = in_memory(model)
    return _prune(model, tokenizer_or_batches, config, progress, Measure())


def _prune(
    model: Any,
    data: object,
    config: EigenDamageConfig,
    progress: Progress | None,
    measure: Measure,
) -> EigenDamageReport:
    adapter, device = _adapter(model, config), find_device(config.device)
    with measure.phase("tokens"):
        tokens = configured_tokens(data, config.calibration, model.config)
    with measure.phase("eigendamage"):
        layers = damage(adapter, tokens, config, device=device, progress=progress)
    report = EigenDamageReport(
        model=model_name(model),
        config=config,
        layers=tuple(layers),
        calibration=CalibrationReport.of(tokens),
        run=RunReport.of(measure),
    )
    notes = [config.idle()] if config.idle() else []
    if config.own_options().factored:
        notes.append(_said_of_factors(report))
    else:
        notes.append(STORED_DENSE)
    widest = max((max(layer.shape) for layer in layers), default=0)
    if tokens.tokens < widest:
        notes.append(
            f"{tokens.tokens:,} calibration tokens for matrices of up to {widest:,} inputs or "
            "outputs: directions that the text says nothing of count as free and go first; more "
            "text would help"
        )
    if report.sparsity < config.sparsity - SHORT:
        notes.append(
            f"{report.sparsity:.1%} of the entries went, {config.sparsity:.1%} were asked for: the "
            "cap or matrices that are kept leave no more"
        )
    return replace(report, notes=tuple(notes))


def _said_of_factors(report: EigenDamageReport) -> str:
    """How many matrices are stored as thin factors and what that saves, or why none is."""
    dense = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    if report.factored:
        left = sum(layer.parameters for layer in report.layers) / dense
        return (
            f"factored: {report.factored} of {len(report.layers)} matrices are stored as thin "
            f"factors, all together with {left:.1%} of their parameters"
        )
    least = min(layer.factored_parameters / math.prod(layer.shape) for layer in report.layers)
    if least < 1:
        return (
            "factored: the matrices that are smaller as thin factors are no plain linear layers: "
            "all are stored as dense matrices, nothing is smaller or faster"
        )
    return (
        f"factored: at {report.sparsity:.1%} no matrix is smaller as thin factors (the best has "
        f"{least:.2f} times its parameters): all are stored as dense matrices, nothing is smaller "
        "or faster; a larger share makes them thinner"
    )


def _adapter(model: nn.Module, config: EigenDamageConfig) -> Adapter:
    adapter = Adapter.of(model)
    return adapter.restricted(select_linears(adapter, config.include, config.exclude))


@undisturbed()
def prune_eigendamage_checkpoint(
    source: str | Path,
    out: str | Path,
    config: EigenDamageConfig,
    progress: Progress | None = None,
    *,
    batches: object = None,
    trust_remote_code: bool = False,
) -> EigenDamageReport:
    """`prune_eigendamage` from a checkpoint, all of it in memory, into a new directory, in the
    dtype that it was stored in. Any loader reads it unless some matrices are thin factors
    (`factored`).

    Args:
        source: a Hugging Face directory with safetensors, or a hub id.
        out: a directory that does not exist or is empty. It appears when everything is written.
        batches: token ids to calibrate on; None reads `config.calibration` with the checkpoint's
            own tokenizer.
        trust_remote_code: run the model code that comes with the checkpoint, if any; it is copied
            into `out` then.

    Returns:
        The report, which is in `out` as pyprune.json too. Only the pruned matrices differ between
        `source` and `out`.

    Raises:
        UserError: see `prune_eigendamage`, `Checkpoint.open` and `output_directory`. Nothing is
            left at `out`.
    """
    check_call(config, EigenDamageConfig, progress)
    measure = Measure()
    check_output(out)
    with measure.phase("open"):
        checkpoint = Checkpoint.open(source, trust_remote_code=trust_remote_code)
        data = checkpoint.tokenizer() if batches is None else batches
        dtype = config.torch_dtype
        factored = config.own_options().factored
        pieces = _pieces(checkpoint) if factored else {}
        model: Any = checkpoint.load_model("cpu", dtype)
        originals = Originals(checkpoint, model)
        changing = list(_changed(model, config))
    report = _prune(model, data, config, progress, measure)
    report = replace(report, model=source_name(source))
    if factored:
        weights = _written(model, {name: pieces[name] for name in changing})
        with measure.phase("write"), write_factored(checkpoint.path, out, weights) as folder:
            report = replace(report, run=replace(report.run, seconds=measure.total()))
            write_report(folder, report.to_dict(), report.card())
        return report
    with output_directory(out, needed=checkpoint.nbytes + AUXILIARY_BYTES) as folder:
        with measure.phase("write"):
            changed = _changed(model, config)
            write_parameters(checkpoint, originals, model, changed, folder, dtype)
        report = replace(report, run=replace(report.run, seconds=measure.total()))
        write_report(folder, report.to_dict(), report.card())
    return report


def _pieces(checkpoint: Checkpoint) -> dict[str, list[Piece]]:
    """The tensors of the checkpoint that each parameter of the model is made of. UserError where
    thin factors could not be loaded."""
    if checkpoint.trust_remote_code:
        raise UserError(f"{METHOD}: factored: expected a model of transformers' own code")
    names = map_names(checkpoint.tensors, checkpoint.build_model("meta", None))
    if names.problem:
        raise UserError(f"{METHOD}: factored: {names.problem}")
    return names.pieces


def _written(
    model: nn.Module, pieces: Mapping[str, list[Piece]]
) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """What `write_factored` takes. pieces: by the parameters that were pruned."""
    weights: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for parameter, parts in pieces.items():
        path, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(path)
        for piece in parts:
            if isinstance(module, FactoredLinear):
                weights[piece.tensor] = module.up.weight, module.down.weight
            else:
                weights[piece.tensor] = piece.view(getattr(module, leaf))
    return weights


def _changed(model: nn.Module, config: EigenDamageConfig) -> dict[str, Tensor]:
    adapter = _adapter(model, config)
    refs = [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
    return {ref.parameter_name: getattr(ref.module, ref.parameter).detach() for ref in refs}


def _run(run: Run) -> EigenDamageReport:
    run.needs_none("state", "preserve_mask")
    if run.pictures is not None:
        raise UserError(f"report: {METHOD} has no pictures, got {run.pictures}")

    def told(phase: str, done: float, total: float | None) -> None:
        run.bar.step(f"{phase} {done}/{total}", done, total)

    return prune_eigendamage_checkpoint(
        run.source,
        run.out,
        run.config,
        told,
        trust_remote_code=run.trust_remote_code,
    )


FAMILY = Family(
    title="rotated weights",
    methods=lambda: {METHOD: ROW},
    config=EigenDamageConfig,
    call="prune_eigendamage",
    targets={"sparsity": ()},
    run=_run,
    headers=HEADERS,
    describe=MethodRow.describe,
)
