"""LLM Surgeon's updates on one matrix against constrained least squares on the whole Kronecker
product, in fp64."""

import pytest
import torch
from methods.golden import golden, show
from methods.test_gradient_methods import golden_gradients

from pyprune import ops
from pyprune.calibration.gradient_stats import KroneckerFactors
from pyprune.calibration.sample import Sample
from pyprune.errors import UserError
from pyprune.methods import LayerInputs, MethodOptions, find_method, kronecker
from pyprune.methods.kronecker import Curvature
from pyprune.methods.options import build_options
from pyprune.methods.surgeon import SurgeonOptions
from pyprune.patterns import NM, Unstructured

METHOD = find_method("llm-surgeon")


def random_problem(rows=6, columns=9, seed=0, condition=1e3):
    """W and ill-conditioned A and G, fp64."""
    gen = torch.Generator().manual_seed(seed)

    def spd(n):
        q = torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=torch.float64)).Q
        return q @ torch.diag(torch.logspace(0, -1, n, condition, dtype=torch.float64)) @ q.T

    return torch.randn(rows, columns, generator=gen, dtype=torch.float64), spd(columns), spd(rows)


def random_mask(w, share, seed=1):
    return torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) >= share


def brute_force(w, mask, a, g):
    """The minimiser of 1/2 vec(D)^T (G kron A) vec(D) with W + D zero where `mask` prunes."""
    f, kept, flat = torch.kron(g, a), mask.flatten(), w.flatten()
    d = torch.where(kept, 0.0, -flat)
    d[kept] = torch.linalg.solve(f[kept][:, kept], -f[kept] @ d)
    return (flat + d).view_as(w)


def quadratic(d, a, g):
    return 0.5 * float(((g @ d @ a) * d).sum())


def element_costs(w, there):
    """w_ij^2 / (2 [G^-1]_ii [A^-1]_jj)"""
    return 0.5 * w.square() / torch.outer(there.g_inverse.diagonal(), there.a_inverse.diagonal())


EXACT = {"iterations": 400, "tolerance": 0.0}


def structure_mask(w, rows, columns):
    mask = torch.ones_like(w, dtype=torch.bool)
    mask[rows], mask[:, columns] = False, False
    return mask


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_joint_elements_are_constrained_least_squares(share):
    w, a, g = random_problem()
    there, mask = Curvature.of(w, a, g), random_mask(w, share)
    new = there.without_elements(w, mask, **EXACT).weight
    torch.testing.assert_close(new, brute_force(w, mask, *there.damped()), rtol=1e-7, atol=1e-8)
    assert torch.equal(new == 0, ~mask)
    assert there.loss(new - w) == pytest.approx(quadratic(new - w, *there.damped()))


@pytest.mark.parametrize("share", [0.05, 0.25, 0.35, 0.6])
def test_joint_elements_are_near_the_optimum_at_the_tolerance_in_use(share):
    w, a, g = random_problem(40, 60)
    there, mask = Curvature.of(w, a, g, g_damping=0.1), random_mask(w, share)
    best = there.loss(brute_force(w, mask, *there.damped()) - w)
    assert there.without_elements(w, mask).loss <= 1.05 * best


def test_few_elements_are_the_closed_form():
    """-G^-1 M A^-1 with K m = w_Q, K = G^-1 o A^-1 on the pruned positions."""
    w, a, g = random_problem()
    there = Curvature.of(w, a, g)
    mask = torch.ones_like(w, dtype=torch.bool)
    for place in ((0, 1), (0, 4), (2, 4), (3, 6), (5, 8), (5, 0)):
        mask[place] = False
    i, j = (~mask).nonzero().T
    m = torch.zeros_like(w)
    system = there.g_inverse[i][:, i] * there.a_inverse[j][:, j]
    m[i, j] = torch.linalg.solve(system, w[i, j])
    closed = torch.where(mask, w - there.g_inverse @ m @ there.a_inverse, 0.0)
    torch.testing.assert_close(closed, brute_force(w, mask, *there.damped()))
    pcg = ops.kron_pcg(w, mask, *there.damped(), **EXACT).weight
    torch.testing.assert_close(pcg, closed, rtol=1e-8, atol=1e-9)
    # One group holds them all: there the paper's update is the same.
    torch.testing.assert_close(there.without_elements(w, mask, "grouped").weight, closed)


