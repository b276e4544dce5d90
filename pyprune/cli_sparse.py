"""The commands of compressed checkpoints; `pyprune.cli` registers them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from pyprune import cli
from pyprune.cli import AsJson, Device, Dtype, Model, app, examples
from pyprune.errors import UserError
from pyprune.progress import ProgressBar

if TYPE_CHECKING:
    from pyprune.sparse.bench import BenchResult
    from pyprune.sparse.choice import LayerConversion
    from pyprune.sparse.convert import ConversionReport

Out = Annotated[Path, typer.Option("--out", "-o", help="A new directory.")]


@app.command(
    epilog=examples(
        "pyprune compress pruned --out small",
        "pyprune compress pruned --out small --values int8",
        "pyprune compress pruned --out small --embeddings coded --dtype bfloat16",
        "pyprune compress pruned --out small --embeddings int8",
        "pyprune compress pruned --out small --choose measured --rows 1 --json",
        "pyprune compress pruned --out small --format deci",
    )
)
def compress(
    model: Model,
    out: Out,
    format: Annotated[
        str,
        typer.Option(
            help="auto (--choose decides for each layer), sparse24 or bitmap; or deci: DeciLM, "
            "without zeroed branches, channels and key-value heads, for vLLM and llama.cpp."
        ),
    ] = "auto",
    choose: Annotated[
        str,
        typer.Option(
            help="bytes (the smallest; the same files on every machine) or measured (what "
            "multiplies fastest here, dense included, among what saves a tenth of the bytes)."
        ),
    ] = "bytes",
    rows: Annotated[
        int | None,
        typer.Option(
            help="Of the activations, for --choose measured. Default: 1, which is decoding."
        ),
    ] = None,
    values: Annotated[
        str,
        typer.Option(help="same (the checkpoint's dtype, bit for bit) or int8, a scale a row."),
    ] = "same",
    embeddings: Annotated[
        str,
        typer.Option(
            help="Of the input embedding and the head, tied or not, which have no zeros to leave "
            "out. same; coded (bf16 in 0.71 of the bytes, bit for bit); int8 (a scale for each "
            "entry of the vocabulary)."
        ),
    ] = "same",
    dtype: Annotated[
        str,
        typer.Option(
            help="same or bfloat16: what the numbers of a dense checkpoint are rounded to first."
        ),
    ] = "same",
    as_json: AsJson = False,
) -> None:
    """Leave the zeros of a pruned checkpoint out. Layers that would not shrink stay dense."""
    cli.quiet()
    from pyprune.sparse.convert import EMBEDDINGS, compress_checkpoint
    from pyprune.sparse.layout import FORMATS

    if format not in ("auto", *FORMATS, "deci"):
        raise UserError(f"--format: expected auto, {', '.join(FORMATS)} or deci, got {format!r}")
    if choose not in ("bytes", "measured"):
        raise UserError(f"--choose: expected bytes or measured, got {choose!r}")
    if values not in ("same", "int8"):
        raise UserError(f"--values: expected same or int8, got {values!r}")
    if embeddings not in EMBEDDINGS:
        raise UserError(f"--embeddings: expected {', '.join(EMBEDDINGS)}, got {embeddings!r}")
    if dtype not in ("same", "bfloat16"):
        raise UserError(f"--dtype: expected same or bfloat16, got {dtype!r}")
    if rows is not None and choose != "measured":
        raise UserError(f"--rows: expected --choose measured with it, got --choose {choose}")
    cli.check_out(out)
    if format == "deci":
        given = (choose, values, embeddings, dtype) != ("bytes", "same", "same", "same")
        _to_deci(model, out, given, as_json)
        return
    allowed = FORMATS if format == "auto" else (format,)
    with ProgressBar(cli.stderr(), "compressing") as bar:
        source = cli.resolve(model, bar)
        report = compress_checkpoint(
            source,
            out,
            allowed=allowed,
            int8=values == "int8",
            embeddings=embeddings,
            dtype=cli.torch_dtype(None if dtype == "same" else dtype),
            measured_rows=(1 if rows is None else rows) if choose == "measured" else None,
            progress=bar.step,
        )
    notes = list(report.notes)
    if report.nbytes_after >= report.nbytes_dense:
        kinds = " or ".join(allowed)
        notes.append(
            f"Nothing became smaller: no layer's zeros save a tenth of its bytes as {kinds}"
        )
    cli.show(report.to_dict(), as_json, _table(report), *notes, f"Saved in {out}")


def _to_deci(model: str, out: Path, rounded: bool, as_json: bool) -> None:
    from pyprune.deci import NOTE
    from pyprune.deci_convert import compress_deci

    if rounded:
        raise UserError(
            "--format deci: expected no --choose, --values, --embeddings and --dtype with it"
        )
    with ProgressBar(cli.stderr(), "compressing") as bar:
        report = compress_deci(cli.resolve(model, bar), out, progress=bar.step)
    cli.show(report.to_dict(), as_json, report.title, NOTE, f"Saved in {out}")


@app.command(
    epilog=examples(
        "pyprune decompress small --out dense",
    )
)
def decompress(model: Model, out: Out, as_json: AsJson = False) -> None:
    """Restore the dense checkpoint, bit for bit. Also reads compressed-tensors' old layouts, and
    makes a stock model of a DeciLM."""
    cli.quiet()
    from pyprune.deci_convert import decompress_deci, is_deci
    from pyprune.sparse.convert import decompress_checkpoint

    cli.check_out(out)
    with ProgressBar(cli.stderr(), "decompressing") as bar:
        source = cli.resolve(model, bar)
        restore = decompress_deci if is_deci(source) else decompress_checkpoint
        report = restore(source, out, progress=bar.step)
    table = _table(report) if report.layers else report.title
    cli.show(report.to_dict(), as_json, table, f"Saved in {out}")


@app.command(
    epilog=examples(
        'pyprune generate small "The capital of France is"',
        'pyprune generate packaged "Why is the sky blue?" --chat --temperature 0.7',
    )
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text, streaming. With a dense or a compressed model."""
    cli.quiet()
    from pyprune.sparse.generate import generate as run

    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    with ProgressBar(cli.stderr(), "loading") as bar:
        source = cli.resolve(model, bar)
    tokens = run(
        source,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        dtype=cli.torch_dtype(dtype),
        device=_device(device),
        write=write,
    )
    if as_json:
        cli.show({"prompt": prompt, "text": "".join(pieces), "tokens": tokens}, True)
    else:
        sys.stdout.write("\n")


