"""`pyprune heal`: fine-tuning of a pruned model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pyprune import cli
from pyprune.cli import AsJson, Device, Model, app, examples
from pyprune.progress import ProgressBar


@app.command(
    epilog=examples(
        "pyprune heal pruned --out healed",
        "pyprune heal pruned --teacher packaged --train all --out healed",
        "pyprune heal pruned -o healed --text a.jsonl --learning-rate 2e-4",
    )
)
def heal(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new directory for the result.")],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model before pruning: its predictions are learnt instead of the text alone. "
            "Default: none.",
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="lora, or all kept weights (16 bytes a weight more memory). Default: lora."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="wiki (packaged), a .txt or .jsonl file, a directory, or hub:ID. Default: wiki."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. Default: 200.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the low-rank change. Default: 8.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="The change is alpha / rank * B A. Default: 16.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Before the low-rank change. Default: 0.05.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak. Default: 0.0001.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches in a step. Default: 1.")] = None,
    nsamples: Annotated[int | None, typer.Option(help="Training sequences. Default: 512.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a sequence. Default: 512.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences that run at once. Default: 4.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of text, order and dropout. Default: 0.")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="To train in: float32 or bfloat16. Default: float32.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a pruned model; zeros stay zero. By LoRA, merged (needs peft), or all of its kept
    weights."""
    from dataclasses import replace

    from pyprune.heal import HealConfig, heal_checkpoint

    def given(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if value is not None}

    shown = given(source=text, nsamples=nsamples, seqlen=seqlen, batch_size=batch_size, seed=seed)
    config = HealConfig(
        training=replace(HealConfig().training, **shown),
        **given(
            train=train,
            steps=steps,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            learning_rate=learning_rate,
            accumulate=accumulate,
            device=device,
            dtype=dtype,
        ),
    )
    cli.check_out(out)
    cli.quiet()
    with ProgressBar(cli.stderr(), "healing") as bar:
        dense = None if teacher is None else cli.resolve(teacher, bar)
        report = heal_checkpoint(cli.resolve(model, bar), out, config, bar.step, teacher=dense)
    table = Table("", "before", "after", title=f"{model}: loss on held-out text")
    table.add_row("nats per token", f"{report.loss_before:.4f}", f"{report.loss_after:.4f}")
    words = f"{report.matrices} matrices, {report.zeros:,} zeros kept. Saved in {out}"
    cli.show(asdict(report), as_json, table, words)
