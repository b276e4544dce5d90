"""Where a run takes place."""

from __future__ import annotations

import torch

from pyprune.errors import UserError


def find_device(name: str) -> torch.device:
    """The device that auto (a GPU if there is one), cpu, cuda or cuda:N means here; UserError if
    this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {name!r}"
        )
    return device