def test_grouped_elements_are_the_sequence_of_groups_and_not_the_joint_update():
    w, a, g = random_problem()
    there, mask = Curvature.of(w, a, g), random_mask(w, 0.5)
    new = w.clone()
    for row in range(len(w)):  # one row a group, each seeing the updates before it
        q = (~mask[row]).nonzero()[:, 0]
        m = torch.zeros(w.shape[1], dtype=w.dtype)
        m[q] = torch.linalg.solve(there.g_inverse[row, row] * there.a_inverse[q][:, q], new[row, q])
        new -= torch.outer(there.g_inverse[:, row], m @ there.a_inverse)
    got = kronecker.remove_in_groups(w, mask, there.a_inverse, there.g_inverse, size=1)
    torch.testing.assert_close(got, torch.where(mask, new, 0.0))
    assert bool(new[~mask].abs().max() > 1e-3)  # what is cut at the end
    joint = there.without_elements(w, mask, **EXACT).weight
    assert there.loss(joint - w) < 0.95 * there.loss(got - w)
    assert there.loss(joint - w) < there.without_elements(w, mask, "none").loss


@pytest.mark.parametrize("condition", [10, 30, 1e8])
def test_multipliers_of_a_group_are_as_good_as_its_dense_system_in_fp32(condition, monkeypatch):
    w, a, g = random_problem(5, 48, condition=condition)
    gone = (~random_mask(w, 0.5)).double()
    i, j = gone.nonzero().T

    dense = list[int]()
    solved = kronecker._solved
    monkeypatch.setattr(kronecker, "_solved", lambda h, b: dense.append(len(b)) or solved(h, b))

    def missed(m):
        return float(((g @ m.double() @ a - w) * gone).norm() / (w * gone).norm())

    single = [t.float() for t in (w, gone, a, g)]
    m = torch.zeros_like(single[0])
    m[i, j] = solved(single[3][i][:, i] * single[2][j][:, j], single[0][i, j])
    assert missed(kronecker._multipliers(*single)) < 10 * missed(m)
    # What conjugate gradients do not come to is solved for.
    assert dense == ([len(i)] if condition == 1e8 else [])


