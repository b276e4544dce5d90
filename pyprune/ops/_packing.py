"""What packing 2:4 and packing a bitmap have in common."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops._checks import check_same_device, check_shape

_BLOCK_BYTES = 1 << 18
_PATTERN = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_mask(w: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    check_shape("mask", mask, tuple(w.shape))
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
    check_same_device(w, mask)


def bit_pattern(t: Tensor) -> Tensor:
    """The elements as integers: PyTorch's float operations may quieten NaNs on the way."""
    return t.view(_PATTERN[t.element_size()])


def unit_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def aligned(t: Tensor, bytes_: int = 16) -> Tensor:
    """`t` with unit stride along columns and rows that start at multiples of `bytes_`, as the CUDA
    kernels' vector loads need them: a slice may begin anywhere."""
    t = t.contiguous() if t.dim() == 1 else unit_columns(t)
    rows = t.dim() == 2 and t.shape[0] > 1
    starts = (t.data_ptr(), t.stride(0) * t.element_size() if rows else 0)
    if all(start % bytes_ == 0 for start in starts):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def row_blocks(t: Tensor) -> Iterator[slice]:
    """Rows of a matrix of bytes, few enough at a time that temporaries of their size do not count:
    it may be checked while a model is loaded that barely fits."""
    step = max(1, _BLOCK_BYTES // max(1, t.shape[1]))
    for start in range(0, t.shape[0], step):
        yield slice(start, start + step)


def native_mask(mask: Tensor | None) -> object:
    return None if mask is None else _native.capsule(unit_columns(mask))
