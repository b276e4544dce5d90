"""Prefill and decode rates of a whole model at a size where weights are what decoding waits for.

    python benchmarks/bench_model.py --json model.json
    python benchmarks/bench_model.py --device cuda --json model.json

A random bf16 Llama: dense, 2:4, and half of the weights zero anywhere as bitmaps, side by side in
bf16; on the CPU also with int8 values. The packaged model of the demo is so small that a good part
of a decoding step is Python; this one shows what the kernels bring beyond it. Before anything is
timed, one decoding step of each model is compared with that of its decompressed form.

size      | parameters              | how it is made
----------|-------------------------|---------------------------------------------------------------
1b (CPU)  | 0.9 G, proportions of   | a checkpoint on disk that `pyprune compress` makes small;
          | Llama-3.2-1B            | zeros do not change the time of a dense product, so the dense
          |                         | model is the 2:4 one decompressed
8b (CUDA) | 8.0 G, Llama-3-8B's     | on the device, layer by layer, by magnitude from the dense
          | shapes                  | one; embeddings, head and norms are shared

On a CUDA device decoding replays a CUDA graph of one step. Prefill at batch 64 is 4096 rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from _harness import environment, write_rows
from _llama import LLAMA_3_8B, TINY, random_llama
from bench_memory import SIZES, SMOKE_SIZES, make_checkpoint
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from pyprune import ops
from pyprune.cli_sparse import bench_tables
from pyprune.models.adapter import Adapter
from pyprune.sparse import SparseLinear
from pyprune.sparse.bench import (
    DENSE,
    TORCH,
    Contestant,
    Protocol,
    bench,
    contestants,
    densified,
    sharing_copy,
    weight_bytes,
)
from pyprune.sparse.convert import compress_checkpoint

PROTOCOL = Protocol(batches=(1, 4, 16), prompt=64, steps=16, rounds=5)
CUDA_PROTOCOL = Protocol(batches=(1, 4, 16, 64), prompt=64, steps=32, rounds=3)
SMOKE_PROTOCOL = Protocol(batches=(1,), prompt=8, steps=2, rounds=1)
# Of the logits, bf16 products summed in another order through all blocks.
TOLERANCE = 0.05
MODELS = {"2:4": ("2:4", "sparse24"), "50% bitmap": ("random", "bitmap")}
# On the CPU also with int8 values, a scale a row.
INT8 = " int8"


@torch.inference_mode()
def check(found: Contestant) -> None:
    tokens = torch.arange(1, 9, device=found.model.device)[None]
    got, want = (m(tokens).logits[0, -1].float() for m in (found.model, densified(found.model)))
    error = float((got - want).norm() / want.norm())
    if not error < TOLERANCE:
        raise AssertionError(f"{found.label}: logits are off by {error:.3f} of the dense model's")


def from_disk(smoke: bool, device: str) -> list[Contestant]:
    with tempfile.TemporaryDirectory() as tmp:
        small = {}
        for name, (zeros, layout) in MODELS.items():
            source, small[name] = Path(tmp) / "dense", Path(tmp) / layout
            source.mkdir(exist_ok=True)
            make_checkpoint(source, SMOKE_SIZES if smoke else SIZES, zeros)
            compress_checkpoint(source, small[name], allowed=(layout,))
            small[name + INT8] = Path(tmp) / (layout + "-int8")
            compress_checkpoint(source, small[name + INT8], allowed=(layout,), int8=True)
        return contestants(small, dtypes=(torch.bfloat16,), device=device)


@torch.no_grad()
def in_memory(smoke: bool, device: str) -> list[Contestant]:
    dense = random_llama(TINY if smoke else LLAMA_3_8B, device)
    models = {DENSE: dense}
    for name, (zeros, layout) in MODELS.items():
        models[name] = pruned_by_magnitude(dense, zeros, layout)
    sizes = {name: weight_bytes(model) for name, model in models.items()}
    return [
        Contestant(name, "bfloat16", None, sizes[name], sizes[name], model, TORCH)
        if name == DENSE
        else Contestant(name, "bfloat16", None, sizes[name], sizes[name], model)
        for name, model in models.items()
    ]


def pruned_by_magnitude(dense: PreTrainedModel, zeros: str, layout: str) -> PreTrainedModel:
    """A copy of `dense` whose blocks' matrices are pruned and compressed."""
    model = sharing_copy(dense)
    adapter = Adapter.of(dense)
    for i in range(len(adapter.blocks)):
        for ref in adapter.linears(i):
            w = ref.weight()
            mask = ops.mask_nm(w, 2, 4) if zeros == "2:4" else ops.mask_topk(w, w.shape[1] // 2)
            linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(w * mask, requires_grad=False)
            model.set_submodule(ref.name, SparseLinear.from_dense(linear, layout).eval())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, made both ways")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1, 4, 16, on CUDA also 64")
    parser.add_argument("--rounds", type=int, help="default: 5, on CUDA 3")
    parser.add_argument("--size", choices=["1b", "8b"], help="default: 1b on the CPU, 8b on CUDA")
    args = parser.parse_args()
    size = args.size or ("8b" if args.device == "cuda" else "1b")
    protocol = CUDA_PROTOCOL if args.device == "cuda" else PROTOCOL
    if args.batches:
        protocol = dataclasses.replace(protocol, batches=tuple(args.batches))
    if args.rounds:
        protocol = dataclasses.replace(protocol, rounds=args.rounds)
    make = {"1b": from_disk, "8b": in_memory}
    for made in make if args.smoke else [size]:
        models = make[made](args.smoke, args.device)
        for found in models:
            if found.name != DENSE:
                check(found)
        result = bench(models, SMOKE_PROTOCOL if args.smoke else protocol)
        for renderable in (*bench_tables(result), *result.verdict()):
            Console().print(renderable)
    row = {"op": "model", "size": size, **result.to_dict(), **environment(args.device)}
    write_rows(args.json, [row])


if __name__ == "__main__":
    main()