def test_groups_are_the_joint_update_if_the_inverse_forgets_what_is_gone():
    """What the paper's sequence lacks: F^-1 down-dated by the rows before."""
    w, a, g = random_problem()
    there, mask = Curvature.of(w, a, g), random_mask(w, 0.5)
    x, inverse = w.flatten().clone(), torch.kron(there.g_inverse, there.a_inverse)
    for row in range(len(w)):
        q = (~mask[row]).nonzero()[:, 0] + row * w.shape[1]
        solved = torch.linalg.solve(inverse[q][:, q], torch.cat([x[q, None], inverse[q]], dim=1))
        x = x - inverse[:, q] @ solved[:, 0]
        inverse = inverse - inverse[:, q] @ solved[:, 1:]
    joint = there.without_elements(w, mask, **EXACT).weight
    torch.testing.assert_close(joint, x.view_as(w) * mask, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(x.view_as(w)[~mask], torch.zeros(int((~mask).sum())).double())


def test_rows_of_groups_are_whole_and_consecutive():
    groups = list(kronecker._row_groups([3, 0, 2, 9, 1, 1, 0], 5))
    assert [(s.start, s.stop) for s in groups] == [(0, 3), (3, 4), (4, 7)]
    assert list(kronecker._row_groups([0, 0], 5)) == []


def test_structures_are_constrained_least_squares():
    w, a, g = random_problem()
    there = Curvature.of(w, a, g)
    rows, columns = torch.tensor([1, 4]), torch.tensor([0, 3, 7])
    joint = there.without_structures(w, rows, columns)
    mask = structure_mask(w, rows, columns)
    torch.testing.assert_close(joint, brute_force(w, mask, *there.damped()))
    summed = there.without_structures(w, rows, columns, "grouped")
    zeroed = there.without_structures(w, rows, columns, "none")
    assert torch.equal(zeroed, w * mask) and torch.equal(summed == 0, ~mask)
    assert there.loss(joint - w) < 0.999 * there.loss(summed - w)
    assert there.loss(joint - w) < 0.999 * there.loss(zeroed - w)


def test_columns_do_not_depend_on_g_nor_rows_on_a():
    w, a, g = random_problem()
    _, other_a, other_g = random_problem(seed=5)
    some, none = torch.tensor([1, 4]), torch.tensor([], dtype=torch.long)
    for rows, columns, x, y in ((none, some, a, other_g), (some, none, other_a, g)):
        one = Curvature.of(w, a, g).without_structures(w, rows, columns)
        torch.testing.assert_close(one, Curvature.of(w, x, y).without_structures(w, rows, columns))


def test_single_costs_with_damped_and_undamped_numerators():
    """The paper's numerator is undamped; with the damped one a cost is the loss it leads to."""
    w, a, g = random_problem()
    there = Curvature.of(w, a, g, a_damping=0.05, g_damping=0.1)
    rows, columns = there.structure_costs(w)
    ai, gi = there.a_inverse.diagonal(), there.g_inverse.diagonal()
    torch.testing.assert_close(rows, 0.5 * (w @ a @ w.T).diagonal() / gi)
    torch.testing.assert_close(columns, 0.5 * (w.T @ g @ w).diagonal() / ai)
    damped_a, damped_g = there.damped()
    damped_rows = kronecker.row_costs(w, damped_a, gi)
    damped_columns = kronecker.column_costs(w, damped_g, ai)
    none = torch.tensor([], dtype=torch.long)
    for k in range(len(w)):
        new = there.without_structures(w, torch.tensor([k]), none)
        assert there.loss(new - w) == pytest.approx(float(damped_rows[k]))
        assert float(rows[k]) < float(damped_rows[k])
    for k in range(w.shape[1]):
        new = there.without_structures(w, none, torch.tensor([k]))
        assert there.loss(new - w) == pytest.approx(float(damped_columns[k]))
    row_scale, column_scale = there.element_scales()
    costs = 0.5 * (w * row_scale[:, None] * column_scale).square()
    torch.testing.assert_close(costs, element_costs(w, there))
    mask = torch.ones_like(w, dtype=torch.bool)
    mask[2, 3] = False
    loss = there.without_elements(w, mask, **EXACT).loss
    assert loss == pytest.approx(float(costs[2, 3]), rel=1e-5)


def test_one_after_the_other_is_the_joint_update_if_what_is_gone_is_left_out():
    """Of a curvature that stays: later shots do not undo the optimum of earlier ones."""
    w, a, g = random_problem()
    none = torch.tensor([], dtype=torch.long)
    dampings = {"a_damping": 0.0, "g_damping": 0.0}
    joint = Curvature.of(w, a, g, **dampings)
    rows, columns = torch.tensor([1, 4]), torch.tensor([0, 3, 7])
    want = joint.without_structures(w, rows, columns)
    step, alone = w, w.clone()
    for kind, k in (("row", 1), ("column", 7), ("row", 4), ("column", 0), ("column", 3)):
        one = torch.tensor([k])
        p, q = (one, none) if kind == "row" else (none, one)
        step = Curvature.of(step, a, g, **dampings).without_structures(step, p, q)
        alone += joint.without_structures(w, p, q) - w
    torch.testing.assert_close(step, want, rtol=1e-8, atol=1e-9)
    mask = structure_mask(w, rows, columns)
    assert joint.loss(alone * mask - w) > 1.01 * joint.loss(want - w)


def test_a_unit_of_columns_costs_the_loss_of_removing_them_together():
    w, a, g = random_problem(6, 12)
    a[2], a[:, 2], w[:, 7] = 0, 0, 0  # a dead input, and a column that is gone
    there = Curvature.of(w, a, g, g_damping=0.0)
    none = torch.tensor([], dtype=torch.long)
    for columns in (
        torch.arange(12).view(4, 3),
        torch.arange(12).view(2, 6).T,
        torch.arange(12)[:, None],
    ):
        costs = there.unit_costs(w, columns)
        for cost, unit in zip(costs, columns, strict=True):
            new = there.without_structures(w, none, unit)
            assert float(cost) == pytest.approx(there.loss(new - w), abs=1e-12)
    assert float(costs[2]) == float(costs[7]) == 0


def dead_problem():
    """A row without gradient, a column without input, one row and one column removed before."""
    w, a, g = random_problem()
    g[1], g[:, 1], a[2], a[:, 2] = 0, 0, 0, 0
    w[4], w[:, 6] = 0, 0
    return w, a, g


def test_what_is_dead_costs_nothing_and_stays_out_of_the_update():
    w, a, g = dead_problem()
    there = Curvature.of(w, a, g)
    assert there.rows.tolist() == [0, 2, 3, 5]
    assert there.columns.tolist() == [0, 1, 3, 4, 5, 7, 8]
    rows, columns = there.structure_costs(w)
    assert (rows == 0).nonzero()[:, 0].tolist() == [1, 4]
    assert (columns == 0).nonzero()[:, 0].tolist() == [2, 6]
    mean_a, mean_g = a[there.columns, there.columns].mean(), g[there.rows, there.rows].mean()
    damped_a = there.a + 0.01 * mean_a * torch.eye(7, dtype=w.dtype)
    damped_g = there.g + 0.01 * mean_g * torch.eye(4, dtype=w.dtype)
    p, q = torch.tensor([0, 1, 4]), torch.tensor([2, 3, 6])
    new = there.without_structures(w, p, q)
    assert not new[p].any() and not new[:, q].any()
    part = there.alive(w)
    want = brute_force(part, structure_mask(part, [0], [2]), damped_a, damped_g)
    torch.testing.assert_close(there.alive(new), want)
    mask = random_mask(w, 0.4)
    new = there.without_elements(w, mask, **EXACT).weight
    want = brute_force(part, there.alive(mask), damped_a, damped_g)
    torch.testing.assert_close(there.alive(new), want, rtol=1e-7, atol=1e-8)
    # Dead weights that are kept have their values.
    assert torch.equal(new[1], w[1] * mask[1]) and torch.equal(new[:, 2], w[:, 2] * mask[:, 2])


def test_everything_dead_is_no_error():
    w, a, g = random_problem()
    there = Curvature.of(w, a, torch.zeros_like(g))
    assert not there.element_scales()[0].any()
    assert torch.equal(
        there.without_elements(w, random_mask(w, 0.5)).weight, w * random_mask(w, 0.5)
    )
    rows = torch.arange(len(w))
    assert not there.without_structures(w, rows, rows[:0]).any()


def test_a_bias_is_corrected_although_all_biases_are_zero():
    w, a, g = random_problem()
    w[:, -1] = 0
    there = Curvature.of(w, a, g, bias=True)
    assert 8 in there.columns.tolist()
    mask = random_mask(w, 0.5)
    mask[:, -1] = True
    assert bool((there.without_elements(w, mask).weight[:, -1] != 0).all())


def test_with_white_gradients_rows_are_independent():
    """G = I: SparseGPT's problem, cost w^2 / (2 [A^-1]_jj) and one reconstruction a row."""
    w, a, _ = random_problem()
    there = Curvature.of(w, a, torch.eye(6, dtype=w.dtype), g_damping=0.0)
    rows, columns = there.element_scales()
    torch.testing.assert_close(rows, torch.ones_like(rows))
    damped_a, _ = there.damped()
    inverse = torch.linalg.inv(damped_a)
    torch.testing.assert_close(columns, inverse.diagonal().rsqrt())
    mask = random_mask(w, 0.5)
    new = there.without_elements(w, mask, **EXACT).weight
    for row, old, kept in zip(new, w, mask, strict=True):
        q = (~kept).nonzero()[:, 0]
        want = old - inverse[:, q] @ torch.linalg.solve(inverse[q][:, q], old[q])
        torch.testing.assert_close(row, torch.where(kept, want, 0.0), rtol=1e-7, atol=1e-8)


def test_more_damping_where_needed_is_used_and_known():
    w, a, g = random_problem()
    a[:] = 1.0  # rank one
    there = Curvature.of(w, a, g, a_damping=0.0)
    settled = there.settled()
    assert there.used[0] > 0 and settled.a_damping == there.used[0]
    assert settled.used == there.used
    assert Curvature.of(w, *random_problem()[1:]).settled().a_damping == 0.01


# As a method on one matrix.


def golden_inputs():
    w, x = golden()
    factors = KroneckerFactors(4, 8, torch.device("cpu"), torch.float64)
    factors.update(Sample(x, golden_gradients(), 31, "leader"))
    factors.sequences, factors.targets = 1, 32
    return w, LayerInputs(x.square().sum(0), 32, x.T @ x).with_gradient(factors)


def test_golden_costs_do_not_depend_on_how_factors_are_balanced():
    w, inputs = golden_inputs()
    options = MethodOptions(own=SurgeonOptions(gradient_damping=0.01))
    costs = 0.5 * (w * METHOD.column_scale(inputs, options)).square()
    assert float(costs.sum()) == pytest.approx(0.152703938582)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.1), NM(2, 4)], ids=str)
