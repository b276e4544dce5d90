"""Uniform quantisation grids, one per output row: what `obs_sweep` can round weights to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyprune.ops._checks import accumulation_dtype, check_matrices


class RowGrid(NamedTuple):
    """The values `step * k` of a row for the whole numbers `low <= k <= high`, `low <= 0 <= high`.

    All `[..., R]`, fp32 (fp64 for fp64 weights).
    """

    step: Tensor
    low: Tensor
    high: Tensor


def row_grid(w: Tensor, bits: int) -> RowGrid:
    """The asymmetric min-max grid of `2^bits` values for each row of `w` `[R, C]` or `[B, R, C]`.

        step = (max(0, max_j w_ij) - min(0, min_j w_ij)) / (2^bits - 1)

    with zero on the grid (SparseGPT's quantiser, Frantar & Alistarh 2023, section 3.5). A row of
    zeros has the grid of [-1, 1].

    Raises:
        ValueError: `bits` is not in 1 to 16, or a wrong shape or dtype.
    """
    check_matrices("w", w)
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: expected 1 to 16, got {bits}")
    if w.shape[-1] == 0:
        raise ValueError(f"w: expected at least one column, got shape {tuple(w.shape)}")
    w = w.to(accumulation_dtype(w))
    least, most = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    flat = (least == 0) & (most == 0)
    least, most = least.masked_fill(flat, -1), most.masked_fill(flat, 1)
    levels = 2**bits - 1
    # Halves: the range of the largest numbers would be infinite.
    step = 2 * ((most / 2 - least / 2) / levels)
    step = step.clamp_min(torch.finfo(step.dtype).tiny)
    zero = (-least / step).round()
    return RowGrid(step, -zero, levels - zero)


def round_to_grid(w: Tensor, grid: RowGrid) -> Tensor:
    """`w` `[..., R, C]` at the nearest value of its row's grid, ties to the even multiple of
    `step`. Zeros are positive."""
    step, low, high = (t[..., None] for t in grid)
    return step * ((w / step).clamp(low, high).round() + 0.0)
