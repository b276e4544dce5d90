"""`pyprune prune`: every method, one command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    from pyprune.config import ConfigFile
    from pyprune.families import Family

# Fields of a configuration with options of its method or allocation: their option, whose they are.
OWN = {
    "method_options": ("option", "method"),
    "allocation_options": ("allocation-option", "allocation"),
}
# Options that are not called what their field is.
RENAMED = {
    "method_option": "method_options",
    "allocation_option": "allocation_options",
    "calibration": "source",
}
# Parameters of the command that are no field.
NO_FIELDS = (
    "model", "out", "config", "preserve_mask", "state", "trust_remote_code", "report", "as_json",
)  # fmt: skip
# Fields that say how much goes, each of some methods.
AMOUNTS = ("sparsity", "pattern", "ratio", "count")


@app.command(
    epilog=examples(
        "pyprune prune packaged --method sparsegpt --pattern 2:4 --out pruned",
        "pyprune prune ./llama --method wanda --sparsity 0.6 --scope row --out pruned",
        "pyprune prune org/model --config run.yaml --out pruned --json > report.json",
        "pyprune prune ./llama -m magnitude -s 0.5 --exclude '*.down_proj' -o out",
        "pyprune prune ./llama -m blockpruner --ratio 0.2 -o out --report pictures",
        "pyprune prune ./llama -m shortgpt --count 4 -O refit=true --out smaller",
    )
)
def prune(
    ctx: typer.Context,
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
        str | None,
        typer.Option("--method", "-m", help="See pyprune methods. Default: sparsegpt."),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            "-s",
            parser=cli.fraction,
            help="Fraction of the weights to remove, e.g. 0.5.",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", "-p", help="N:M, with N weights kept of every M, e.g. 2:4."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="Which weights compete, with --sparsity: those of a row, of a block of columns, "
            "of a layer, or all (global). Default: the method's own, see pyprune methods."
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How --sparsity is shared out: uniform, alphapruning (spectra of the weights), "
            "owl (outliers among scores), ecoflap (gradients of the loss) or besa (learned in "
            "each block). Default: uniform."
        ),
    ] = None,
    allocation_strength: Annotated[
        float | None,
        typer.Option(
            help="How unequal: epsilon of alphapruning, lambda of owl. Default: the paper's."
        ),
    ] = None,
    allocation_option: Annotated[
        list[str] | None,
        typer.Option(
            "--allocation-option", "-A", help="name=value of the allocation's own. Repeatable."
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            help="How kept weights make up for what is gone: none, sequential or iterative "
            "(choosing anew in between), for methods that say so in pyprune methods. Default: none."
        ),
    ] = None,
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct/--no-reconstruct",
            help="Then give kept weights their best values (least squares), for any method. "
            "Default: for SparseGPT, in layers that saw 4 tokens per input or more.",
        ),
    ] = None,
    score_mass: Annotated[
        bool | None,
        typer.Option(
            "--score-mass/--no-score-mass",
            help="Wanda: cut each row at a share of its score, not of its weights.",
        ),
    ] = None,
    reference_count: Annotated[
        bool | None,
        typer.Option(
            "--reference-count/--exact-count",
            help="magnitude and sparsegpt: the reference code's threshold rule.",
        ),
    ] = None,
    preserve_zeros: Annotated[
        bool | None,
        typer.Option(
            "--preserve-zeros/--no-preserve-zeros",
            help="Weights that are zero already stay zero, and count among the pruned.",
        ),
    ] = None,
    preserve_mask: Annotated[
        Path | None,
        typer.Option(
            help="A safetensors file of bool masks by layer name: what is false goes and counts."
        ),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            help="For methods that solve with a matrix H of the inputs: this share of the mean of "
            "its diagonal is added to the diagonal. Default: 0.01."
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that SparseGPT chooses among and updates together. Default: 128."
        ),
    ] = None,
    method_option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            help="name=value of the method's own options, see pyprune methods NAME. Repeatable.",
        ),
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
        typer.Option(
            parser=cli.fraction,
            help="For methods that remove structure: the share to remove, e.g. 0.2; see --by.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Instead of --ratio: branches or layers to remove.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="What --ratio is a share of: params, count (of branches or layers) or latency "
            "(measured). Default: params."
        ),
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            help="Layers left with one branch: packed (as few layers as possible), zeros (all "
            "layers stay) or deci (really with one, as DeciLM, for vLLM and llama.cpp; plain "
            "transformers cannot load it). Default: packed."
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Layers to prune, e.g. 'model.layers.0.*'. Repeatable. Default: all."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers to leave as they are. Repeatable.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="The text: wiki (packaged), a .txt or .jsonl file, a directory, or "
            "hub:ID[:config[:split[:column]]]. Default: wiki."
        ),
    ] = None,
    nsamples: Annotated[
        int | None,
        typer.Option(
            help="Sequences of it. Fewer take less time. Default: 128; 32 for methods that remove "
            "structure."
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a sequence, at most what the model takes. Default: 2048; 512 for "
            "methods that remove structure."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences that run at once. Default: 8.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which sequences are drawn. Default: 0.")] = None,
    padding: Annotated[
        str | None,
        typer.Option(
            help="windows of the joined text, or documents, padded and masked. Default: windows."
        ),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin sequences with BOS; else as the tokenizer does."
        ),
    ] = None,
    walk: Annotated[
        str | None,
        typer.Option(
            help="How blocks are run: single (once, every layer sees pruned ones before it), "
            "two-pass (statistics of the dense block, then its outputs) or naive (as single, "
            "running the block again for each layer). Default: single."
        ),
    ] = None,
    spill: Annotated[
        str | None,
        typer.Option(
            help="Where waiting activations go: none (they stay on the device), host or disk. "
            "Default: none."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="llm-surgeon, llm-surgeon-width, blockpruner and sleb: a directory for what an "
            "interrupted run needs to go on after its last shot or removal. Run the same command "
            "again."
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
    """Prune a checkpoint into a new directory. Weights, one block in memory at a time; or branches,
    layers and widths."""
    family, full = _prune_config(config, _fields_of(ctx.params))
    if full.idle() and preserve_mask is None:
        cli.say(full.idle())
    from pyprune.checkpoint import check_apart, check_writable
    from pyprune.checkpoint.files import nearest_folder
    from pyprune.families import Run

    cli.check_out(out)
    if state is not None:
        check_apart(out, state)
        check_writable(nearest_folder(state), "state")
    cli.quiet()
    with ProgressBar(cli.stderr(), "pruning") as bar:
        source = cli.resolve(model, bar)
        run = Run(source, out, full, bar, trust_remote_code, report, state, preserve_mask)
        outcome = family.run(run)
    cli.show(outcome.to_dict(), as_json, outcome.table(), f"Saved in {out}")


def _fields_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of the command's parameters those that were given and are fields of the configuration or of
    its calibration."""
    given = {
        RENAMED.get(name, name): value
        for name, value in params.items()
        if name not in NO_FIELDS and value is not None and value != [] and value != ()
    }
    for name, (option, _) in OWN.items():
        if name in given:
            given[name] = _named_values(f"--{option}", given[name])
    return given


