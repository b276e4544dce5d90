"""`pyprune drop-layers`: whole layers out of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pyprune.cli import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Model,
    Seqlen,
    _quiet,
    _resolve,
    _show,
    _stderr,
    app,
)
from pyprune.errors import UserError
from pyprune.progress import ProgressBar


@app.command(
    "drop-layers",
    epilog="[b]Examples[/b]\n\n"
    "pyprune drop-layers packaged --method shortgpt --ratio 0.2 --out smaller\n\n"
    "pyprune drop-layers ./llama -m angular --count 4 -O refit=true --out smaller\n\n"
    "pyprune drop-layers ./llama -m shortened-llama --count 4 -O criterion=taylor --out smaller",
)
def drop(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new directory for the result.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="shortgpt, angular, shortened-llama, segments, laco, llm-streamline or reverse.",
        ),
    ] = "shortgpt",
    ratio: Annotated[float | None, typer.Option(help="Share of all parameters to remove.")] = None,
    count: Annotated[int | None, typer.Option(help="Layers to remove.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="name=value of the method; also compensate, refit."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="wiki (packaged), a .txt or .jsonl file, a directory, or hub:ID."),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    seqlen: Seqlen = None,
    batch_size: BatchSize = None,
    seed: Annotated[int | None, typer.Option(help="Which sequences are drawn.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Remove whole layers: the result is an ordinary, smaller model."""
    from dataclasses import replace

    import torch
    import yaml

    from pyprune.config import DTYPES, CalibrationConfig
    from pyprune.depth.layer_run import prune_layers_checkpoint

    options: dict[str, Any] = {}
    for item in option or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--option: expected name=value, got {item!r}")
        options[name] = yaml.safe_load(value)
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    shown = {
        "source": calibration,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "seed": seed,
    }
    text = replace(
        CalibrationConfig(nsamples=32, seqlen=512),
        **{k: v for k, v in shown.items() if v is not None},  # type: ignore[arg-type]
    )
    _quiet()
    with ProgressBar(_stderr(), "dropping layers") as bar:
        decision = prune_layers_checkpoint(
            _resolve(model, bar),
            out,
            method,
            ratio=ratio,
            count=count,
            options=options,
            calibration=text,
            device=device or "auto",
            dtype=None if dtype in (None, "auto") else getattr(torch, str(dtype)),
        )
    before, after = decision["parameters"]
    table = Table("removed, in order", "layers", "parameters", "share removed", title=method)
    removed = [step["unit"][0][1] for step in decision["steps"]]
    table.add_row(
        ", ".join(map(str, removed)),
        f"{decision['layers']} -> {decision['layers'] - len(removed)}",
        f"{before:,} -> {after:,}",
        f"{1 - after / before:.1%}",
    )
    _show(decision, as_json, table, f"Saved in {out}")
