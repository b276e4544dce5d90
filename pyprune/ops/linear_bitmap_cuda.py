"""Bitmap products on CUDA devices: which kernel serves how many rows of x.

route    | what it is
---------|------------------------------------------------------------------------------------------
kernel   | `csrc/cuda/linear_bitmap.cu`: values expanded in registers, tensor cores
triton   | `kernels/sparse_linear.py`: any dtypes and widths
expand   | the dense matrix, made anew by `unpack_bitmap`, and a dense product: at 50 % and 16 bits
         | 5.1 bytes of traffic an element against the 2 of a dense weight, and the memory of one
         | dense layer at a time

`ROUTES` has the numbers of rows at which one gives way to the next, by measurement on an H200 with
bf16 at 50 %. Speed as a multiple of cuBLAS's on the dense matrix (CUDA graphs, W out of memory):

rows of x | 4096 x 4096 | 4096 x 14336 | 14336 x 4096 | 28672 x 8192
----------|-------------|--------------|--------------|-------------
        1 |        1.1  |         1.0  |         1.1  |         1.1
        2 |        1.0  |              |              |         1.0
        4 |        0.9  |         0.9  |         0.8  |         0.9
        8 |        0.8  |         0.8  |         0.6  |         0.8
       16 |        0.7  |         0.6  |         0.6  |         0.6
       32 |        0.4  |         0.4  |         0.5  |         0.6
       64 |        0.3  |         0.4  |         0.5  |         0.5

So what the format saves is memory. Expanding and multiplying is 0.3 to 0.4 at any of these: ahead
of the kernel at 4096 x 4096 from 32 rows on and level at 4096 x 14336 with 64, behind everywhere
else, and gaining with every row of x above. Triton takes 0.12 ms for 14336 x 4096 with one
row of x (0.25), 0.15 with two and 0.28 with eight, where the expanded matrix takes 0.11.
fp32 activations have not been timed. `benchmarks/bench_sparse_linear.py --device cuda` times the
routes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops._expanded import multiply_dense

Route = Literal["kernel", "triton", "expand"]

# For the dtypes of x and of the values: up to how many rows of x which route serves (None: any).
# An fp32 row counts threefold in the kernel, as three rows of bf16 parts.
Table = tuple[tuple[int | None, Route], ...]
ROUTES: dict[tuple[torch.dtype, torch.dtype], Table] = {
    (torch.bfloat16, torch.bfloat16): ((64, "kernel"), (None, "expand")),
    (torch.float16, torch.float16): ((64, "kernel"), (None, "expand")),
    (torch.float32, torch.bfloat16): ((5, "kernel"), (None, "expand")),
}
OTHER_DTYPES: Table = ((1, "triton"), (None, "expand"))

WORD = 32  # columns of a word of the bitmap: the kernel takes multiples, so that rows are aligned
LARGEST = 2**31 - 1  # positions in the values and words of the bitmap have 32 bits


def route(x: Tensor, values: Tensor, bitmap: Tensor) -> Route:
    """Which of the three serves `x [..., C]` and a weight of these tensors on a CUDA device."""
    rows, cols = x.numel() // x.shape[-1], x.shape[-1]
    table = ROUTES.get((x.dtype, values.dtype), OTHER_DTYPES)
    words = bitmap.shape[0] * bitmap.shape[1] // 4
    if cols % WORD or max(values.numel(), words) > LARGEST:
        table = OTHER_DTYPES
    return next(served for most, served in table if most is None or rows <= most)


def limits(x: Tensor, values: Tensor, bitmap: Tensor, *rest: Tensor | None) -> str:
    """Why these arguments are Triton's; empty if the kernel or the expanded matrix serves them."""
    if route(x, values, bitmap) != "triton":
        return ""
    return (
        f"{x.numel() // x.shape[-1]} rows of {x.dtype} with {x.shape[-1]} columns and "
        f"{values.dtype} values go to Triton (see pyprune.ops.linear_bitmap_cuda)"
    )


def linear_bitmap_cuda(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    if route(x, values, bitmap) == "kernel":
        y = _kernel(x.reshape(-1, x.shape[-1]), values, bitmap, row_offsets, bias)
        return y.reshape(*x.shape[:-1], bitmap.shape[0])
    return expand_and_multiply(x, values, bitmap, row_offsets, bias)


def expand_and_multiply(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """The product by way of the dense matrix, for all dtypes but fp64 and on any device."""
    if not len(bitmap):
        return x.new_empty((*x.shape[:-1], 0))
    # The op, not the public function: validating would wait for the device at every call.
    weight = torch.ops.pyprune.unpack_bitmap(values, bitmap, row_offsets, x.shape[-1])
    return multiply_dense(x, weight, bias)


def _kernel(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    y = x.new_empty(x.shape[0], bitmap.shape[0])
    if y.numel() == 0:
        return y
    if bias is not None:
        bias = bias.float().contiguous()
    arrays = (*map(_native.aligned, (x, values, bitmap)), row_offsets.contiguous())
    extra = _native.optional_capsule(bias)
    _native.launch("linear_bitmap_cuda", x.device, y, *arrays, extra)
    return y
