"""N:M and per-row masks. The tensor table of the inputs is in `score.py`.

tensor | dtype | shape  | layout
-------|-------|--------|-----------
mask   | int8  | [R, C] | contiguous (a bool tensor's bytes)
"""

from functools import partial

import torch
import triton
import triton.language as tl

from pyprune.kernels import score
from pyprune.kernels.score import score_keys, term_arguments
from pyprune.kernels.select_global import mask_global_triton
from pyprune.ops.select import fill_stack

INTERPRET = triton.knobs.runtime.interpret

# Rank counting holds M x M comparisons a group in registers: beyond this a group is selected like a
# row of mask_topk.
MAX_RANKED = 32
# Rows longer than this are shared by many programs (mask_global's passes).
LONG_ROW = 1 << 17
# Columns per step of the row kernel: eight a thread. Sixteen spill on sm_90 with all terms in fp32.
MAX_BLOCK = 2048


@triton.jit
def _two_of_four(k0, k1, k2, k3):
    """Which of four keys are among the two highest, by six comparisons; equal keys: the later."""
    b01 = (k1 >= k0).to(tl.int32)
    b02 = (k2 >= k0).to(tl.int32)
    b03 = (k3 >= k0).to(tl.int32)
    b12 = (k2 >= k1).to(tl.int32)
    b13 = (k3 >= k1).to(tl.int32)
    b23 = (k3 >= k2).to(tl.int32)
    keep0 = (b01 + b02 + b03 < 2) & (k0 > 0)
    keep1 = (1 - b01 + b12 + b13 < 2) & (k1 > 0)
    keep2 = (2 - b02 - b12 + b23 < 2) & (k2 > 0)
    keep3 = (3 - b03 - b13 - b23 < 2) & (k3 > 0)
    return keep0, keep1, keep2, keep3


@triton.jit
def _mask_nm_kernel(
    w_ptr,
    column_ptr,
    row_ptr,
    addend_ptr,
    preserve_ptr,
    mask_ptr,
    GROUPS,
    C,
    stride_r,
    stride_c,
    N: tl.constexpr,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_PRESERVE: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, M_PADDED)
    per_row = C // M
    zero = tl.zeros([BLOCK, M_PADDED], dtype=tl.int64)
    row = (group // per_row)[:, None] + zero
    col = ((group % per_row) * M)[:, None] + member[None, :] + zero
    valid = (group < GROUPS)[:, None] & (member < M)[None, :]
    key = score_keys(
        w_ptr, column_ptr, row_ptr, addend_ptr, preserve_ptr, row, col, valid, C, stride_r,
        stride_c, HAS_COLUMN, HAS_ROW, HAS_ADDEND, HAS_PRESERVE,
    )  # fmt: skip
    if N == 2 and M == 4:
        even, odd = tl.split(tl.reshape(key, [BLOCK, 2, 2]))
        k0, k2 = tl.split(even)
        k1, k3 = tl.split(odd)
        keep0, keep1, keep2, keep3 = _two_of_four(k0, k1, k2, k3)
        keep = tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3)).reshape([BLOCK, 4])
    else:
        higher_index = member[None, None, :] > member[None, :, None]
        mine = key[:, :, None]
        other = key[:, None, :]
        beaten = (other > mine) | ((other == mine) & higher_index)
        keep = (tl.sum(beaten.to(tl.int32), axis=2) < N) & (key > 0)
    tl.store(mask_ptr + row * C + col, keep.to(tl.int8), mask=valid)


def mask_nm_triton(w: torch.Tensor, n: int, m: int, *terms: torch.Tensor | None) -> torch.Tensor:
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    return fill_stack(partial(_fill_nm, n, m), mask, w, *terms)


