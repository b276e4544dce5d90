"""Squared column norms.

tensor | dtype            | shape  | layout
-------|------------------|--------|--------------------------------------------
x      | fp32, bf16, fp16 | [T, C] | any strides
weight | fp32             | [T]    | contiguous, optional
part   | fp32             | [P, C] | one row of partial sums per program along T
"""

import torch
import triton
import triton.language as tl

from pyprune.ops.column_norms import matrices

# Rows per program: long enough that the partial sums are a small share of the traffic (1/512 of a
# bf16 input), short enough that a calibration batch fills the device.
ROWS_PER_PROGRAM = 1024


@triton.jit
def _column_norms_kernel(
    x_ptr,
    weight_ptr,
    part_ptr,
    T,
    C,
    stride_t,
    stride_c,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    pid_c = tl.program_id(0)
    pid_t = tl.program_id(1)
    cols = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_T):
        rows = pid_t.to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_T)
        live = rows < T
        if HAS_WEIGHT:
            # A token of weight 0 contributes nothing even if it holds an infinity or NaN.
            w = tl.load(weight_ptr + rows, mask=live, other=0.0)
            live = live & (w != 0.0)
        offsets = rows[:, None] * stride_t + cols[None, :].to(tl.int64) * stride_c
        mask = live[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        squares = x * x
        if HAS_WEIGHT:
            squares = squares * w[:, None]
        acc += tl.sum(squares, axis=0)
    tl.store(part_ptr + pid_t.to(tl.int64) * C + cols, acc, mask=cols < C)


def column_norms_triton(acc: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None) -> None:
    for matrix in matrices(acc, x, weight):
        _add_norms(*matrix)


def _add_norms(acc: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None) -> None:
    rows, cols = x.shape
    programs_t = triton.cdiv(rows, ROWS_PER_PROGRAM)
    part = torch.empty(programs_t, cols, dtype=torch.float32, device=x.device)
    w = None if weight is None else weight.float().contiguous()
    grid = (triton.cdiv(cols, 128), programs_t)
    _column_norms_kernel[grid](
        x,
        w if w is not None else x,
        part,
        rows,
        cols,
        x.stride(0),
        x.stride(1),
        ROWS=ROWS_PER_PROGRAM,
        BLOCK_T=32,
        BLOCK_C=128,
        HAS_WEIGHT=w is not None,
        enable_fp_fusion=True,
    )
    # The second stage is a fixed-order reduction: no atomics, so the result is reproducible.
    acc += part.sum(dim=0)


AOT = [
    {
        "kernel": _column_norms_kernel,
        "signature": {
            "x_ptr": "*bf16",
            "weight_ptr": "*fp32",
            "part_ptr": "*fp32",
            "T": "i32",
            "C": "i32",
            "stride_t": "i32",
            "stride_c": "constexpr",
        },
        "constexprs": {
            "stride_c": 1,
            "ROWS": ROWS_PER_PROGRAM,
            "BLOCK_T": 32,
            "BLOCK_C": 128,
            "HAS_WEIGHT": True,
        },
        "num_warps": 4,
        "num_stages": 3,
        "aligned": ["x_ptr", "weight_ptr", "part_ptr", "C", "stride_t"],
        "label": "bf16 32x128 weighted",
    }
]
