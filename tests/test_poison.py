"""What the other tests rely on: conftest.py fills memory that nobody has written to."""

import pytest
import torch


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3),
        lambda: torch.empty(3, requires_grad=True),
        lambda: torch.empty_like(torch.ones(3, dtype=torch.bfloat16)),
        lambda: torch.empty_strided((3,), (2,)),
        lambda: torch.ones(1).new_empty(3),
    ],
)
def test_floating_point_is_nan(allocate):
    assert allocate().isnan().all()


def test_integers_are_the_largest():
    assert torch.empty(3, dtype=torch.int16).tolist() == [2**15 - 1] * 3


def test_a_leaf_stays_one():
    leaf = torch.empty(3, requires_grad=True)
    assert leaf.is_leaf and leaf.requires_grad
