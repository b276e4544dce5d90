"""`PYPRUNE_BACKEND`: one backend for every op, or for those named."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyprune import ops
from pyprune.errors import UserError
from pyprune.ops import registry

X = torch.ones(3, 4)


def selected(op):
    return registry.select(op, (X, X, X))


def test_for_every_op(monkeypatch):
    monkeypatch.setenv("PYPRUNE_BACKEND", "reference")
    assert selected("gram") == selected("column_norms") == "reference"


def test_for_some_ops(monkeypatch):
    usual = selected("column_norms")
    monkeypatch.setenv("PYPRUNE_BACKEND", "gram=reference,mask_nm=triton")
    assert selected("gram") == "reference" and selected("mask_nm") == "triton"
    assert selected("column_norms") == usual != "reference"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cuda", "PYPRUNE_BACKEND=cuda: cuda needs a CUDA device"),
        ("gram=cuda", "PYPRUNE_BACKEND=cuda: gram has no cuda implementation"),
        ("gram=fastest", r"expected reference, native, triton, cuda, got \['fastest'\]"),
        ("gram=native,mask_nm=", r"expected reference, .*, got \[''\]"),
        ("fastest", "PYPRUNE_BACKEND=fastest: expected reference, native, triton, cuda"),
        ("gramm=native", r"no op is called \['gramm'\]"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, setting, message):
    monkeypatch.setenv("PYPRUNE_BACKEND", setting)
    with pytest.raises(RuntimeError, match=message) as raised:
        ops.gram(X) if "=" in setting else ops.mask_nm(X, 2, 4)
    assert isinstance(raised.value, UserError)  # one line on the command line


@pytest.mark.parametrize("number", [0, 1])
def test_an_implementation_runs_with_its_tensors_device_current(monkeypatch, number):
    """On which Triton launches. PyTorch makes tensors without data on GPUs that are not there."""
    entered = []

    @contextmanager
    def device(wanted):
        entered.append(wanted)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    found = registry.Impl(lambda *args: list(entered))
    monkeypatch.setitem(registry.IMPLS, "gram", {"reference": found})
    with FakeTensorMode():
        x = torch.empty(3, 4, device=f"cuda:{number}")
    assert registry.call("gram", x, x, None) == ([torch.device("cuda:1")] if number else [])
    assert entered == ([torch.device("cuda:1"), "left"] if number else [])
