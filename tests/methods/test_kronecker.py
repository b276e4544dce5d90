import pytest
import torch

from pyprune import ops
from pyprune.methods import kronecker

EYE = {n: torch.eye(n, dtype=torch.float64) for n in (4, 8)}


def golden():
    """The specification's example: W, balanced A and G, and their damped forms and inverses."""
    i = torch.arange(4, dtype=torch.float64)[:, None]
    j = torch.arange(8, dtype=torch.float64)[None]
    t = torch.arange(32, dtype=torch.float64)[:, None]
    w = torch.cos(2.3 * i + 1.7 * j + 0.5 * i * j)
    wave = torch.cos(0.4 + 0.5 * t) + 0.6 * torch.sin(0.9 * t + 0.8 * j)
    x = (1 + 3 * (j == 3)) * (wave + 0.3 * torch.cos(2.1 * t * (j + 1)))
    y = torch.sin(0.3 + 0.61 * t) + 0.5 * torch.cos(0.7 * t * (i.T + 1))
    a, g = x.T @ x / 32, y.T @ y / 32
    ratio = (g.norm() / a.norm()).sqrt()
    a, g = a * ratio, g / ratio
    a_damped = a + 0.01 * a.diagonal().mean() * EYE[8]
    g_damped = g + 0.01 * g.diagonal().mean() * EYE[4]
    return w, a, g, a_damped, g_damped, torch.linalg.inv(a_damped), torch.linalg.inv(g_damped)


def close(got, want, atol=1e-6):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=atol)


def loss(new, w, a, g):
    d = new - w
    return 0.5 * float(((g @ d @ a) * d).sum())


def test_golden_costs():
    w, a, g, _, _, ai, gi = golden()
    assert float(a.norm()) == pytest.approx(5.304393527470)
    assert float(g.norm()) == pytest.approx(5.304393527470)
    close(kronecker.row_costs(w, a, gi.diagonal()), [0.126570, 0.658937, 0.601419, 0.282059])
    columns = [0.009419, 0.004783, 0.013035, 0.085418, 0.007272, 0.009121, 0.027826, 0.003991]
    close(kronecker.column_costs(w, g, ai.diagonal()), columns)
    elements = 0.5 * w.square() / torch.outer(gi.diagonal(), ai.diagonal())
    assert float(elements.sum()) == pytest.approx(0.152703938582)


def test_golden_structured_update_equals_brute_force():
    w, _, _, a, g, ai, gi = golden()
    new = kronecker.remove_structures(w, torch.tensor([1]), torch.tensor([2, 5]), ai, gi)
    assert loss(new, w, a, g) == pytest.approx(0.686987061278)
    row = [0.817069, -0.328485, 0, -0.072806, 0.912023, 0, -1.010172, 0.652753]
    close(new[0], row)
    kept = torch.ones(4, 8, dtype=torch.bool)
    kept[1], kept[:, [2, 5]] = False, False
    f, k, flat = torch.kron(g, a), kept.flatten(), w.flatten()
    d = torch.where(k, 0.0, -flat)
    d[k] = torch.linalg.solve(f[k][:, k], -f[k] @ d)
    torch.testing.assert_close(new, (flat + d).view(4, 8), rtol=0, atol=1e-10)


def test_golden_joint_elements():
    w, _, _, a, g, _, _ = golden()
    mask = torch.ones(4, 8, dtype=torch.bool)
    for place in ((0, 1), (0, 4), (2, 4), (3, 6)):
        mask[place] = False
    new = ops.kron_pcg(w, mask, a, g, iterations=200, tolerance=0).weight
    assert loss(new, w, a, g) == pytest.approx(0.005698439507, rel=1e-8)
    close(new[0], [0.554130, 0, -1.171826, 0.566251, 0, -0.350535, -0.663025, 1.117355])


def test_single_costs_are_the_achieved_loss_with_damped_numerators():
    w, _, _, a, g, ai, gi = golden()
    none, one = torch.tensor([], dtype=torch.long), torch.tensor([2])
    row = loss(kronecker.remove_structures(w, one, none, ai, gi), w, a, g)
    column = loss(kronecker.remove_structures(w, none, one, ai, gi), w, a, g)
    assert float(kronecker.row_costs(w, a, gi.diagonal())[2]) == pytest.approx(row)
    assert float(kronecker.column_costs(w, g, ai.diagonal())[2]) == pytest.approx(column)


def test_rows_do_not_depend_on_a_and_joint_beats_the_sum_of_updates():
    w, _, _, a, g, ai, gi = golden()
    p, q, none = torch.tensor([0, 3]), torch.tensor([1, 6]), torch.tensor([], dtype=torch.long)
    rows = kronecker.remove_structures(w, p, none, ai, gi)
    torch.testing.assert_close(rows, kronecker.remove_structures(w, p, none, EYE[8], gi))
    columns = kronecker.remove_structures(w, none, q, ai, gi)
    total = rows + columns - w
    total[p], total[:, q] = 0, 0
    zeroed = w.clone()
    zeroed[p], zeroed[:, q] = 0, 0
    joint = loss(kronecker.remove_structures(w, p, q, ai, gi), w, a, g)
    assert joint < loss(total, w, a, g)
    assert joint < loss(zeroed, w, a, g)
