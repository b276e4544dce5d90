"""Least squares drawn to the identity, for one ridge and for many."""

import pytest
import torch

from pyprune.depth.ridge import LADDER, Moments, Solutions


def rows(n, d=6, noise=1.0, seed=0, change=0.5):
    """m, and y = m (I + W) + noise."""
    made = torch.Generator().manual_seed(seed)
    w = change * torch.randn(d, d, dtype=torch.float64, generator=made) / d**0.5
    made.manual_seed(seed + 1000 + n)
    m = torch.randn(n, d, dtype=torch.float64, generator=made) * torch.logspace(-1, 1, d)
    y = m @ (torch.eye(d, dtype=torch.float64) + w)
    return m, y + noise * torch.randn(n, d, dtype=torch.float64, generator=made)


def moments(m, y):
    return Moments.of(m, y - m)


def oracle(m, y, ridge):
    """I + W by least squares of stacked rows: [M; sqrt(lambda) I] T = [Y; sqrt(lambda) I]."""
    eye = torch.eye(m.shape[1], dtype=m.dtype)
    root = (ridge * m.square().sum() / m.shape[1]).sqrt()
    return torch.linalg.lstsq(torch.cat([m, root * eye]), torch.cat([y, root * eye])).solution


@pytest.mark.parametrize("n", [4, 40])  # fewer rows than unknowns, and more
def test_solutions_and_errors_against_stacked_least_squares(n):
    (m, y), (other_m, other_y) = rows(n), rows(17, seed=1)
    fitted, held = moments(m, y), moments(other_m, other_y)
    assert float(held.error) == pytest.approx(float((other_y - other_m).square().sum()))
    solutions = Solutions(fitted)
    for ridge in LADDER:
        wanted = oracle(m, y, ridge)
        change = fitted.solve(ridge)
        torch.testing.assert_close(change + torch.eye(6, dtype=m.dtype), wanted)
        torch.testing.assert_close(solutions.change_of(other_m, ridge), other_m @ wanted - other_m)
        expected = float((other_m @ wanted - other_y).square().sum())
        assert held.error_of(change) == pytest.approx(expected, rel=1e-6)
        assert fitted.error_of(change) == pytest.approx(
            float((m @ wanted - y).square().sum()), rel=1e-6, abs=1e-6
        )


def test_moments_add_up():
    m, y = rows(20)
    both = moments(m[:7], y[:7]) + moments(m[7:], y[7:])
    whole = moments(m, y)
    for name in ("gram", "cross", "error"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name))


def test_a_branch_that_is_silent():
    silent = moments(torch.zeros(5, 6, dtype=torch.float64), rows(5)[1])
    assert not silent.solve(1.0).any()
