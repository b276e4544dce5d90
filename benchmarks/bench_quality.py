"""What each method and pattern costs in perplexity, on the packaged model and two texts.

    python benchmarks/bench_quality.py --json benchmarks/results/quality.json
    python benchmarks/bench_quality.py --methods wanda --patterns 2:4
    python benchmarks/bench_quality.py --methods gradients --json benchmarks/results/quality.json
    python benchmarks/bench_quality.py --methods allocations --nsamples 16 --tokens 8192 \
        --dtype bfloat16 --json benchmarks/results/allocation_quality.json

A method is a row of `pyprune methods` or one of VARIANTS (its options), or a group of them: see
GROUPS. Without --patterns each has those of its group. Whether --reconstruct pays, by calibration:

    python benchmarks/bench_quality.py --methods sparsegpt --patterns 0.5 2:4 --reconstruct off on \
        --nsamples 4 8 16 32 64 --json reconstruct.json

Every row: method, pattern, calibration (text, tokens, seed), seconds and peak memory of the
pruning run, and for each evaluation text the perplexity with its protocol. Rows already in the
JSON file are kept, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import cpu_seconds_of_children, environment, write_rows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune.config import CalibrationConfig, ConfigFile
from pyprune.eigendamage.config import METHOD as EIGENDAMAGE
from pyprune.evaluate import perplexity
from pyprune.families import find_family
from pyprune.methods import METHODS, SHOT_METHODS
from pyprune.packaged import packaged_model_dir

# No group has the name of a method: --methods NAME is that method's rows alone.
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "baselines": (("magnitude", "wanda", "sparsegpt"), ("0.5", "2:4", "4:8")),
    "gradients": (
        ("gblm", "gblm-l2", "gblm, alpha 10", "gblm+update", "wanda+update", "obd", "l-obd",
         "k-obd", "obs", "exactobs",
         "woodfisher", "woodfisher-paper", "llm-surgeon", "llm-surgeon-1shot",
         "llm-surgeon-grouped"),
        ("0.5", "2:4"),
    ),
    "structures": (
        ("llm-surgeon-structures", "llm-surgeon-structures, sum"),
        ("0.1", "0.2", "0.3"),
    ),
    "rotated": (("eigendamage", "eigendamage-ekfac"), ("0.1", "0.2", "0.3", "0.5")),
    "rotated-elements": (("eigendamage-elements", "eigendamage-elements-ekfac"), ("0.5",)),
    # With plain Wanda beside them: the baselines have it at 0.5 only.
    "allocations": (
        ("wanda", "wanda+alphapruning", "wanda+owl", "wanda+ecoflap", "wanda+ecoflap-first",
         "besa", "besa-layer"),
        ("0.5", "0.7"),
    ),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "gblm-l2": {"method": "gblm", "method_options": {"norm": "l2"}},
    "gblm, alpha 10": {"method": "gblm", "method_options": {"alpha": 10.0}},
    "gblm+update": {"method": "gblm", "update": "sequential"},
    "wanda+update": {"method": "wanda", "update": "sequential"},
    "wanda+alphapruning": {"method": "wanda", "allocation": "alphapruning"},
    "wanda+owl": {"method": "wanda", "allocation": "owl"},
    # Two forwards from every block on: a few sequences will do.
    "wanda+ecoflap": {
        "method": "wanda",
        "allocation": "ecoflap",
        "allocation_options": {"samples": 8},
    },
    "wanda+ecoflap-first": {
        "method": "wanda",
        "allocation": "ecoflap",
        "allocation_options": {"order": "first"},
    },
    "besa": {"method": "wanda", "allocation": "besa"},
    "besa-layer": {
        "method": "wanda",
        "allocation": "besa",
        "allocation_options": {"granularity": "layer"},
    },
    "woodfisher-paper": {
        "method": "woodfisher",
        "method_options": {"joint": False, "shrinkage": 0.0},
    },
    "llm-surgeon-1shot": {"method": "llm-surgeon", "method_options": {"shots": 1}},
    "llm-surgeon-grouped": {
        "method": "llm-surgeon",
        "method_options": {"shots": 1, "update": "grouped"},
    },
    "llm-surgeon-drawn": {"method": "llm-surgeon", "method_options": {"fisher_samples": 1}},
    "llm-surgeon-structures": {
        "method": "llm-surgeon",
        "method_options": {"structure": "rows-columns"},
    },
    # The paper's update: the sum of what removing rows and columns one by one would do.
    "llm-surgeon-structures, sum": {
        "method": "llm-surgeon",
        "method_options": {"structure": "rows-columns", "update": "grouped"},
    },
    "eigendamage-ekfac": {"method": EIGENDAMAGE, "method_options": {"reestimate": True}},
    "eigendamage-elements": {"method": EIGENDAMAGE, "method_options": {"unit": "elements"}},
    "eigendamage-elements-ekfac": {
        "method": EIGENDAMAGE,
        "method_options": {"unit": "elements", "reestimate": True},
    },
}
TEXTS = ("wiki", "sotu")
SEQLEN = 1024


def wanted(methods: list[str], patterns: list[str] | None) -> list[tuple[str, str]]:
    """Method and pattern of every row, pattern by pattern."""
    known = {*METHODS, *SHOT_METHODS, EIGENDAMAGE, *VARIANTS}
    pairs = []
    for name in methods:
        if name not in GROUPS and name not in known:
            raise SystemExit(f"no method {name}; there are {sorted({*GROUPS, *known})}")
        home = next((g for g in GROUPS.values() if name in g[0]), ((), ("0.5", "2:4")))
        members, theirs = GROUPS[name] if name in GROUPS else ((name,), home[1])
        pairs += [(m, p) for m in members for p in patterns or theirs]
    # No N:M of what is not a sparse matrix.
    pairs = [(m, p) for m, p in pairs if not m.startswith(EIGENDAMAGE) or ":" not in p]
    order = list(dict.fromkeys(p for _, p in pairs))
    return sorted(dict.fromkeys(pairs), key=lambda pair: order.index(pair[1]))


def configuration(
    method: str, pattern: str, reconstruct: str, calibration: CalibrationConfig, smoke: bool
) -> ConfigFile:
    values = {**VARIANTS.get(method, {"method": method}), "calibration": calibration}
    values |= {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    if reconstruct != "default":
        values["reconstruct"] = reconstruct == "on"
    if smoke and method == EIGENDAMAGE:
        # Two eigendecompositions a matrix: those of one show whether it runs.
        values["include"] = ["model.layers.0.self_attn.k_proj"]
    return find_family(values["method"]).config.from_dict(values)


def evaluate(folder: Path, tokens: int, dtype: str) -> dict[str, dict]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    for text in TEXTS:
        r = perplexity(model, tokenizer, text=text, seqlen=min(SEQLEN, tokens), max_tokens=tokens)
        results[text] = {"ppl": r.ppl, "tokens": r.tokens, "seqlen": r.seqlen, "bos": r.bos,
                         "dtype": dtype}  # fmt: skip
    return results


# Pruning runs in a process of its own: peak memory is then that of this run alone.
CHILD = """
import sys
from pathlib import Path
from rich.console import Console
from pyprune.config import read_yaml
from pyprune.families import Run, find_family
from pyprune.progress import ProgressBar
values = read_yaml(sys.stdin.read())
family = find_family(values["method"])
config = family.config.from_dict(values)
with ProgressBar(Console(stderr=True, quiet=True), "pruning") as bar:
    family.run(Run(sys.argv[1], Path(sys.argv[2]), config, bar))
