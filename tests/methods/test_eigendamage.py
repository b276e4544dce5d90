"""EigenDamage: what must hold in the eigenbasis."""

import pytest
import torch
from methods.gradients import output_gradients
from methods.test_properties import example

from pyprune.methods import eigendamage as maths


def layer(rows=5, columns=7, tokens=60):
    """Weights, tokens' inputs and output gradients, their factors per token."""
    w, x = example(rows, columns, tokens)
    g = output_gradients(rows, x)
    return w, x, g, x.T @ x / tokens, g.T @ g / tokens


def eigenbasis(a, g):
    left, right = maths.eigenvectors(g), maths.eigenvectors(a)
    return maths.EigenBasis(left[1], right[1], left[0], right[0])


def loss(change, g, a):
    return 0.5 * float(((g @ change @ a) * change).sum())


def index(mask):
    return mask.nonzero()[:, 0]


def test_rotation_keeps_the_norm_and_comes_back():
    w, _, _, a, g = layer()
    basis = eigenbasis(a, g)
    rotated = basis.rotate(w)
    assert float(rotated.norm()) == pytest.approx(float(w.norm()))
    torch.testing.assert_close(basis.restore(rotated), w)
    everything = torch.arange(5), torch.arange(7)
    factors = maths.thin_factors(basis, rotated, *everything)
    torch.testing.assert_close(factors.up @ factors.down, w)


def test_costs_add_up_to_the_quadratic_form():
    w, _, _, a, g = layer()
    basis = eigenbasis(a, g)
    costs = maths.element_costs(basis.rotate(w), basis.curvature())
    assert float(costs.sum()) == pytest.approx(0.5 * float((g @ w @ a * w).sum()))


def test_in_the_basis_damage_is_surgery():
    """For a Kronecker Fisher matrix the best of all updates in the basis is none at all."""
    w, _, _, a, g = layer()
    basis = eigenbasis(a, g)
    rotated, f = basis.rotate(w), torch.kron(g, a)
    q = torch.kron(basis.left, basis.right)
    diagonal = q.T @ f @ q
    off = diagonal - torch.diag(diagonal.diagonal())
    assert float(off.abs().max()) < 1e-10 * float(diagonal.max())
    costs = maths.element_costs(rotated, basis.curvature()).flatten()
    inverse = torch.linalg.inv(diagonal).diagonal()
    torch.testing.assert_close(costs, 0.5 * rotated.flatten().square() / inverse, rtol=1e-6, atol=0)
    kept = torch.rand(35, generator=torch.Generator().manual_seed(1)) > 0.4
    d = torch.where(kept, 0, -rotated.flatten())
    d[kept] = torch.linalg.solve(diagonal[kept][:, kept], -(diagonal @ d)[kept])
    assert float(d[kept].abs().max()) < 1e-9
    change = basis.restore(d.view(5, 7))
    assert loss(change, g, a) == pytest.approx(float(costs[~kept].sum()))


def test_directions_cost_what_removing_them_costs_and_no_less_than_the_best_of_their_rank():
    w, _, _, a, g = layer()
    basis = eigenbasis(a, g)
    rotated = basis.rotate(w)
    costs = maths.element_costs(rotated, basis.curvature())
    rows, columns = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 3, 5, 6])
    factors = maths.thin_factors(basis, rotated, rows, columns)
    left = torch.zeros_like(costs, dtype=torch.bool)
    left[rows[:, None], columns] = True
    achieved = loss(factors.up @ factors.down - w, g, a)
    assert achieved == pytest.approx(float(costs[~left].sum()))
    # The best matrix of rank 3 under the same curvature, by the SVD of G^1/2 W A^1/2.
    root_g = basis.left @ torch.diag(basis.left_values.sqrt())
    root_a = basis.right @ torch.diag(basis.right_values.sqrt())
    values = torch.linalg.svdvals(root_g.T @ w @ root_a)
    assert achieved >= 0.5 * float(values[3:].square().sum())


@pytest.mark.parametrize(("r", "c"), [(2, 6), (6, 2), (3, 3), (0, 4)])
def test_two_factors_are_the_three_of_the_paper_and_never_more_parameters(r, c):
    w, _, _, a, g = layer(8, 9)
    basis = eigenbasis(a, g)
    rotated = basis.rotate(w)
    rows, columns = torch.arange(r), torch.arange(c)
    factors = maths.thin_factors(basis, rotated, rows, columns)
    three = basis.left[:, rows], rotated[rows][:, columns], basis.right[:, columns].T
    torch.testing.assert_close(factors.up @ factors.down, three[0] @ three[1] @ three[2])
    assert factors.parameters == min(r, c) * (8 + 9) <= sum(t.numel() for t in three)


def test_degenerate_factors():
    a, g = torch.eye(4, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    basis = eigenbasis(a, g)
    assert not basis.curvature().any()
    w = torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(basis.restore(basis.rotate(w)), w)
    # Rank-deficient: what rounding leaves of an eigenvalue of zero is not negative.
    v = torch.arange(1.0, 5.0)[:, None].double()
    assert bool((eigenbasis(v @ v.T, g).right_values >= 0).all())


def test_reestimation_is_nearer_to_the_fisher_matrix():
    """Both are diagonal in the basis; EK-FAC's diagonal is the best one (George et al. 2018)."""
    _, x, g, a, b = layer()
    basis = eigenbasis(a, b)
    outer = (g[:, :, None] * x[:, None, :]).flatten(1)
    q = torch.kron(basis.left, basis.right)
    f = q.T @ (outer.T @ outer / len(x)) @ q
    again = (g @ basis.left).square().T @ (x @ basis.right).square() / len(x)
    errors = [float((f - torch.diag(d.flatten())).norm()) for d in (basis.curvature(), again)]
    assert errors[1] < errors[0]
