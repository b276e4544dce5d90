"""What `pyprune heal` gives back of the perplexity that pruning costs, on the packaged model.

    python benchmarks/bench_heal.py --json benchmarks/results/heal_quality.json

A row for each pattern as SparseGPT leaves it, and one for each way of healing that model: what
trains (LoRA or all kept weights), and what it learns from (the text or the dense model's
predictions of it). All see the same tokens in the same order. Rows already in the JSON file are
kept, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _harness import cpu_seconds_of_children, environment, write_rows
from bench_quality import TEXTS, evaluate, prune, summary
from rich.console import Console
from rich.table import Table

from pyprune.config import CalibrationConfig
from pyprune.packaged import packaged_model_dir

# What trains and how fast; LoRA's few numbers want a higher rate.
RATES = {"lora": 1e-3, "all": 3e-4}
WAYS = (("all", "teacher"), ("lora", "teacher"), ("all", "text"), ("lora", "text"))


def heal(pruned: Path, out: Path, dense: Path, train: str, learnt: str, **more: object) -> dict:
    """In a process of its own, as a user would: its report and CPU seconds."""
    values = {"train": train, "learning_rate": RATES[train], **more}
    command = [sys.executable, "-m", "pyprune", "heal", str(pruned), "--out", str(out), "--json"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    if learnt == "teacher":
        command.append(f"--teacher={dense}")
    before = cpu_seconds_of_children()
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {**report, "cpu_seconds": cpu_seconds_of_children() - before}


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("pattern", "train", "learnt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one way, a few tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    parser.add_argument("--nsamples", type=int, default=16, help="that SparseGPT sees")
    parser.add_argument("--steps", type=int, default=64, help="of healing, 1,024 tokens each")
    parser.add_argument("--tokens", type=int, default=8192, help="evaluated, each text")
    args = parser.parse_args()
    seqlen, batch, ways, dtype = 512, 2, WAYS, "bfloat16"
    if args.smoke:
        args.patterns, args.nsamples, args.steps, args.tokens = ["2:4"], 2, 1, 64
        # PyTorch's bf16 takes ten times as long where a processor has no instructions for it.
        seqlen, ways, dtype = 32, WAYS[:1], "float32"
    rows = []
    if args.json is not None and args.json.exists() and not args.smoke:
        rows = json.loads(args.json.read_text())
    done = {key(r) for r in rows}
    dense = packaged_model_dir()

    def keep(row: dict, folder: Path) -> None:
        found = evaluate(folder, args.tokens, dtype)
        rows.append({**row, "perplexity": found, **environment(args.device)})
        write_rows(args.json, rows)

    if ("-", None, None) not in done:
        keep({"method": "dense", "pattern": "-"}, dense)
    calibration = CalibrationConfig(nsamples=args.nsamples, seqlen=seqlen)
    for pattern in args.patterns:
        missing = [way for way in ways if (pattern, *way) not in done]
        if not missing and (pattern, None, None) in done:
            continue
        with tempfile.TemporaryDirectory() as tmp:
            pruned = Path(tmp) / "pruned"
            report = prune(dense, pruned, "sparsegpt", pattern, "default", calibration, args.smoke)
            start = {"method": "sparsegpt", "pattern": pattern,
                     "calibration_tokens": args.nsamples * seqlen}  # fmt: skip
            if (pattern, None, None) not in done:
                keep({**start, **summary(report)}, pruned)
            for train, learnt in missing:
                out = Path(tmp) / f"{train}-{learnt}"
                # Every sequence once, and a batch that is held out.
                report = heal(
                    pruned, out, dense, train, learnt, steps=args.steps, batch_size=batch,
                    seqlen=seqlen, nsamples=batch * (args.steps + 1), device=args.device,
                    dtype=dtype,
                )  # fmt: skip
                keep({**start, "train": train, "learnt": learnt, **{
                    name: report[name]
                    for name in ("tokens", "steps", "cpu_seconds", "loss_before", "loss_after",
                                 "text_sha256")
                }, "learning_rate": RATES[train]}, out)  # fmt: skip
    table = Table("pattern", "trains", "learns from", *TEXTS, "CPU s")
    for row in rows:
        table.add_row(row["pattern"], row.get("train", "-"), row.get("learnt", "-"),
                      *(f"{row['perplexity'][t]['ppl']:.2f}" for t in TEXTS),
                      f"{row.get('cpu_seconds', 0):.0f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
