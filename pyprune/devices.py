"""Where a run takes place."""

from __future__ import annotations

import torch

from pyprune.config import check_device
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
