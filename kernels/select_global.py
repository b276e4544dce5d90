"""Masks over several matrices together. The tensor table of the inputs is in `score.py`.

tensor | dtype | shape    | layout
-------|-------|----------|-------------------------------------------------
mask   | int8  | [R, C]   | contiguous (a bool tensor's bytes)
counts | int64 | [256]    | keys that share the bits found so far, by digit
state  | int64 | [2]      | bits of the cut found so far; ranks left below it
ties   | int32 | [blocks] | keys equal to the cut, one count a program

Nothing is read back to the host: the search runs on the device and so can be captured in a graph.
"""

import torch
import triton
import triton.language as tl

from pyprune.kernels import score
from pyprune.kernels.score import score_keys, term_arguments

# Elements a program takes, in pieces: one set of histogram atomics for all of them.
PIECE = 4096
PIECES = 8


@triton.jit
def _global_histogram_kernel(
    w_ptr,
    column_ptr,
    row_ptr,
    addend_ptr,
    preserve_ptr,
    counts_ptr,
    state_ptr,
    NUMEL,
    C,
    stride_r,
    stride_c,
    SHIFT: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_PRESERVE: tl.constexpr,
):
    prefix = tl.load(state_ptr).to(tl.int32)
    counts = tl.zeros([256], dtype=tl.int32)
    for piece in range(PIECES):
        flat = (tl.program_id(0).to(tl.int64) * PIECES + piece) * PIECE + tl.arange(0, PIECE)
        valid = flat < NUMEL
        key = score_keys(
            w_ptr, column_ptr, row_ptr, addend_ptr, preserve_ptr, flat // C, flat % C, valid, C,
            stride_r, stride_c, HAS_COLUMN, HAS_ROW, HAS_ADDEND, HAS_PRESERVE,
        )  # fmt: skip
        same = valid
        if SHIFT < 24:
            same = same & ((key >> (SHIFT + 8)) == prefix)
        counts += tl.histogram((key >> SHIFT) & 255, 256, mask=same)
    # Sums of integers: the order of the atomics does not matter.
    tl.atomic_add(counts_ptr + tl.arange(0, 256), counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _global_ties_kernel(
    w_ptr,
    column_ptr,
    row_ptr,
    addend_ptr,
    preserve_ptr,
    ties_ptr,
    state_ptr,
    NUMEL,
    C,
    stride_r,
    stride_c,
    PIECE: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_PRESERVE: tl.constexpr,
):
    cut = tl.load(state_ptr).to(tl.int32)
    flat = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    valid = flat < NUMEL
    key = score_keys(
        w_ptr, column_ptr, row_ptr, addend_ptr, preserve_ptr, flat // C, flat % C, valid, C,
        stride_r, stride_c, HAS_COLUMN, HAS_ROW, HAS_ADDEND, HAS_PRESERVE,
    )  # fmt: skip
    tl.store(ties_ptr + tl.program_id(0), tl.sum((key == cut).to(tl.int32), axis=0))


@triton.jit
def _global_mask_kernel(
    w_ptr,
    column_ptr,
    row_ptr,
    addend_ptr,
    preserve_ptr,
    mask_ptr,
    ties_before_ptr,
    state_ptr,
    NUMEL,
    C,
    stride_r,
    stride_c,
    PIECE: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_PRESERVE: tl.constexpr,
):
    cut = tl.load(state_ptr).to(tl.int32)
    quota = tl.load(state_ptr + 1)
    flat = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    valid = flat < NUMEL
    key = score_keys(
        w_ptr, column_ptr, row_ptr, addend_ptr, preserve_ptr, flat // C, flat % C, valid, C,
        stride_r, stride_c, HAS_COLUMN, HAS_ROW, HAS_ADDEND, HAS_PRESERVE,
    )  # fmt: skip
    tie = (key == cut).to(tl.int32)
    place = tl.load(ties_before_ptr + tl.program_id(0)) + tl.cumsum(tie, axis=0)
    keep = ((key > cut) | ((tie > 0) & (place > quota))) & (key > 0)
    tl.store(mask_ptr + flat, keep.to(tl.int8), mask=valid)


def _narrow(state: torch.Tensor, counts: torch.Tensor) -> None:
    """Appends the digit that holds the wanted rank to the bits found so far."""
    upto = counts.cumsum(0)
    lower = upto < state[1]
    state[0] = state[0] * 256 + lower.sum()
    # Not `upto[digit - 1]`: to index by a number that a tensor holds is to wait for it.
    state[1] -= torch.where(lower, counts, 0).sum()


def mask_global_triton(
    ws: list[torch.Tensor], pruned: int, *lists: list[torch.Tensor] | None
) -> list[torch.Tensor]:
    device = ws[0].device
    masks = [torch.empty(w.shape, dtype=torch.bool, device=device) for w in ws]
    # With nothing to prune the cut lies below every key. Filled on the device: a copy of numbers
    # from the host cannot be captured.
    state = torch.empty(2, dtype=torch.int64, device=device)
    state[0], state[1] = (0 if pruned else -1), pruned
    jobs = []
    for i, w in enumerate(ws):
        if w.numel():
            terms = [None if t is None else t[i] for t in lists]
            pointers, flags = term_arguments(w, *terms)
            jobs.append((pointers, flags, masks[i], (w.numel(), w.shape[1], *w.stride())))
    for shift in (24, 16, 8, 0) if pruned else ():
        counts = torch.zeros(256, dtype=torch.int64, device=device)
        for pointers, flags, mask, sizes in jobs:
            grid = (triton.cdiv(mask.numel(), PIECE * PIECES),)
            _global_histogram_kernel[grid](
                *pointers, counts, state, *sizes, SHIFT=shift, PIECE=PIECE, PIECES=PIECES,
                **flags, num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
        _narrow(state, counts)
    blocks = [triton.cdiv(mask.numel(), PIECE) for _, _, mask, _ in jobs]
    ties = torch.zeros(sum(blocks), dtype=torch.int32, device=device)
    for (pointers, flags, _, sizes), part in zip(jobs, ties.split(blocks), strict=True):
        _global_ties_kernel[(len(part),)](
            *pointers, part, state, *sizes, PIECE=PIECE, **flags, num_warps=8, enable_fp_fusion=True
        )
    before = ties.cumsum(0, dtype=torch.int64) - ties
    for (pointers, flags, mask, sizes), part in zip(jobs, before.split(blocks), strict=True):
        _global_mask_kernel[(len(part),)](
            *pointers,
            mask.view(torch.int8),
            part,
            state,
            *sizes,
            PIECE=PIECE,
            **flags,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return masks


def _aot(kernel, pointers: dict[str, str], constexprs: dict) -> list[dict]:
    return [
        {
            "kernel": kernel,
            "signature": {
                "w_ptr": f"*{dtype}", "state_ptr": "*i64", "NUMEL": "i64", **pointers,
                **score.SIGNATURE,
            },
            "constexprs": {"PIECE": PIECE, **constexprs, **flags},
            "aligned": ("C", "stride_r", "NUMEL"),
            "num_warps": 8,
            "label": f"{dtype} {name}",
        }
        for dtype in ("bf16", "fp32")
        for name, flags in (("|w|", score.MAGNITUDE), ("all terms", score.ALL_TERMS))
    ]  # fmt: skip


AOT = [
    *_aot(_global_histogram_kernel, {"counts_ptr": "*i64"}, {"SHIFT": 16, "PIECES": PIECES}),
    *_aot(_global_ties_kernel, {"ties_ptr": "*i32"}, {}),
    *_aot(_global_mask_kernel, {"mask_ptr": "*i8", "ties_before_ptr": "*i64"}, {}),
]
