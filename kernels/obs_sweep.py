"""The blockwise OBS solve (SparseGPT), a sub-block of columns at a time.

tensor   | dtype | shape     | layout
---------|-------|-----------|------------------------------------------------------------------
w        | fp32  | [B, R, C] | contiguous; solved in place
u        | fp32  | [b, C, C] | contiguous, upper triangular; b is 1 (shared) or B
mask     | u8    | [B, R, C] | contiguous; 1 = kept; read if given, else written
preserve | u8    | [B, R, C] | contiguous, optional; 0 = stays pruned
scale    | fp32  | [b, C]    | contiguous, optional; scores are |w| scale, without it |w| / U_jj
grid     | fp32  | [B, 3, R] | contiguous, optional; step, low, high of what kept weights round to
error    | fp32  | [B, S, R] | contiguous; errors of the S columns of a panel, transposed
loss     | fp64  | [B, R]    | contiguous; accumulated

A program owns BLOCK_R rows and keeps the sub-block's columns in registers from the first to the
last. What lies to the right of the sub-block follows as full-precision matrix products: one as far
as the panel of sub-blocks goes, and after its last one for all columns right of the panel. Which of
a block's weights go, other than N of every M, is chosen before it (`obs_choice`).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from pyprune.kernels.obs_choice import keep_but_smallest
from pyprune.ops._precision import full_precision
from pyprune.ops.obs_sweep import SweepArgs, keys_of_scores, scored, smallest_in_groups

# 32 x 64 floats over 256 threads: the weights, their masks and the scores stay in registers on
# sm_80, 90 and 100 (at most 116).
# Interpreted, a column costs milliseconds whatever the shape: there a strip takes more rows, and a
# sub-block fewer columns so that few of them already make several sub-blocks and panels.
#
# Columns of a PANEL: every product reads and writes the weights to its right, and one for all of
# them after each sub-block would take as long to move as to multiply.
BLOCK_R, BLOCK_C, PANEL = (64, 16, 32) if triton.knobs.runtime.interpret else (32, 64, 512)
NUM_WARPS = 8

# x + 1.5 * 2^23 has no room for a fraction: adding and taking it off again rounds |x| < 2^22 to the
# nearest whole number, ties to even.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def _round_to_grid(x, step, low, high):
    k = tl.minimum(tl.maximum(tl.math.div_rn(x, step), low), high)
    return step * ((k + ROUNDING) - ROUNDING)


@triton.jit
def _obs_sweep_kernel(
    w_ptr,
    u_ptr,
    mask_ptr,
    preserve_ptr,
    scale_ptr,
    grid_ptr,
    error_ptr,
    loss_ptr,
    R,
    C,
    first,
    width,
    panel_first,
    panel_width,
    u_batch_stride,
    scale_batch_stride,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_PRESERVE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    QUANTISE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Columns [first, first + width) of a panel that starts at `panel_first`."""
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    in_rows = rows < R
    inside = in_rows[:, None] & (cols < width)[None, :]
    at = (batch * R + rows)[:, None] * C + (first + cols)[None, :]
    # Not `first.to()`: an argument of 1 is a constant, which has no methods.
    u_ptr += batch * u_batch_stride + tl.cast(first, tl.int64) * (C + 1)
    error_ptr += (batch * panel_width + (first - panel_first)) * R + rows

    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    pruned = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.int32)
    if GIVEN:
        pruned = (tl.load(mask_ptr + at, mask=inside, other=1) == 0).to(tl.int32)
    if HAS_SCALE:
        scale_ptr += batch * scale_batch_stride + first
        factor = tl.load(scale_ptr + cols, mask=cols < width, other=0.0)
    else:
        diag = tl.load(u_ptr + cols * (C + 1), mask=cols < width, other=1.0)
    if QUANTISE:
        grid_ptr += batch * 3 * R + rows
        step = tl.load(grid_ptr, mask=in_rows, other=1.0)
        low = tl.load(grid_ptr + R, mask=in_rows, other=0.0)
        high = tl.load(grid_ptr + 2 * R, mask=in_rows, other=0.0)
    loss = tl.zeros([BLOCK_R], dtype=tl.float32)
    # A row of U is loaded a column before it is needed: the columns follow from one another, and
    # nothing else would hide how long that takes.
    d = tl.load(u_ptr)
    u_row = tl.load(u_ptr + cols, mask=(cols > 0) & (cols < width), other=0.0)

    for group in range(0, width, GROUP):
        if not GIVEN:
            # The bits of non-negative floats order like the floats, NaN above infinity.
            scores = w * factor[None, :] if HAS_SCALE else w / diag[None, :]
            keys = tl.abs(scores).to(tl.int32, bitcast=True)
            if HAS_PRESERVE:
                stays = tl.load(preserve_ptr + at, mask=inside, other=1) == 0
                keys = tl.where(stays, -1, keys)
            # Every column of the group counts how many of its fellows come before it.
            rank = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.int32)
            for j in range(group, group + GROUP):
                key = tl.sum(tl.where((cols == j)[None, :], keys, 0), axis=1)[:, None]
                before = (key < keys) | ((key == keys) & (cols > j)[None, :])
                rank += before.to(tl.int32)
            chosen = rank < GROUP - KEEP
            if HAS_PRESERVE:
                chosen = chosen | stays
            here = (cols >= group) & (cols < group + GROUP)
            pruned = tl.where(here[None, :], chosen.to(tl.int32), pruned)
        for j in range(group, min(group + GROUP, width)):
            this = (cols == j)[None, :]
            prune = tl.sum(tl.where(this, pruned, 0), axis=1) > 0
            after = u_ptr + (j + 1) * C
            next_d = tl.load(after + j + 1, mask=j + 1 < width, other=1.0)
            next_row = tl.load(after + cols, mask=(cols > j + 1) & (cols < width), other=0.0)
            column = tl.sum(tl.where(this, w, 0.0), axis=1)
            if QUANTISE:
                new = tl.where(prune, 0.0, _round_to_grid(column, step, low, high))
                error = (column - new) / d
            else:
                error = tl.where(prune, column / d, 0.0)
            loss += 0.5 * error * error
            w -= error[:, None] * u_row[None, :]
            if QUANTISE:
                w = tl.where(this, new[:, None], w)
            else:
                w = tl.where(this & prune[:, None], 0.0, w)
            tl.store(error_ptr + j * R, error, mask=in_rows)
            d, u_row = next_d, next_row

    tl.store(w_ptr + at, w, mask=inside)
    if not GIVEN:
        tl.store(mask_ptr + at, (1 - pruned).to(tl.uint8), mask=inside)
    total = tl.load(loss_ptr + batch * R + rows, mask=in_rows, other=0.0)
    tl.store(loss_ptr + batch * R + rows, total + loss.to(tl.float64), mask=in_rows)


