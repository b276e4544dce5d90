"""`pyprune eval`, `inspect`, `methods` and `doctor`: what looks and changes nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from pyprune import cli
from pyprune.cli import (
    AsJson,
    Device,
    Dtype,
    Model,
    TrustRemoteCode,
    app,
    examples,
)
from pyprune.errors import UserError
from pyprune.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pyprune.checkpoint import Checkpoint
    from pyprune.sparse.stored import StoredCheckpoint


@app.command(
    "eval",
    epilog=examples(
        "pyprune eval pruned",
        "pyprune eval org/model --text sotu --seqlen 2048 --json",
        "pyprune eval pruned --text book.txt --stride 512 --max-tokens 100000",
    ),
)
def evaluate(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            help="wiki or sotu (packaged, the part not used for calibration), a .txt or .jsonl "
            "file, a directory, or hub:ID."
        ),
    ] = "wiki",
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window; 1024 by default, or the model's positions if it has fewer."
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; the sequence length by default.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows that run at once. Default: 1.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="How much of the text, from its start; 0: all of it.")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="Start windows with BOS.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on a text. Dense or compressed models; states the protocol too."""
    if max_tokens is not None and max_tokens < 0:
        raise UserError(f"--max-tokens: expected 0 (all of the text) or more, got {max_tokens}")
    cli.quiet()
    from pyprune.evaluate import DEFAULT_SEQLEN, perplexity
    from pyprune.sparse.stored import StoredCheckpoint

    with ProgressBar(cli.stderr(), "evaluating") as bar:
        stored = StoredCheckpoint.open(cli.resolve(model, bar), trust_remote_code=trust_remote_code)
        checkpoint = stored.checkpoint(trust_remote_code)
        given = {
            "seqlen": seqlen,
            "stride": stride,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
        }
        options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if max_tokens == 0:
            options["max_tokens"] = None
        tokenizer = checkpoint.tokenizer()
        bar.step("loading the model")
        result = perplexity(
            _load(stored, checkpoint, device, dtype),
            tokenizer,
            text=text,
            bos=bos,
            progress=lambda done, total: bar.step(f"window {done}/{total}", done, total),
            **options,
        )
    table = Table("perplexity", "nats per token", "tokens/s", "seconds", title=model)
    table.add_row(
        f"{result.ppl:.3f}",
        f"{result.nll:.4f}",
        f"{result.tokens_per_second:,.0f}",
        f"{result.seconds:.1f}",
    )
    notes = [result.protocol]
    if seqlen is None and result.seqlen < DEFAULT_SEQLEN:
        notes.append(
            f"The model has {result.seqlen:,} positions: windows are that long, not "
            f"{DEFAULT_SEQLEN:,} tokens."
        )
    cli.show({"model": model, **asdict(result)}, as_json, table, *notes)


def _load(
    stored: StoredCheckpoint, checkpoint: Checkpoint, device: str | None, dtype: str | None
) -> PreTrainedModel:
    from pyprune.devices import find_device
    from pyprune.sparse.load import load
    from pyprune.sparse.range import check_range
    from pyprune.sparse.stored import DENSE

    compute = cli.torch_dtype(dtype)
    where = find_device(device or "auto")
    if stored.kind == DENSE:
        model = checkpoint.load_model(where, compute)
        check_range(model, stored.stored)
        return model
    return load(stored.path, compute, None if where.type == "cpu" else where)


@app.command(
    epilog=examples(
        "pyprune inspect pruned",
        "pyprune inspect pruned --json | jq .sparsity",
    )
)
def inspect(
    model: Model, trust_remote_code: TrustRemoteCode = False, as_json: AsJson = False
) -> None:
    """Show what every matrix is: shape, sparsity, pattern, bytes."""
    cli.quiet()
    from pyprune.inspection import inspect_checkpoint
    from pyprune.sparse.stored import StoredCheckpoint

    with ProgressBar(cli.stderr(), "reading") as bar:
        stored = StoredCheckpoint.open(cli.resolve(model, bar), trust_remote_code=trust_remote_code)
        found = inspect_checkpoint(stored, bar.step, trust_remote_code=trust_remote_code)
    cli.show(found.to_dict(), as_json, found.table(), *filter(None, [found.note]))


@app.command(epilog=examples("pyprune methods", "pyprune methods blockpruner"))
def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Only this method or allocation, and what each of its own options means.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List methods, and what can be combined."""
    from pyprune.allocation import ALLOCATIONS
    from pyprune.families import families, find_family

    if name is not None and name not in ALLOCATIONS:
        try:
            find_family(name)
        except UserError as error:  # which says which methods there are
            raise UserError(f"{error}; or an allocation: {', '.join(ALLOCATIONS)}") from None
    rows: list[dict[str, Any]] = []
    shown: list[Any] = []
    for family in families():
        table = Table(*family.headers, title=family.title, box=box.SIMPLE, padding=0)
        table.show_lines = True
        described = [family.describe(method) for method in family.methods().values()]
        _add_rows(described, "-O", name, table, rows, shown)
    from pyprune.allocation.table import HEADERS, describe_allocation

    table = Table(*HEADERS, title="--allocation of an unstructured sparsity", box=box.SIMPLE)
    described = [describe_allocation(allocation) for allocation in ALLOCATIONS.values()]
    _add_rows(described, "-A", name, table, rows, shown)
    if name is None:
        shown.append("pyprune methods NAME says what the options of one mean.")
    cli.show(rows, as_json, *shown)


def _add_rows(
    described: Sequence[tuple[tuple[str, ...], dict[str, Any]]],
    option: str,
    name: str | None,
    table: Table,
    rows: list[dict[str, Any]],
    shown: list[Any],
) -> None:
    """Those called `name` (None: all): to the table, to the rows, and the table with a line for
    each option to what is shown; with a name its meaning as well."""
    notes = []
    for cells, row in described:
        if name not in (None, row["name"]):
            continue
        table.add_row(*cells)
        rows.append(row)
        for key, takes in row["options"].items():
            notes.append(f"{row['name']} {option} {key}=...: {takes}")
            if name is not None:
                width = Console().width
                notes.append(
                    textwrap.fill(
                        row["meanings"][key], width, initial_indent="  ", subsequent_indent="  "
                    )
                )
    if table.row_count:
        _give_room(table)
        shown += [table, *notes]


def _give_room(table: Table) -> None:
    """To the column "what", which holds sentences: the others, but the name, need no more than
    their longest word and get no more than a seventh."""
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.overflow = "fold"
        if column.header != "what":
            words = " ".join(map(str, (column.header, *column.cells))).split()
            column.max_width = max(Console().width // 7, *map(len, words))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, and the backends each op has here."""
    from pyprune.doctor import diagnose

    diagnosis = diagnose()
    cli.show(diagnosis.to_dict(), as_json, diagnosis.render())
