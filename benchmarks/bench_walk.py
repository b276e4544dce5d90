"""The calibration walk's modes on one random Llama: seconds by phase, passes and peak memory.

    python benchmarks/bench_walk.py
    python benchmarks/bench_walk.py --statistic gram --nsamples 32 --json walk.json

single: one forward per batch, paused before every stage (the default; true-sequential).
single+disk: the same, with the inputs of waiting batches in temporary files.
naive: true-sequential by running each block once per stage, as SparseGPT's --true-sequential does.
two-pass: each block once dense and once pruned, as SparseGPT and Wanda do; not true-sequential.

All run on the same weights and tokens in turns; first it is checked that single, single+disk and
naive end with the same bits. Memory is measured in a process per mode: the highest resident size
(on a GPU: allocated bytes) above what the loaded model and the tokens take.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from typing import Any

import torch
from _harness import environment, parse, ratio, write_rows
from _memory import peaks, print_peak
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyprune.calibration.stats import GramStatistic, NormStatistic
from pyprune.calibration.tokens import Batch
from pyprune.calibration.walk import Group, InMemoryStore, WalkReport, walk
from pyprune.models.adapter import Adapter

MODES: dict[str, dict[str, Any]] = {
    "single": {"mode": "single"},
    "single+disk": {"mode": "single", "spill": "disk"},
    "naive": {"mode": "naive"},
    "two-pass": {"mode": "two-pass"},
}
BASELINE = "two-pass"
STATISTICS = {"norms": NormStatistic, "gram": GramStatistic}


def build(args: Namespace) -> tuple[PreTrainedModel, list[Batch]]:
    torch.manual_seed(0)
    hidden = 64 if args.smoke else args.hidden
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=2 if args.smoke else args.blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    nsamples, seqlen, batch = (4, 32, 2) if args.smoke else (args.nsamples, args.seqlen, args.batch)
    ids = torch.randint(0, 512, (nsamples, seqlen))
    return model, [Batch(part) for part in ids.split(batch)]


def prune_half(group: Group) -> None:
    """Half of every row by |w| * ||x||, Wanda's rule: cheap, so that the walk is what is timed."""
    assert group.statistic is not None
    norms = group.statistic.column_norms().sqrt()
    for ref in group.linears:
        w = ref.weight()
        smallest = (w.abs() * norms).topk(w.shape[1] // 2, dim=1, largest=False, sorted=False)
        ref.write(w.scatter(1, smallest.indices, 0.0))


def run(model: PreTrainedModel, batches: list[Batch], name: str, args: Namespace) -> WalkReport:
    adapter = Adapter.of(model)
    with InMemoryStore(adapter, args.device) as store:
        return walk(
            adapter,
            batches,
            statistic=STATISTICS[args.statistic],
            prune_group=prune_half,
            store=store,
            device=args.device,
            **MODES[name],
        )


def check_equal(model: PreTrainedModel, batches: list[Batch], args: Namespace) -> None:
    dense = {key: t.clone() for key, t in model.state_dict().items()}
    want: dict[str, torch.Tensor] | None = None
    for name in ("naive", "single", "single+disk"):
        model.load_state_dict(dense)
        run(model, batches, name, args)
        got = {key: t.clone() for key, t in model.state_dict().items()}
        want = want or got
        different = [key for key, t in got.items() if not torch.equal(t, want[key])]
        if different:
            raise SystemExit(f"{name} differs from naive in {len(different)} tensors: {different}")
    model.load_state_dict(dense)


def time_modes(
    model: PreTrainedModel, batches: list[Batch], args: Namespace
) -> dict[str, list[tuple[float, WalkReport]]]:
    dense = {key: t.clone() for key, t in model.state_dict().items()}
    samples: dict[str, list[tuple[float, WalkReport]]] = {name: [] for name in MODES}
    for _ in range(1 if args.smoke else args.repetitions):
        for name in MODES:
            model.load_state_dict(dense)
            start = time.perf_counter()
            report = run(model, batches, name, args)
            if args.device == "cuda":
                torch.cuda.synchronize()
            samples[name].append((time.perf_counter() - start, report))
    return samples


def print_memory(args: Namespace) -> None:
    model, batches = build(args)
    with torch.no_grad():  # thread pools and libraries set themselves up
        model(batches[0].input_ids[:1, :8])
    print_peak(args.device, lambda: run(model, batches, args.memory_of, args))


def rows(args: Namespace) -> list[dict[str, Any]]:
    model, batches = build(args)
    check_equal(model, batches, args)
    peak_bytes = peaks(MODES, args.smoke)
    samples = time_modes(model, batches, args)
    base = [seconds for seconds, _ in samples[BASELINE]]
    made = []
    for name, taken in samples.items():
        seconds = [s for s, _ in taken]
        report = taken[-1][1]
        made.append({
            "op": "walk",
            "provider": name,
            "statistic": args.statistic,
            "hidden": model.config.hidden_size,
            "blocks": model.config.num_hidden_layers,
            "tokens": report.tokens,
            "batch_shape": list(batches[0].input_ids.shape),
            "model_bytes": sum(p.nbytes for p in model.parameters()),
            "seconds_median": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "repetitions": len(seconds),
            "baseline": BASELINE,
            "ratio_to_baseline": ratio(seconds, base),
            "seconds_by_phase": {
                phase: statistics.median(r.seconds[phase] for _, r in taken)
                for phase in report.seconds
            },
            "passes": report.passes,
            "held_bytes": report.held_bytes,
            "spilled_bytes": report.spilled_bytes,
            "peak_bytes": peak_bytes[name],
            **environment(args.device),
        })  # fmt: skip
    return made


def show(made: list[dict[str, Any]]) -> None:
    first = made[0]
    title = (
        f"walk: {first['blocks']} blocks of width {first['hidden']}, {first['tokens']} tokens, "
        f"{first['statistic']}; single, single+disk and naive end with equal bits"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("mode", no_wrap=True)
    headers = ("median s", "min", "max", "time / two-pass", "forward s", "statistics s", "passes",
               "held MB", "peak MB")  # fmt: skip
    for header in headers:
        table.add_column(header, justify="right")
    for row in made:
        table.add_row(
            row["provider"],
            *(f"{row[f'seconds_{k}']:.2f}" for k in ("median", "min", "max")),
            f"{row['ratio_to_baseline']:.2f}",
            *(f"{row['seconds_by_phase'][k]:.2f}" for k in ("forward", "statistics")),
            f"{row['passes']:.2f}",
            *(f"{row[k] / 1e6:.1f}" for k in ("held_bytes", "peak_bytes")),
        )
    Console(width=120).print(table)


def main() -> None:
    args = parse(
        __doc__,
        statistic={"choices": sorted(STATISTICS), "default": "norms"},
        hidden={"type": int, "default": 512, "help": "width, a multiple of 64"},
        blocks={"type": int, "default": 6},
        nsamples={"type": int, "default": 16},
        seqlen={"type": int, "default": 512},
        batch={"type": int, "default": 4},
        memory_of={"choices": sorted(MODES), "help": "print this mode's peak memory and exit"},
    )
    if args.memory_of is not None:
        print_memory(args)
        return
    made = rows(args)
    show(made)
    write_rows(args.json, made)


if __name__ == "__main__":
    main()
