"""What each method and pattern costs in perplexity, on the packaged model and two texts.

    python benchmarks/bench_quality.py --json benchmarks/results/quality.json
    python benchmarks/bench_quality.py --methods wanda --patterns 2:4
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

import torch
from _harness import environment
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune.config import CalibrationConfig, PruneConfig
from pyprune.evaluate import perplexity
from pyprune.packaged import packaged_model_dir

METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("0.5", "2:4", "4:8")
TEXTS = ("wiki", "sotu")
SEQLEN = 1024


def configuration(
    method: str, pattern: str, reconstruct: str, calibration: CalibrationConfig
) -> PruneConfig:
    target = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    on = {"default": None, "on": True, "off": False}[reconstruct]
    return PruneConfig(method=method, reconstruct=on, calibration=calibration, **target)


def evaluate(folder: Path, tokens: int) -> dict[str, dict]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    for text in TEXTS:
        r = perplexity(model, tokenizer, text=text, seqlen=SEQLEN, max_tokens=tokens)
        results[text] = {"ppl": r.ppl, "tokens": r.tokens, "seqlen": r.seqlen, "bos": r.bos}
    return results


# Pruning runs in a process of its own: peak memory is then that of this run alone.
CHILD = """
import sys
from pyprune.config import PruneConfig
from pyprune.prune import prune_checkpoint
prune_checkpoint(sys.argv[1], sys.argv[2], PruneConfig.from_yaml(sys.stdin.read()))
"""


def prune(dense: Path, folder: Path, config: PruneConfig) -> dict:
    subprocess.run(
        [sys.executable, "-c", CHILD, str(dense), str(folder)],
        input=config.to_yaml(), text=True, check=True,
    )  # fmt: skip
    report: dict = json.loads((folder / "pyprune.json").read_text())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one method, a few tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--reconstruct", nargs="+", choices=["default", "on", "off"],
                        default=["default"])  # fmt: skip
    parser.add_argument("--nsamples", type=int, nargs="+", default=[64])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48 * 1024, help="evaluated, each text")
    args = parser.parse_args()
    if args.smoke:
        args.methods, args.patterns = ["wanda"], ["2:4"]
        args.nsamples, args.seqlen, args.tokens = [2], 32, SEQLEN
    rows = []
    if args.json is not None and args.json.exists() and not args.smoke:
        rows = json.loads(args.json.read_text())
    done = {key(r) for r in rows}
    dense = packaged_model_dir()

    def keep(row: dict) -> None:
        rows.append({**row, **environment(args.device)})
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=1) + "\n")

    if not any(r["method"] == "dense" for r in rows):
        keep({"method": "dense", "pattern": "-", "sparsity": 0.0,
              "calibration_tokens": args.nsamples[0] * args.seqlen,
              "perplexity": evaluate(dense, args.tokens)})  # fmt: skip
    for pattern, method, reconstruct, nsamples in itertools.product(
        args.patterns, args.methods, args.reconstruct, args.nsamples
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
            report = prune(dense, folder, configuration(method, pattern, reconstruct, calibration))
            keep({**row, **summary(report), "perplexity": evaluate(folder, args.tokens)})
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
        "seconds": sum(report["run"]["seconds"].values()),
        "peak_memory_bytes": report["run"]["peak_rss_bytes"],
        "calibration_sha256": (report["calibration"] or {}).get("sha256"),
    }


if __name__ == "__main__":
    main()
