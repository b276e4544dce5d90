"""Ridges drawn to the identity, chosen on rows that were not fitted."""

import pytest
import torch
from tiny_models import tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import _held_out
from pyprune.depth.ridge import LADDER, Moments, choose_ridge, held_out_errors


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
    found = held_out_errors(fitted, held, LADDER)
    for ridge, error in zip(LADDER, found, strict=True):
        wanted = oracle(m, y, ridge)
        change = fitted.solve(ridge)
        torch.testing.assert_close(change + torch.eye(6, dtype=m.dtype), wanted)
        expected = float((other_m @ wanted - other_y).square().sum())
        assert error == pytest.approx(expected, rel=1e-6)
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


def test_much_clean_text_takes_a_small_ridge_little_noisy_text_a_large_one():
    clean, _ = choose_ridge(moments(*rows(400, noise=0.01)), moments(*rows(100, noise=0.01)))
    noisy, gain = choose_ridge(moments(*rows(8, noise=1.0)), moments(*rows(100, noise=1.0)))
    assert clean is not None and noisy is not None and clean < noisy / 10 and gain < 1


def test_no_change_is_a_choice():
    """Where what is missing has nothing to do with the branch, most of all."""
    none, worst = 0, 1.0
    for seed in range(20):
        fitted = moments(*rows(8, noise=3.0, seed=seed, change=0.0))
        held = moments(*rows(30, noise=3.0, seed=seed, change=0.0))
        ridge, gain = choose_ridge(fitted, held)
        errors = held_out_errors(fitted, held, LADDER)
        none += ridge is None
        worst = max(worst, gain)
        assert (ridge is None) == (min(errors) >= float(held.error))
        if ridge is not None:
            assert gain == pytest.approx(min(errors) / float(held.error))
    assert none > 5 and worst == 1.0  # an unbounded fit would be far above 1


def test_a_branch_that_is_silent():
    nothing, y = torch.zeros(5, 6, dtype=torch.float64), rows(5)[1]
    silent = moments(nothing, y)
    assert choose_ridge(silent, silent) == (None, 1.0)
    assert not silent.solve(1.0).any()


def test_whole_sequences_are_held_out():
    ids = tiny_tokens(3, 8)
    split = _held_out([Batch(ids), Batch(ids), Batch(ids[:2])])
    assert [t.view(-1, 8).all(1).tolist() for t in split] == [
        [False, False, False], [True, False, False], [False, True],
    ]  # fmt: skip
    assert all(bool((t.view(-1, 8).all(1) == t.view(-1, 8).any(1)).all()) for t in split)
    assert [t.sum().item() for t in _held_out([Batch(ids)])] == [8]  # the last of fewer than four
    assert _held_out([Batch(ids[:1])])[0].tolist() == [False] * 6 + [True] * 2
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[2, 3:] = 0, 0
    (padded,) = _held_out([Batch(ids, mask)])
    assert padded.tolist() == [False] * 13 + [True] * 3
