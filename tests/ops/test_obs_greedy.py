import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isa import AVAILABLE, restricted

from pyprune import ops

OP = "obs_greedy"
MODULE = sys.modules["pyprune.ops.obs_greedy"]


@pytest.fixture
def dtype(backend, use_backend):
    """fp64 where the backend has it."""
    found = torch.float64 if backend == "reference" else torch.float32
    use_backend(backend, OP, "cpu", found)
    return found


def close(got, want):
    """Within what the dtype resolves of a problem whose pivots span three decades."""
    tolerance = 1e-9 if got.dtype == torch.float64 else 1e-3
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 1e-3)


def spd(cols, count=None, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    shape = (cols, cols) if count is None else (count, cols, cols)
    x = torch.randn(*shape[:-1], 2 * cols, generator=gen, dtype=torch.float64)
    h = x @ x.mT / (2 * cols) + 0.05 * torch.eye(cols, dtype=torch.float64)
    return h.to(dtype)


def problem(count=5, cols=12, own=False, seed=0):
    w = torch.randn(count, cols, generator=torch.Generator().manual_seed(seed + 1)).double()
    h = spd(cols, count if own else None, seed)
    return w, h, torch.linalg.inv(h)


def downdates(w, inverse, steps, nm=None, first=None):
    """Algorithm 1 of the paper on one problem, its inverse downdated and stored."""
    w, inverse = w.clone(), inverse.clone()
    gone, order, losses = torch.zeros(len(w), dtype=torch.bool), [], []
    for _ in range(steps):
        score = w.square() / inverse.diagonal() / 2
        score[gone] = float("inf")
        if nm is not None:
            n, m = nm
            closed = (gone.view(-1, m).sum(1) >= m - n).repeat_interleave(m)
            score[closed if first is None else closed & ~first] = float("inf")
        if first is not None and bool((first & ~gone).any()):
            score = torch.where(first & ~gone, 0.0, float("inf"))  # by index
        j = int(score.argmin())
        losses.append(float(w[j] ** 2 / inverse[j, j] / 2))
        w -= w[j] / inverse[j, j] * inverse[:, j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        gone[j] = True
        w[gone], inverse[gone], inverse[:, gone] = 0, 0, 0
        inverse[gone, gone] = 1
        order.append(j)
    return order, losses


def least_loss(w, h, kept):
    """1/2 d h d^T of the best weights for a mask."""
    d = torch.where(kept, 0, -w)
    if bool(kept.any()):
        d[kept] = torch.linalg.solve(h[kept][:, kept], -(h @ d)[kept])
    return 0.5 * float(d @ h @ d)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("nm", [None, (2, 4), (1, 3)], ids=str)
def test_is_the_papers_algorithm(dtype, nm, own):
    w, _, inverse = problem(own=own)
    steps = 12 if nm is None else 12 // nm[1] * (nm[1] - nm[0])
    order, loss = ops.obs_greedy(w.to(dtype), inverse.to(dtype), nm=nm)
    assert order.shape == loss.shape == (5, steps)
    for i, row in enumerate(w):
        want = downdates(row, inverse[i] if own else inverse, steps, nm)
        assert order[i].tolist() == want[0]
        close(loss[i], want[1])


def test_losses_add_up_to_that_of_the_joint_optimum(dtype):
    w, h, inverse = problem()
    order, loss = ops.obs_greedy(w.to(dtype), inverse.to(dtype))
    for row, steps, losses in zip(w, order, loss, strict=True):
        kept = torch.ones(12, dtype=torch.bool)
        for k, j in enumerate(steps):
            kept[j] = False
            close(losses[: k + 1].sum(), least_loss(row, h, kept))


def test_is_near_the_best_of_all_masks(dtype):
    ratios = []
    for seed in range(6):
        w, h, inverse = problem(count=1, cols=8, seed=seed)
        total = float(ops.obs_greedy(w.to(dtype), inverse.to(dtype), steps=4).loss.sum())
        best = min(
            least_loss(w[0], h, ~torch.isin(torch.arange(8), torch.tensor(gone)))
            for gone in itertools.combinations(range(8), 4)
        )
        assert total >= best * (1 - 1e-4)
        ratios.append(total / best)
    assert sum(ratios) / len(ratios) < 1.1


@pytest.mark.parametrize("nm", [None, (2, 4)], ids=str)
def test_what_goes_first_goes_first(dtype, nm):
    w, _, inverse = problem()
    first = torch.zeros(5, 12, dtype=torch.bool)
    first[0, [3, 7]] = first[1, [4, 5, 6]] = first[2, :] = True
    steps = 12 if nm is None else 7
    order, loss = ops.obs_greedy(w.to(dtype), inverse.to(dtype), nm=nm, first=first, steps=steps)
    assert order[0, :2].tolist() == [3, 7] and order[1, :3].tolist() == [4, 5, 6]
    for i, row in enumerate(w[:2]):
        count = 12 if nm is None else 6 + int(first[i].view(3, 4).sum(1).clamp_min(2).sum() - 6)
        want = downdates(row, inverse, count, nm, first[i])
        assert order[i, :count].tolist() == want[0]
        close(loss[i, :count], want[1])
        assert order[i, count:].tolist() == [-1] * (steps - count)


def test_ties_zeros_and_uncoupled_weights(dtype):
    eye = torch.eye(8, dtype=dtype)
    w = torch.ones(2, 8, dtype=dtype)
    w[1, [2, 6]] = 0
    order, loss = ops.obs_greedy(w, eye)
    assert order[0].tolist() == list(range(8))
    assert order[1].tolist() == [2, 6, 0, 1, 3, 4, 5, 7]
    assert loss[1].tolist() == [0, 0] + [0.5] * 6
    assert ops.obs_greedy(w, eye, nm=(2, 4)).order[0].tolist() == [0, 1, 4, 5]


def test_single_precision(backend, use_backend):
    w, _, inverse = problem(count=40, cols=64)
    want = ops.obs_greedy(w, inverse, steps=32)
    use_backend(backend, OP, "cpu")
    got = ops.obs_greedy(w.float(), inverse.float(), steps=32)
    same = [set(a) == set(b) for a, b in zip(got.order.tolist(), want.order.tolist(), strict=True)]
    assert sum(same) >= 38
    torch.testing.assert_close(got.loss.sum(1).double(), want.loss.sum(1), rtol=1e-4, atol=0)


def test_problems_in_parts_are_the_problems_together(monkeypatch):
    w, _, inverse = problem(own=True)
    whole = ops.obs_greedy(w, inverse)
    monkeypatch.setattr(MODULE, "HELD_BYTES", 2 * 12 * 12 * 8)
    parts = ops.obs_greedy(w, inverse)
    assert torch.equal(parts.order, whole.order) and torch.equal(parts.loss, whole.loss)


@pytest.mark.parametrize(("count", "cols", "steps"), [(0, 4, 2), (3, 1, 1), (2, 5, 0), (1, 3, 3)])
def test_awkward_shapes(dtype, count, cols, steps):
    w, _, inverse = problem(count=count, cols=cols)
    order, loss = ops.obs_greedy(w.to(dtype), inverse.to(dtype), steps=steps)
    assert order.shape == loss.shape == (count, steps)
    assert bool((order >= 0).all()) and bool(loss.isfinite().all())


def test_strides_do_not_matter(dtype):
    w, _, inverse = (t.to(dtype) for t in problem())
    wide = torch.zeros(5, 24, dtype=dtype)
    wide[:, ::2] = w
    a, b = ops.obs_greedy(wide[:, ::2], inverse.T), ops.obs_greedy(w, inverse)
    assert torch.equal(a.order, b.order)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, use_isa, use_backend):
    w, _, inverse = (t.float() for t in problem(count=3, cols=37))
    want = ops.obs_greedy(w.double(), inverse.double(), steps=20)
    use_isa(isa)
    use_backend("native", OP, "cpu")
    got = ops.obs_greedy(w, inverse, steps=20)
    assert torch.equal(got.order, want.order)
    close(got.loss, want.loss)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 4),
    cols=st.integers(1, 40),
    share=st.floats(0, 1),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 999),
)
def test_fuzz_native_against_float64(count, cols, share, isa, seed):
    """Each step costs what the exact inverse says, and next to nothing more than the best one."""
    w = torch.randn(count, cols, generator=torch.Generator().manual_seed(seed)).double()
    inverse = torch.linalg.inv(spd(cols, seed=seed))
    with restricted(isa):
        found = ops.obs_greedy(w.float(), inverse.float(), steps=round(share * cols))
    for x, order, losses in zip(w, found.order.tolist(), found.loss.tolist(), strict=True):
        assert len(set(order)) == len(order)
        left, rest = inverse.clone(), x.clone()
        for j, loss in zip(order, losses, strict=True):
            costs = rest.square() / left.diagonal() / 2
            assert loss <= 1.01 * float(costs.min()) + 1e-5
            assert abs(loss - float(costs[j])) <= 0.01 * loss + 1e-5
            rest -= rest[j] / left[j, j] * left[:, j]
            left -= torch.outer(left[:, j], left[j]) / left[j, j]
            rest[j], left[j, j] = float("inf"), 1.0


