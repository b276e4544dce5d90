"""What the compressed layouts have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops._checks import check_array, check_same_device
from pyprune.ops.storage import unit_columns

# Bytes of metadata that are checked at a time: a model may be loaded that barely fits.
CHECKED_BYTES = 1 << 18


def check_mask(w: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    check_array("mask", mask, torch.bool, tuple(w.shape))
    check_same_device(w, mask)


def native_mask(mask: Tensor | None) -> object:
    return None if mask is None else _native.capsule(unit_columns(mask))
