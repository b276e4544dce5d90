"""Prefill and decode rates of a whole model at a size where weights are what decoding waits for.

    python benchmarks/bench_model.py --json model.json

A random bf16 Llama (1.8 GB, the proportions of Llama-3.2-1B): dense, 2:4, and half of the weights
zero anywhere as bitmaps, side by side in bf16. The packaged model of the demo is so small that a
good part of a decoding step is Python; this one shows what the kernels bring beyond it. Zeros do
not change the time of a dense product, so the dense model is the 2:4 one decompressed. Before
anything is timed, one decoding step of each model is compared with that of its decompressed form.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from _harness import environment, write_rows
from bench_memory import SIZES, SMOKE_SIZES, make_checkpoint
from rich.console import Console

from pyprune.cli_sparse import bench_tables
from pyprune.sparse.bench import DENSE, Contestant, Protocol, bench, contestants, densified
from pyprune.sparse.convert import compress_checkpoint

PROTOCOL = Protocol(batches=(1, 4, 16), prompt=64, steps=16, rounds=5)
SMOKE_PROTOCOL = Protocol(batches=(1,), prompt=8, steps=2, rounds=1)
# Of the logits, bf16 products summed in another order through all blocks.
TOLERANCE = 0.05
MODELS = {"2:4": ("2:4", "sparse24"), "50% bitmap": ("random", "bitmap")}


@torch.inference_mode()
def check(found: Contestant) -> None:
    tokens = torch.arange(1, 9)[None]
    got, want = (m(tokens).logits[0, -1].float() for m in (found.model, densified(found.model)))
    error = float((got - want).norm() / want.norm())
    if not error < TOLERANCE:
        raise AssertionError(f"{found.label}: logits are off by {error:.3f} of the dense model's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        small = {}
        for name, (zeros, layout) in MODELS.items():
            source, small[name] = Path(tmp) / "dense", Path(tmp) / layout
            source.mkdir(exist_ok=True)
            make_checkpoint(source, SMOKE_SIZES if args.smoke else SIZES, zeros)
            compress_checkpoint(source, small[name], allowed=(layout,))
        models = contestants(small, dtypes=(torch.bfloat16,), device=args.device)
        for found in models:
            if found.name != DENSE:
                check(found)
        result = bench(models, SMOKE_PROTOCOL if args.smoke else PROTOCOL)
    for renderable in (*bench_tables(result), *result.verdict()):
        Console().print(renderable)
    write_rows(args.json, [{"op": "model", **result.to_dict(), **environment(args.device)}])


if __name__ == "__main__":
    main()
