"""`pyprune eigendamage`: directions out of the Fisher matrix's eigenbasis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from pyprune.cli import (
    AsJson,
    BatchSize,
    Device,
    Model,
    Seqlen,
    _quiet,
    _resolve,
    _show,
    _stderr,
    app,
)
from pyprune.progress import ProgressBar


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "pyprune eigendamage packaged -s 0.2 --out damaged\n\n"
    "pyprune eigendamage packaged -s 0.5 --unit elements --reestimate --out damaged"
)
def eigendamage(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new directory for the result.")],
    sparsity: Annotated[
        float, typer.Option("--sparsity", "-s", help="Share of all rotated entries to remove.")
    ],
    unit: Annotated[
        str | None,
        typer.Option(help="directions (rows and columns in the basis) or elements of it."),
    ] = None,
    reestimate: Annotated[
        bool | None,
        typer.Option(
            "--reestimate/--eigenvalues",
            help="Curvature from a second backward pass in the basis (EK-FAC).",
        ),
    ] = None,
    cap: Annotated[float | None, typer.Option(help="Most of one layer's rows or columns.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Layers to prune, e.g. 'model.layers.0.*'. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers to leave as they are. Repeatable.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="wiki (packaged), a .txt or .jsonl file, a directory, or hub:ID."),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    seqlen: Seqlen = None,
    batch_size: BatchSize = None,
    seed: Annotated[int | None, typer.Option(help="Which sequences are drawn.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Less memory for the gradients, and one more forward.")
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prune in the eigenbasis of every matrix's Kronecker factors. The result is dense: no loader
    of today stores it smaller, see [b]pyprune.eigendamage[/b]."""
    from pyprune.config import CalibrationConfig
    from pyprune.eigendamage import EigenDamageConfig, eigendamage_checkpoint
    from pyprune.report import with_notes

    def given(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if value is not None}

    config = EigenDamageConfig(
        sparsity,
        calibration=CalibrationConfig(
            **given(
                source=calibration, nsamples=nsamples, seqlen=seqlen, batch_size=batch_size,
                seed=seed,
            )
        ),
        **given(
            unit=unit,
            reestimate=reestimate,
            cap=cap,
            include=tuple(include) if include else None,
            exclude=tuple(exclude) if exclude else None,
        ),
    )  # fmt: skip
    _quiet()
    with ProgressBar(_stderr(), "eigendamage") as bar:
        report = eigendamage_checkpoint(
            _resolve(model, bar),
            out,
            config,
            checkpointing=gradient_checkpointing,
            device=device or "auto",
            progress=bar.step,
        )
    table = Table(box=box.SIMPLE, padding=0)
    # Names take what is left, on several lines if they must; they never vanish.
    table.add_column("layer", min_width=12, overflow="fold")
    for heading in ("directions left", "removed", "thin factors\n/ dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report["layers"]:
        rows, columns = layer["shape"]
        table.add_row(
            layer["name"],
            f"{layer['rows']} of {rows}, {layer['columns']} of {columns}",
            f"{layer['removed'] / (rows * columns):.1%}",
            f"{layer['factored_parameters'] / (rows * columns):.2f}",
        )
    noted = [f"{layer['name']}: {layer['note']}" for layer in report["layers"] if layer["note"]]
    words = (
        f"{report['sparsity']:.1%} removed, {report['predicted_loss']:.4f} nats per token "
        f"predicted. Saved in {out}"
    )
    _show(report, as_json, with_notes(table, noted), words)