def _fill_nm(
    n: int, m: int, mask: torch.Tensor, w: torch.Tensor, *terms: torch.Tensor | None
) -> None:
    if m > MAX_RANKED:
        _select_segments(w, m, m - n, terms, mask)
        return
    rows, cols = w.shape
    pointers, flags = term_arguments(w, *terms)
    padded = triton.next_power_of_2(m)
    # 2:4: 4096 weights a program; otherwise 4096 comparisons.
    block = 1024 if (n, m) == (2, 4) else max(1, 4096 // padded**2)
    block = max(block, 4096 // padded) if INTERPRET else block
    groups = rows * (cols // m)
    _mask_nm_kernel[(triton.cdiv(groups, block),)](
        *pointers,
        mask.view(torch.int8),
        groups,
        cols,
        w.stride(0),
        w.stride(1),
        N=n,
        M=m,
        M_PADDED=padded,
        BLOCK=block,
        **flags,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def _mask_topk_kernel(
    w_ptr,
    column_ptr,
    row_ptr,
    addend_ptr,
    preserve_ptr,
    mask_ptr,
    LENGTH,
    PRUNED,
    C,
    stride_r,
    stride_c,
    BLOCK: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_PRESERVE: tl.constexpr,
):
    # A program selects among LENGTH columns of one row: four passes find the PRUNED-th smallest
    # key eight bits at a time, each by a histogram of the keys that share the bits found so far.
    segments = C // LENGTH
    row = tl.program_id(0) // segments
    first = (tl.program_id(0) % segments) * LENGTH
    bins = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.int32)
    rank = tl.full([], 0, tl.int32) + PRUNED
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], dtype=tl.int32)
        for start in range(0, LENGTH, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            valid = offset < LENGTH
            key = score_keys(
                w_ptr, column_ptr, row_ptr, addend_ptr, preserve_ptr, row + offset * 0,
                first + offset, valid, C, stride_r, stride_c,
                HAS_COLUMN, HAS_ROW, HAS_ADDEND, HAS_PRESERVE,
            )  # fmt: skip
            same = valid
            if step > 0:
                same = same & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram((key >> shift) & 255, 256, mask=same)
        before = tl.cumsum(counts, axis=0)
        digit = tl.sum((before < rank).to(tl.int32), axis=0)
        rank -= tl.sum(tl.where(bins < digit, counts, 0), axis=0)
        prefix = (prefix << 8) | digit
    # Keys below the cut go, and the first `rank` of those equal to it.
    seen = tl.full([], 0, tl.int32)
    for start in range(0, LENGTH, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        valid = offset < LENGTH
        key = score_keys(
            w_ptr, column_ptr, row_ptr, addend_ptr, preserve_ptr, row + offset * 0,
            first + offset, valid, C, stride_r, stride_c,
            HAS_COLUMN, HAS_ROW, HAS_ADDEND, HAS_PRESERVE,
        )  # fmt: skip
        tie = (key == prefix).to(tl.int32)
        place = seen + tl.cumsum(tie, axis=0)
        keep = ((key > prefix) | ((tie > 0) & (place > rank))) & (key > 0)
        seen += tl.sum(tie, axis=0)
        target = mask_ptr + row.to(tl.int64) * C + first + offset
        tl.store(target, keep.to(tl.int8), mask=valid)


def _select_segments(
    w: torch.Tensor,
    length: int,
    pruned: int,
    terms: tuple[torch.Tensor | None, ...],
    mask: torch.Tensor,
) -> None:
    """Prunes `pruned` of every `length` consecutive columns."""
    rows, cols = w.shape
    if pruned == 0:
        preserve = terms[3]
        mask.copy_(preserve if preserve is not None else torch.ones_like(mask))
        return
    pointers, flags = term_arguments(w, *terms)
    _mask_topk_kernel[(rows * (cols // length),)](
        *pointers,
        mask.view(torch.int8),
        length,
        pruned,
        cols,
        w.stride(0),
        w.stride(1),
        BLOCK=min(MAX_BLOCK, max(256, triton.next_power_of_2(length))),
        **flags,
        num_warps=8,
        enable_fp_fusion=True,
    )


def mask_topk_triton(w: torch.Tensor, pruned: int, *terms: torch.Tensor | None) -> torch.Tensor:
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    return fill_stack(partial(_fill_topk, pruned), mask, w, *terms)


def _fill_topk(
    pruned: int, mask: torch.Tensor, w: torch.Tensor, *terms: torch.Tensor | None
) -> None:
    rows, cols = w.shape
    if cols <= LONG_ROW:
        _select_segments(w, cols, pruned, terms, mask)
        return
    column_scale, *by_row = terms
    for i in range(rows):
        one = [None if t is None else [t[i : i + 1]] for t in by_row]
        columns = None if column_scale is None else [column_scale]
        mask[i] = mask_global_triton([w[i : i + 1]], pruned, columns, *one)[0][0]


def _aot(kernel, constexprs: dict, ints: tuple[str, ...], warps: int) -> list[dict]:
    return [
        {
            "kernel": kernel,
            "signature": {
                "w_ptr": f"*{dtype}", "mask_ptr": "*i8", **score.SIGNATURE,
                **dict.fromkeys(ints, "i32"),
            },
            "constexprs": {**constexprs, **flags},
            "aligned": ("C", "stride_r", "LENGTH"),
            "num_warps": warps,
            "label": f"{dtype} {name} {label}",
        }
        for dtype in ("bf16", "fp32")
        for name, flags in (("|w|", score.MAGNITUDE), ("all terms", score.ALL_TERMS))
        for label in ("2:4" if constexprs.get("M") == 4 else "",)
    ]  # fmt: skip


AOT = [
    *_aot(_mask_nm_kernel, {"N": 2, "M": 4, "M_PADDED": 4, "BLOCK": 1024}, ("GROUPS",), 4),
    *_aot(_mask_nm_kernel, {"N": 4, "M": 8, "M_PADDED": 8, "BLOCK": 64}, ("GROUPS",), 4),
    *_aot(_mask_topk_kernel, {"BLOCK": MAX_BLOCK}, ("LENGTH", "PRUNED"), 8),
]
