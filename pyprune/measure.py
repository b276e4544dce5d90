"""Seconds by phase and peak memory of a run, and what the machine has."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")  # counted now; the status lags behind by some megabytes
_MEMINFO = Path("/proc/meminfo")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the high-water mark of the resident set
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor, 0 if the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [0]
    for file in _CACHES.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG])", file.read_text().strip())
        sizes += [int(found[1]) * units[found[2]]] if found else []
    return max(sizes)


def _status_bytes(field: str, file: Path = _STATUS) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {field}")


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device` without swapping, now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_MEMINFO} has no MemAvailable")


def held_bytes(device: torch.device) -> int:
    """What this process holds on `device` now: PyTorch's allocations on a GPU; elsewhere its
    resident set, once the allocator has given back what it kept for later (glibc)."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if not _ROLLUP.exists():
        return Measure.rss_bytes()
    return _status_bytes("Rss:", _ROLLUP)


class Measure:
    """Starts when created: peaks are those since then (of the whole process's resident set where
    the kernel does not let it be reset)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()
        # A container may forbid it. The peak then includes what came before the run.
        with suppress(PermissionError):
            _CLEAR_REFS.write_text(_RESET_PEAK)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def total(self) -> dict[str, float]:
        """Seconds by phase, and in `total` those since the start."""
        return {**self.seconds, "total": time.perf_counter() - self._start}

    @staticmethod
    def peak_rss_bytes() -> int:
        """High-water mark of the resident set (VmHWM)."""
        return _status_bytes("VmHWM:")

    @staticmethod
    def rss_bytes() -> int:
        """The resident set (VmRSS)."""
        return _status_bytes("VmRSS:")

    @staticmethod
    def peak_cuda_bytes() -> int | None:
        """Most that PyTorch had allocated on the GPU; None without one."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
