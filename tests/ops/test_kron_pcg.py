import itertools
import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops import masked_cg
from pyprune.ops.kron_pcg import _Lines, _Preconditioner
from pyprune.ops.kron_scaled import Scaled, left_to_gain

OP = "kron_pcg"


def definite(n, seed, fall=1.0):
    """Eigenvalues fall as those of activations do: a few are large."""
    gen = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=torch.float64)).Q
    return (q / torch.arange(1, n + 1, dtype=torch.float64) ** fall) @ q.T


def problem(rows=6, cols=9, sparsity=0.5, dtype=torch.float64, fall=1.0):
    gen = torch.Generator().manual_seed(7)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    mask = torch.rand(rows, cols, generator=gen) >= sparsity
    a, g = definite(cols, 1, fall), definite(rows, 2, fall)
    return w.to(dtype), mask, a.to(dtype), g.to(dtype)


def loss(new, w, a, g):
    d = new.double() - w.double()
    return 0.5 * float(((g.double() @ d @ a.double()) * d).sum())


def brute_force(w, mask, a, g):
    """Constrained least squares on the full Kronecker matrix, by its kept block."""
    f = torch.kron(g.double(), a.double())
    kept, flat = mask.flatten(), w.double().flatten()
    d = torch.where(kept, 0.0, -flat)
    d[kept] = torch.linalg.solve(f[kept][:, kept], -f[kept] @ d)
    return (flat + d).view_as(w)


