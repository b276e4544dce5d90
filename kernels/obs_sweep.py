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
keys     | i32   | [B, N]    | contiguous; scores as order-preserving integers

A program owns BLOCK_R rows and keeps the sub-block's columns in registers from the first to the
last. What lies to the right of the sub-block follows as full-precision matrix products: one as far
as the panel of sub-blocks goes, and after its last one for all columns right of the panel.
"""

from typing import Any

import torch
import triton
import triton.language as tl

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

# Radix select, digit by digit from the top. 256 bins: a histogram's cost grows with its bins.
BINS = 256
SHIFTS = (24, 16, 8, 0)
KEYS_PER_PROGRAM = 4096


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


@triton.jit
def _next_digit(state_ptr, histogram_ptr, BINS: tl.constexpr):
    """Of the state `(prefix, wanted)` before a digit and the counts of that digit among the keys
    with this prefix: the state after it. The wanted-th smallest key has the new prefix, and is the
    new wanted-th among the keys that have it."""
    prefix, wanted = tl.load(state_ptr), tl.load(state_ptr + 1)
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins)
    running = tl.cumsum(counts, 0)
    digit = tl.sum((running < wanted).to(tl.int32), 0)
    before = tl.sum(tl.where(bins < digit, counts, 0), 0)
    return prefix * BINS + digit, wanted - before


@triton.jit
def _digit_histogram_kernel(
    keys_ptr,
    state_ptr,
    histogram_ptr,
    N,
    LEVEL: tl.constexpr,
    SHIFT: tl.constexpr,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the digit at SHIFT of the keys whose digits above it are those of the key sought.

    Keys are taken up by one, so that the lowest is 0: they reach 2^31. `state` is int64
    `[B, LEVELS + 1, 2]`, `histogram` int32 `[B, LEVELS, BINS]`: each level reads what the one
    before it left there.
    """
    batch = tl.program_id(1).to(tl.int64)
    state_ptr += batch * (LEVELS + 1) * 2
    histogram_ptr += batch * LEVELS * BINS + LEVEL * BINS
    prefix = tl.zeros([], dtype=tl.int64)
    if LEVEL > 0:
        prefix, wanted = _next_digit(state_ptr + (LEVEL - 1) * 2, histogram_ptr - BINS, BINS)
        if tl.program_id(0) == 0:
            tl.store(state_ptr + LEVEL * 2, prefix)
            tl.store(state_ptr + LEVEL * 2 + 1, wanted)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + batch * N + i, mask=i < N, other=0).to(tl.int64) + 1
    counted = (i < N) & ((key >> SHIFT) // BINS == prefix)
    digit = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
    counts = tl.histogram(digit, BINS, mask=counted)
    # Integer additions: the order of the programs does not show in the sums.
    tl.atomic_add(histogram_ptr + tl.arange(0, BINS), counts, mask=counts > 0)


@triton.jit
def _count_ties_kernel(
    keys_ptr,
    state_ptr,
    histogram_ptr,
    ties_ptr,
    N,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys of each block equal the one sought, int32 `[B, blocks]`."""
    batch = tl.program_id(1).to(tl.int64)
    state_ptr += batch * (LEVELS + 1) * 2 + (LEVELS - 1) * 2
    histogram_ptr += batch * LEVELS * BINS + (LEVELS - 1) * BINS
    sought, wanted = _next_digit(state_ptr, histogram_ptr, BINS)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + 2, sought)
        tl.store(state_ptr + 3, wanted)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + batch * N + i, mask=i < N, other=-2).to(tl.int64) + 1
    ties = tl.sum((key == sought).to(tl.int32), 0)
    tl.store(ties_ptr + batch * tl.num_programs(0) + tl.program_id(0), ties)


@triton.jit(do_not_specialize=["count_stride"])
def _keep_kernel(
    keys_ptr,
    count_ptr,
    state_ptr,
    ties_ptr,
    kept_ptr,
    N,
    count_stride,
    LEVELS: tl.constexpr,
    ALL_TIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keeps what is above the key sought, and of those equal to it all but the first wanted ones
    (none if ALL_TIES)."""
    batch = tl.program_id(1).to(tl.int64)
    state_ptr += batch * (LEVELS + 1) * 2 + LEVELS * 2
    sought, wanted = tl.load(state_ptr), tl.load(state_ptr + 1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + batch * N + i, mask=i < N, other=0).to(tl.int64) + 1
    pruned = key <= sought
    if not ALL_TIES:
        ties_ptr += batch * tl.num_programs(0)
        before = tl.zeros([BLOCK], dtype=tl.int32)
        for first in range(0, tl.program_id(0), BLOCK):
            block = first + tl.arange(0, BLOCK)
            before += tl.load(ties_ptr + block, mask=block < tl.program_id(0), other=0)
        tie = key == sought
        rank = tl.sum(before, 0) + tl.cumsum(tie.to(tl.int32), 0)
        pruned = pruned & ((rank <= wanted) | (key < sought))
        pruned = pruned & (tl.load(count_ptr + batch * count_stride) > 0)
    # Key 0 is what must stay pruned.
    tl.store(kept_ptr + batch * N + i, (~pruned & (key > 0)).to(tl.uint8), mask=i < N)


def _keep_but_smallest(keys: torch.Tensor, count: torch.Tensor, all_ties: bool) -> torch.Tensor:
    """Which of `keys` `[B, N]` are kept when the `count[b]` smallest go, the lower index first
    among equal ones. No host synchronisation, six launches."""
    batch, n = keys.shape
    blocks, levels = triton.cdiv(n, KEYS_PER_PROGRAM), len(SHIFTS)
    state = torch.zeros(batch, levels + 1, 2, dtype=torch.int64, device=keys.device)
    state[:, 0, 1] = count.clamp(min=1)
    histogram = torch.zeros(batch, levels, BINS, dtype=torch.int32, device=keys.device)
    ties = torch.empty(batch, blocks, dtype=torch.int32, device=keys.device)
    kept = torch.empty(keys.shape, dtype=torch.bool, device=keys.device)
    sizes = {"LEVELS": levels, "BLOCK": KEYS_PER_PROGRAM}
    grid = (blocks, batch)
    for level, shift in enumerate(SHIFTS):
        _digit_histogram_kernel[grid](
            keys, state, histogram, n, LEVEL=level, SHIFT=shift, BINS=BINS, **sizes
        )
    _count_ties_kernel[grid](keys, state, histogram, ties, n, BINS=BINS, **sizes)
    _keep_kernel[grid](
        keys,
        count,
        state,
        ties,
        kept.view(torch.uint8),
        n,
        count.stride(0),
        ALL_TIES=all_ties,
        **sizes,
    )
    return kept


def _choose(
    scores: torch.Tensor, count: torch.Tensor, preserve: torch.Tensor | None, all_ties: bool
) -> torch.Tensor:
    """The kept positions of a block's scores `[B, R, N]`: `count[B, R]` go from each row, or
    `count[B, 1]` from each matrix."""
    batch, rows, cols = scores.shape
    keys = keys_of_scores(scores, preserve)
    if count.shape[1] == 1 and rows > 1:
        return _keep_but_smallest(keys.view(batch, -1), count[:, 0], all_ties).view_as(scores)
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


_SELECT = {
    "keys_ptr": "*i32",
    "count_ptr": "*i32",
    "state_ptr": "*i64",
    "histogram_ptr": "*i32",
    "ties_ptr": "*i32",
    "kept_ptr": "*u8",
    "N": "i32",
    "count_stride": "i32",
}
_SELECT_SIZES = {"LEVELS": len(SHIFTS), "BLOCK": KEYS_PER_PROGRAM}

AOT = [
    _aot("given mask", 0, 0),
    _aot("given mask quantised", 0, 0, quantise=True),
    _aot("2:4", 2, 4),
    _aot("2:4 preserve", 2, 4, preserve=True),
    _aot("2:4 scaled", 2, 4, scale=True),
    _aot("2:4 quantised", 2, 4, quantise=True),
    _aot("4:8", 4, 8),
    *(
        {
            "kernel": _digit_histogram_kernel,
            "label": f"radix digit at bit {shift}",
            "signature": _SELECT,
            "constexprs": {"LEVEL": level, "SHIFT": shift, "BINS": BINS, **_SELECT_SIZES},
            "num_warps": 4,
            "num_stages": 3,
            "aligned": ["N"],
        }
        for level, shift in enumerate(SHIFTS)
    ),
    {
        "kernel": _count_ties_kernel,
        "signature": _SELECT,
        "constexprs": {"BINS": BINS, **_SELECT_SIZES},
        "num_warps": 4,
        "num_stages": 3,
        "aligned": ["N"],
    },
    {
        "kernel": _keep_kernel,
        "signature": _SELECT,
        "constexprs": {"ALL_TIES": False, **_SELECT_SIZES},
        "num_warps": 4,
        "num_stages": 3,
        "aligned": ["N"],
    },
]
