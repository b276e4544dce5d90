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

Every call takes the next of several copies of the weights, together more than twice the last-level
cache, so that nothing is served from it. `cache_bytes` and `rotated_bytes` are in the rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Bench, environment, gemm_rate, parse, time_interleaved

from pyprune import ops
from pyprune.measure import last_level_cache

SHAPES = [(8192, 4096), (4096, 14336)]
SMOKE_SHAPES = [(64, 128)]
TOKENS = [1, 4, 8, 16, 64, 512]
SMOKE_TOKENS = [1, 8, 16, 64]
INT8 = "_int8"  # suffix of names and ops with int8 values
WIDE = "_fp32x"  # suffix of our kernels' names when the activations are fp32
DENSE = ("dense", "dense" + WIDE, "torch_bf16", "torch_fp32")
# A product with hundreds of rows takes up to a second and varies little.
LONG_REPETITIONS = 3
MEMORY_BOUND_TOKENS = 16


@cache
def read_bandwidth(smoke: bool) -> float:
    """Bytes per second of reading, by a product with one row of x over a dense bf16 weight far
    larger than the caches, which is the fastest reader here: the best of several. A provider that
    does better at reading than that shows a share above one."""
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


def make_weights(rows: int, cols: int, rotated: int) -> tuple[Weights, dict[str, torch.Tensor]]:
    """Each provider's copies of its weight, `rotated` bytes of them, and the dense equivalents."""
    w = torch.randn(rows, cols).bfloat16()
    masks = {"sparse24": mask_24(rows, cols)}
    for percent in (50, 70):
        masks[f"bitmap{percent}"] = torch.rand(rows, cols) >= percent / 100
    packed: dict[str, tuple[torch.Tensor, ...]] = {
        name: ops.pack_24(w, m) if name == "sparse24" else ops.pack_bitmap(w, m)
        for name, m in masks.items()
    }
    dense = {name: w * m for name, m in masks.items()}
    for name in ("sparse24", "bitmap50"):
        q, scales = ops.quantize_rows(dense[name])
        pack = ops.pack_24 if name == "sparse24" else ops.pack_bitmap
        values, *meta = pack(q.bfloat16(), q != 0)
        packed[name + INT8] = (values.to(torch.int8), *meta, scales)
        dense[name + INT8] = q.float() * scales.float()[:, None]
    q, scales = ops.quantize_rows(w)
    packed["dense" + INT8] = (q, scales)
    dense["dense" + INT8] = q.float() * scales.float()[:, None]
    packed |= {"dense": (w,), "torch_bf16": (w,), "torch_fp32": (w.float(),)}
    copies: Weights = {}
    for name, tensors in packed.items():
        count = max(1, -(-rotated // sum(t.nbytes for t in tensors)))
        copies[name] = [tuple(t.clone() for t in tensors) for _ in range(count)]
    return copies, dense | dict.fromkeys(("dense", "torch_bf16", "torch_fp32"), w)


def make_provider(name: str, x: torch.Tensor, copies: list[Any]) -> Callable[[int], torch.Tensor]:
    call: Callable[..., torch.Tensor]
    if not name.endswith(WIDE):
        x = x.to(torch.float32 if name == "torch_fp32" else torch.bfloat16)
    name = name.removesuffix(WIDE)
    if name.startswith("torch"):
        call = F.linear
    elif name == "dense":
        call = ops.linear_dense
    elif name == "dense" + INT8:
        call = ops.linear_int8
    else:
        op = "linear_24" if name.startswith("sparse24") else "linear_bitmap"
        call = getattr(ops, op + (INT8 if name.endswith(INT8) else ""))
    # The counter is the provider's own: turns of the other providers do not make it skip copies.
    turn = iter(range(10**12))
    return lambda _: call(x, *copies[next(turn) % len(copies)])


def check(name: str, got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    few = x[:4, :].to(got.dtype).double()
    part = dense[:512].double()
    want = few @ part.T
    error = (got[:4, :512].double() - want).abs().max() / want.abs().max()
    limit = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
    assert error <= limit, f"{name}: relative error {error:.1e}"


def limit_seconds(
    m: int, rows: int, cols: int, nbytes: int, dtype: torch.dtype, smoke: bool
) -> float:
    reading = nbytes / read_bandwidth(smoke)
    if m <= MEMORY_BOUND_TOKENS:
        return reading
    return max(reading, 2.0 * m * rows * cols / gemm_rate("cpu", dtype, smoke))


def provider_names(copies: Weights) -> list[str]:
    ours = [name for name in copies if not name.startswith("torch")]
    return [*copies, *(name + WIDE for name in ours)]


def bench_rows(bench: Bench, m: int, copies: Weights, dense: dict[str, torch.Tensor]) -> None:
    """All providers at m rows of x, in turns."""
    rows, cols = dense["dense"].shape
    x = torch.randn(m, cols)
    names = provider_names(copies)
    weights = {name: copies[name.removesuffix(WIDE)] for name in names}
    providers = {name: make_provider(name, x, weights[name]) for name in names}
    dtypes = {}
    for name, provider in providers.items():
        got = provider(0)
        check(name, got, x, dense[name.removesuffix(WIDE)])
        dtypes[name] = got.dtype
    repetitions = bench.repetitions if m <= MEMORY_BOUND_TOKENS else LONG_REPETITIONS
    samples = time_interleaved(providers, "cpu", 1 if bench.smoke else repetitions, 0.0)
    best = min(DENSE, key=lambda name: statistics.median(samples[name]))
    for name in names:
        own = sum(t.nbytes for t in weights[name][0])
        median = statistics.median(samples[name])
        limit = limit_seconds(m, rows, cols, own, dtypes[name], bench.smoke)
        ratios = {
            d: statistics.median(a / b for a, b in zip(samples[d], samples[name], strict=True))
            for d in DENSE
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
                "read_bandwidth": read_bandwidth(bench.smoke),
                "cache_bytes": last_level_cache(),
                "rotated_bytes": own * len(weights[name]),
                **environment("cpu"),
            }
        )
        bench.console.print(
            f"{rows}x{cols} rows {m:4d} {name:15s} {median * 1e3:9.3f} ms"
            f"  {limit / median:6.1%} of limit  {ratios[best]:6.2f} x {best}"
        )


def bench_shape(bench: Bench, rows: int, cols: int) -> None:
    copies, dense = make_weights(rows, cols, 0 if bench.smoke else 2 * last_level_cache())
    for m in SMOKE_TOKENS if bench.smoke else TOKENS:
        bench_rows(bench, m, copies, dense)


def main() -> None:
    args = parse(__doc__)
    bench = Bench("sparse_linear", args)
    torch.manual_seed(0)
    bench.console.print(f"reading: {read_bandwidth(bench.smoke) / 1e9:.1f} GB/s")
    for rows, cols in SMOKE_SHAPES if bench.smoke else SHAPES:
        bench_shape(bench, rows, cols)
    bench.finish()


if __name__ == "__main__":
    main()
