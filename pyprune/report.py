"""What a pruning run did, layer by layer: kept with the model as `pyprune.json`, shown as a table,
summarised in the model card."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

import pyprune
from pyprune.calibration.text import HUB_PREFIX
from pyprune.calibration.tokens import TokenSet
from pyprune.config import PruneConfig
from pyprune.errors import UserError
from pyprune.measure import Measure

SCHEMA = 1
# Between the shares of zeros of two matrices: below it they count as equal.
UNEQUAL = 1e-3


def versions() -> dict[str, str]:
    """Of what a run depends on. PyTorch's own tells the build too (`+cu130`), which the metadata of
    some wheels leave out."""
    import torch

    return {
        "pyprune": pyprune.__version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def model_name(model: Any) -> str:
    """The hub id it was loaded from, or the name of the directory, or the class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_dir() else str(name)


def source_name(source: str | Path) -> str:
    """A hub id, or the name of the directory."""
    return Path(source).resolve().name if Path(source).is_dir() else str(source)


def text_name(source: str) -> str:
    """What a text is called where others read it: a file without the folders of this machine."""
    return source if source.startswith(HUB_PREFIX) else Path(source).name


@dataclass(frozen=True)
class LayerReport:
    """One pruned matrix.

    name, shape: of the matrix, outputs x inputs. pattern: as asked for, "50% block" or "2:4".
    method: what chose its weights (another one than the run's when it saw too few tokens).
    sparsity: fraction of zeros in what was written. zeros, elements: the counts behind it.
    tokens: calibration tokens it saw; 0 when there was no calibration.
    relative_error_before_update: tr(D H D^T) / tr(W H W^T) with D what zeroing the pruned weights
        changes and H = X^T X; relative_error_after: the same for the weights that were written.
        Squared errors of the outputs; None without calibration.
    error_basis: "gram", or "column norms" where only diag(H) was collected.
    damping, loss, iterations, gap: see `methods.Solution`. dead_inputs: inputs that were always
        zero.
    seconds: solving and writing it, statistics excluded.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    method: str
    sparsity: float
    zeros: int
    elements: int
    tokens: float = 0.0
    relative_error_before_update: float | None = None
    relative_error_after: float | None = None
    error_basis: str | None = None
    damping: float | None = None
    loss: float | None = None
    iterations: int | None = None
    gap: float | None = None
    dead_inputs: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class CalibrationReport:
    """The text that was shown: its `sha256`, real `tokens` (padding excluded), `sequences` of
    `seqlen` tokens each at most."""

    source: str
    sha256: str | None
    tokens: int
    sequences: int
    seqlen: int

    @classmethod
    def of(cls, text: TokenSet) -> CalibrationReport:
        return cls(text.source, text.sha256, text.tokens, text.nsamples, text.seqlen)

    def fact(self) -> str:
        """For a model card, which others read."""
        digest = f", sha256 `{self.sha256}`" if self.sha256 else ""
        return (
            f"Calibration: {text_name(self.source)}, {self.tokens:,} tokens in {self.sequences} "
            f"sequences of up to {self.seqlen}{digest}"
        )


@dataclass(frozen=True)
class RunReport:
    """What differs from one run to the next: seconds by phase, and peak memory in bytes (resident
    set of the process since the run began; `peak_cuda_bytes` allocated by PyTorch)."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    peak_cuda_bytes: int | None = None

    @classmethod
    def of(cls, measure: Measure) -> RunReport:
        return cls(measure.total(), measure.peak_rss_bytes(), measure.peak_cuda_bytes())