@app.command(
    epilog=examples(
        "pyprune bench small --against pruned",
        "pyprune bench small --batches 1,8 --json --plot bench.png > bench.json",
    )
)
def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    against: Annotated[
        str | None,
        typer.Option(help="The dense model; by default DIR decompressed in memory."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,4,16,64",
    prompt: Annotated[int, typer.Option(help="Tokens of each sequence in prefill.")] = 32,
    steps: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 16,
    rounds: Annotated[int, typer.Option(help="Turns of each model.")] = 3,
    graph: Annotated[
        bool | None,
        typer.Option(
            "--graph/--no-graph",
            help="Decode by replaying a CUDA graph of one step; by default on CUDA devices.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG to write (needs matplotlib).")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure dense and compressed side by side. Bytes, load time, prefill and decode tokens/s.

    Both run in float32 and bfloat16; the dense yardstick is the fastest of these two and of
    bfloat16 with our own dense kernel. The model of --against may have other layers and sizes (a
    line says which), but has to have the same tokenizer: tokens/s of others say nothing of each
    other.
    """
    cli.quiet()
    from pyprune.pictures import check_picture
    from pyprune.sparse import plot as drawing
    from pyprune.sparse.bench import Protocol, contestants
    from pyprune.sparse.bench import bench as run

    try:
        sizes = tuple(int(size) for size in batches.split(","))
    except ValueError as error:
        raise UserError(f"--batches: expected numbers with commas, got {batches!r}") from error
    protocol = Protocol(sizes, prompt, steps, rounds, graph=graph)
    if plot is not None:
        check_picture(plot, "--plot")
    with ProgressBar(cli.stderr(), "benchmark") as bar:
        bar.step("loading the models")
        dense = None if against is None else cli.resolve(against, bar)
        models = contestants({"sparse": model}, dense, device=_device(device))
        result = run(models, protocol, bar.step)
    if plot is not None:
        drawing.plot(result, plot)
    notes = (*result.warnings(), *result.verdict())
    cli.show(result.to_dict(), as_json, *bench_tables(result), *notes)


def bench_tables(result: BenchResult) -> list[Table]:
    """What is in memory and on disk, and the rates, as tables."""
    from pyprune.sparse.bench import label, threads

    def table(title: str, *columns: str, left: int) -> Table:
        # A plain frame: the lines of eighty columns must not break.
        made = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
        for place, name in enumerate(columns):
            made.add_column(name, justify="left" if place < left else "right", no_wrap=True)
        return made

    title = "MB, and weights in memory over the 16-bit dense model's"
    sizes = table(title, "model", "file", "weights", "of dense", "resident", "load s", left=1)
    shares = result.memory()
    for m in result.models:
        name = label(m["name"], m["dtype"], m["kernels"])
        seconds = "-" if m["load_seconds"] is None else f"{m['load_seconds']:.2f}"
        file, weights = (f"{m[key] / 1e6:,.1f}" for key in ("file_bytes", "weight_bytes"))
        share = f"{shares[name]:.1%}" if name in shares else ""
        held = m.get("resident_bytes")
        resident = "-" if held is None else f"{held / 1e6:,.1f}"
        sizes.add_row(name, file, weights, share, resident, seconds)
    where = threads(result.threads)
    if result.protocol.graph:
        where = "decoding by CUDA graphs"
    title = (
        f"tokens/s, median (least - greatest), and ratio to the fastest dense model; "
        f"{result.device}, {where}"
    )
    rates = table(title, "phase", "batch", "model", "tokens/s", "", "ratio", left=3)
    for rate in sorted(result.rates, key=lambda r: (r.phase, r.batch)):
        dense = result.fastest("dense", rate.phase, rate.batch).median
        rates.add_row(
            rate.phase,
            str(rate.batch),
            rate.label,
            f"{rate.median:,.1f}",
            f"({rate.least:,.1f} - {rate.greatest:,.1f})",
            f"{rate.median / dense:.2f}x",
        )
    return [sizes, rates]


def _device(name: str | None) -> str | None:
    from pyprune.devices import find_device

    device = find_device(name or "auto")
    return None if device.type == "cpu" else str(device)


def _table(report: ConversionReport) -> Table:
    """One line for layers of one shape that are stored alike; every layer is in the JSON."""
    from pyprune.report import with_notes

    table = Table(title_justify="left", box=box.SIMPLE, padding=0)
    for name in ("layers", "shape", "format", "values", "density", "MB dense", "MB", "error"):
        justify: Any = "left" if name in ("format", "values") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    measured = []
    groups: dict[tuple[Any, ...], list[LayerConversion]] = {}
    for layer in report.layers.values():
        groups.setdefault((layer.shape, layer.format, layer.values), []).append(layer)
    for (shape, format, values), layers in groups.items():
        density = [layer.density for layer in layers]
        dense = sum(layer.nbytes_dense for layer in layers)
        nbytes = sum(layer.nbytes for layer in layers)
        errors = [layer.error for layer in layers if layer.error is not None]
        row = [str(len(layers)), "x".join(map(str, shape)), format, values, _range(density, ".1%")]
        row += [f"{dense / 1e6:,.2f}", f"{nbytes / 1e6:,.2f}"]
        row.append(_range(errors, ".2%") if errors else "")
        table.add_row(*row)
        # None where a layer has no zeros to leave out: it is not measured.
        if seconds := next((layer.seconds for layer in layers if layer.seconds), None):
            times = ", ".join(f"{kind} {1e6 * s:,.0f}" for kind, s in seconds.items())
            rows = "1 row" if report.rows == 1 else f"{report.rows} rows"
            measured.append(f"{row[1]}: {times} microseconds a product of {rows}")
    table.title = report.title
    return with_notes(table, list(dict.fromkeys(measured)))


def _range(values: list[float], spec: str) -> str:
    low, high = f"{min(values):{spec}}", f"{max(values):{spec}}"
    return low if low == high else f"{low} - {high}"
