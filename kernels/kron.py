"""Quadratic forms of rows under a symmetric matrix, `out_i = sum_jk W_ij H_jk W_ik`.

tensor | dtype | shape  | layout
-------|-------|--------|--------------------------------------------------------------
w      | fp32  | [R, C] | any strides
h      | fp32  | [C, C] | any strides, symmetric; tiles on and above the diagonal are read
part   | fp32  | [S, R] | contiguous; what each of S tiles of columns contributes

A program owns a block of rows and one tile of columns. It forms that tile of W H in registers,
from the rows of H above the tile, twice, and the tile on the diagonal, and multiplies it by W
there: no product reaches memory. The tiles are summed in order, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl

from pyprune.kernels.gram import indexable


@triton.jit
def _kron_quadratic_kernel(
    w_ptr,
    h_ptr,
    part_ptr,
    R,
    C,
    w_stride_r,
    w_stride_c,
    h_stride_r,
    h_stride_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The tile furthest to the right has the most rows of H above it: it starts first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    first_c = tile * BLOCK_C
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = first_c + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    # Where a row starts takes 64 bits; inside a row or tile 32 do (the launcher sees to that).
    w_rows = w_ptr + r.to(tl.int64)[:, None] * w_stride_r
    w_ptrs = w_rows + k[None, :] * w_stride_c
    h_ptrs = h_ptr + k[:, None] * h_stride_r + c.to(tl.int64)[None, :] * h_stride_c
    in_rows, in_cols = (r < R)[:, None], (c < C)[None, :]

    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for _ in range(0, first_c, BLOCK_K):
        a = tl.load(w_ptrs, mask=in_rows, other=0.0)
        b = tl.load(h_ptrs, mask=in_cols, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        w_ptrs += BLOCK_K * w_stride_c
        h_ptrs += BLOCK_K * h_stride_r
    acc *= 2.0
    for left in range(tl.minimum(C - first_c, BLOCK_C), 0, -BLOCK_K):
        live = k < left
        a = tl.load(w_ptrs, mask=in_rows & live[None, :], other=0.0)
        b = tl.load(h_ptrs, mask=live[:, None] & in_cols, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        w_ptrs += BLOCK_K * w_stride_c
        h_ptrs += BLOCK_K * h_stride_r

    w_ptrs = w_rows + c.to(tl.int64)[None, :] * w_stride_c
    acc *= tl.load(w_ptrs, mask=in_rows & in_cols, other=0.0)
    tl.store(part_ptr + tile.to(tl.int64) * R + r, tl.sum(acc, axis=1), mask=r < R)


def _blocks(interpreted: bool) -> dict[str, int]:
    """fp32 runs on the ordinary multipliers: tiles as small as `gram`'s for it."""
    if interpreted:
        return {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


def kron_quadratic_triton(w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    rows, columns = w.shape
    blocks = _blocks(not isinstance(_kron_quadratic_kernel, triton.JITFunction))
    tiles = triton.cdiv(columns, blocks["BLOCK_C"])
    part = torch.empty(tiles, rows, dtype=torch.float32, device=w.device)
    if part.numel():
        w, h = indexable(w), indexable(h)
        _kron_quadratic_kernel[(triton.cdiv(rows, blocks["BLOCK_R"]), tiles)](
            w,
            h,
            part,
            rows,
            columns,
            *w.stride(),
            *h.stride(),
            **blocks,
            enable_fp_fusion=True,
        )
    return part.sum(0, dtype=torch.float64).to(w.dtype)


def _aot(label: str, w_strides: dict[str, str]) -> dict:
    """`w_strides`: the type of each of its strides, "constexpr" for the one that is 1."""
    strides = w_strides | {"h_stride_r": "i32", "h_stride_c": "constexpr"}
    ones = [name for name, kind in strides.items() if kind == "constexpr"]
    pointers = {"w_ptr": "*fp32", "h_ptr": "*fp32", "part_ptr": "*fp32"}
    blocks = _blocks(interpreted=False)
    return {
        "kernel": _kron_quadratic_kernel,
        "signature": pointers | {"R": "i32", "C": "i32"} | strides,
        "constexprs": dict.fromkeys(ones, 1)
        | {name: size for name, size in blocks.items() if name.startswith("BLOCK")},
        "num_warps": blocks["num_warps"],
        "num_stages": blocks["num_stages"],
        "aligned": [*pointers, "R", "C", *(name for name in strides if name not in ones)],
        "label": label,
    }


AOT = [
    _aot("rows, fp32 64x64x32", {"w_stride_r": "i32", "w_stride_c": "constexpr"}),
    _aot("columns, fp32 64x64x32", {"w_stride_r": "constexpr", "w_stride_c": "i32"}),
]