# With 32 rows or columns and more a side has directions beside its diagonal.
SHAPES = [(6, 9), (9, 6), (1, 9), (9, 1), (1, 1), (36, 40), (40, 33), (4, 64), (64, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_equals_brute_force(backend, device, use_backend, shape, sparsity):
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = (t.to(device) for t in problem(*shape, sparsity=sparsity))
    got = ops.kron_pcg(w, mask, a, g, iterations=300, tolerance=0)
    want = brute_force(*(t.cpu() for t in (w, mask, a, g)))
    torch.testing.assert_close(got.weight.cpu(), want, rtol=0, atol=1e-9)
    assert not got.weight[~mask].any()
    assert float(got.loss) == pytest.approx(loss(want, *(t.cpu() for t in (w, a, g))))
    assert got.weight.is_contiguous()


@pytest.mark.parametrize("shape", [(40, 72), (72, 40)])
@pytest.mark.parametrize("sparsity", [0.03, 0.5])
def test_directions_save_iterations(
    backend, device, use_backend, shape, sparsity, monkeypatch, by_kept
):
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = problem(*shape, sparsity=sparsity)
    mine = ops.kron_pcg(w, mask, a, g, tolerance=1e-3)
    monkeypatch.setattr(masked_cg, "RANK", 0)
    by_diagonal = ops.kron_pcg(w, mask, a, g, tolerance=1e-3)
    assert int(mine.iterations) < 0.7 * int(by_diagonal.iterations)


def test_preconditioner_is_the_inverse_without_a_mask_and_of_either_side_alone():
    gen = torch.Generator().manual_seed(3)
    low_a, low_g = (2 * torch.randn(8, n, generator=gen, dtype=torch.float64) for n in (12, 10))
    r, kept = torch.randn(10, 12, generator=gen, dtype=torch.float64), torch.ones(10, 12)
    a, g = (low.T @ low + torch.eye(low.shape[1], dtype=low.dtype) for low in (low_a, low_g))
    some = (torch.rand(10, 12, generator=gen) > 0.4).double()
    some[3], some[:, 5] = 0, 0

    def apply(low_a, low_g, kept, r):
        unused = torch.empty(0)
        parts = (unused, kept.double(), unused, unused, low_a, low_g, unused, unused)
        return _Preconditioner(Scaled(*parts)).apply(r)

    both = torch.linalg.solve(g, torch.linalg.solve(a, r, left=False))
    torch.testing.assert_close(apply(low_a, low_g, kept, r), both)
    for low_one, low_two in ((low_a, 0 * low_g), (0 * low_a, low_g)):
        near = torch.kron(
            low_two.T @ low_two + torch.eye(10, dtype=r.dtype),
            low_one.T @ low_one + torch.eye(12, dtype=r.dtype),
        )
        on = some.flatten().bool()
        want = torch.zeros(120, dtype=r.dtype)
        want[on] = torch.linalg.solve(near[on][:, on], (r * some).flatten()[on])
        got = apply(low_one, low_two, some, r * some)
        torch.testing.assert_close(got, want.view_as(r))


def test_root_squares_to_the_inverse():
    gen = torch.Generator().manual_seed(3)
    low = 2 * torch.randn(8, 12, generator=gen, dtype=torch.float64)
    kept = (torch.rand(5, 12, generator=gen) > 0.4).double()
    lines, eye = _Lines(low, kept), torch.eye(12, dtype=low.dtype)
    for keeps, root, inverse in zip(kept, lines.root(), lines.inverse(), strict=True):
        part = low * keeps
        w = eye - part.T @ root @ part
        torch.testing.assert_close(w.T @ w, eye - part.T @ inverse @ part)
        torch.testing.assert_close(
            eye - part.T @ inverse @ part, torch.linalg.inv(eye + part.T @ part)
        )


def test_loss_falls_with_every_iteration(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = problem(36, 48)
    results = [ops.kron_pcg(w, mask, a, g, iterations=i, tolerance=0) for i in range(12)]
    losses = [float(result.loss) for result in results]
    assert losses == pytest.approx([loss(result.weight, w, a, g) for result in results])
    assert losses[0] == pytest.approx(loss(torch.where(mask, w, 0), w, a, g))
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert [int(result.iterations) for result in results] == list(range(12))


@pytest.fixture
def by_kept(monkeypatch):
    """Whatever is pruned, the multipliers are not tried."""
    monkeypatch.setattr(import_module("pyprune.ops.kron_pcg"), "MULTIPLIERS_SHARE", -1.0)


@pytest.mark.parametrize("tolerance", [0.05, 0.01, 1e-4])
@pytest.mark.parametrize("fall", [0.5, 1.5])
def test_gap_is_about_what_there_is_left(backend, device, use_backend, tolerance, fall, by_kept):
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = problem(48, 64, fall=fall)
    least = float(ops.kron_pcg(w, mask, a, g, iterations=500, tolerance=1e-12).loss)
    got = ops.kron_pcg(w, mask, a, g, iterations=200, tolerance=tolerance)
    assert got.converged(tolerance) and int(got.iterations) < 200
    assert float(got.loss) / least - 1 <= 2.5 * tolerance
    short = ops.kron_pcg(w, mask, a, g, iterations=int(got.iterations) - 1, tolerance=tolerance)
    assert not short.converged(tolerance) and float(short.gap) > tolerance


def test_gap_is_unknown_with_few_iterations(by_kept):
    w, mask, a, g = problem(36, 48)
    few, more = (ops.kron_pcg(w, mask, a, g, iterations=i) for i in (3, 4))
    assert math.isinf(float(few.gap)) and not few.converged(0.9)
    assert math.isfinite(float(more.gap))


def test_left_to_gain_is_the_rest_of_a_geometric_series():
    gains = [0.5**i for i in range(8)]
    assert left_to_gain(gains) == pytest.approx(0.5**7)
    assert left_to_gain(gains[:3]) == math.inf
    assert left_to_gain([1.0, 1.0, 1.0, 2.0]) == math.inf
    assert left_to_gain([1.0, 0.0, 0.0, 0.0]) == 0
    # A lull of two iterations is seen through.
    lull = [1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.01, 0.01]
    assert left_to_gain(lull[-4:]) < 1e-3 and left_to_gain(lull) > 1


def test_single_precision(backend, device, use_backend):
    use_backend(backend, OP, device)
    w, mask, a, g = (t.to(device) for t in problem(33, 40, dtype=torch.float32))
    got = ops.kron_pcg(w, mask, a, g, iterations=200, tolerance=1e-6)
    w, mask, a, g = (t.cpu() for t in (w, mask, a, g))
    best = loss(brute_force(w, mask, a, g), w, a, g)
    assert loss(got.weight.cpu(), w, a, g) == pytest.approx(best, rel=1e-4)
    assert float(got.loss) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_and_everything_pruned(backend, device, use_backend, keep):
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = problem(33, 34)
    got = ops.kron_pcg(w, torch.full_like(mask, keep), a, g)
    assert torch.equal(got.weight, w if keep else torch.zeros_like(w))
    assert int(got.iterations) == 0 and float(got.gap) == 0
    assert float(got.loss) == pytest.approx(0 if keep else loss(0 * w, w, a, g))


def test_no_weights():
    w, mask, a, g = problem(4, 0)
    got = ops.kron_pcg(w, mask, a, g)
    assert got.weight.shape == (4, 0) and float(got.loss) == 0 and got.converged(0)


def test_nan_is_not_convergence():
    w, mask, a, g = problem(33, 34)
    w[2, 3] = torch.nan
    for mask[2, 3] in (True, False):
        got = ops.kron_pcg(w, mask, a, g)
        assert not got.converged(0.9) and math.isnan(float(got.loss))
        assert bool(got.weight.isnan().any()) == bool(mask[2, 3])
    w, mask, a, g = problem(33, 34)
    a[2, 3] = torch.nan
    with pytest.raises(RuntimeError):
        ops.kron_pcg(w, mask, a, g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_widened(dtype):
    w, mask, a, g = problem(dtype=torch.float32)
    got = ops.kron_pcg(w.to(dtype), mask, a, g)
    assert torch.equal(got.weight, ops.kron_pcg(w.to(dtype).float(), mask, a, g).weight)


def test_opcheck():
    w, mask, a, g = problem(33, 34, dtype=torch.float32)
    torch.library.opcheck(torch.ops.pyprune.kron_pcg.default, (w, mask, a, g, 5, 1e-3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(6, 9)}, "mask: expected torch.bool"),
        ({"a": torch.eye(8).double()}, "a: expected shape"),
        ({"g": torch.eye(6)}, "g: expected torch.float64"),
        ({"iterations": -1}, "iterations: expected"),
        ({"tolerance": 1.0}, "tolerance: expected"),
    ],
    ids=["mask", "a", "g", "iterations", "tolerance"],
)
def test_wrong_arguments(change, message):
    w, mask, a, g = problem()
    with pytest.raises(ValueError, match=message):
        ops.kron_pcg(**{"w": w, "mask": mask, "a": a, "g": g, **change})


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_fuzz_against_brute_force(rows, cols, sparsity, seed):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    mask = torch.rand(rows, cols, generator=gen) >= sparsity
    a, g = definite(cols, seed), definite(rows, seed + 1)
    want = brute_force(w, mask, a, g)
    got = ops.kron_pcg(w, mask, a, g, iterations=500, tolerance=1e-14)
    best = loss(want, w, a, g)
    # The promise is of the loss, by estimate; what is above the least is that of the distance.
    assert loss(got.weight, want, a, g) <= 1e-13 * best + 1e-20
    assert not got.weight[~mask].any()
    got = ops.kron_pcg(w.float(), mask, a.float(), g.float(), iterations=500, tolerance=1e-6)
    limit = best * (1 + 1e-3) + 1e-5 * loss(0 * w, w, a, g)
    assert loss(got.weight, w, a, g) <= limit


def test_stacks():
    w, mask, a, g = problem(36, 40, 0.4)
    stack = torch.stack([w, 2 * w, w.flip(1)]), torch.stack([mask, mask, mask.flip(1)])
    both = torch.stack([a, a.flip(0, 1), definite(40, 5)])
    got = ops.kron_pcg(*stack, both, g, tolerance=1e-3)
    for b in range(3):
        one = ops.kron_pcg(stack[0][b], stack[1][b], both[b], g, tolerance=1e-3)
        for name in got._fields:
            assert torch.equal(getattr(got, name)[b], getattr(one, name))
    assert got.converged(1e-3) and not got.converged(0.5 * float(got.gap.max()))
    none = ops.kron_pcg(stack[0][:0], stack[1][:0], a, g)
    assert none.weight.shape == (0, 36, 40) and none.loss.shape == (0,) and none.converged(0)
    with pytest.raises(ValueError, match="one size, got w 3, mask 2"):
        ops.kron_pcg(stack[0], stack[1][:2], a, g)
