import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops

OP = "kron_pcg"


def definite(n, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 3, n, generator=gen, dtype=torch.float64)
    x *= torch.linspace(0.2, 2, n, dtype=torch.float64)
    return x.T @ x / n + 0.05 * torch.eye(n, dtype=torch.float64)


def problem(rows=6, cols=9, sparsity=0.5, dtype=torch.float64):
    gen = torch.Generator().manual_seed(7)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    mask = torch.rand(rows, cols, generator=gen) >= sparsity
    a, g = definite(cols, 1), definite(rows, 2)
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


@pytest.mark.parametrize("preconditioner", ["diagonal", "inverse"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_equals_brute_force(backend, device, use_backend, preconditioner, sparsity):
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = (t.to(device) for t in problem(sparsity=sparsity))
    inverses = {}
    if preconditioner == "inverse":
        inverses = {"a_inverse": torch.linalg.inv(a), "g_inverse": torch.linalg.inv(g)}
    got = ops.kron_pcg(w, mask, a, g, iterations=300, tolerance=0, **inverses).cpu()
    torch.testing.assert_close(got, brute_force(*problem(sparsity=sparsity)), rtol=0, atol=1e-9)
    assert not got[~mask.cpu()].any()


def test_inverse_needs_fewer_iterations_for_few_weights(backend, device, use_backend):
    """With a few removed weights the inverse is nearly the exact preconditioner."""
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = problem(24, 32, sparsity=0.03)
    best = loss(ops.kron_pcg(w, mask, a, g, iterations=2000, tolerance=0), w, a, g)
    short = {"iterations": 6, "tolerance": 0}
    inverses = {"a_inverse": torch.linalg.inv(a), "g_inverse": torch.linalg.inv(g)}
    by_diagonal = loss(ops.kron_pcg(w, mask, a, g, **short), w, a, g)
    by_inverse = loss(ops.kron_pcg(w, mask, a, g, **short, **inverses), w, a, g)
    assert by_inverse - best < 0.2 * (by_diagonal - best)


def test_loss_falls_with_every_iteration(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = problem(20, 30)
    losses = [
        loss(ops.kron_pcg(w, mask, a, g, iterations=i, tolerance=0), w, a, g) for i in range(12)
    ]
    assert losses[0] == pytest.approx(loss(torch.where(mask, w, 0), w, a, g))
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_single_precision(backend, device, use_backend):
    use_backend(backend, OP, device)
    w, mask, a, g = problem(dtype=torch.float32)
    got = ops.kron_pcg(w, mask, a, g, iterations=200, tolerance=1e-6)
    best = loss(brute_force(w, mask, a, g), w, a, g)
    assert loss(got, w, a, g) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_and_everything_pruned(backend, device, use_backend, keep):
    use_backend(backend, OP, device, torch.float64)
    w, mask, a, g = problem()
    got = ops.kron_pcg(w, torch.full_like(mask, keep), a, g)
    assert torch.equal(got, w if keep else torch.zeros_like(w))


def test_opcheck():
    w, mask, a, g = problem(dtype=torch.float32)
    torch.library.opcheck(torch.ops.pyprune.kron_pcg.default, (w, mask, a, g, None, None, 5, 1e-3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(6, 9)}, "mask: expected torch.bool"),
        ({"a": torch.eye(8).double()}, "a: expected shape"),
        ({"g": torch.eye(6)}, "g: expected torch.float64"),
        ({"a_inverse": torch.eye(9).double()}, "expected both or neither"),
        ({"iterations": -1}, "iterations: expected"),
        ({"tolerance": 1.0}, "tolerance: expected"),
    ],
    ids=["mask", "a", "g", "one inverse", "iterations", "tolerance"],
)
def test_wrong_arguments(change, message):
    w, mask, a, g = problem()
    with pytest.raises(ValueError, match=message):
        ops.kron_pcg(**{"w": w, "mask": mask, "a": a, "g": g, **change})


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 8),
    sparsity=st.floats(0, 1),
    inverse=st.booleans(),
    seed=st.integers(0, 999),
)
def test_fuzz_against_brute_force(rows, cols, sparsity, inverse, seed):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    mask = torch.rand(rows, cols, generator=gen) >= sparsity
    a, g = definite(cols, seed), definite(rows, seed + 1)
    want = brute_force(w, mask, a, g)
    inverses = {}
    if inverse:
        inverses = {"a_inverse": torch.linalg.inv(a), "g_inverse": torch.linalg.inv(g)}
    got = ops.kron_pcg(w, mask, a, g, iterations=500, tolerance=0, **inverses)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    single = {name: t.float() for name, t in inverses.items()}
    got = ops.kron_pcg(
        w.float(), mask, a.float(), g.float(), iterations=500, tolerance=1e-6, **single
    )
    best = loss(want, w, a, g)
    assert loss(got, w, a, g) <= best * (1 + 1e-3) + 1e-5 * loss(0 * w, w, a, g)
