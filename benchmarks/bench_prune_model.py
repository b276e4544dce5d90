"""Pruning a whole model in memory, end to end, by phase, with random weights.

    python benchmarks/bench_prune_model.py --device cuda --json prune_model.json
    python benchmarks/bench_prune_model.py --device cuda --layers 4 --methods sparsegpt
    python benchmarks/bench_prune_model.py --device cuda --layers 1 --profile

On a CUDA device a model of Llama-3-8B's shapes and 128 sequences of 2048 random tokens; on the CPU
four blocks of SmolLM2-135M's and 16 of 512. They go through `pyprune.prune` as a user would call
it, 2:4, by

sparsegpt        as it is by default: the sweep, then `obs_reconstruct` for its mask
sparsegpt-sweep  the sweep alone (reconstruct=False), as in the paper
wanda, magnitude

The floor is the arithmetic that no implementation is spared, at the measured rate of bf16 matrix
products: one forward of the blocks (attention's lower triangle) and, for SparseGPT, half of each
distinct Gram matrix. The embeddings and the head are not pruned; the head is not even run. A model
of one block is pruned by each method first, so that no kernel is compiled while it counts; what
that took is in the column "first". Afterwards every pruned matrix is checked: finite, at most two
of four weights left, half of them gone.
"""

from __future__ import annotations

import time
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from _harness import environment, gemm_rate, parse, write_rows
from _llama import LLAMA_3_8B, SMOLLM_135M, TINY, Sizes, random_llama
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from pyprune import prune
from pyprune.models.adapter import Adapter
from pyprune.report import Report

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt-sweep": ("sparsegpt", {"reconstruct": False}),
    "wanda": ("wanda", {}),
    "magnitude": ("magnitude", {}),
}
# Phases of a run that are worth a column.
PHASES = {"forward": "forward", "statistics": "stats", "prune": "prune"}
# Of zeros: random bf16 weights are themselves zero now and then.
SLACK = 1e-4
PROFILED_OPS = 15
_NOT_PROFILED = nullcontext()
# Batches of the run that warms up: enough tokens per input that everything is reconstructed.
WARM_BATCHES = 4