"""


def prune(
    dense: Path,
    folder: Path,
    method: str,
    pattern: str,
    reconstruct: str,
    calibration: CalibrationConfig,
    smoke: bool,
) -> dict:
    config = configuration(method, pattern, reconstruct, calibration, smoke)
    command = [sys.executable, "-c", CHILD, str(dense), str(folder)]
    before = cpu_seconds_of_children()
    subprocess.run(command, input=config.to_yaml(), text=True, check=True)
    report: dict = json.loads((folder / "pyprune.json").read_text())
    return {**report, "cpu_seconds": cpu_seconds_of_children() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few methods, a few tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--methods", nargs="+", default=["baselines"], help="or groups of them")
    parser.add_argument("--patterns", nargs="+", help="N:M or sparsities; default: the group's")
    parser.add_argument("--reconstruct", nargs="+", choices=["default", "on", "off"],
                        default=["default"])  # fmt: skip
    parser.add_argument("--nsamples", type=int, nargs="+", default=[64])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48 * 1024, help="evaluated, each text")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the evaluation")  # fmt: skip
    args = parser.parse_args()
    pairs = wanted(args.methods, args.patterns)
    if args.smoke:
        pairs = [("gblm", "2:4"), ("eigendamage", "0.3")]  # one of each family
        args.nsamples, args.seqlen, args.tokens = [2], 32, 64
    rows = []
    if args.json is not None and args.json.exists() and not args.smoke:
        rows = json.loads(args.json.read_text())
    done = {key(r) for r in rows}
    dense = packaged_model_dir()

    def keep(row: dict) -> None:
        rows.append({**row, **environment(args.device)})
        write_rows(args.json, rows)

    if not any(r["method"] == "dense" for r in rows):
        keep({"method": "dense", "pattern": "-", "sparsity": 0.0,
              "calibration_tokens": args.nsamples[0] * args.seqlen,
              "perplexity": evaluate(dense, args.tokens, args.dtype)})  # fmt: skip
    for (method, pattern), reconstruct, nsamples in itertools.product(
        pairs, args.reconstruct, args.nsamples
    ):
        row = {"method": method, "pattern": pattern, "calibration_tokens": nsamples * args.seqlen}
        if reconstruct != "default":
            row["reconstruct"] = reconstruct
        if key(row) in done:
            continue
        calibration = CalibrationConfig(
            source="wiki", nsamples=nsamples, seqlen=args.seqlen, batch_size=8, seed=0
        )
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp) / "pruned"
            report = prune(dense, folder, method, pattern, reconstruct, calibration, args.smoke)
            keep(
                {**row, **summary(report), "perplexity": evaluate(folder, args.tokens, args.dtype)}
            )
    table = Table("method", "pattern", "reconstruct", "calibration", *TEXTS, "seconds", "peak GiB")
    for row in rows:
        table.add_row(row["method"], row["pattern"], row.get("reconstruct", "default"),
                      f"{row['calibration_tokens']:,}",
                      *(f"{row['perplexity'][t]['ppl']:.2f}" for t in TEXTS),
                      f"{row.get('seconds', 0):.1f}",
                      f"{row.get('peak_memory_bytes', 0) / 2**30:.2f}")  # fmt: skip
    Console().print(table)


def key(row: dict) -> tuple:
    """What tells one run from another."""
    return tuple(row.get(k) for k in ("method", "pattern", "reconstruct", "calibration_tokens"))


def summary(report: dict) -> dict:
    return {
        "sparsity": report["sparsity"],
        "seconds": report["run"]["seconds"]["total"],
        "cpu_seconds": report["cpu_seconds"],
        "peak_memory_bytes": report["run"]["peak_rss_bytes"],
        "calibration_sha256": (report["calibration"] or {}).get("sha256"),
    }


if __name__ == "__main__":
    main()
