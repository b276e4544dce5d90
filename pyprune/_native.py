"""The compiled module `pyprune._C`, or the reason why it is absent."""

from __future__ import annotations

import logging
import math
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch.utils import dlpack

# From this size on the C library gives memory back to the kernel when it is freed.
KEPT_BYTES = 32 << 20

# torch is imported first on purpose: its OpenMP runtime is then the one `_C` binds to, and both
# share one thread pool.

logger = logging.getLogger("pyprune")


def _load() -> tuple[ModuleType | None, str]:
    try:
        _C = import_module("pyprune._C")
    except ImportError as error:
        return None, f"pyprune._C cannot be imported ({error})"
    return _C, ""


MODULE, MISSING = _load()
if MODULE is None:
    logger.warning("%s; the slower reference and the Triton backends are used", MISSING)


def capsule(t: torch.Tensor) -> Any:
    """`t` as a DLPack capsule, which holds its memory. `_C` borrows it for the length of one call,
    or keeps it (`PreparedLinear`)."""
    if t.requires_grad:
        t = t.detach()
    return dlpack.to_dlpack(t)  # type: ignore[attr-defined]


def optional_capsule(t: torch.Tensor | None) -> Any:
    return None if t is None else capsule(t)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the CPU. A large one takes the memory of the last large one that
    was freed: fresh pages cost more than selecting or unpacking does (csrc/bind/kept_memory.cpp).
    """
    count = math.prod(shape) * dtype.itemsize
    if count < KEPT_BYTES:
        return torch.empty(shape, dtype=dtype)
    return dlpack.from_dlpack(call("kept_bytes", count)).view(dtype).view(shape)


def call(name: str, *args: Any) -> Any:
    """Calls `_C.<name>`, handing tensors over as capsules and `torch.get_num_threads()` last."""
    if MODULE is None:
        raise RuntimeError(MISSING)
    converted = [capsule(a) if isinstance(a, torch.Tensor) else a for a in args]
    return getattr(MODULE, name)(*converted, torch.get_num_threads())


def launch(name: str, device: torch.device, *args: Any) -> Any:
    """`call` of a CUDA function: on `device`'s current stream, which comes after `args`."""
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        return call(name, *args, stream)


# Bytes of a CUDA kernel's vector loads.
ALIGNMENT = 16


def aligned(t: torch.Tensor) -> torch.Tensor:
    """`t`, contiguous and from an address that vector loads can start at: a view into another
    tensor may begin anywhere."""
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()