def _choose(
    scores: torch.Tensor, count: torch.Tensor, preserve: torch.Tensor | None, all_ties: bool
) -> torch.Tensor:
    """The kept positions of a block's scores `[B, R, N]`: `count[B, R]` go from each row, or
    `count[B, 1]` from each matrix."""
    batch, rows, cols = scores.shape
    keys = keys_of_scores(scores, preserve)
    if count.shape[1] == 1 and rows > 1:
        return keep_but_smallest(keys.view(batch, -1), count[:, 0], all_ties).view_as(scores)
    pruned = smallest_in_groups(keys.view(-1, cols), count.reshape(-1), all_ties)
    kept = ~pruned.view_as(scores)
    return kept if preserve is None else kept & preserve


class _Sweep:
    """The state of one call, all batched: see the table at the top of the file."""

    def __init__(self, args: SweepArgs) -> None:
        w = args.w
        self.weight = w.clone(memory_format=torch.contiguous_format)
        self.u = args.u.contiguous()
        self.preserve, self.scale, self.grid = (
            None if t is None else t.contiguous()
            for t in (args.preserve, args.column_scale, args.grid)
        )
        self.mask = torch.ones(w.shape, dtype=torch.bool, device=w.device)
        self.loss = torch.zeros(w.shape[:2], dtype=torch.float64, device=w.device)
        self.first = self.last = 0

    def choose(self, first: int, last: int, count: torch.Tensor, all_ties: bool) -> None:
        """The mask of columns [first, last) by their scores now; `count` `[B, 1 or R]` of them."""
        span = slice(first, last)
        diag = self.u.diagonal(dim1=1, dim2=2)[:, None, span]
        scale = None if self.scale is None else self.scale[:, None]
        scores = scored(self.weight[..., span], diag, scale, span)
        stay = None if self.preserve is None else self.preserve[..., span]
        self.mask[..., span] = _choose(scores, count, stay, all_ties)

    def open_panel(self, first: int, last: int) -> None:
        """Columns [first, last) come next. What lies right of them is behind until they are
        done."""
        batch, rows, _ = self.weight.shape
        self.first, self.last = first, last
        shape = (batch, last - first, rows)
        self.error = torch.empty(shape, dtype=torch.float32, device=self.weight.device)

    def close_panel(self) -> None:
        self._update(self.first, self.last, self.weight.shape[2])

    def _update(self, first: int, last: int, until: int) -> None:
        """Columns [last, until), by the errors of columns [first, last)."""
        if last < until:
            error = self.error[:, first - self.first : last - self.first].mT
            right = self.u[:, first:last, last:until].expand(len(error), -1, -1)
            self.weight[:, :, last:until].baddbmm_(error, right, alpha=-1)

    def columns(self, first: int, last: int, keep: int, group: int) -> None:
        """Solves columns [first, last), at most BLOCK_C, and updates the panel to their right.
        Without a `group` their mask is there already."""
        batch, rows, cols = self.weight.shape
        mask = self.mask.view(torch.uint8)
        preserve = mask if self.preserve is None else self.preserve.view(torch.uint8)
        # A pointer that is not used must still be one.
        unused = self.loss
        _obs_sweep_kernel[(triton.cdiv(rows, BLOCK_R), batch)](
            self.weight,
            self.u,
            mask,
            preserve,
            unused if self.scale is None else self.scale,
            unused if self.grid is None else self.grid,
            self.error,
            self.loss,
            rows,
            cols,
            first,
            last - first,
            self.first,
            self.last - self.first,
            self.u.stride(0) if len(self.u) > 1 else 0,
            cols if self.scale is not None and len(self.scale) > 1 else 0,
            KEEP=keep,
            GROUP=group or BLOCK_C,
            GIVEN=group == 0,
            HAS_PRESERVE=group > 0 and self.preserve is not None,
            HAS_SCALE=self.scale is not None,
            QUANTISE=self.grid is not None,
            BLOCK_R=BLOCK_R,
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        self._update(first, last, self.last)


@full_precision()
def obs_sweep_triton(*values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    args = SweepArgs(*values)
    counts, n, m, block_size = args.counts, args.n, args.m, args.block_size
    batch, rows, cols = args.w.shape
    sweep = _Sweep(args)
    if args.mask is not None:
        sweep.mask.copy_(args.mask if args.preserve is None else args.mask & args.preserve)
    if m > BLOCK_C:  # groups too wide for the registers: the row rule with a block per group
        shape, device = (batch, rows, cols // m), args.w.device
        counts = torch.full(shape, m - n, dtype=torch.int32, device=device)
        block_size, m = m, 0
    step = BLOCK_C // m * m if m else BLOCK_C
    block = step if counts is None else block_size
    panel = max(1, PANEL // block) * block
    for left in range(0, cols, panel):
        right = min(cols, left + panel)
        sweep.open_panel(left, right)
        for start in range(left, right, block):
            end = min(right, start + block)
            if counts is not None:
                sweep.choose(start, end, counts[:, :, start // block], args.all_ties)
            for first in range(start, end, step):
                sweep.columns(first, min(end, first + step), n, m)
        sweep.close_panel()
    return sweep.weight, sweep.mask, sweep.loss.to(args.w.dtype)


def _aot(label: str, keep: int, group: int, **flags: bool) -> dict:
    return {
        "kernel": _obs_sweep_kernel,
        "label": label,
        "signature": {
            "w_ptr": "*fp32",
            "u_ptr": "*fp32",
            "mask_ptr": "*u8",
            "preserve_ptr": "*u8",
            "scale_ptr": "*fp32",
            "grid_ptr": "*fp32",
            "error_ptr": "*fp32",
            "loss_ptr": "*fp64",
            "R": "i32",
            "C": "i32",
            "first": "i32",
            "width": "i32",
            "panel_first": "i32",
            "panel_width": "i32",
            "u_batch_stride": "i64",
            "scale_batch_stride": "i64",
        },
        "constexprs": {
            "KEEP": keep,
            "GROUP": group or BLOCK_C,
            "GIVEN": group == 0,
            "HAS_PRESERVE": flags.get("preserve", False),
            "HAS_SCALE": flags.get("scale", False),
            "QUANTISE": flags.get("quantise", False),
            "BLOCK_R": BLOCK_R,
            "BLOCK_C": BLOCK_C,
        },
        "num_warps": NUM_WARPS,
        "num_stages": 3,
        "aligned": ["R", "C", "first", "width", "panel_first", "panel_width", "u_batch_stride"],
    }


AOT = [
    _aot("given mask", 0, 0),
    _aot("given mask quantised", 0, 0, quantise=True),
    _aot("2:4", 2, 4),
    _aot("2:4 preserve", 2, 4, preserve=True),
    _aot("2:4 scaled", 2, 4, scale=True),
    _aot("2:4 quantised", 2, 4, quantise=True),
    _aot("4:8", 4, 8),
]
