"""What `pyprune.integrations` says of LLM Surgeon's code: ops against the expressions there."""

import torch

from pyprune import ops

TOKENS, R, C = 40, 12, 16


def damped(h, share=0.01):
    return h + share * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def problem():
    """W, and inputs and gradients `[TOKENS, .]`, with the damped factors and their inverses."""
    torch.manual_seed(0)
    w, a, g = (
        torch.randn(n, m, dtype=torch.float64) for n, m in ((R, C), (TOKENS, C), (TOKENS, R))
    )
    factors = damped(a.T @ a / TOKENS), damped(g.T @ g / TOKENS)
    return w, a, g, factors, [f.inverse() for f in factors]


def test_factors():
    _, a, g, _, _ = problem()
    near = a.T @ a
    want = torch.einsum("bi,ij,bj,bu,bv->uv", a, near, a, g, g)
    torch.testing.assert_close(ops.gram(g, weight=ops.kron_quadratic(a, near)), want)
    torch.testing.assert_close(ops.gram(a), torch.einsum("bu,bv->uv", a, a))


def test_costs_of_rows_and_columns():
    w, _, _, (a, g), _ = problem()
    torch.testing.assert_close(ops.kron_quadratic(w, a), torch.sum((w @ a) * w, 1))
    torch.testing.assert_close(ops.kron_quadratic(w.T, g), torch.sum((g @ w) * w, 0))


def test_update_of_weights():
    """Removed together, as with max_correlate 0."""
    w, _, _, (a, g), (a_inverse, g_inverse) = problem()
    mask = torch.rand(R, C) < 0.3
    rows, columns = mask.nonzero().T
    system = g_inverse[rows][:, rows] * a_inverse[columns][:, columns]
    multipliers = torch.zeros_like(w)
    multipliers[mask] = torch.linalg.solve(system, w[mask])
    want = (w - g_inverse @ multipliers @ a_inverse).masked_fill(mask, 0)
    found = ops.kron_pcg(w, ~mask, a, g, iterations=500, tolerance=1e-14).weight
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_update_of_rows_and_columns():
    """The paper's is the sum of the two changes, each on the original weights."""
    w, _, _, _, (a_inverse, g_inverse) = problem()
    rows, columns, none = torch.tensor([1, 5]), torch.tensor([0, 7, 9]), torch.tensor([]).long()
    left = g_inverse[:, rows] @ torch.linalg.solve(g_inverse[rows][:, rows], w[rows])
    right = w[:, columns] @ torch.linalg.solve(a_inverse[columns][:, columns], a_inverse[columns])
    want = w - left - right
    found = [ops.kron_remove(w, *sets, a_inverse, g_inverse) for sets in (
        (rows, none), (none, columns), (rows, columns),
    )]  # fmt: skip
    torch.testing.assert_close(found[0] + found[1] - w, want)
    joint = want + g_inverse[:, rows] @ torch.linalg.solve(g_inverse[rows][:, rows], right[rows])
    joint[rows], joint[:, columns] = 0, 0
    torch.testing.assert_close(found[2], joint)
