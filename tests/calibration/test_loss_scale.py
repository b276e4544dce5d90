"""Gradients of mean losses in fp16, where unscaled ones would be zero."""

import pytest
import torch

from pyprune.calibration.loss_scale import LARGEST, STEP, LossScale, all_finite


def chain(dtype, factor):
    """w, and a loss whose gradient is `factor`, by way of numbers in `dtype`."""
    w = torch.ones(3, dtype=dtype, requires_grad=True)
    return w, (w * 1.0).float().sum() * factor


@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1.0, 1e4])
def test_small_and_large_ones_in_fp16(factor):
    w, loss = chain(torch.float16, factor)
    scale = LossScale([w])
    assert scale.value == LARGEST
    with torch.no_grad():  # whatever is switched on around it
        gradient, none = scale.gradients(loss, [w, torch.zeros(2, requires_grad=True)])
    torch.testing.assert_close(gradient, torch.full((3,), factor), rtol=2e-3, atol=0)
    assert none is None and w.grad is None
    # Only as far as it must, and it stays there.
    assert scale.value == {1e-9: LARGEST, 1e-3: LARGEST, 1.0: LARGEST / STEP, 1e4: 1.0}[factor]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_dtypes_need_none(dtype):
    w, loss = chain(dtype, 1e-9)
    scale = LossScale([w])
    (gradient,) = scale.gradients(loss, [w])
    assert scale.value == 1 and not scale.lower()
    assert gradient.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(gradient.float(), torch.full((3,), 1e-9), rtol=4e-3, atol=0)
    with pytest.raises(RuntimeError, match="second time"):  # the graph is not kept
        scale.gradients(loss, [w])


def test_what_overflows_at_any_scale_is_seen():
    w, loss = chain(torch.float16, 1e6)
    scale = LossScale([torch.zeros(1), w])
    found = scale.gradients(loss, [w])
    assert scale.value == 1 and not all_finite(found)
    assert all_finite([None, torch.ones(2)])
