"""One table of op implementations; it drives dispatch, tests and benchmarks alike.

`IMPLS[op][backend]` is an `Impl`. An op has one schema, registered on the `pyprune` library;
calling it runs the fastest backend that can serve the tensors' device and dtype, or the one that
`PYPRUNE_BACKEND` names: `triton` for all ops, or `gram=triton,linear_24=cuda` for some. A forced
backend that lacks the op raises; an implementation that fails raises: nothing falls back after an
exception.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from pyprune import _native
from pyprune.errors import UserError

LIBRARY = torch.library.Library("pyprune", "FRAGMENT")

# Fastest first, per device. The reference is complete everywhere, so it closes each list.
PREFERENCE = {"cpu": ("native", "triton", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("reference", "native", "triton", "cuda")

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (*HALF_OR_SINGLE, torch.float64)


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    `function` has the op's schema as its signature, or is a `"module:name"` string that is imported
    on first use (Triton is slow to import and reads TRITON_INTERPRET when it is).
    `dtypes` are those it takes for the op's first input-like tensor (`dtype_of` argument).
    `limits` returns why it cannot serve these arguments, or an empty string.
    """

    function: Callable[..., Any] | str
    dtypes: tuple[torch.dtype, ...] = ANY_FLOAT
    limits: Callable[..., str] | None = None

    def resolve(self) -> Callable[..., Any]:
        if callable(self.function):
            return self.function
        module, name = self.function.split(":")
        function: Callable[..., Any] = getattr(import_module(module), name)
        return function


IMPLS: dict[str, dict[str, Impl]] = {}
_DTYPE_ARG: dict[str, int] = {}


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    impls: dict[str, Impl],
    dtype_arg: int = 0,
    gradient: bool = False,
) -> None:
    """Defines op `schema` on the `pyprune` library with its fake and its implementations.

    `dtype_arg`: position of the tensor whose dtype and device decide which backend can serve.
    `gradient`: whether one is registered (`linear_backward`). Results of other ops require none,
    though a layer's weight, a parameter, may be among what they are made of.
    """
    name = schema.split("(", 1)[0]
    unknown = set(impls) - set(BACKENDS)
    if unknown or "reference" not in impls:
        raise ValueError(f"{name}: backends must be among {BACKENDS} and include reference")
    IMPLS[name] = impls
    _DTYPE_ARG[name] = dtype_arg

    def run(*args: Any) -> Any:
        if gradient:  # what is registered has left autograd behind by now
            return call(name, *args)
        # As torch.no_grad() does, whose two objects take as long as some kernels.
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return call(name, *args)
        finally:
            torch._C._set_grad_enabled(before)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    if not gradient:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"pyprune::{name}", fake, lib=LIBRARY)


def call(name: str, *args: Any) -> Any:
    """What the op's kernel does: for plain tensors that need no gradient it saves PyTorch's
    dispatch, some microseconds a call. Arguments are not checked."""
    function = IMPLS[name][select(name, args)].resolve()
    tensor = _deciding(name, args)
    # Triton launches on the current device, whatever its tensors are on.
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            return function(*args)
    return function(*args)


def _deciding(op: str, args: Sequence[Any]) -> torch.Tensor:
    """The tensor among the arguments whose dtype and device decide."""
    found: Any = args[_DTYPE_ARG[op]]
    # An op on a list: its check has made the items alike.
    tensor: torch.Tensor = found[0] if isinstance(found, (list, tuple)) else found
    return tensor


def unavailable(
    op: str, backend: str, device: str, dtype: torch.dtype, args: Sequence[Any] = ()
) -> str:
    """Why `backend` cannot serve `op` on `device` with `dtype` here; empty if it can."""
    impl = IMPLS[op].get(backend)
    if impl is None:
        return f"{op} has no {backend} implementation"
    reason = _backend_unavailable(backend, device)
    if not reason and dtype not in impl.dtypes:
        reason = f"{op}'s {backend} implementation does not take {dtype}"
    if not reason and impl.limits is not None and args:
        reason = impl.limits(*args)
    return reason


def _backend_unavailable(backend: str, device: str) -> str:
    if backend == "native":
        if device != "cpu":
            return "native runs on the CPU only"
        return _native.MISSING
    if backend == "cuda":
        if device != "cuda":
            return "cuda needs a CUDA device"
        if _native.MODULE is None:
            return _native.MISSING
        return "" if _native.MODULE.has_cuda else "pyprune._C was built without CUDA (nvcc)"
    if backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "triton on the CPU needs TRITON_INTERPRET=1 before it is imported"
    return ""


def backends(op: str, device: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that can run `op` here, fastest first."""
    return [b for b in PREFERENCE[device] if not unavailable(op, b, device, dtype)]


FORCE = "PYPRUNE_BACKEND"
# os.environ encodes a name before it looks it up, which takes a microsecond.
_ENVIRON: Any = getattr(os.environ, "_data", os.environ)
_FORCE_KEY: Any = os.environ.encodekey(FORCE) if _ENVIRON is not os.environ else FORCE


def any_backend_forced() -> bool:
    """Whether `PYPRUNE_BACKEND` is set."""
    return _FORCE_KEY in _ENVIRON


class ForcedBackendError(UserError, RuntimeError):
    """`PYPRUNE_BACKEND` asks for what is not there."""


def forced_backend(op: str) -> str:
    """What `PYPRUNE_BACKEND` names for `op`, or an empty string."""
    setting = os.environ.get(FORCE, "") if any_backend_forced() else ""
    if not setting:
        return ""
    items = setting.split(",") if "=" in setting else [f"{op}={setting}"]
    chosen = dict(item.partition("=")[::2] for item in items)
    if unknown := set(chosen) - set(IMPLS):
        raise ForcedBackendError(f"{FORCE}={setting}: no op is called {sorted(unknown)}")
    if unknown := set(chosen.values()) - set(BACKENDS):
        raise ForcedBackendError(
            f"{FORCE}={setting}: expected {', '.join(BACKENDS)}, got {sorted(unknown)}"
        )
    return chosen.get(op, "")


def select(op: str, args: Sequence[Any]) -> str:
    """The backend that serves this call."""
    tensor = _deciding(op, args)
    device, dtype = tensor.device.type, tensor.dtype
    if forced := forced_backend(op):
        reason = unavailable(op, forced, device, dtype, args)
        if reason:
            raise ForcedBackendError(f"{FORCE}={forced}: {reason}")
        return forced
    for backend in PREFERENCE[device]:
        # The interpreter is for tests: it is never picked on its own.
        if backend == "triton" and device == "cpu":
            continue
        if not unavailable(op, backend, device, dtype, args):
            return backend
    raise RuntimeError(f"{op}: no backend serves {dtype} on {device}")
