"""Products with 2:4 and bitmap compressed weights for few rows of x (decoding).

tensor      | dtype            | shape            | layout
------------|------------------|------------------|----------------------------------------
x           | fp32, bf16, fp16 | [M, C]           | contiguous, M <= 16
values      | fp32, bf16, fp16 | [R, C/2] | [nnz] | contiguous
meta        | uint8            | [R, C/8]         | two 2-bit columns a group of four
bitmap      | uint8            | [R, ceil(C/8)]   | one bit a column
row_offsets | int64            | [R + 1]          | contiguous
bias        | fp32             | [R]              | contiguous, optional
y           | x's              | [M, R]           | contiguous

A program owns BLOCK_R rows of W and walks along the columns once; what it reads of W serves all
rows of x. Nothing is expanded in memory: a lane holds one group (2:4) or one byte of bitmap, its
weights in registers, and multiplies them with the x of the same columns. The sums over the lanes
are taken once, at the end. With more rows of x the backend expands the weight.
"""

import os

import torch
import triton
import triton.language as tl

from pyprune.ops import linear_24_cuda, linear_bitmap_cuda
from pyprune.ops.sparse_linear import has_many_rows


@triton.jit
def store_sums(acc, y_ptr, bias_ptr, rows, M, R, BLOCK_M: tl.constexpr, HAS_BIAS: tl.constexpr):
    # acc [BLOCK_M, BLOCK_R, lanes]
    y = tl.sum(acc, axis=2)
    m = tl.arange(0, BLOCK_M)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=rows < R, other=0.0)[None, :]
    mask = (m < M)[:, None] & (rows < R)[None, :]
    offsets = m[:, None].to(tl.int64) * R + rows[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_24_kernel(
    x_ptr,
    values_ptr,
    meta_ptr,
    bias_ptr,
    y_ptr,
    M,
    R,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    groups = C // 4
    row_starts = rows.to(tl.int64)[:, None] * groups
    x_rows = x_ptr + m[:, None].to(tl.int64) * C
    acc = tl.zeros([BLOCK_M, BLOCK_R, BLOCK_G], dtype=tl.float32)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        inside = (rows < R)[:, None] & (g < groups)[None, :]
        at = row_starts + g[None, :]
        first = tl.load(values_ptr + 2 * at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(values_ptr + 2 * at + 1, mask=inside, other=0.0).to(tl.float32)
        # A byte holds two groups: neighbouring lanes read the same one.
        byte = tl.load(meta_ptr + at // 2, mask=inside, other=0).to(tl.int32)
        nibble = byte >> (4 * (g % 2))[None, :]
        c0 = nibble & 3
        c1 = (nibble >> 2) & 3
        x_mask = (m < M)[:, None] & (g < groups)[None, :]
        for k in tl.static_range(4):
            x = tl.load(x_rows + (4 * g + k)[None, :], mask=x_mask, other=0.0).to(tl.float32)
            w = tl.where(c0 == k, first, 0.0) + tl.where(c1 == k, second, 0.0)
            acc += w[None, :, :] * x[:, None, :]
    store_sums(acc, y_ptr, bias_ptr, rows, M, R, BLOCK_M, HAS_BIAS)


@triton.jit
def _bits_of_byte(b):
    b = b - ((b >> 1) & 0x55)
    b = (b & 0x33) + ((b >> 2) & 0x33)
    return (b + (b >> 4)) & 0x0F


@triton.jit
def _linear_bitmap_kernel(
    x_ptr,
    values_ptr,
    bitmap_ptr,
    offsets_ptr,
    bias_ptr,
    y_ptr,
    M,
    R,
    C,
    NNZ,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    row_bytes = (C + 7) // 8
    x_rows = x_ptr + m[:, None].to(tl.int64) * C
    bitmap_rows = bitmap_ptr + rows.to(tl.int64)[:, None] * row_bytes
    # Inside the values, whatever the offsets say.
    first = tl.load(offsets_ptr + rows, mask=rows < R, other=0)
    first = tl.minimum(tl.maximum(first, 0), NNZ)
    end = tl.minimum(tl.load(offsets_ptr + rows + 1, mask=rows < R, other=0), NNZ)
    # From there on counted in 32 bits: a row has no more values than columns.
    row_values = values_ptr + first[:, None]
    left = tl.minimum(tl.maximum(end - first, 0), C).to(tl.int32)
    used = tl.zeros([BLOCK_R], dtype=tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_R, BLOCK_B], dtype=tl.float32)
    for start in range(0, row_bytes, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        inside = (rows < R)[:, None] & (b < row_bytes)[None, :]
        byte = tl.load(bitmap_rows + b[None, :], mask=inside, other=0).to(tl.int32)
        count = _bits_of_byte(byte)
        # Where each byte's values start: the bits before it in this row.
        at = used[:, None] + (tl.cumsum(count, axis=1) - count)
        used += tl.sum(count, axis=1)
        for k in tl.static_range(8):
            kept = ((byte >> k) & 1) != 0
            # Inside the row's own values, whatever the bits say.
            w = tl.load(row_values + at, mask=kept & (at < left[:, None]), other=0.0)
            at += kept.to(tl.int32)
            c = 8 * b + k
            x_mask = (m < M)[:, None] & (c < C)[None, :]
            x = tl.load(x_rows + c[None, :], mask=x_mask, other=0.0).to(tl.float32)
            acc += w.to(tl.float32)[None, :, :] * x[:, None, :]
    store_sums(acc, y_ptr, bias_ptr, rows, M, R, BLOCK_M, HAS_BIAS)


def _blocks(m: int) -> dict[str, int]:
    """Rows of x rounded up to a power of two, and the tile of W that its sums leave room for."""
    block_m = triton.next_power_of_2(m)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return {"BLOCK_M": block_m, "BLOCK_R": 8, "lanes": 16}
    return {"BLOCK_M": block_m, "BLOCK_R": 4 if block_m <= 8 else 2, "lanes": 128}


def launch(kernel, x, rows, bias, lanes, *weight, more=()):
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    m, cols = flat.shape
    y = torch.empty(m, rows, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y.reshape(*x.shape[:-1], rows)
    b = y if bias is None else bias.float().contiguous()
    blocks = _blocks(m)
    block_r = blocks["BLOCK_R"]
    kernel[(triton.cdiv(rows, block_r),)](
        flat, *(t.contiguous() for t in weight), b, y, m, rows, cols, *more,
        BLOCK_M=blocks["BLOCK_M"], BLOCK_R=block_r, HAS_BIAS=bias is not None,
        **{lanes: blocks["lanes"]}, enable_fp_fusion=True,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], rows)


def linear_24_triton(x, values, meta, bias):
    if has_many_rows(x):
        return linear_24_cuda.expand_and_multiply(x, values, meta, bias)
    return launch(_linear_24_kernel, x, values.shape[0], bias, "BLOCK_G", values, meta)


def linear_bitmap_triton(x, values, bitmap, row_offsets, bias):
    if has_many_rows(x):
        return linear_bitmap_cuda.expand_and_multiply(x, values, bitmap, row_offsets, bias)
    return launch(
        _linear_bitmap_kernel, x, bitmap.shape[0], bias, "BLOCK_B", values, bitmap, row_offsets,
        more=(values.numel(),),
    )  # fmt: skip


def aot(
    kernel, weight: dict[str, str], more: dict[str, str], lanes: str, block_m: int
) -> dict[str, object]:
    block_r = 4 if block_m <= 8 else 2
    return {
        "kernel": kernel,
        "signature": {
            "x_ptr": "*bf16", **weight, "bias_ptr": "*fp32", "y_ptr": "*bf16",
            "M": "i32", "R": "i32", "C": "i32", **more,
        },
        "constexprs": {
            "BLOCK_M": block_m, "BLOCK_R": block_r, lanes: 128, "HAS_BIAS": False,
        },
        "num_warps": 4,
        "aligned": ["R", "C"],
        "label": f"bf16 {block_m} rows",
    }  # fmt: skip


_24 = {"values_ptr": "*bf16", "meta_ptr": "*u8"}
_BITMAP = {"values_ptr": "*bf16", "bitmap_ptr": "*u8", "offsets_ptr": "*i64"}

AOT = [
    aot(kernel, weight, more, lanes, block_m)
    for kernel, weight, more, lanes in (
        (_linear_24_kernel, _24, {}, "BLOCK_G"),
        (_linear_bitmap_kernel, _BITMAP, {"NNZ": "i32"}, "BLOCK_B"),
    )
    for block_m in (1, 2, 4, 8, 16)
]
