"""`PYPRUNE_BACKEND`: one backend for every op, or for those named."""

import pytest
import torch

from pyprune import ops
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
        ("gram=fastest", "gram has no fastest implementation"),
        ("gramm=native", r"no op is called \['gramm'\]"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, setting, message):
    monkeypatch.setenv("PYPRUNE_BACKEND", setting)
    with pytest.raises(RuntimeError, match=message):
        ops.gram(X) if "=" in setting else ops.mask_nm(X, 2, 4)