def test_one_shot_on_one_matrix(pattern):
    w, inputs = golden_inputs()
    options = MethodOptions(own=SurgeonOptions(**EXACT))
    solution = METHOD.solve(w, inputs, pattern, options, None, None)
    a, g = inputs.gradient.normalised()
    there = Curvature.of(w, a, g, a_damping=0.01, g_damping=0.1)
    want = brute_force(w, solution.mask, *there.damped())
    torch.testing.assert_close(solution.weight, want, rtol=1e-6, atol=1e-7)
    assert solution.loss == pytest.approx(there.loss(want - w), rel=1e-6)
    costs = element_costs(w, there)
    if isinstance(pattern, NM):
        expected = ops.mask_nm(costs, 2, 4)
    else:
        expected = ops.mask_topk(costs.view(1, -1), round(32 * pattern.sparsity)).view_as(w)
    assert show(solution.mask) == show(expected)


def test_expects_factors():
    w, _ = golden()
    with pytest.raises(ValueError, match="llm-surgeon: expected calibration inputs, got none"):
        METHOD.solve(w, None, NM(2, 4), MethodOptions(), None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shots": 0}, "shots: expected at least 1, got 0"),
        ({"cap": 0.0}, r"cap: expected a number in \(0, 1\], got 0.0"),
        ({"corrections": -1}, "corrections: expected 0 or more"),
        ({"correction_rank": 0}, "correction_rank: expected at least 1"),
        ({"factor_memory": 0.0}, "factor_memory: expected a positive number"),
        ({"gradient_damping": 2.0}, r"gradient_damping: expected a number in \[0, 1\]"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"tolerance": 1.0}, r"tolerance: expected a number in \[0, 1\), got 1.0"),
        ({"refinements": 0}, "refinements: expected at least 1"),
        ({"fisher_samples": -1}, "fisher_samples: expected 0 or more, got -1"),
    ],
)
def test_options_are_checked(values, message):
    with pytest.raises(UserError, match=f"llm-surgeon {message}"):
        build_options("llm-surgeon", SurgeonOptions, values)


def test_gradient_damping_is_the_papers_by_default():
    assert SurgeonOptions().g_damping == 0.1
    assert SurgeonOptions(structure="rows").g_damping == 0.01
    assert SurgeonOptions(structure="rows", gradient_damping=0.0).g_damping == 0.0
