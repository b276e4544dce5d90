"""From a stock checkpoint with zeros to DeciLM and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict

from pyprune.checkpoint import (
    Checkpoint,
    check_output,
    copy_auxiliary,
    output_directory,
    write_report,
)
from pyprune.checkpoint.output import (
    AUXILIARY_BYTES,
    MAX_SHARD_SIZE,
    changed_model,
    earlier_report,
)
from pyprune.checkpoint.source import DECI, locate, main_dtype, read_json, read_tensors
from pyprune.deci import NOTE, check_family, dead_branches, save_deci, stock_tensors, to_deci
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.repack import repack
from pyprune.sparse.convert import ConversionReport
from pyprune.width.structure import Widths

Progress = Callable[[str, float, float | None], None]


def compress_deci(
    source: str | Path, out: str | Path, *, progress: Progress | None = None
) -> ConversionReport:
    """Writes the dense checkpoint `source` into the new directory `out`, as DeciLM, without the
    branches, channels and key-value heads that are zero: those of any method, and after healing.
    The model is held in memory.

    Raises UserError: see `to_deci`, `Checkpoint.open` and `output_directory`.
    """
    check_output(out)
    checkpoint = Checkpoint.open(source)
    if progress is not None:
        progress("loading the model", 0, None)
    model = checkpoint.load_model()
    check_family(model)
    graph = ResidualGraph.of(model)
    dead = dead_branches(graph, Widths.of(model, graph.adapter).live())
    before = sum(p.numel() for p in model.parameters())
    repack(graph, dead)
    report = earlier_report(checkpoint)
    with changed_model(checkpoint, model, out, save_deci) as folder:
        deci = to_deci(model)
        # Of the model before anything was pruned, where a structural method has said it.
        sizes = {"before": before, **report.get("parameters", {})}
        sizes |= {"after": deci.parameters, "zeros": deci.padding}
        sizes["removed_share"] = 1 - deci.wanted / sizes["before"]
        sizes["realised_share"] = 1 - deci.parameters / sizes["before"]
        stock = [f"of the stock model: {note}" for note in report.get("notes", [])]
        report |= {"parameters": sizes, "notes": [*stock, NOTE]}
        write_report(folder, report, _card(checkpoint.path.name, deci.parameters))
    after = sum(entry.nbytes for entry in read_tensors(Path(out).expanduser()).values())
    return ConversionReport(str(out), {}, checkpoint.nbytes, after, checkpoint.nbytes)


def _card(name: str, parameters: int) -> str:
    return (
        f"# {name} as DeciLM\n\n{parameters:,} parameters; {NOTE}.\n\nWhat was pruned is in "
        "`pyprune.json`.\n"
    )


def is_deci(source: str | Path) -> bool:
    """Whether a directory or hub id is a DeciLM checkpoint."""
    return read_json(locate(source) / "config.json").get("model_type") == DECI


def decompress_deci(
    source: str | Path, out: str | Path, *, progress: Progress | None = None
) -> ConversionReport:
    """Writes the stock checkpoint that computes what the DeciLM checkpoint `source` does into the
    new directory `out`, see `stock_tensors`."""
    check_output(out)
    path = locate(source)
    if progress is not None:
        progress("reading", 0, None)
    config, tensors = stock_tensors(path)
    entries = read_tensors(path)
    stock = Checkpoint(path, config, main_dtype(path, entries), entries)
    nbytes = sum(t.nbytes for t in tensors.values())
    report: dict[str, Any] = earlier_report(stock)
    with output_directory(out, needed=nbytes + AUXILIARY_BYTES) as folder:
        copy_auxiliary(stock, folder, index=False)
        config.save_pretrained(folder)
        save_torch_state_dict(
            {name: t.contiguous() for name, t in tensors.items()},
            folder,
            max_shard_size=MAX_SHARD_SIZE,
            metadata={"format": "pt"},
        )
        write_report(folder, report, "A DeciLM model as a stock one, with zeros.\n")
    return ConversionReport(str(out), {}, stock.nbytes, nbytes, nbytes)
