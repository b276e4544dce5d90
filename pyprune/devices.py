"""Where a run takes place, and in which numbers."""

from __future__ import annotations

import torch

from pyprune.config import DTYPES, check_device
from pyprune.errors import UserError


def find_device(name: str) -> torch.device:
    """The device that auto (a GPU if there is one), cpu, cuda or cuda:N means here; UserError for
    other words, and if this machine does not have it."""
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device: expected one that is here, got {name!r}: {count} CUDA devices")
    return device


def find_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """What a caller's dtype, or its name, means; None for auto. UserError unless it is a floating
    point one of 16 bits or more."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return found
