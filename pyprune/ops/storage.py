"""How the elements of a tensor lie in memory: as integers, aligned, and in blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PATTERN = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_pattern(t: Tensor) -> Tensor:
    """The elements as integers: PyTorch's float operations may quieten NaNs on the way."""
    return t.view(_PATTERN[t.element_size()])


def unit_columns(t: Tensor) -> Tensor:
    """`t` `[..., C]` with unit stride along its last dimension."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def aligned_rows(t: Tensor, bytes_: int = 16) -> Tensor:
    """`t` with unit stride along columns and rows that start at multiples of `bytes_`, as the CUDA
    kernels' vector loads need them: a slice may begin anywhere."""
    t = unit_columns(t)
    rows = t.dim() == 2 and t.shape[0] > 1
    starts = (t.data_ptr(), t.stride(0) * t.element_size() if rows else 0)
    if all(start % bytes_ == 0 for start in starts):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def row_blocks(shape: Sequence[int], elements: int) -> list[slice]:
    """The rows of a matrix of this shape, so many at a time that they have `elements` or fewer (one
    row at least), for temporaries that do not count beside the whole."""
    rows, cols = shape
    step = max(1, elements // max(1, cols))
    return [slice(start, start + step) for start in range(0, rows, step)]
