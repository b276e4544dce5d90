"""Pruning scores as order-preserving integer keys, shared by the selection kernels.

    score = |w[i, j] * (column_scale[j] + addend[i, j]) * row_scale[i]|     in fp32, in this order

tensor       | dtype            | shape  | layout
-------------|------------------|--------|---------------------------
w            | fp32, bf16, fp16 | [R, C] | any strides
column_scale | fp32             | [C]    | contiguous, optional
row_scale    | fp32             | [R]    | contiguous, optional
addend       | fp32             | [R, C] | contiguous, optional
preserve     | int8 (0 or 1)    | [R, C] | contiguous, optional

A non-negative float compares like its bit pattern, so a key is the pattern plus one. All NaNs share
one key above infinity; 0 is for positions that must stay pruned; -1 pads.
"""

import torch
import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7F800001)


@triton.jit
def score_keys(
    w_ptr,
    column_ptr,
    row_ptr,
    addend_ptr,
    preserve_ptr,
    row,
    col,
    mask,
    C,
    stride_r,
    stride_c,
    HAS_COLUMN: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_PRESERVE: tl.constexpr,
):
    """Keys at (row, col), tensors of one shape; -1 where `mask` is False."""
    row = row.to(tl.int64)
    col = col.to(tl.int64)
    flat = row * C + col
    score = tl.load(w_ptr + row * stride_r + col * stride_c, mask=mask, other=0.0).to(tl.float32)
    if HAS_COLUMN:
        factor = tl.load(column_ptr + col, mask=mask, other=0.0)
        if HAS_ADDEND:
            factor = factor + tl.load(addend_ptr + flat, mask=mask, other=0.0)
        score = score * factor
    elif HAS_ADDEND:
        score = score * tl.load(addend_ptr + flat, mask=mask, other=0.0)
    if HAS_ROW:
        score = score * tl.load(row_ptr + row, mask=mask, other=0.0)
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    key = tl.where(bits > INFINITY_BITS, NAN_BITS, bits) + 1
    if HAS_PRESERVE:
        key = tl.where(tl.load(preserve_ptr + flat, mask=mask, other=0) != 0, key, 0)
    return tl.where(mask, key, -1)


def term_arguments(
    w: torch.Tensor,
    column_scale: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    addend: torch.Tensor | None,
    preserve: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, ...], dict[str, bool]]:
    """The five pointers of `score_keys` (an absent term's is never read) and its flags."""
    column = None if column_scale is None else column_scale.float().contiguous()
    row = None if row_scale is None else row_scale.float().contiguous()
    extra = None if addend is None else addend.float().contiguous()
    allowed = None if preserve is None else preserve.contiguous().view(torch.int8)
    pointers = tuple(w if t is None else t for t in (w, column, row, extra, allowed))
    flags = {
        "HAS_COLUMN": column is not None,
        "HAS_ROW": row is not None,
        "HAS_ADDEND": extra is not None,
        "HAS_PRESERVE": allowed is not None,
    }
    return pointers, flags


# For the launchers' AOT tables: the signature of the arguments above, and the two common cases.
SIGNATURE = {
    "column_ptr": "*fp32",
    "row_ptr": "*fp32",
    "addend_ptr": "*fp32",
    "preserve_ptr": "*i8",
    "C": "i32",
    "stride_r": "i32",
}
MAGNITUDE = {
    "HAS_COLUMN": False,
    "HAS_ROW": False,
    "HAS_ADDEND": False,
    "HAS_PRESERVE": False,
    "stride_c": 1,
}
ALL_TERMS = {
    "HAS_COLUMN": True,
    "HAS_ROW": True,
    "HAS_ADDEND": True,
    "HAS_PRESERVE": True,
    "stride_c": 1,
}

AOT: list[dict] = []  # no kernel of its own
