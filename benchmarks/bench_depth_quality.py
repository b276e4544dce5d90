"""What removing branches and layers costs in perplexity and brings in size and speed, for every
method, on the packaged model.

    python benchmarks/bench_depth_quality.py --json benchmarks/results/depth_quality.json
    python benchmarks/bench_depth_quality.py --variants blockpruner shortgpt --ratios 0.2

Every row: perplexity on two texts (evaluated in bfloat16 unless --dtype says
otherwise), parameters, bytes of the weights on disk, and tokens per second in float32 in prefill
and decoding, the dense model taking turns with the pruned one. Calibration is the same for all.
Rows already in the JSON file are kept, so that an interrupted run goes on where it stopped.
Searches continue from one ratio to the next: a greedy list is a prefix of a longer one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _harness import environment
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pyprune.config import CalibrationConfig
from pyprune.depth.config import StructureConfig
from pyprune.depth.registry import DEPTH_METHODS
from pyprune.evaluate import perplexity
from pyprune.packaged import packaged_model_dir
from pyprune.sparse.bench import DENSE, Contestant, Protocol, bench, weight_bytes

RATIOS = (0.1, 0.2, 0.3)
TEXTS = ("wiki", "sotu")
SEQLEN = 1024
PROTOCOL = Protocol(batches=(1,), prompt=256, steps=16, rounds=3)
SMOKE_PROTOCOL = Protocol(batches=(1,), prompt=8, steps=2, rounds=1)
# Similarities that LaCo accepts a fold at: the highest that reaches the target.
THRESHOLDS = (0.85, 0.75, 0.65, 0.55, 0.45, 0.3, 0.0, -1.0)
UNREACHABLE = ("LaCo: expected to remove more", "expected to remove at most")


@dataclass(frozen=True)
class Variant:
    """method, and what is not as by default. searched: whether it continues from a state file."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    fill: str = "packed"
    searched: bool = False


FAST = {"mode": "fast"}
VARIANTS: dict[str, Variant] = {
    **{name: Variant(name) for name in DEPTH_METHODS.load()},
    "blockpruner": Variant("blockpruner", FAST, searched=True),
    "blockpruner, zeros": Variant("blockpruner", FAST, fill="zeros", searched=True),
    "sleb": Variant("sleb", FAST, searched=True),
    "blockpruner, compensate": Variant("blockpruner", {**FAST, "compensate": True}, searched=True),
    "blockpruner, refit": Variant("blockpruner", {**FAST, "refit": True}, searched=True),
    "sleb, refit": Variant("sleb", {**FAST, "refit": True}, searched=True),
    "llm-drop, mixed": Variant("llm-drop", {"blocks": "mixed"}),
    "shortgpt, compensate": Variant("shortgpt", {"compensate": True}),
    "shortgpt, refit": Variant("shortgpt", {"refit": True}),
    "laco": Variant("laco", {"fold": 3}),
}

# In a process of its own: peak memory is then that of this run alone.
CHILD = """
import sys
from pyprune.depth.config import StructureConfig
from pyprune.depth.run import prune_structure_checkpoint
from pyprune.errors import UserError
try:
    config = StructureConfig.from_yaml(sys.stdin.read())
    prune_structure_checkpoint(sys.argv[1], sys.argv[2], config)
except UserError as error:
    sys.exit(str(error))
"""


def add_protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8 * 1024, help="evaluated, each text")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="of the evaluation")  # fmt: skip


def prune(dense: Path, folder: Path, config: StructureConfig) -> dict[str, Any]:
    """The report; RuntimeError with what it says if it cannot be done."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(dense), str(folder)],
        input=config.to_yaml(), text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    report: dict[str, Any] = json.loads((folder / "pyprune.json").read_text())
    return report


def configurations(
    variant: Variant, ratio: float, shown: CalibrationConfig, device: str, state: Path
) -> list[StructureConfig]:
    """To be tried one after the other."""
    options = dict(variant.options)
    if variant.searched:
        options["state"] = str(state)
    tries = [options]
    if variant.method == "laco":
        tries = [{**options, "threshold": threshold} for threshold in THRESHOLDS]
    return [
        StructureConfig(
            variant.method, ratio=ratio, fill=variant.fill, method_options=given,
            device=device, dtype="float32", calibration=shown,
        )
        for given in tries
    ]  # fmt: skip


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    model = load(folder, args.device, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    for text in TEXTS:
        r = perplexity(model, tokenizer, text=text, seqlen=SEQLEN, max_tokens=args.tokens)
        results[text] = {"ppl": r.ppl, "tokens": r.tokens, "seqlen": r.seqlen, "bos": r.bos,
                         "dtype": args.dtype}  # fmt: skip
    return results


def load(folder: Path, device: str, dtype: str = "float32") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def rates(dense: PreTrainedModel, pruned: PreTrainedModel, protocol: Protocol) -> dict[str, Any]:
    """Tokens per second of the pruned model, and how many times the dense model's."""
    both = [
        Contestant(name, "float32", None, 0, weight_bytes(model), model)
        for name, model in ((DENSE, dense), ("pruned", pruned))
    ]
    result = bench(both, protocol)
    row: dict[str, Any] = {}
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


