"""The blockwise OBS solve of SparseGPT: prune and compensate, column by column, in all rows."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import (
    check_array,
    check_float,
    check_same_device,
    check_shape,
    check_tensor,
)
from pyprune.ops._precision import full_precision
from pyprune.ops.pack import bits_of
from pyprune.ops.row_grid import RowGrid, round_to_grid
from pyprune.ops.storage import unit_columns

Scope = Literal["row", "block", "layer"]

SweepTensors = tuple[Tensor, Tensor, Tensor]


class ObsSweep(NamedTuple):
    """`weight` `[..., R, C]`; `mask` bool, True = kept; `loss` `[..., R]`."""

    weight: Tensor
    mask: Tensor
    loss: Tensor

    def packed_mask(self) -> Tensor:
        """The mask as bits, uint8 `[..., R, ceil(C/8)]`: the bitmap that `pack_bitmap` makes."""
        return bits_of(self.mask)


class SweepArgs(NamedTuple):
    """The op's arguments, in the order of its schema. Everything is batched: w `[B, R, C]`, u
    `[1 or B, C, C]`, counts int32 `[B, 1 or R, blocks]`, mask and preserve bool like w,
    column_scale `[1 or B, C]`, grid `[B, 3, R]` (step, low, high)."""

    w: Tensor
    u: Tensor
    counts: Tensor | None
    mask: Tensor | None
    preserve: Tensor | None
    n: int
    m: int
    block_size: int
    all_ties: bool
    column_scale: Tensor | None = None
    grid: Tensor | None = None

    def check(self) -> None:
        """The op's rules; exactly one of counts, mask and n:m is given."""
        w, u = self.w, self.u
        if w.dim() != 3 or u.dim() != 3 or u.shape[0] not in (1, w.shape[0]):
            raise ValueError(
                f"w, u: expected [B, R, C] and [1 or B, C, C], got {tuple(w.shape)}, "
                f"{tuple(u.shape)}"
            )
        batch, rows, cols = w.shape
        if w.dtype not in (torch.float32, torch.float64) or u.dtype != w.dtype:
            raise ValueError(f"w, u: expected both fp32 or both fp64, got {w.dtype} and {u.dtype}")
        check_shape("u", u, (u.shape[0], cols, cols))
        if (self.counts is not None) + (self.mask is not None) + (self.m > 0) != 1:
            raise ValueError("expected exactly one of sparsity, nm and mask")
        if self.block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {self.block_size}")
        if self.counts is not None:
            per_row = self.counts.dim() == 3 and self.counts.shape[1] == rows
            blocks = math.ceil(cols / self.block_size)
            shape = (batch, rows if per_row else 1, blocks)
            check_array("counts", self.counts, torch.int32, shape)
        for name, flags in (("mask", self.mask), ("preserve", self.preserve)):
            if flags is not None:
                check_array(name, flags, torch.bool, tuple(w.shape))
        n, m = self.n, self.m
        if m > 0 and not (1 <= n <= m and cols % m == 0 and self.block_size % m == 0):
            raise ValueError(
                f"nm: expected 1 <= n <= m with m dividing the columns, got {n}:{m} for "
                f"{cols} columns"
            )
        self._check_terms(batch, rows, cols)
        check_same_device(*(t for t in self if isinstance(t, Tensor)))

    def _check_terms(self, batch: int, rows: int, cols: int) -> None:
        if self.column_scale is not None:
            shared = self.column_scale.dim() == 2 and self.column_scale.shape[0] == 1
            check_shape("column_scale", self.column_scale, (1 if shared else batch, cols))
            if self.mask is not None:
                raise ValueError("column_scale: expected none with a mask, nothing is scored")
        if self.grid is not None:
            check_shape("grid", self.grid, (batch, 3, rows))
        for name, t in (("column_scale", self.column_scale), ("grid", self.grid)):
            if t is not None and t.dtype != self.w.dtype:
                raise ValueError(f"{name}: expected {self.w.dtype} as w, got {t.dtype}")

    def matrix(self, b: int) -> SweepArgs:
        """The arguments of one matrix of the batch, without the batch dimension."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[b % len(t)]

        return self._replace(
            w=self.w[b],
            u=self.u[b % len(self.u)],
            counts=pick(self.counts),
            mask=pick(self.mask),
            preserve=pick(self.preserve),
            column_scale=pick(self.column_scale),
            grid=pick(self.grid),
        )


def scored(w: Tensor, diag: Tensor, column_scale: Tensor | None, span: slice) -> Tensor:
    """Scores, up to their sign, of the columns `span`: their weights `w` `[..., N]` over the
    diagonal of U, or times the given scales `[..., C]`."""
    return w / diag if column_scale is None else w * column_scale[..., span]


def keys_of_scores(scores: Tensor, preserve: Tensor | None) -> Tensor:
    """Integers that order like `|scores|`, NaN above infinity, and -1, below all others, where
    `preserve` (bool, same shape) says that a weight must stay pruned."""
    keys = scores.abs().view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    return keys if preserve is None else keys.masked_fill(~preserve, -1)


def smallest_in_groups(keys: Tensor, count: Tensor, all_ties: bool) -> Tensor:
    """Which `count[g]` of `keys[g, :]` are smallest, the lower index first among equal ones.

    `all_ties` adds every key equal to the last one chosen.
    """
    ordered, index = keys.sort(dim=1, stable=True)
    chosen = torch.arange(keys.shape[1], device=keys.device) < count[:, None]
    if all_ties:
        return keys <= ordered.gather(1, count[:, None].long() - 1)
    return torch.zeros_like(chosen).scatter(1, index, chosen)


def _prune(scores: Tensor, count: Tensor, preserve: Tensor | None, ties: bool) -> Tensor:
    """The pruned positions of a block `[R, N]`: `count[R]` of each row or `count[1]` of all."""
    keys = keys_of_scores(scores, preserve).reshape(len(count), -1)
    return smallest_in_groups(keys, count, ties).view_as(scores)


def _sweep_matrix(w: Tensor, args: SweepArgs) -> tuple[Tensor, Tensor]:
    """One matrix `[R, C]`: SparseGPT's algorithm 1 as written. `w` is overwritten by the result;
    returns the kept positions and the loss."""
    rows, cols = w.shape
    u, m, block_size = args.u, args.m, args.block_size
    diag = u.diagonal()
    grid = None if args.grid is None else RowGrid(*args.grid)
    pruned = torch.zeros_like(w, dtype=torch.bool) if args.mask is None else ~args.mask
    if args.preserve is not None:
        pruned |= ~args.preserve
    loss = torch.zeros(rows, dtype=torch.float64, device=w.device)
    for start in range(0, cols, block_size):
        end = min(cols, start + block_size)
        errors = torch.zeros_like(w[:, start:end])
        for j in range(start, end):
            stop = j
            if m and j % m == 0:
                stop, count = j + m, torch.full((rows,), m - args.n, device=w.device)
            elif args.counts is not None and j == start:
                stop, count = end, args.counts[:, start // block_size]
            if stop > j:
                span = slice(j, stop)
                stay = None if args.preserve is None else args.preserve[:, span]
                scores = scored(w[:, span], diag[span], args.column_scale, span)
                pruned[:, span] |= _prune(scores, count, stay, args.all_ties)
            column = w[:, j].clone()
            new = column if grid is None else round_to_grid(column[:, None], grid)[:, 0]
            w[:, j] = torch.where(pruned[:, j], 0, new)
            moved = pruned[:, j] if grid is None else torch.ones_like(pruned[:, j])
            error = torch.where(moved, (column - w[:, j]) / diag[j], 0)
            loss += error.double().square() / 2
            w[:, j + 1 : end] -= error[:, None] * u[j, j + 1 : end]
            errors[:, j - start] = error
        w[:, end:] -= errors @ u[start:end, end:]
    return ~pruned, loss.to(w.dtype)


@full_precision()
def obs_sweep_reference(*values: Any) -> SweepTensors:
    args = SweepArgs(*values)
    weight = args.w.clone(memory_format=torch.contiguous_format)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    loss = weight.new_zeros(weight.shape[:2])
    for b in range(len(weight)):
        kept[b], loss[b] = _sweep_matrix(weight[b], args.matrix(b))
    return weight, kept, loss


def _obs_sweep_native(*values: Any) -> SweepTensors:
    args = SweepArgs(*values)
    w = args.w
    rows, weight = unit_columns(w), w.new_empty(w.shape)
    kept, loss = w.new_empty(w.shape, dtype=torch.bool), w.new_zeros(w.shape[:2])
    optional = (
        _native.optional_capsule(None if t is None else t.contiguous())
        for t in (args.counts, args.mask, args.preserve, args.column_scale, args.grid)
    )
    rule = (args.n, args.m, args.block_size, args.all_ties)
    _native.call("obs_sweep", weight, kept, loss, rows, args.u.contiguous(), *optional, *rule)
    return weight, kept, loss


def _obs_sweep_fake(*values: Any) -> SweepTensors:
    args = SweepArgs(*values)
    args.check()
    w = args.w
    kept = w.new_empty(w.shape, dtype=torch.bool)
    return w.new_empty(w.shape), kept, w.new_empty(w.shape[:2])


registry.register(
    "obs_sweep(Tensor w, Tensor u, Tensor? counts, Tensor? mask, Tensor? preserve, int n, int m, "
    "int block_size, bool all_ties, Tensor? column_scale=None, Tensor? grid=None) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_obs_sweep_fake,
    impls={
        "reference": registry.Impl(obs_sweep_reference, (torch.float32, torch.float64)),
        "native": registry.Impl(_obs_sweep_native, (torch.float32,)),
        "triton": registry.Impl("pyprune.kernels.obs_sweep:obs_sweep_triton", (torch.float32,)),
    },
)


def block_counts(
    shape: torch.Size,
    pruned: int,
    per_row: bool,
    block_size: int,
    preserve: Tensor | None,
) -> Tensor:
    """How many weights each group prunes in each block of columns: int32 `[B, R or 1, blocks]`.

    Each group (a row of C weights, or the matrix) loses exactly `pruned`, spread over the blocks in
    proportion to their free positions by rounding the cumulative count. What `preserve` keeps
    pruned counts; if it alone exceeds `pruned`, nothing is added to it.
    """
    batch, rows, cols = shape
    if preserve is None:
        # Proportions of C are those of R * C: no need to count in weights.
        until = [min(cols, start + block_size) for start in range(0, cols, block_size)]
        sums = [0, *((2 * pruned * end + cols) // (2 * cols) for end in until)]
        counts = [b - a for a, b in pairwise(sums)]
        return torch.tensor(counts, dtype=torch.int32).expand(batch, rows if per_row else 1, -1)
    starts = torch.arange(0, cols, block_size, device=preserve.device)
    ends = (starts + block_size).clamp(max=cols)
    running = (~preserve).to(torch.int32).cumsum(2, dtype=torch.int64)
    stay = running[:, :, ends - 1]
    size = ends.expand_as(stay)
    if not per_row:
        stay, size = stay.sum(1, keepdim=True), size.sum(1, keepdim=True)
    free = size - stay
    extra = (pruned - stay[:, :, -1:]).clamp(min=0)
    all_free = free[:, :, -1:].clamp(min=1)
    cumulative = stay + (2 * extra * free + all_free) // (2 * all_free)
    zero = cumulative.new_zeros(*cumulative.shape[:2], 1)
    return cumulative.diff(dim=2, prepend=zero).to(torch.int32)


def reference_counts(shape: torch.Size, sparsity: float, block_size: int) -> Tensor:
    """The reference code's threshold, as a count that includes the threshold itself."""
    batch, rows, cols = shape
    widths = [min(block_size, cols - start) for start in range(0, cols, block_size)]
    counts = [int(rows * width * sparsity) + 1 for width in widths]
    return torch.tensor(counts, dtype=torch.int32).expand(batch, 1, -1)


