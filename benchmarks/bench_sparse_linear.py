"""Products with compressed weights against dense ones: `y = x @ W^T`, 1 to 512 rows of x.

Providers: `sparse24`, `bitmap50`, `bitmap70` (ours, bf16 values), `sparse24_int8`, `bitmap50_int8`
(int8 values, a scale a row); `dense` (our own bf16 kernel: the
same code without the decoding); `dense_int8` (every element as int8: what embeddings and heads
can be stored as); each with bf16 activations, and with fp32 ones as `*_fp32x`;
`torch_bf16`, `torch_fp32` (F.linear, activations like the weight). `ratios` holds the time of every
dense provider over the provider's, by medians of turn-by-turn ratios, `ratio_to_best_dense` the one
against the fastest dense. The limit up to 16 rows is reading the provider's own bytes at the
bandwidth measured first (`read_bandwidth`); above, the measured rate of matrix products in the
activations' dtype.

On a GPU (`--device cuda`): bf16 throughout, `torch_bf16` (cuBLAS) as the dense product;
`sparse24`, `bitmap50`, `bitmap70` and those with int8 values as the ops route them
(`pyprune.ops.linear_24_cuda`, `linear_bitmap_cuda`); and, so that the routes' numbers of rows can
be set by measurement, each bitmap by Triton (`_triton`, up to 2 rows) and expanded and multiplied
densely (`_expand`). From 16 rows on, peers for 2:4 where PyTorch has them: `cusparselt` with its
algorithm searched, and `torch_sparse24`, the default one, which
`torch.sparse.to_sparse_semi_structured` uses. Times are those of CUDA graphs of calls: at a few
microseconds a product, launching from Python would decide. `read_bandwidth` is there that of a
copy.

`--isa avx2` stands for a processor without AVX-512: our kernels, PyTorch, oneDNN and MKL are held
to that.

Every call takes the next of several copies of the weights, together more than twice the last-level
cache, so that nothing is served from it. `cache_bytes` and `rotated_bytes` are in the rows.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from _harness import (
    SAMPLE_SECONDS,
    Bench,
    copy_bandwidth,
    environment,
    gemm_rate,
    parse,
    time_interleaved,
)

from pyprune import _native, ops
from pyprune.measure import last_level_cache
from pyprune.ops import linear_24_cuda, registry

SHAPES = [(8192, 4096), (4096, 14336)]
SMOKE_SHAPES = [(64, 128)]
TOKENS = [1, 4, 8, 16, 64, 512]
SMOKE_TOKENS = [1, 8, 16, 64]
CUDA_SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (28672, 8192)]
CUDA_TOKENS = [1, 2, 4, 8, 16, 32, 64, 512, 4096]
TRITON = "_triton"  # suffixes of a bitmap's names: by another route than the op's
EXPAND = "_expand"
SEARCHED, DEFAULT = "cusparselt", "torch_sparse24"  # peers' names, by the algorithm
PEER_TOKENS = 16  # from which on they are timed
TRITON_TOKENS = 2  # up to which Triton is: no faster than dense at any number
INT8 = "_int8"  # suffix of names and ops with int8 values
WIDE = "_fp32x"  # suffix of our kernels' names when the activations are fp32
DENSE = ("dense", "dense" + WIDE, "torch_bf16", "torch_fp32")
# A product with hundreds of rows takes up to a second and varies little.
LONG_REPETITIONS = 9
MEMORY_BOUND_TOKENS = 16


@cache
def read_bandwidth(device: str, smoke: bool) -> float:
    """Bytes per second of reading, by a product with one row of x over a dense bf16 weight far
    larger than the caches, which is the fastest reader here: the best of several. A provider that
    does better at reading than that shows a share above one."""
    if device == "cuda":
        return copy_bandwidth(device, smoke)
    rows = 64 if smoke else 65536
    weight = torch.ones(rows, 4096, dtype=torch.bfloat16)
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    times = time_interleaved(
        {"read": lambda i: ops.linear_dense(x, weight)}, "cpu", 3 if smoke else 15, 0.0
    )["read"]
    return weight.nbytes / min(times)


def mask_24(rows: int, cols: int) -> torch.Tensor:
    kept = torch.rand(rows, cols // 4, 4).argsort(-1)[..., :2]
    mask = torch.zeros(rows, cols // 4, 4, dtype=torch.bool).scatter_(-1, kept, True)
    return mask.reshape(rows, cols)


Weights = dict[str, list[tuple[torch.Tensor, ...]]]


def cache_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return last_level_cache()


def add_int8(packed: Any, dense: dict[str, torch.Tensor], w: torch.Tensor) -> None:
    for name in ("sparse24", "bitmap50"):
        q, scales = ops.quantize_rows(dense[name])
        pack = ops.pack_24 if name == "sparse24" else ops.pack_bitmap
        values, *meta = pack(q.bfloat16(), q != 0)
        packed[name + INT8] = (values.to(torch.int8), *meta, scales)
        dense[name + INT8] = q.float() * scales.float()[:, None]
    q, scales = ops.quantize_rows(w)
    packed["dense" + INT8] = (q, scales)
    dense["dense" + INT8] = q.float() * scales.float()[:, None]


def make_weights(
    rows: int, cols: int, rotated: int, device: str
) -> tuple[Weights, dict[str, torch.Tensor]]:
    """Each provider's copies of its weight, `rotated` bytes of them, and the dense equivalents."""
    with torch.device(device):
        w = torch.randn(rows, cols).bfloat16()
        masks = {"sparse24": mask_24(rows, cols)}
        for percent in (50, 70):
            masks[f"bitmap{percent}"] = torch.rand(rows, cols) >= percent / 100
    packed: dict[str, tuple[torch.Tensor, ...]] = {
        name: ops.pack_24(w, m) if name == "sparse24" else ops.pack_bitmap(w, m)
        for name, m in masks.items()
    }
    dense = {name: w * m for name, m in masks.items()}
    packed["torch_bf16"] = (w,)
    if device == "cuda":
        for name in ("bitmap50", "bitmap70"):
            packed |= dict.fromkeys((name + TRITON, name + EXPAND), packed[name])
            dense |= dict.fromkeys((name + TRITON, name + EXPAND), dense[name])
        if torch.backends.cusparselt.is_available():
            library = (torch._cslt_compress(dense["sparse24"]),)
            packed |= dict.fromkeys((SEARCHED, DEFAULT), library)
            dense |= dict.fromkeys((SEARCHED, DEFAULT), dense["sparse24"])
    else:
        packed |= {"dense": (w,), "torch_fp32": (w.float(),)}
    add_int8(packed, dense, w)
    copies: Weights = {}
    for name, tensors in packed.items():
        count = max(1, -(-rotated // sum(t.nbytes for t in tensors)))
        copies[name] = [tuple(t.to(device, copy=True) for t in tensors) for _ in range(count)]
    return copies, dense | dict.fromkeys(("dense", "torch_bf16", "torch_fp32"), w)


def expand_and_multiply(x: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
    return F.linear(x, torch.ops.pyprune.unpack_bitmap(*packed, x.shape[-1]))


def peer(name: str, x: torch.Tensor, weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    chosen = {}
    if name == SEARCHED:
        chosen["alg_id"] = torch._cslt_sparse_mm_search(weight, x.T, transpose_result=True)
    return lambda x, w: torch._cslt_sparse_mm(w, x.T, transpose_result=True, **chosen)


def make_provider(name: str, x: torch.Tensor, copies: list[Any]) -> Callable[[int], torch.Tensor]:
    call: Callable[..., torch.Tensor]
    if not name.endswith(WIDE):
        x = x.to(torch.float32 if name == "torch_fp32" else torch.bfloat16)
    name = name.removesuffix(WIDE)
    if name in (SEARCHED, DEFAULT):
        call = peer(name, x, copies[0][0])
    elif name.startswith("torch"):
        call = F.linear
    elif name == "dense":
        call = ops.linear_dense
    elif name == "dense" + INT8:
        call = ops.linear_int8
    elif name.endswith(EXPAND):
        call = expand_and_multiply
    elif name.endswith(TRITON):
        triton = registry.IMPLS["linear_bitmap"]["triton"].resolve()
        call = lambda x, *packed: triton(x, *packed, None)  # noqa: E731
    else:
        op = "linear_24" if name.startswith("sparse24") else "linear_bitmap"
        if name == "sparse24" and x.device.type == "cuda" and len(x) > linear_24_cuda.ROWS:
            for values, meta in copies:  # timed in a graph
                linear_24_cuda.prepare_library(values, meta, len(x))
        call = getattr(ops, op + (INT8 if name.endswith(INT8) else ""))
    # The counter is the provider's own: turns of the other providers do not make it skip copies.
    turn = iter(range(10**12))
    return lambda _: call(x, *copies[next(turn) % len(copies)])


def check(name: str, got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    few = x[:4, :].to(got.dtype).double().cpu()
    part = dense[:512].double().cpu()
    want = few @ part.T
    error = (got[:4, :512].double().cpu() - want).abs().max() / want.abs().max()
    limit = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
    assert error <= limit, f"{name}: relative error {error:.1e}"


def limit_seconds(
    m: int, rows: int, cols: int, nbytes: int, dtype: torch.dtype, device: str, smoke: bool
) -> float:
    reading = nbytes / read_bandwidth(device, smoke)
    if m <= MEMORY_BOUND_TOKENS:
        return reading
    return max(reading, 2.0 * m * rows * cols / gemm_rate(device, dtype, smoke))


def provider_names(copies: Weights, m: int, device: str) -> list[str]:
    if device == "cuda":
        fits = {name: m <= TRITON_TOKENS for name in copies if name.endswith(TRITON)}
        fits |= dict.fromkeys((SEARCHED, DEFAULT), m >= PEER_TOKENS)
        return [name for name in copies if fits.get(name, True)]
    ours = [name for name in copies if not name.startswith("torch")]
    return [*copies, *(name + WIDE for name in ours)]


def bench_rows(bench: Bench, m: int, copies: Weights, dense: dict[str, torch.Tensor]) -> None:
    """All providers at m rows of x, in turns."""
    rows, cols = dense["dense"].shape
    x = torch.randn(m, cols).to(bench.device)
    names = provider_names(copies, m, bench.device)
    weights = {name: copies[name.removesuffix(WIDE)] for name in names}
    providers = {name: make_provider(name, x, weights[name]) for name in names}
    dtypes = {}
    for name, provider in providers.items():
        got = provider(0)
        check(name, got, x, dense[name.removesuffix(WIDE)])
        dtypes[name] = got.dtype
    repetitions = bench.repetitions if m <= MEMORY_BOUND_TOKENS else LONG_REPETITIONS
    # A GPU's samples hold many calls; a product on the CPU is long enough by itself.
    seconds = SAMPLE_SECONDS["cuda"] if bench.device == "cuda" and not bench.smoke else 0.0
    turns = 1 if bench.smoke else repetitions
    samples = time_interleaved(providers, bench.device, turns, seconds, graphs=True)
    baselines = [name for name in DENSE if name in samples]
    best = min(baselines, key=lambda name: statistics.median(samples[name]))
    for name in names:
        own = sum(t.nbytes for t in weights[name][0])
        median = statistics.median(samples[name])
        limit = limit_seconds(m, rows, cols, own, dtypes[name], bench.device, bench.smoke)
        # A provider that is very slow takes part in the first turns only.
        ratios = {
            d: statistics.median(a / b for a, b in zip(samples[d], samples[name], strict=False))
            for d in baselines
        }
        bench.rows.append(
            {
                "op": "sparse_linear",
                "provider": name,
                "shape": [rows, cols],
                "dtype": str(weights[name][0][0].dtype).removeprefix("torch."),
                "activations": str(dtypes[name]).removeprefix("torch."),
                "rows": m,
                "seconds_median": median,
                "seconds_min": min(samples[name]),
                "seconds_max": max(samples[name]),
                "bytes": own,
                "share_of_limit": limit / median,
                "best_dense": best,
                "ratio_to_best_dense": ratios[best],
                "ratios": ratios,
                "read_bandwidth": read_bandwidth(bench.device, bench.smoke),
                "cache_bytes": cache_bytes(bench.device),
                "rotated_bytes": own * len(weights[name]),
                **environment(bench.device),
            }
        )
        bench.console.print(
            f"{rows}x{cols} rows {m:4d} {name:15s} {median * 1e3:9.3f} ms"
            f"  {limit / median:6.1%} of limit  {ratios[best]:6.2f} x {best}"
        )


def bench_shape(bench: Bench, rows: int, cols: int) -> None:
    rotated = 0 if bench.smoke else 2 * cache_bytes(bench.device)
    copies, dense = make_weights(rows, cols, rotated, bench.device)
    full = CUDA_TOKENS if bench.device == "cuda" else TOKENS
    for m in SMOKE_TOKENS if bench.smoke else full:
        bench_rows(bench, m, copies, dense)
        bench.finish()  # an interrupted run keeps what it has measured


# What PyTorch and its libraries read when they are loaded.
LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
             "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}  # fmt: skip


def hold_to(isa: str) -> None:
    """Restricts everything that is timed to an instruction set; starts anew if torch is not."""
    if any(os.environ.get(name) != value for name, value in LIMITS[isa].items()):
        os.environ.update(LIMITS[isa])
        os.execv(sys.executable, [sys.executable, *sys.argv])
    assert _native.MODULE is not None, _native.MISSING
    _native.MODULE.set_isa(isa)


def main() -> None:
    args = parse(__doc__, isa={"choices": list(LIMITS), "help": "do without what is newer"})
    if args.isa:
        hold_to(args.isa)
    bench = Bench("sparse_linear", args)
    torch.manual_seed(0)
    bandwidth = read_bandwidth(bench.device, bench.smoke)
    bench.console.print(f"reading: {bandwidth / 1e9:.1f} GB/s")
    full = CUDA_SHAPES if bench.device == "cuda" else SHAPES
    for rows, cols in SMOKE_SHAPES if bench.smoke else full:
        bench_shape(bench, rows, cols)
    if args.isa:
        bench.rows = [row | {"isa": args.isa} for row in bench.rows]
    bench.finish()


if __name__ == "__main__":
    main()