def measure(
    dense: PreTrainedModel, folder: Path, report: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    pruned = load(folder, args.device)
    parameters = report["parameters"]
    return {
        "steps": len(report["decision"]["steps"]),
        "removed": [step["unit"] for step in report["decision"]["steps"]],
        "layers": pruned.config.num_hidden_layers,
        "options": {k: v for k, v in report["config"]["method_options"].items() if k != "state"},
        "parameters": parameters["after"],
        "zeros": parameters["zeros"],
        "removed_share": parameters["removed_share"],
        "realised_share": parameters["realised_share"],
        "file_bytes": file_bytes(folder),
        "seconds": report["run"]["seconds"]["total"],
        "peak_memory_bytes": report["run"]["peak_rss_bytes"],
        "calibration_sha256": report["calibration"]["sha256"],
        "perplexity": evaluate(folder, args),
        **rates(dense, pruned, SMOKE_PROTOCOL if args.smoke else PROTOCOL),
    }


def run(
    variant: Variant, ratio: float, dense: PreTrainedModel, args: argparse.Namespace, states: Path
) -> dict[str, Any]:
    """The first try that reaches the ratio; "impossible" says why none does (attention is a fifth
    of this model)."""
    shown = CalibrationConfig(nsamples=args.nsamples, seqlen=args.seqlen)
    state = states / f"{variant.method}.json"
    reason = ""
    with tempfile.TemporaryDirectory() as tmp:
        for config in configurations(variant, ratio, shown, args.device, state):
            folder = Path(tmp) / "pruned"
            try:
                report = prune(packaged_model_dir(), folder, config)
            except RuntimeError as error:
                reason = str(error)
                if not any(words in reason for words in UNREACHABLE):
                    raise
                continue
            return measure(dense, folder, report, args)
    return {"impossible": reason}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "ratio", *TEXTS, "removed", "realised", "layers", "MB", "prefill x",
                  "decode x", "s")  # fmt: skip
    for row in rows:
        if "impossible" in row:
            table.add_row(row["variant"], f"{row['ratio']:.0%}", "impossible")
            continue
        texts = [f"{row['perplexity'][t]['ppl']:.2f}" for t in TEXTS]
        if row["variant"] == DENSE:
            table.add_row(DENSE, "-", *texts, "", "", "", f"{row['file_bytes'] / 1e6:,.0f}")
            continue
        table.add_row(
            row["variant"], f"{row['ratio']:.0%}", *texts,
            *(f"{row[k]:.1%}" for k in ("removed_share", "realised_share")), str(row["layers"]),
            f"{row['file_bytes'] / 1e6:,.0f}",
            *(f"{row[phase]['over_dense']:.2f}" for phase in ("prefill", "decode")),
            f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two variants, a few tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    add_protocol(parser)
    args = parser.parse_args()
    if args.smoke:
        args.variants, args.ratios = ["shortgpt", "llm-drop"], [0.1]
        args.nsamples, args.seqlen, args.tokens = 2, 32, SEQLEN
    rows: list[dict[str, Any]] = []
    if args.json is not None and args.json.exists() and not args.smoke:
        rows = json.loads(args.json.read_text())
    done = {(row["variant"], row["ratio"]) for row in rows}
    folder = packaged_model_dir()
    dense = load(folder, args.device)
    common = {**environment(args.device), "calibration_tokens": args.nsamples * args.seqlen}

    def keep(row: dict[str, Any]) -> None:
        rows.append({**row, **common})
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=1) + "\n")

    if (DENSE, 0.0) not in done:
        keep({"variant": DENSE, "ratio": 0.0, "perplexity": evaluate(folder, args),
              "parameters": sum(p.numel() for p in dense.parameters()),
              "file_bytes": file_bytes(folder)})  # fmt: skip
    with tempfile.TemporaryDirectory() as states:
        for ratio in sorted(args.ratios):
            for name in args.variants:
                if (name, ratio) not in done:
                    row = run(VARIANTS[name], ratio, dense, args, Path(states))
                    keep({"variant": name, "ratio": ratio, **row})
    show(rows)


if __name__ == "__main__":
    main()