def _pruned_counts(
    shape: torch.Size,
    sparsity: float,
    scope: str,
    preserve: Tensor | None,
    block_size: int,
    reference_count: bool,
) -> Tensor:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected a fraction in [0, 1], got {sparsity}")
    if scope not in ("row", "block", "layer"):
        raise ValueError(f"scope: expected row, block or layer, got {scope!r}")
    largest = min(block_size, shape[2]) * (1 if scope == "row" else shape[1])
    if largest > torch.iinfo(torch.int32).max:
        raise ValueError(
            f"block_size: expected fewer than 2^31 weights that are chosen together, got {largest} "
            f"({shape[1]} rows of {min(block_size, shape[2])})"
        )
    if reference_count:
        if scope != "block" or preserve is not None or sparsity == 1:
            raise ValueError(
                "reference_count: expected scope 'block', no preserve and a sparsity below 1, "
                "the only case that the reference code has"
            )
        return reference_counts(shape, sparsity, block_size)
    group = shape[2] if scope == "row" else shape[1] * shape[2]
    pruned = math.floor(group * sparsity + 0.5)
    return block_counts(shape, pruned, scope == "row", block_size, preserve)


def obs_sweep(
    w: Tensor,
    u: Tensor,
    *,
    sparsity: float | None = None,
    scope: Scope = "block",
    nm: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    preserve: Tensor | None = None,
    block_size: int = 128,
    reference_count: bool = False,
    column_scale: Tensor | None = None,
    grid: RowGrid | None = None,
) -> ObsSweep:
    """Prunes `w` and adjusts what is kept so that the layer's output changes least.

    Columns are visited left to right. A weight pruned in column j costs

        err = w_j / U_jj,    loss = err^2 / 2,    w_k -= err * U_jk  for all k > j

    (Frantar & Alistarh 2023, algorithm 1; the score is `w_j^2 / U_jj^2`). Rows are independent but
    for the comparison group. The summed loss is `1/2 tr(D H D^T)`, D the change of `w` and H the
    damped Hessian behind `u`.

    Args:
        w: `[R, C]` or `[B, R, C]`, fp32 or fp64 (bf16 and fp16 are widened to fp32), any strides.
            Not modified. Columns that `obs_factor` calls dead should be zero already: they then
            score 0, are pruned first and disturb nothing.
        u: `obs_factor(h).u`, `[C, C]` (shared by the batch) or `[B, C, C]`, fp64 if `w` is, else
            fp32.
        sparsity: fraction to remove, in [0, 1]: `floor(n * sparsity + 0.5)` of n, exactly, for
            every row (scope "row") or for the matrix (scopes "block", "layer").
        scope: which weights compete. "row" and "block": those of one row, or of all rows, within a
            block of columns, chosen when its first column is reached; the count is spread over the
            blocks by rounding the cumulative count. "layer": the whole matrix, by the scores of
            the initial weights.
        nm: `(n, m)`: keep n of every m consecutive weights of a row, chosen when the group's first
            column is reached. m must divide C; `block_size` is rounded up to a multiple of m.
        mask: bool like `w`, True = kept: no choice, only the update. Exactly one of `sparsity`,
            `nm` and `mask` is given.
        preserve: bool like `w`, False = must stay pruned. These positions count among the pruned
            ones (they are chosen first); if they alone are more than a group's count, all stay
            pruned and no more are added.
        block_size: columns per block. With a given mask it does not change the result beyond
            rounding; with the scopes "row" and "block" it is part of the comparison group.
        reference_count: prune `score <= sort(scores)[int(n * sparsity)]` of every block as the
            SparseGPT code does: one more than asked for, and all ties. Scope "block" only.
        column_scale: `[C]` (shared by the batch) or `[B, C]`: the score is `|w_j| * column_scale_j`
            instead of SparseGPT's, on the weights as the columns before left them (Wanda's score
            with updates, Sun et al. 2023, section 4.4). Not with `mask`.
        grid: `row_grid(w, bits)`: every kept weight is rounded to its row's grid when its column is
            visited, and its rounding error spread like a pruned weight's, q its new value (joint
            sparsification and quantisation, section 3.5):

                err = (w_j - q) / U_jj

    Returns:
        `weight` and the per-row `loss`, fp32 (fp64 for fp64), and the `mask` (True = kept).
        Pruned weights are exactly 0; on a grid kept ones may be, too.

    Ties go to the lower index (row-major for "block" and "layer"): it is pruned first. NaN scores
    rank above infinity, so NaN weights are kept; check for them before.

    Raises:
        ValueError: a shape, dtype or device does not match, or a pattern does not fit.
    """
    check_float("w", w)
    check_tensor("u", u)
    if w.dim() not in (2, 3):
        raise ValueError(f"w: expected [R, C] or [B, R, C], got shape {tuple(w.shape)}")
    batched = w.dim() == 3
    flags = [mask, preserve]
    if not batched:
        w = w[None]
        flags = [None if t is None else t[None] for t in flags]
    given, stay = flags
    w = w if w.dtype == torch.float64 else w.float()
    u = u if u.dim() == 3 else u[None]
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    n, m = nm or (0, 0)
    if nm is not None:
        if not 1 <= n <= m:
            raise ValueError(f"nm: expected 1 <= n <= m, got {n}:{m}")
        block_size = math.ceil(block_size / m) * m
    if (sparsity is not None) + (nm is not None) + (mask is not None) != 1:
        raise ValueError("expected exactly one of sparsity, nm and mask")
    counts = None
    if sparsity is not None:
        if scope == "layer":  # one block of all columns: chosen before the first one is visited
            block_size = max(1, w.shape[2])
        counts = _pruned_counts(w.shape, sparsity, scope, stay, block_size, reference_count)
        counts = counts.to(w.device)
    if column_scale is not None:
        shared = column_scale.dim() == 1
        column_scale = (column_scale[None] if shared else column_scale).to(w.dtype)
    levels = None
    if grid is not None:
        for name, t in zip(RowGrid._fields, grid, strict=True):
            check_shape(f"grid.{name}", t, tuple(w.shape[0 if batched else 1 : -1]))
        levels = torch.stack([t.reshape(w.shape[:-1]) for t in grid], dim=1).to(w.dtype)
    args = SweepArgs(
        w, u, counts, given, stay, n, m, block_size, reference_count, column_scale, levels
    )
    args.check()
    if w.numel():
        result = ObsSweep(*torch.ops.pyprune.obs_sweep(*args))
    else:
        result = ObsSweep(w.clone(), torch.ones_like(w, dtype=torch.bool), w.new_zeros(w.shape[:2]))
    return result if batched else ObsSweep(*(t[0] for t in result))
