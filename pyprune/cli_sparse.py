"""The commands of compressed checkpoints; `pyprune.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pyprune import cli
from pyprune.cli import AsJson, Model, app
from pyprune.errors import UserError
from pyprune.progress import ProgressBar

if TYPE_CHECKING:
    from pyprune.sparse.convert import ConversionReport

Out = Annotated[Path, typer.Option("--out", "-o", help="A new directory.")]


@app.command(
    epilog="[b]Examples[/b]\n\npyprune compress pruned --out small\n\n"
    "pyprune compress pruned --out small --format bitmap --json"
)
def compress(
    model: Model,
    out: Out,
    format: Annotated[
        str,
        typer.Option(help="auto (the smallest for each layer), sparse24 or bitmap."),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Leave the zeros of a pruned checkpoint out. Layers that would not shrink stay dense."""
    cli._quiet()
    from pyprune.sparse.convert import compress_checkpoint
    from pyprune.sparse.linear import FORMATS

    if format not in ("auto", *FORMATS):
        raise UserError(f"--format: expected auto, {', '.join(FORMATS)}, got {format!r}")
    allowed = FORMATS if format == "auto" else (format,)
    with ProgressBar(cli._stderr(), "compressing") as bar:
        source = cli._resolve(model, bar)
        report = compress_checkpoint(source, out, allowed=allowed, progress=bar.step)
    cli._show(report.to_dict(), as_json, _table(report), f"Saved in {out}")


@app.command(epilog="[b]Example[/b]\n\npyprune decompress small --out dense")
def decompress(model: Model, out: Out, as_json: AsJson = False) -> None:
    """Restore the dense checkpoint, bit for bit, also from compressed-tensors' old sparse
    layouts."""
    cli._quiet()
    from pyprune.sparse.convert import decompress_checkpoint

    with ProgressBar(cli._stderr(), "decompressing") as bar:
        report = decompress_checkpoint(cli._resolve(model, bar), out, progress=bar.step)
    cli._show(report.to_dict(), as_json, _table(report), f"Saved in {out}")


def _table(report: ConversionReport) -> Table:
    table = Table("format", "layers")
    for kind in sorted(set(report.formats.values())):
        table.add_row(kind, str(list(report.formats.values()).count(kind)))
    share = report.nbytes_after / max(1, report.nbytes_dense)
    table.title = (
        f"{report.nbytes_before / 1e6:,.2f} MB to {report.nbytes_after / 1e6:,.2f} MB "
        f"({share:.1%} of dense)"
    )
    return table