def test_opcheck():
    w, _, inverse = problem(count=2, cols=4)
    torch.library.opcheck(torch.ops.pyprune.obs_greedy, (w, inverse, None, 3, 0, 0))
    first = torch.zeros(2, 4, dtype=torch.bool)
    torch.library.opcheck(torch.ops.pyprune.obs_greedy, (w, inverse, first, 2, 2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(4)}, r"w: expected \[P, C\]"),
        ({"w": torch.ones(2, 4, dtype=torch.int64)}, r"w: expected \[P, C\] in fp32 or fp64"),
        ({"inverse": torch.eye(3)}, r"inverse: expected shape \(4, 4\)"),
        ({"inverse": torch.eye(4).double()}, "inverse: expected torch.float32 like w"),
        ({"first": torch.ones(2, 4)}, "first: expected torch.bool"),
        ({"steps": 5}, "steps: expected a number from 0 to C = 4, got 5"),
        ({"nm": (2, 3)}, "m to divide C = 4, got 2:3"),
        ({"nm": (5, 4), "steps": 1}, "expected 0 <= n <= m"),
    ],
)
def test_says_what_is_wrong(change, message):
    given = {"w": torch.ones(2, 4), "inverse": torch.eye(4), **change}
    with pytest.raises(ValueError, match=message):
        ops.obs_greedy(given.pop("w"), given.pop("inverse"), **given)
