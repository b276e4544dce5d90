"""Peak memory of one provider of a benchmark, measured in a process of its own: what an earlier one
left in the allocator would hide it.

The benchmark has an option `--memory-of NAME`, with which it builds what it needs, calls
`print_peak` and ends; `peak_of(NAME)` runs it like that, and `peaks` for all of them.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

RESIDENT_SECONDS = 0.002  # between two looks at the resident size


def peak_of(name: str) -> int:
    """Bytes that `print_peak` found, in a process with the arguments of this one."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    # By default glibc keeps freed blocks below 32 MiB for itself; then size says little about use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"the measured process failed:\n{done.stderr}")
    return int(json.loads(done.stdout)["peak_bytes"])


def peaks(names: Iterable[str], smoke: bool) -> dict[str, int]:
    """`peak_of` each. A smoke run asks for the first alone, which all get: that a process can be
    measured is seen by one, and each takes seconds to import PyTorch."""
    if smoke:
        names = list(names)
        return dict.fromkeys(names, peak_of(names[0]))
    return {name: peak_of(name) for name in names}


def print_peak(device: str, call: Callable[[], object]) -> None:
    """How far `call` raises this process's memory: allocated bytes on a GPU, else resident ones."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - start
    else:
        with PeakResident() as resident:
            call()
        peak = resident.bytes
    print(json.dumps({"peak_bytes": peak}))


class PeakResident:
    """The highest resident size of this process within a `with` block, above that at its start."""

    def __enter__(self) -> PeakResident:
        gc.collect()
        self.start = self.peak = self._resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = self.peak - self.start

    def _watch(self) -> None:
        while not self._stop.wait(RESIDENT_SECONDS):
            self.peak = max(self.peak, self._resident())

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