def floor_flops(sizes: Sizes, method: str, sequences: int, tokens: int) -> float:
    """Of `sequences` of `tokens` each."""
    if method == "magnitude":
        return 0.0
    h, f, layers = (sizes[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = h * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    matrices = 2 * h * h + 2 * h * kv + 3 * h * f
    seen = sequences * tokens
    forward = 2.0 * seen * matrices + 2.0 * seen * tokens * h
    grams = seen * (3.0 * h * h + 1.0 * f * f) if method.startswith("sparsegpt") else 0.0
    return layers * (forward + grams)


def check(model: torch.nn.Module) -> None:
    adapter = Adapter.of(model)
    for i in range(len(adapter.blocks)):
        for ref in adapter.linears(i):
            w = ref.weight()
            kept = (w != 0).view(len(w), -1, 4).sum(2, dtype=torch.int8)
            if not bool(w.isfinite().all()):
                raise AssertionError(f"{ref.name}: not finite")
            if int(kept.max()) > 2:
                raise AssertionError(f"{ref.name}: not 2:4")
            share = float(kept.sum(dtype=torch.float64)) / w.numel()
            if share < 0.5 - SLACK:
                raise AssertionError(f"{ref.name}: keeps {share:.4f} of its weights")


def batches(sizes: Sizes, args: Namespace, sequences: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(sizes["vocab_size"], (sequences, args.tokens), generator=gen)
    return list(ids.split(args.batch_size))


def run(
    sizes: Sizes,
    name: str,
    args: Namespace,
    sequences: int,
    measured: AbstractContextManager[Any] = _NOT_PROFILED,
) -> tuple[Report, float]:
    """Prunes a new model; the report, and the seconds in all. `measured` is open meanwhile."""
    method, options = METHODS[name]
    model = random_llama(sizes, args.device)
    data = batches(sizes, args, sequences)
    synchronise(args.device)
    with measured:
        started = time.perf_counter()
        report = prune(model, data, method, "2:4", device=args.device, **options)
        synchronise(args.device)
        seconds = time.perf_counter() - started
    check(model)
    return report, seconds


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def warm_up(sizes: Sizes, name: str, args: Namespace) -> float:
    """Seconds of pruning one block, the first time."""
    one_block = {**sizes, "num_hidden_layers": 1}
    return run(one_block, name, args, min(args.sequences, WARM_BATCHES * args.batch_size))[1]


def row_of(sizes: Sizes, name: str, args: Namespace) -> dict[str, Any]:
    """Warms up, then measures."""
    first = warm_up(sizes, name, args)
    report, seconds = run(sizes, name, args, args.sequences)
    flops = floor_flops(sizes, name, args.sequences, args.tokens)
    floor = flops / gemm_rate(args.device, torch.bfloat16, args.smoke)
    errors = [x.relative_error_after for x in report.layers if x.relative_error_after is not None]
    return {
        "op": "prune_model",
        "method": name,
        "pattern": "2:4",
        "sizes": sizes,
        "sequences": args.sequences,
        "tokens": args.tokens,
        "batch_size": args.batch_size,
        "seconds": seconds,
        "phases": dict(report.run.seconds),
        "first_seconds": first,
        "floor_flops": flops,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
        "layers": len(report.layers),
        "notes": list(report.notes),
        "mean_relative_error": sum(errors) / len(errors) if errors else None,
        "sparsity": report.sparsity,
        "peak_cuda_bytes": report.run.peak_cuda_bytes if args.device == "cuda" else None,
        "layer_seconds": by_kind(report),
        **environment(args.device),
    }


def by_kind(report: Report) -> dict[str, float]:
    """Seconds of solving and writing, summed over the blocks."""
    found: dict[str, float] = {}
    for layer in report.layers:
        kind = layer.name.rsplit(".", 1)[-1]
        found[kind] = found.get(kind, 0.0) + layer.seconds
    return found


def show(rows: list[dict[str, Any]], console: Console) -> None:
    sizes = rows[0]["sizes"]
    title = (
        f"2:4 of {sizes['num_hidden_layers']} blocks, {rows[0]['sequences']} x "
        f"{rows[0]['tokens']} tokens; seconds, GB on the GPU"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
    table.add_column("method", no_wrap=True)
    for column in ("all", *PHASES.values(), "floor", "share", "GB", "error", "first"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        peak, error = row["peak_cuda_bytes"], row["mean_relative_error"]
        table.add_row(
            row["method"],
            f"{row['seconds']:.2f}",
            *(f"{row['phases'].get(phase, 0):.2f}" for phase in PHASES),
            f"{row['floor_seconds']:.2f}",
            f"{row['share_of_floor']:.1%}",
            "-" if peak is None else f"{peak / 1e9:.1f}",
            "-" if error is None else f"{error:.2%}",
            f"{row['first_seconds']:.1f}",
        )
    console.print(table)
    for row in rows:
        kinds = ", ".join(f"{kind} {s:.2f}" for kind, s in row["layer_seconds"].items())
        console.print(f"{row['method']}: solving took {kinds}")


def profiled(sizes: Sizes, name: str, args: Namespace, console: Console) -> None:
    """The operators that take longest, on the GPU if there is one and on the CPU."""
    warm_up(sizes, name, args)
    kinds = [ProfilerActivity.CPU]
    orders = ["self_cpu_time_total"]
    if args.device == "cuda":
        kinds.append(ProfilerActivity.CUDA)
        orders.insert(0, "self_cuda_time_total")
    found = profile(activities=kinds)
    run(sizes, name, args, args.sequences, found)
    for order in orders:
        averages = found.key_averages()
        table = averages.table(order, row_limit=PROFILED_OPS, max_name_column_width=60)
        console.print(f"{name} by {order}:\n{table}", soft_wrap=True, highlight=False)


def main() -> None:
    args = parse(
        __doc__,
        repetitions=1,
        layers={"type": int, "help": "blocks (default: all 32, on the CPU 4)"},
        methods={"nargs": "+", "choices": list(METHODS), "default": list(METHODS)},
        sequences={"type": int, "help": "default: 128, on the CPU 16"},
        tokens={"type": int, "help": "of each sequence (default: 2048, on the CPU 512)"},
        batch_size={"type": int, "default": 8, "help": "sequences that run at once"},
        profile={"action": "store_true", "help": "print the longest operators instead of rows"},
    )
    if args.smoke:
        sizes, sequences, tokens = dict(TINY), 8, 128
        args.batch_size = 4
    elif args.device == "cuda":
        sizes, sequences, tokens = dict(LLAMA_3_8B), 128, 2048
    else:
        sizes, sequences, tokens = {**SMOLLM_135M, "num_hidden_layers": 4}, 16, 512
    args.sequences, args.tokens = args.sequences or sequences, args.tokens or tokens
    if args.layers is not None:
        sizes["num_hidden_layers"] = args.layers
    console, rows = Console(), []
    for name in args.methods:
        if args.profile:
            profiled(sizes, name, args, console)
            continue
        rows.append(row_of(sizes, name, args))
        write_rows(args.json, rows)
        show(rows[-1:], console)
    if len(rows) > 1:
        show(rows, console)


if __name__ == "__main__":
    main()
