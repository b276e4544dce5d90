"""Shared fixtures. Triton's interpreter is switched on before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import triton.language as tl
from hypothesis import HealthCheck, settings
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

from pyprune import ops

# `with torch.device(...)` recognises allocating functions by a table that it builds on first use:
# now, before `poison_empty` replaces some of them.
with torch.device("cpu"):
    torch.empty(0)

# Triton 3.6's interpreter has every constant but those in bf16.
if not hasattr(InterpreterBuilder, "get_bf16"):
    InterpreterBuilder.get_bf16 = lambda self, value: self.create_fp_trunc(
        self.get_fp32(value), tl.bfloat16
    )


class Nothing:
    def restore(self) -> None: ...


def patch_unpatched(fn, patch=interpreter._patch_lang):
    """Triton's interpreter replaces the functions of its language at every launch, and again at
    every call of a device function, when nothing is left to replace: half of its time."""
    languages = [v for v in fn.__globals__.values() if v is tl or v is tl.core]
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return Nothing()
    return patch(fn)


interpreter._patch_lang = patch_unpatched

# Machines that run tests are busy: how long an example takes says nothing.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ALLOCATORS = ("empty", "empty_like", "empty_strided")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none here")


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `torch.empty*` and `new_empty` return with NaN (or the largest integer): what a
    kernel forgets to write then fails the comparison instead of passing by luck."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            t = allocate(*args, **kwargs)
            if isinstance(t, torch.Tensor) and type(t) is torch.Tensor and not t.is_meta:
                with torch.no_grad():  # of torch 2.11's checkpointing it is a leaf of the graph
                    if t.is_floating_point():
                        t.fill_(float("nan"))
                    elif t.dtype is not torch.bool and not t.is_complex():
                        t.fill_(torch.iinfo(t.dtype).max)
            return t

        return wrapper

    for name in ALLOCATORS:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `backend` run once per implementation of the op named by the module's
    `OP`: a new backend is tested without new test code."""
    if "backend" in metafunc.fixturenames:
        op = metafunc.module.OP
        metafunc.parametrize("backend", list(ops.registry.IMPLS[op]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops combinations that cannot exist (native on a GPU, cuda on the CPU, a dtype that a
    backend does not take), so that what is left on the CPU never skips."""

    def exists(item: pytest.Item) -> bool:
        params = getattr(getattr(item, "callspec", None), "params", {})
        backend, op = params.get("backend"), getattr(item.module, "OP", None)
        if backend is None or op is None:
            return True
        if (backend, params.get("device", "cpu")) in {("native", "cuda"), ("cuda", "cpu")}:
            return False
        return params.get("dtype", torch.float32) in ops.registry.IMPLS[op][backend].dtypes

    dropped = [item for item in items if not exists(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if exists(item)]


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch):
    """Forces an op's backend for the rest of the test; it must be able to run. Other ops, which
    prepare or check, run wherever their tensors are."""

    def force(backend: str, op: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        reason = ops.registry.unavailable(op, backend, device, dtype)
        assert not reason, reason
        monkeypatch.setenv("PYPRUNE_BACKEND", f"{op}={backend}")

    return force


@pytest.fixture
def use_isa():
    """Restricts the native kernels to one instruction set for the rest of the test."""
    native = ops.registry._native.MODULE
    assert native is not None, ops.registry._native.MISSING

    def force(isa: str) -> None:
        try:
            native.set_isa(isa)
        except ValueError as error:
            pytest.skip(str(error))

    yield force
    native.set_isa("best")
