"""Products with int8 weights for few rows of x. Compressed ones go through the kernels of
`sparse_linear` on int8 values, and are scaled afterwards; uncompressed ones have their own.

tensor      | dtype            | shape
------------|------------------|----------------------------------------------
x           | fp32, bf16, fp16 | [M, C], M <= 16; widened to fp32
values      | int8             | [R, C] | [R, C/2] | [nnz]
scales      | any float        | [R]
bias        | any float        | [R], optional
y           | x's              | [M, R]

meta, bitmap and row_offsets as there. Sums are formed in fp32, scaled and only then rounded. With
more rows of x the numbers are expanded to 16 bits, which hold them, and multiplied by the library.
"""

import os

import torch
import triton
import triton.language as tl

from pyprune.kernels import sparse_linear
from pyprune.ops._expanded import multiply_in_parts, number_dtype
from pyprune.ops.sparse_linear import has_many_rows


# As in sparse_linear a program owns BLOCK_R rows of W, walks along the columns once, and takes the
# sums over the lanes at the end. A lane is one column here: four neighbours, one 32-bit word of
# weights, fall to one thread.
@triton.jit
def _linear_int8_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    M,
    R,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    row_starts = rows.to(tl.int64)[:, None] * C
    x_rows = x_ptr + m[:, None].to(tl.int64) * C
    acc = tl.zeros([BLOCK_M, BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (rows < R)[:, None] & (c < C)[None, :]
        w = tl.load(values_ptr + row_starts + c[None, :], mask=inside, other=0).to(tl.float32)
        x_mask = (m < M)[:, None] & (c < C)[None, :]
        x = tl.load(x_rows + c[None, :], mask=x_mask, other=0.0).to(tl.float32)
        acc += w[None, :, :] * x[:, None, :]
    y = tl.sum(acc, axis=2) * tl.load(scales_ptr + rows, mask=rows < R, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=rows < R, other=0.0)[None, :]
    mask = (m < M)[:, None] & (rows < R)[None, :]
    offsets = m[:, None].to(tl.int64) * R + rows[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def _blocks(block_m: int) -> dict[str, int]:
    """The tile of W whose sums take at most 64 of the 255 registers of each of 128 threads."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return {"BLOCK_M": block_m, "BLOCK_R": 8, "BLOCK_C": 64}
    rows = 4 if block_m <= 4 else 2
    return {"BLOCK_M": block_m, "BLOCK_R": rows, "BLOCK_C": 512 if block_m <= 8 else 256}


def linear_int8_triton(x, values, scales, bias):
    if has_many_rows(x):
        return multiply_in_parts(
            x, values.shape, lambda rows: values[rows].to(number_dtype(x)), scales, bias
        )
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    m, cols = flat.shape
    rows = values.shape[0]
    y = torch.empty(m, rows, dtype=x.dtype, device=x.device)
    if y.numel():
        scales = scales.float().contiguous()
        b = scales if bias is None else bias.float().contiguous()
        blocks = _blocks(triton.next_power_of_2(m))
        _linear_int8_kernel[(triton.cdiv(rows, blocks["BLOCK_R"]),)](
            flat, values.contiguous(), scales, b, y, m, rows, cols,
            HAS_BIAS=bias is not None, **blocks, enable_fp_fusion=True,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], rows)


def _scaled(y, x, scales, bias):
    y = y * scales.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _multiply_whole(x, weight, scales, bias):
    return multiply_in_parts(x, weight.shape, lambda rows: weight[rows], scales, bias)


def linear_24_int8_triton(x, values, meta, scales, bias):
    if has_many_rows(x) and len(values):
        weight = torch.ops.pyprune.unpack_24(values.to(number_dtype(x)), meta)
        return _multiply_whole(x, weight, scales, bias)
    y = sparse_linear.linear_24_triton(x.float(), values, meta, None)
    return _scaled(y, x, scales, bias)


def linear_bitmap_int8_triton(x, values, bitmap, row_offsets, scales, bias):
    if has_many_rows(x) and len(bitmap):
        numbers = values.to(number_dtype(x))
        weight = torch.ops.pyprune.unpack_bitmap(numbers, bitmap, row_offsets, x.shape[-1])
        return _multiply_whole(x, weight, scales, bias)
    y = sparse_linear.linear_bitmap_triton(x.float(), values, bitmap, row_offsets, None)
    return _scaled(y, x, scales, bias)


def _aot_compressed(entry):
    values = {"x_ptr": "*fp32", "values_ptr": "*i8", "y_ptr": "*fp32"}
    label = entry["label"].replace("bf16", "int8")
    return {**entry, "signature": {**entry["signature"], **values}, "label": label}


def _aot_dense(block_m):
    return {
        "kernel": _linear_int8_kernel,
        "signature": {
            "x_ptr": "*bf16", "values_ptr": "*i8", "scales_ptr": "*fp32", "bias_ptr": "*fp32",
            "y_ptr": "*bf16", "M": "i32", "R": "i32", "C": "i32",
        },
        "constexprs": {**_blocks(block_m), "HAS_BIAS": False},
        "num_warps": 4,
        "aligned": ["R", "C"],
        "label": f"int8 {block_m} rows",
    }  # fmt: skip


AOT = [_aot_compressed(entry) for entry in sparse_linear.AOT]
AOT += [_aot_dense(block_m) for block_m in (1, 2, 4, 8, 16)]
