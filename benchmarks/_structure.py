"""What the quality benches of removed branches and of narrower layers share: pruning in a process
of its own, perplexity, size and speed of the result, and rows that are kept when a run goes on."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _harness import cpu_seconds_of_children, environment, write_rows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pyprune.config import CalibrationConfig, ConfigFile
from pyprune.evaluate import perplexity
from pyprune.packaged import packaged_model_dir
from pyprune.sparse.bench import DENSE, Contestant, Protocol, bench, weight_bytes

Row = dict[str, Any]
# (variant, ratio, the dense model) -> what there is to say of it.
Measure = Callable[[str, float, PreTrainedModel], Row]
RATIOS = (0.1, 0.2, 0.3)
TEXTS = ("wiki", "sotu")
SEQLEN = 1024
PROTOCOL = Protocol(batches=(1,), prompt=256, steps=16, rounds=3)
SMOKE_PROTOCOL = Protocol(batches=(1,), prompt=8, steps=2, rounds=1)
# How refusals begin that mean that a method cannot reach a ratio on this model.
UNREACHABLE = ("LaCo: expected to remove more", "expected to remove at most", "ratio: expected")

# In a process of its own: peak memory is then that of this run alone.
CHILD = """
import sys
from importlib import import_module
from pyprune.errors import UserError
function, config = (getattr(import_module(m), n) for m, n in (p.split(":") for p in sys.argv[3:]))
try:
    function(sys.argv[1], sys.argv[2], config.from_yaml(sys.stdin.read()))
except UserError as error:
    sys.exit(str(error))
"""


def parse(
    doc: str,
    names: Iterable[str],
    smoke: Sequence[str],
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> argparse.Namespace:
    """The command line. names: of all variants; smoke: of those that --smoke runs. more: adds
    options of one bench."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one variant, a few tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--variants", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8 * 1024, help="evaluated, each text")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="of the evaluation")  # fmt: skip
    parser.add_argument("--rates-only", action="store_true",
                        help="time the rows of --json again, nothing else")  # fmt: skip
    parser.add_argument("--again", action="store_true",
                        help="make the rows of --json again, but for speeds that stay")  # fmt: skip
    more(parser)
    args = parser.parse_args()
    if args.rates_only or args.again:
        if args.json is None or not args.json.exists():
            parser.error(f"expected --json with a file of rows, got {args.json}")
    elif args.smoke:
        args.variants, args.ratios = list(smoke), [0.1]
        args.nsamples, args.seqlen, args.tokens = 2, 32, 64
        args.dtype = "float32"  # bf16 takes ten times as long where a processor has none
    return args


def shown(args: argparse.Namespace, batch_size: int = 8) -> CalibrationConfig:
    return CalibrationConfig(nsamples=args.nsamples, seqlen=args.seqlen, batch_size=batch_size)


def prune_and_measure(
    function: Callable[..., Any],
    tries: Iterable[ConfigFile],
    dense: PreTrainedModel,
    args: argparse.Namespace,
    own: Callable[[Row, PreTrainedModel], Row],
) -> Row:
    """Of the first configuration that reaches its ratio; "impossible" says why none does.

    function: `(source, out, config)`, prunes a checkpoint. own: (report, pruned model) -> what only
    this bench has to say.
    """
    reason = ""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "pruned"
        for config in tries:
            try:
                report = prune(function, folder, config)
            except RuntimeError as error:
                # What comes before the last line are the progress bars of loading.
                reason = str(error).splitlines()[-1]
                if not any(words in reason for words in UNREACHABLE):
                    raise
                continue
            pruned = load(folder, args.device)
            return own(report, pruned) | measured(dense, pruned, folder, report, args)
    return {"impossible": reason}


def prune(function: Callable[..., Any], folder: Path, config: ConfigFile) -> Row:
    """The report; RuntimeError with what it says if it cannot be done."""
    names = [f"{f.__module__}:{f.__qualname__}" for f in (function, type(config))]
    before = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(packaged_model_dir()), str(folder), *names],
        input=config.to_yaml(), text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    report: Row = json.loads((folder / "pyprune.json").read_text())
    return {**report, "cpu_seconds": cpu_seconds_of_children() - before}


