"""Products with coded bf16 weights against dense ones: `y = x @ W^T`, 1 to 64 rows of bf16 x.

Providers: `coded` (lossless, 11.4 bits a weight), `int8` (a scale a row), `torch` (F.linear) and
`dense`, our own bf16 kernel, which ratios are against: what reading decides takes `byte_ratio` of
its time. Weights are normal numbers of one size, whose exponents are about as spread as those of
trained ones, with 2.7 % escapes. The first shape is SmolLM2-135M's head.

Every call takes the next of several copies of the weights, together more than twice the last-level
cache, so that nothing is served from it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Bench, Case, parse

from pyprune import ops
from pyprune.measure import last_level_cache

SHAPES = [(49152, 576), (32000, 4096)]
SMOKE_SHAPES = [(64, 136)]
TOKENS = [1, 4, 8, 16, 64]
SMOKE_TOKENS = [1, 16]

OPS: dict[str, Callable[..., torch.Tensor]] = {
    "coded": ops.linear_coded,
    "int8": ops.linear_int8,
    "torch": F.linear,
    "dense": ops.linear_dense,
}
Copies = dict[str, list[tuple[torch.Tensor, ...]]]


def make_weights(rows: int, cols: int, rotated: int, device: str) -> tuple[Copies, torch.Tensor]:
    """Each provider's copies of its weight, `rotated` bytes of them at least, and the weight."""
    w = (torch.randn(rows, cols) / cols**0.5).bfloat16()
    packed = {"coded": ops.pack_coded(w), "int8": ops.quantize_rows(w), "torch": (w,)}
    packed["dense"] = (w,)
    copies: Copies = {}
    for name, tensors in packed.items():
        number = max(1, -(-rotated // sum(t.nbytes for t in tensors)))
        copies[name] = [tuple(t.to(device, copy=True) for t in tensors) for _ in range(number)]
    return copies, w


def provider(name: str, x: torch.Tensor, copies: list[Any]) -> Callable[[int], torch.Tensor]:
    # The counter is the provider's own: turns of the others do not make it skip copies.
    turn = count()
    return lambda _: OPS[name](x, *copies[next(turn) % len(copies)])


def checker(x: torch.Tensor, w: torch.Tensor) -> Callable[[str, torch.Tensor], None]:
    want = x[:4].double().cpu() @ w[:512].double().T

    def check(name: str, got: torch.Tensor) -> None:
        error = (got[:4, :512].double().cpu() - want).abs().max() / want.abs().max()
        assert error <= (5e-2 if name == "int8" else 1e-2), f"{name}: relative error {error:.1e}"

    return check


def main() -> None:
    args = parse(__doc__)
    bench = Bench("coded", args)
    torch.manual_seed(0)
    for rows, cols in SMOKE_SHAPES if bench.smoke else SHAPES:
        rotated = 0 if bench.smoke else 2 * last_level_cache()
        copies, w = make_weights(rows, cols, rotated, bench.device)
        nbytes = {name: sum(t.nbytes for t in found[0]) for name, found in copies.items()}
        for m in SMOKE_TOKENS if bench.smoke else TOKENS:
            x = torch.randn(m, cols).bfloat16().to(bench.device)
            bench.run(
                Case(
                    shape=(rows, cols),
                    dtype=torch.bfloat16,
                    flops=2.0 * m * rows * cols,
                    bytes=nbytes["dense"],
                    providers={name: provider(name, x, found) for name, found in copies.items()},
                    limit="dense",
                    check=checker(x, w),
                    baseline="dense",
                    note={"rows": m, "byte_ratio": round(nbytes["coded"] / nbytes["dense"], 4)},
                    graphs=True,
                )
            )
    bench.finish()


if __name__ == "__main__":
    main()
