"""Whether a model in memory is the one that something was computed for."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 4096  # elements of a parameter whose very bits are hashed
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """sha256 over every parameter's name, shape, dtype, sum of its bits as integers, and up to
    `SAMPLES` evenly spaced elements of it.

    The sum sees any one weight that changed, the samples see an order that did; hashing all bytes
    instead would take the longer part of a minute for a model of 7B.
    """
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        bits = p.detach().contiguous().view(_INTEGERS[p.element_size()]).flatten()
        step = max(1, bits.numel() // SAMPLES)
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(p.shape)} {p.dtype} {total}\n".encode())
        digest.update(bits[::step].cpu().numpy().tobytes())
    return digest.hexdigest()