def measured(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    folder: Path,
    report: Row,
    args: argparse.Namespace,
) -> Row:
    protocol = SMOKE_PROTOCOL if args.smoke else PROTOCOL
    parameters = report["parameters"]
    return {
        "parameters": parameters["after"],
        "zeros": parameters["zeros"],
        "removed_share": parameters["removed_share"],
        "realised_share": parameters["realised_share"],
        "file_bytes": file_bytes(folder),
        "seconds": report["run"]["seconds"]["total"],
        "cpu_seconds": report["cpu_seconds"],
        "peak_memory_bytes": report["run"]["peak_rss_bytes"],
        "calibration_sha256": report["calibration"]["sha256"],
        "perplexity": evaluate(folder, args),
        **({} if args.again else rates(dense, pruned, protocol)),
    }


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, Row]:
    model = load(folder, args.device, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    for text in TEXTS:
        r = perplexity(model, tokenizer, text=text, seqlen=min(SEQLEN, args.tokens),
                       max_tokens=args.tokens)  # fmt: skip
        results[text] = {"ppl": r.ppl, "tokens": r.tokens, "seqlen": r.seqlen, "bos": r.bos,
                         "dtype": args.dtype}  # fmt: skip
    return results


def load(folder: Path, device: str, dtype: str = "float32") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def rates(dense: PreTrainedModel, pruned: PreTrainedModel, protocol: Protocol) -> Row:
    """Tokens per second of the pruned model, and how many times the dense model's."""
    both = [
        Contestant(name, "float32", None, 0, weight_bytes(model), model)
        for name, model in ((DENSE, dense), ("pruned", pruned))
    ]
    result = bench(both, protocol)
    row: Row = {}
    for phase in ("prefill", "decode"):
        mine, theirs = (result.fastest(n, phase, protocol.batches[0]) for n in ("pruned", DENSE))
        row[phase] = {
            "tokens_per_second": mine.median,
            "least": mine.least,
            "greatest": mine.greatest,
            "dense_tokens_per_second": theirs.median,
            "over_dense": mine.median / theirs.median,
        }
    return row


def rates_again(row: Row, dense: PreTrainedModel, args: argparse.Namespace) -> Row:
    """The speed of a row that was measured beside other work. It depends on shapes alone, so the
    model is a random one of the row's shape; `timed` says so, and what the machine did meanwhile.
    """
    found = rates(dense, of_shape(row, dense), SMOKE_PROTOCOL if args.smoke else PROTOCOL)
    return {**found, "timed": {"weights": "random", **environment(args.device)}}


def made_again(old: Row, new: Row, dense: PreTrainedModel, args: argparse.Namespace) -> Row:
    """`new`, of the same variant, with its speed: that of `old` if it was timed apart from the rest
    of its row and the shape is the same, which is all that a speed depends on."""
    shape = ("parameters", "layers", "sizes")
    if "timed" in old and all(old.get(key) == new.get(key) for key in shape):
        return new | {key: old[key] for key in ("prefill", "decode", "timed")}
    return new | (rates_again(new, dense, args) if "parameters" in new else {})


def of_shape(row: Row, dense: PreTrainedModel) -> PreTrainedModel:
    """A random model of the structure that a row tells of, in float32."""
    sizes = {name: after for name, (_, after) in row.get("sizes", {}).items()}
    if "layers" in row:
        sizes["num_hidden_layers"] = row["layers"]
    # What a row does not say, but for its parameters: biases that FLAP adds, heads that are untied.
    unsaid = ("attention_bias", "mlp_bias", "tie_word_embeddings")
    for values in product((False, True), (False, True), (True, False)):
        config = copy.deepcopy(dense.config)
        for name, value in (sizes | dict(zip(unsaid, values, strict=True))).items():
            setattr(config, name, value)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if sum(p.numel() for p in model.parameters()) == row["parameters"]:
            return AutoModelForCausalLM.from_config(config).to(dense.device).eval()
    raise ValueError(
        f"{row['variant']} at {row['ratio']:.0%}: expected {row['parameters']:,} parameters, no "
        f"model with {sizes} has them"
    )


def measure_all(args: argparse.Namespace, measure: Measure) -> None:
    """All variants at all ratios, but for rows that `args.json` has already; shows the table."""
    rows: list[Row] = []
    kept = args.rates_only or args.again or not args.smoke
    if args.json is not None and args.json.exists() and kept:
        rows = json.loads(args.json.read_text())
    done = {(row["variant"], row["ratio"]) for row in rows}
    folder = packaged_model_dir()
    dense = load(folder, args.device)
    common = {**environment(args.device), "calibration_tokens": args.nsamples * args.seqlen}

    def keep(row: Row) -> None:
        rows.append({**row, **common})
        write_rows(args.json, rows)

    if args.rates_only:
        for row in rows:
            wanted = row["variant"] in args.variants and row["ratio"] in args.ratios
            if wanted and "prefill" in row:
                row |= rates_again(row, dense, args)
                write_rows(args.json, rows)
        show(rows)
        return
    if args.again:
        for i, row in enumerate(rows):
            if row["variant"] in args.variants and row["ratio"] in args.ratios:
                name = {key: row[key] for key in ("variant", "ratio")}
                new = name | measure(row["variant"], row["ratio"], dense) | common
                rows[i] = made_again(row, new, dense, args)
                write_rows(args.json, rows)
        show(rows)
        return
    if (DENSE, 0.0) not in done:
        keep({"variant": DENSE, "ratio": 0.0, "perplexity": evaluate(folder, args),
              "parameters": sum(p.numel() for p in dense.parameters()),
              "file_bytes": file_bytes(folder)})  # fmt: skip
    for ratio in sorted(args.ratios):
        for name in args.variants:
            if (name, ratio) not in done:
                keep({"variant": name, "ratio": ratio, **measure(name, ratio, dense)})
    show(rows)


def show(rows: list[Row]) -> None:
    table = Table("method", "ratio", *TEXTS, "removed", "realised", "MB", "prefill x", "decode x",
                  "s")  # fmt: skip
    for row in rows:
        if "impossible" in row:
            table.add_row(row["variant"], f"{row['ratio']:.0%}", "impossible")
            continue
        cells = [row["variant"], f"{row['ratio']:.0%}"]
        cells += [f"{row['perplexity'][t]['ppl']:.2f}" for t in TEXTS]
        if "removed_share" in row:
            cells += [f"{row[k]:.1%}" for k in ("removed_share", "realised_share")]
            cells += [f"{row['file_bytes'] / 1e6:,.0f}"]
            cells += [f"{row[phase]['over_dense']:.2f}" for phase in ("prefill", "decode")]
            cells += [f"{row['seconds']:.0f}"]
        table.add_row(*cells)
    Console(width=120).print(table)