@dataclass(frozen=True, repr=False)
class Report:
    """The outcome of `prune`. In the file everything that varies between identical runs stands in
    the last section, `run`.

    notes: what the user should know of the run as a whole.
    """

    model: str
    config: PruneConfig
    versions: Mapping[str, str]
    layers: tuple[LayerReport, ...]
    calibration: CalibrationReport | None = None
    run: RunReport = field(default_factory=RunReport)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Report of {self.model}: {_summary(self)}>"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned matrices together."""
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / elements if elements else 0.0

    @property
    def noted(self) -> list[LayerReport]:
        """The layers that something has to be said about."""
        return [layer for layer in self.layers if layer.notes]

    def to_dict(self) -> dict[str, Any]:
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        seconds = {layer["name"]: layer.pop("seconds") for layer in layers}
        return {
            "schema": SCHEMA,
            "model": self.model,
            "config": self.config.to_dict(),
            "versions": dict(self.versions),
            "calibration": self.calibration and dataclasses.asdict(self.calibration),
            "sparsity": self.sparsity,
            "notes": list(self.notes),
            "layers": layers,
            "run": {**dataclasses.asdict(self.run), "layer_seconds": seconds},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`; UserError for anything else."""
        try:
            values = json.loads(text)
            schema = values["schema"]
            if schema != SCHEMA:
                raise UserError(f"pyprune.json: expected schema {SCHEMA}, got {schema!r}")
            return cls._from_dict(values)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"pyprune.json: expected a report, got something else: {error!r}"
            ) from (error)

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> Report:
        run = dict(values["run"])
        seconds = run.pop("layer_seconds")
        layers = tuple(
            LayerReport(
                **{
                    **layer,
                    "shape": tuple(layer["shape"]),
                    "notes": tuple(layer["notes"]),
                    "seconds": seconds[layer["name"]],
                }
            )
            for layer in values["layers"]
        )
        calibration = values["calibration"]
        return cls(
            model=values["model"],
            config=PruneConfig.from_dict(values["config"]),
            versions=values["versions"],
            layers=layers,
            calibration=None if calibration is None else CalibrationReport(**calibration),
            run=RunReport(**run),
            notes=tuple(values.get("notes", ())),
        )

    def table(self) -> Table:
        """For a terminal: one row per kind of matrix (the same place in every block), and below
        them what has to be said of the run and of layers. `pyprune.json` has every layer."""
        title = Text(f"{self.model}: {_summary(self)}")
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
        # Names take what is left, on several lines if they must; they never vanish.
        table.add_column("matrices", min_width=12, overflow="fold")
        for name in ("shape", "sparsity", "error\nbefore", "error\nafter", "damping", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        for kind, shape, layers in alike(self.layers):
            dampings = [layer.damping for layer in layers if layer.damping is not None]
            table.add_row(
                f"{len(layers)} {kind}",
                f"{shape[0]}x{shape[1]}",
                f"{sum(x.zeros for x in layers) / sum(x.elements for x in layers):.4f}",
                _mean_percent([layer.relative_error_before_update for layer in layers]),
                _mean_percent([layer.relative_error_after for layer in layers]),
                f"{max(dampings):g}" if dampings else "-",
                f"{sum(layer.seconds for layer in layers):.2f}",
            )
        of_layers = [f"{layer.name}: {'; '.join(layer.notes)}" for layer in self.noted]
        return with_notes(table, [*self.notes, *of_layers])


class Named(Protocol):
    """What is said of one matrix."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...


Layer = TypeVar("Layer", bound=Named)


def alike(layers: Iterable[Layer]) -> Iterator[tuple[str, tuple[int, int], list[Layer]]]:
    """The kinds of matrices (the same place in every block, one shape): their name without that of
    the block, their shape, and the layers."""
    kinds: dict[tuple[str, tuple[int, int]], list[Layer]] = {}
    for layer in layers:
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name)
        kinds.setdefault((kind, layer.shape), []).append(layer)
    for (kind, shape), same in kinds.items():
        yield kind.split("*.", 1)[-1], shape, same


def with_notes(table: Table, notes: Sequence[str]) -> Table:
    """Puts sentences below a table, where they have its whole width."""
    if notes:
        table.caption = Text("\n".join(notes), style="yellow")
        table.caption_justify = "left"
    return table


def _mean_percent(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2%}" if known else "-"


def _reconstruction(config: PruneConfig) -> str:
    """Said where it is not what the method does by itself."""
    if config.reconstruct is None:
        return ""
    return "reconstruction" if config.reconstruct else "no reconstruction"


def _summary(report: Report) -> str:
    config = report.config
    variant = filter(None, [_allocated(config), _variant(config)])
    words = ", ".join([config.method, str(config.target()), *variant])
    whole = f"{words}: {report.sparsity:.2%} of {len(report.layers)} matrices is zero"
    shares = sorted(layer.sparsity for layer in report.layers)
    if not shares or shares[-1] - shares[0] < UNEQUAL:
        return whole
    return f"{whole}, {shares[0]:.1%} to {shares[-1]:.1%} of each"


def _allocated(config: PruneConfig) -> str:
    """How the sparsity was shared out, if not uniformly."""
    if config.allocation == "uniform":
        return ""
    own = [f"{name} {value}" for name, value in config.allocation_options.items()]
    return ", ".join([f"allocation {config.allocation}", *own])


def _variant(config: PruneConfig) -> str:
    """What was asked for beyond the method, its own options included."""
    common = [
        f"update {config.update}" if config.update != "none" else "",
        "score mass" if config.score_mass else "",
        _reconstruction(config),
        "reference count" if config.reference_count else "",
    ]
    own = [f"{name} {value}" for name, value in config.method_options.items()]
    return ", ".join([*filter(None, common), *own])


def _untouched(config: PruneConfig) -> str:
    if config.in_shots():  # it corrects the biases of the matrices with their weights
        return "Embeddings, head, norms and routers"
    return "Embeddings, head, norms, biases and routers"


def card_head(model: str, tags: Sequence[str], title: str) -> list[str]:
    """The first lines of the README.md of what `model` was pruned to: the hub's YAML header with
    `tags`, and a heading that says how (`title`)."""
    return [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(model, ensure_ascii=False)}",
        "base_model_relation: finetune",
        "tags:",
        *(f"- {tag}" for tag in ("pruned", *tags)),
        "---",
        "",
        f"# {model}, pruned: {title}",
        "",
    ]


def model_card(report: Report) -> str:
    """The README.md of a pruned checkpoint (Markdown with the hub's YAML header)."""
    config, calibration = report.config, report.calibration
    method = config.find_method()
    elements = sum(layer.elements for layer in report.layers)
    lines = [
        *card_head(report.model, ("sparse", config.method), f"{config.method} {config.target()}"),
        f"{report.sparsity:.2%} of the {elements:,} weights in {len(report.layers)} matrices of "
        f"the decoder blocks are zero. {_untouched(config)} are those of the original. The "
        "weights are stored dense, zeros included: any loader reads them, and nothing is smaller "
        "or faster by itself.",
        "",
        f"- Method: {config.method}, {method.title} ({method.paper})",
        f"- Pattern: {config.target()}"
        + (" (N kept of every M consecutive inputs)" if config.pattern else ""),
    ]
    if _allocated(config):
        lines.append(f"- Sparsity: {_allocated(config)}")
    if _variant(config):
        lines.append(f"- Options: {_variant(config)}")
    if calibration is not None:
        lines.append(f"- {calibration.fact()}")
    lines += [f"- {name}: {version}" for name, version in report.versions.items()]
    lines += [f"- Note: {note}" for note in report.notes]
    if report.noted:
        lines += ["", "## Layers with notes", ""]
        lines += [f"- `{layer.name}`: {'; '.join(layer.notes)}" for layer in report.noted]
    lines += ["", "Configuration and figures of every layer are in `pyprune.json`.", ""]
    return "\n".join(lines)
