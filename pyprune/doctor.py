"""What pyprune finds on this machine, and which backends its ops have here."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

import pyprune
from pyprune import _native
from pyprune.ops import registry

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "datasets",
    "numpy",
    "greenlet",
)
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can serve an op on a device in fp32. reason: why not; empty if it can."""

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """versions: of packages, None where absent. cpu, gpus: the machine. native: instruction set
    and CUDA support of pyprune._C, or why it is missing. backends: op by device by backend."""

    versions: dict[str, str | None]
    cpu: dict[str, Any]
    gpus: list[dict[str, Any]]
    native: dict[str, Any]
    environment: dict[str, str]
    backends: list[BackendStatus]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> RenderableType:
        return Group(self._machine(), self._ops())

    def _machine(self) -> Table:
        table = Table("item", "found", title="pyprune doctor", title_justify="left")
        for name, found in self.versions.items():
            table.add_row(name, found or "not installed")
        for name, value in self.cpu.items():
            table.add_row(name.replace("_", " "), str(value))
        for i, gpu in enumerate(self.gpus):
            table.add_row(f"cuda:{i}", ", ".join(f"{k} {v}" for k, v in gpu.items()))
        if not self.gpus:
            table.add_row("GPU", "none that PyTorch sees")
        for name, value in (*self.native.items(), *self.environment.items()):
            table.add_row(name, str(value))
        return table

    def _ops(self) -> Table:
        """Ops that run alike, for the same reasons, share a line."""
        table = Table("ops", "device", "runs", "also here", "not here, because", show_lines=True)
        devices = [d for d in DEVICES if d == "cpu" or self.gpus]
        alike: dict[tuple[str, ...], list[str]] = {}
        for op in dict.fromkeys(status.op for status in self.backends):
            for device in devices:
                rows = [s for s in self.backends if (s.op, s.device) == (op, device)]
                good = [s.backend for s in rows if not s.reason]
                # The interpreter is never picked on its own.
                good.sort(key=lambda backend: device == "cpu" and backend == "triton")
                bad = [_because(s) for s in rows if s.reason]
                cells = (device, good[0], ", ".join(good[1:]), "\n".join(bad))
                alike.setdefault(cells, []).append(op)
        for shared, names in alike.items():
            table.add_row(", ".join(names), *shared)
        return table


def _because(status: BackendStatus) -> str:
    """Without the op's name, which the line has already, so that reasons compare alike."""
    reason = status.reason
    for own in (f"{status.op} has ", f"{status.op}'s "):
        reason = reason.removeprefix(own)
    return f"{status.backend}: {reason}"


def diagnose() -> Diagnosis:
    """Looks at versions, devices and every op of `pyprune.ops`. Changes nothing."""
    versions: dict[str, str | None] = {name: _version(name) for name in PACKAGES}
    return Diagnosis(
        versions={
            "python": platform.python_version(),
            "pyprune": pyprune.__version__,
            **versions,
            "torch": str(torch.__version__),  # tells the build too, `+cu130`
        },
        cpu=_cpu(),
        gpus=[_gpu(i) for i in range(torch.cuda.device_count())],
        native=_native_module(),
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("PYPRUNE_") or name in ("TRITON_INTERPRET", "OMP_NUM_THREADS")
        },
        backends=[
            BackendStatus(op, device, backend, _unavailable(op, backend, device))
            for op in sorted(registry.IMPLS)
            for device in DEVICES
            for backend in _order(device)
        ],
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _order(device: str) -> list[str]:
    preferred = list(registry.PREFERENCE[device])
    return preferred + [b for b in registry.BACKENDS if b not in preferred]


def _unavailable(op: str, backend: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device here"
    # fp32, unless the op takes bytes alone.
    dtypes = registry.IMPLS[op]["reference"].dtypes
    dtype = torch.float32 if torch.float32 in dtypes else dtypes[0]
    return registry.unavailable(op, backend, device, dtype)


def _cpu() -> dict[str, Any]:
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model,
        "platform": f"{sys.platform} {platform.release()}",
        "usable_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "memory_GiB": round(gib, 1),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_GiB": round(properties.total_memory / 2**30, 1),
    }


def _native_module() -> dict[str, Any]:
    if _native.MODULE is None:
        return {"pyprune._C": f"missing: {_native.MISSING}"}
    return {
        "pyprune._C": "built",
        "pyprune._C isa": _instruction_set(_native.MODULE.isa()),
        "pyprune._C cuda": _native.MODULE.has_cuda,
    }


def _instruction_set(isa: str) -> str:
    """The set in use, what its name does not say and, where it is the slowest, why no other is."""
    machine = platform.machine()
    neon = f"with NEON, which is in the baseline of {machine}"
    if isa == "neon_bf16":
        return f"neon_bf16: portable {neon}, and bfmmla for bf16 products"
    if isa != "portable":
        return isa
    if machine in ("aarch64", "arm64"):
        return f"portable, {neon}; the processor lacks BF16"
    if machine != "x86_64":
        return f"portable, the only one for {machine}"
    return "portable: of AVX2, FMA, F16C, BMI, BMI2 and POPCNT the processor lacks one or more"
