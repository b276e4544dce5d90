"""Prunes a real model with SparseGPT at 50 % and 2:4, and shows what that costs and gains.

    python examples/demo.py --out demo-output

Everything comes from ordinary packages: SmolLM2-135M-Instruct (dequantised from its 4-bit release)
and Wikipedia articles, other ones for calibration than for evaluation. The two pruned checkpoints
stay in the output folder, with `demo.json` beside them. At the end both are compressed and run
beside the dense model: bytes, load time, tokens per second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pyprune.calibration.walk import WalkEvent
from pyprune.cli_sparse import bench_tables
from pyprune.config import CalibrationConfig, PruneConfig
from pyprune.errors import UserError
from pyprune.evaluate import perplexity
from pyprune.packaged import packaged_documents, packaged_model_dir
from pyprune.prune import prune_checkpoint
from pyprune.sparse.bench import BenchResult, Protocol, bench, contestants
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.plot import plot

# 64 x 512 tokens of calibration and 24 windows of evaluation keep the demo within minutes on two
# cores. README's table uses more of both.
CALIBRATION = CalibrationConfig(source="wiki", nsamples=64, seqlen=512, batch_size=8, seed=0)
SEQLEN, EVALUATION_TOKENS = 1024, 24 * 1024
RUNS = {
    "sparsegpt-50": PruneConfig(method="sparsegpt", sparsity=0.5, calibration=CALIBRATION),
    "sparsegpt-2of4": PruneConfig(method="sparsegpt", pattern="2:4", calibration=CALIBRATION),
}
# The compressed models, as they are called in the comparison with the dense one: run, the rest of
# the folder's name, options of compress_checkpoint.
SPARSE = {
    "2:4": ("sparsegpt-2of4", "compressed", {}),
    "2:4, coded embeddings": (
        "sparsegpt-2of4",
        "coded-embeddings",
        {"embeddings": "coded", "dtype": torch.bfloat16},
    ),
    "2:4, int8 embeddings": ("sparsegpt-2of4", "int8-embeddings", {"embeddings": "int8"}),
    "50% bitmap": ("sparsegpt-50", "compressed", {}),
    "50% int8": ("sparsegpt-50", "int8", {"int8": True}),
}
COMPARISON = Protocol(batches=(1, 4, 16), prompt=16, steps=8, rounds=3)


class Demo:
    def __init__(self, out: Path, progress: Progress) -> None:
        self.out = out
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.rows: list[dict[str, object]] = []
        self.bench: BenchResult | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[int]:
        """A line of the progress display (of the output, where that is no terminal: the display is
        drawn when all is done), and an entry in the table of seconds."""
        if not self.progress.console.is_terminal:
            self.say(name)
        task = self.progress.add_task(name, total=None)
        started = time.perf_counter()
        try:
            yield task
        finally:
            self.seconds[name] = time.perf_counter() - started
        done = self.progress.tasks[self.progress.task_ids.index(task)]
        self.progress.update(task, total=done.total or 1, completed=done.total or 1)

    def say(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False)

    def run(self) -> None:
        with self.phase("model and text"):
            dense = packaged_model_dir(self.say)
            packaged_documents("wiki", progress=self.say)
        self.evaluate(dense, {"method": "dense", "pattern": "-", "sparsity": 0.0})
        for name, config in RUNS.items():
            folder = self.out / name
            with self.phase(f"prune {config.target()}") as task:
                report = prune_checkpoint(dense, folder, config, progress=self.walk_events(task))
            row = {
                "method": config.method,
                "pattern": str(config.target()),
                "sparsity": report.sparsity,
                "seconds": self.seconds[f"prune {config.target()}"],
                "peak_memory_bytes": report.run.peak_rss_bytes,
            }
            self.evaluate(folder, row)
        self.bench = self.compare(dense)

    def compare(self, dense: Path) -> BenchResult:
        """Compresses both pruned checkpoints and times them beside the dense one."""
        small = {}
        with self.phase("compress"):
            for label, (name, kind, options) in SPARSE.items():
                small[label] = self.out / f"{name}-{kind}"
                compress_checkpoint(self.out / name, small[label], **options)
        with self.phase("dense against sparse") as task:
            models = contestants(small, dense)
            result = bench(
                models,
                COMPARISON,
                lambda words, done, total: self.progress.update(task, completed=done, total=total),
            )
        plot(result, self.out / "bench.png")
        return result

    def evaluate(self, folder: Path, row: dict[str, object]) -> None:
        with self.phase(f"perplexity {row['pattern'] if self.rows else 'dense'}") as task:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            result = perplexity(
                model,
                tokenizer,
                text="wiki",
                seqlen=SEQLEN,
                max_tokens=EVALUATION_TOKENS,
                progress=lambda done, total: self.progress.update(
                    task, completed=done, total=total
                ),
            )
        self.rows.append({**row, "perplexity": result.ppl, "evaluated_tokens": result.tokens})

    def walk_events(self, task: int):
        def show(event: WalkEvent) -> None:
            if event.kind == "block":
                self.progress.update(task, completed=event.block, total=event.blocks)

        return show

    def table(self) -> Table:
        table = Table(
            title=f"SmolLM2-135M; perplexity on {EVALUATION_TOKENS:,} tokens of Wikipedia in "
            f"windows of {SEQLEN}, no BOS"
        )
        columns = ("method", "pattern", "sparsity", "perplexity", "seconds", "peak memory")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i > 1 else "left")
        for row in self.rows:
            pruned = "seconds" in row
            table.add_row(
                str(row["method"]),
                str(row["pattern"]),
                f"{row['sparsity']:.1%}",
                f"{row['perplexity']:.2f}",
                f"{row['seconds']:.1f}" if pruned else "-",
                f"{row['peak_memory_bytes'] / 2**30:.2f} GiB" if pruned else "-",
            )
        return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    console = Console()
    logging.disable_progress_bar()  # ours shows where it is
    if args.out.exists() and not (args.out / "demo.json").exists() and any(args.out.iterdir()):
        console.print(f"{args.out}: expected an earlier demo's folder or none", style="red")
        return 2
    shutil.rmtree(args.out, ignore_errors=True)  # an earlier demo's
    args.out.mkdir(parents=True)
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    try:
        with Progress(*columns, console=console) as progress:
            demo = Demo(args.out, progress)
            demo.run()
    except UserError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2
    console.print(demo.table())
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in demo.seconds.items())
    console.print(f"[dim]{phases}[/dim]")
    console.print(
        "A model of 135 million parameters has little to spare: 2:4 costs it dearly, and 50 % "
        "costs it more than it costs a model of 7 billion."
    )
    console.print(f"Pruned checkpoints: {', '.join(str(args.out / name) for name in RUNS)}")
    assert demo.bench is not None
    for renderable in (*bench_tables(demo.bench), *demo.bench.verdict()):
        console.print(renderable)
    console.print(f"Plot: {args.out / 'bench.png'}")
    result = {"rows": demo.rows, "seconds": demo.seconds, "bench": demo.bench.to_dict()}
    (args.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