def _named_values(option: str, given: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs, values by YAML's rules for scalars."""
    import yaml

    from pyprune.config import load_yaml

    values = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"{option}: expected name=value, got {pair!r}")
        try:
            parsed = load_yaml(value)
        except yaml.YAMLError:
            parsed = None
        if not isinstance(parsed, bool | int | float | str):
            raise UserError(f"{option} {name}: expected a number or a word, got {value!r}")
        values[name] = parsed
    return values


def _prune_config(file: Path | None, options: Mapping[str, Any]) -> tuple[Family, ConfigFile]:
    """The family of the method, and the file's fields (or the defaults), overridden by the options
    that were given."""
    from pyprune.config import CalibrationConfig, PruneConfig, read_yaml_file
    from pyprune.families import find_family

    values: dict[str, Any] = {} if file is None else dict(read_yaml_file(file))
    of_text = {field.name for field in fields(CalibrationConfig)}
    shown = {name: value for name, value in options.items() if name in of_text}
    given = {name: value for name, value in options.items() if name not in of_text}
    method = given.get("method", values.get("method", PruneConfig.method))
    family = find_family(method)
    known = {field.name for field in fields(family.config)}
    for name in given:
        if name not in known:
            option = OWN.get(name, (name,))[0].replace("_", "-")
            takes = " or ".join(f"--{target}" for target in family.targets)
            hint = f", which takes {takes}" if name in AMOUNTS else ""
            raise UserError(f"--{option}: not for {method}{hint}; see pyprune prune --help")
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
    text = values.get("calibration", {})
    values["calibration"] = {**text, **shown} if isinstance(text, dict) else text
    return family, family.config.from_dict(values)
