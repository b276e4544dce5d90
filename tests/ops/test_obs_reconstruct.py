import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops.masked_cg import Preconditioner, TorchSteps, near_hessian

OP = "obs_reconstruct"
MODULE = sys.modules["pyprune.ops.obs_reconstruct"]
# Tight enough to see fp32 rounding rather than where the iterations stopped.
TIGHT = 1e-9
DTYPES = (torch.float32, torch.float64)


def problem(rows, cols, tokens=None, sparsity=0.5, seed=0):
    """Weights, the Hessian of correlated inputs and a random mask, fp64."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    mix = torch.randn(cols, cols, generator=gen, dtype=torch.float64)
    mix = mix / max(cols, 1) ** 0.5 + torch.eye(cols, dtype=torch.float64)
    tokens = 4 * cols if tokens is None else tokens
    x = torch.randn(tokens, cols, generator=gen, dtype=torch.float64) @ mix
    mask = torch.rand(rows, cols, generator=gen, dtype=torch.float64) >= sparsity
    return w, x.T @ x, mask


def damped(h, damping=0.01):
    """As `obs_factor` has it: a dead input's diagonal counts as one."""
    dead = (h.diagonal() == 0).to(h.dtype)
    mean = (h.diagonal() + dead).mean()
    return h + torch.diag(dead + damping * mean)


def least_squares(w, h, mask, damping=0.01):
    """By a general solver on every row's kept part."""
    h = damped(h, damping)
    out = torch.zeros_like(w)
    for i, kept in enumerate(mask):
        s = kept.nonzero()[:, 0]
        if len(s):
            out[i, s] = torch.linalg.solve(h[s][:, s], (w[i] @ h)[s])
    return out


def losses(x, w, h, damping=0.01):
    return (((x - w) @ damped(h, damping)) * (x - w)).sum(1)


def assert_solution(got, w, h, mask, atol=2e-4, resolved=2e-6):
    want = least_squares(w, h, mask)
    torch.testing.assert_close(got.weight.double(), want, rtol=0, atol=atol)
    assert bool((got.weight[~mask] == 0).all())
    # The loss is a difference; what fp32 resolves of it is relative to the row's output.
    scale = losses(torch.zeros_like(w), w, h)
    assert bool(((got.loss - losses(want, w, h)).abs() <= resolved * scale + 1e-12).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 2), (5, 17), (1, 64), (7, 50), (2, 131)])
def test_is_the_least_squares_solution(backend, device, use_backend, dtype, rows, cols):
    use_backend(backend, OP, device, dtype)
    w, h, mask = problem(rows, cols)
    got = ops.obs_reconstruct(
        *(t.to(device) for t in (w.to(dtype), h.to(dtype), mask)), tolerance=TIGHT
    )
    got = ops.ObsReconstruct(*(t.cpu() for t in got))
    assert got.weight.dtype == dtype and got.loss.dtype == torch.float64
    assert got.iterations.dtype == torch.int32 and got.iterations.shape == (rows,)
    # On a GPU fp32 operands are sums of two bf16 numbers.
    resolved = 1e-5 if device == "cuda" and dtype == torch.float32 else 2e-6
    assert_solution(got, w, h, mask, 2e-4 if dtype == torch.float32 else 1e-9, resolved)
    assert bool(got.converged(1e-6).all())


@pytest.mark.parametrize("damping", [1e-4, 0.01])
@pytest.mark.parametrize("cols", [5, 31, 32, 100, 200])
def test_near_hessian_bounds_the_least_eigenvalue_on_any_columns(cols, damping):
    _, h, mask = problem(12, cols, tokens=cols // 2 + 1)
    h = damped(h * torch.outer(*[torch.logspace(-1, 1, cols, dtype=h.dtype)] * 2), damping)
    near = near_hessian(h.float(), torch.linalg.inv(h).float())
    assert near.low.shape == (min(32, cols // 4 // 8 * 8), cols) and 0 < near.least <= 0.5
    low = near.low.double()
    about = torch.diag(near.diagonal.double()) + low.mT @ low
    preconditioner = Preconditioner(near, mask)
    for i, kept in enumerate(mask):
        s = kept.nonzero()[:, 0]
        inverse = torch.linalg.inv(about[s][:, s])
        assert float(torch.linalg.eigvals(inverse @ h[s][:, s]).real.min()) >= near.least
        residual = torch.where(kept, torch.randn(cols), 0)
        got = preconditioner.apply(residual.expand(12, -1))[i, s]
        want = inverse @ residual[s].double()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.85, 0.97])
def test_kept_columns_near_and_far_apart(use_isa, use_backend, isa, sparsity):
    """Rows cut by one permutation a vector, by several, and rows too short for any."""
    use_backend("native", OP, "cpu")
    use_isa(isa)
    for cols in (31, 32, 300):
        w, h, mask = problem(5, cols, sparsity=sparsity, seed=cols)
        mask[0, : cols // 2] = False
        mask[1, cols // 3 :] = False
        got = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT)
        assert_solution(got, w, h, mask)


@pytest.mark.parametrize("sparsity", [0.02, 0.9])
def test_few_and_many_pruned(backend, use_backend, sparsity):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(4, 90, sparsity=sparsity)
    assert_solution(ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT), w, h, mask)


def test_matches_the_closed_form_of_obs(backend, use_backend):
    """w - Hi_:Q (Hi_QQ)^-1 w_Q, the same solution written with the inverse."""
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(6, 20)
    inverse = torch.linalg.inv(damped(h))
    want = w.clone()
    for row, kept in zip(want, mask, strict=True):
        q = (~kept).nonzero()[:, 0]
        row -= inverse[:, q] @ torch.linalg.solve(inverse[q][:, q], row[q])
    got = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT)
    torch.testing.assert_close(got.weight.double(), want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("cols", [7, 64, 203])
def test_every_instruction_set(use_isa, use_backend, isa, cols):
    use_backend("native", OP, "cpu")
    use_isa(isa)
    w, h, mask = problem(19, cols, seed=3)
    mask[4] = False
    mask[5] = True
    assert_solution(ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT), w, h, mask)


def test_native_hands_wide_matrices_to_products(monkeypatch, use_backend):
    use_backend("native", OP, "cpu")
    w, h, mask = problem(70, 60)
    mask[3] = False
    taken = []
    real = MODULE.solve_by_products
    monkeypatch.setattr(MODULE, "solve_by_products", lambda *args: taken.append(1) or real(*args))
    monkeypatch.setattr(MODULE, "NATIVE_COLUMNS", 60)
    got = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT)
    assert taken == [1]
    assert_solution(got, w, h, mask)
    monkeypatch.setattr(MODULE, "NATIVE_COLUMNS", 61)
    packed = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT)
    assert taken == [1]
    torch.testing.assert_close(packed.weight, got.weight, rtol=0, atol=2e-4)


def test_rows_that_are_done_leave_the_products(monkeypatch, use_backend):
    use_backend("native", OP, "cpu")
    monkeypatch.setattr(MODULE, "NATIVE_COLUMNS", 0)
    w, h, mask = problem(16, 80)
    mask[:14] = True  # nothing to do in these
    sizes = []
    real = TorchSteps.advance
    monkeypatch.setattr(
        TorchSteps, "advance", lambda self, p, hp: sizes.append(len(p)) or real(self, p, hp)
    )
    got = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT)
    assert set(sizes) == {2}
    assert got.iterations[:14].tolist() == [0] * 14 and bool((got.iterations[14:] > 4).all())
    assert torch.equal(got.weight[:14], w[:14].float())
    assert_solution(got, w, h, mask)


def test_rows_with_all_or_nothing(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(6, 40)
    mask[1], mask[4] = False, True
    got = ops.obs_reconstruct(w.float(), h.float(), mask, start=torch.randn(6, 40))
    assert not got.weight[1].any()
    assert torch.equal(got.weight[4], w[4].float()) and got.loss[4] == 0
    assert got.iterations[[1, 4]].tolist() == [0, 0] and bool(got.converged(1e-3).all())


def test_a_row_of_zeros_stays_one(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(3, 20)
    w[1] = 0
    got = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT)
    assert not got.weight[1].any() and got.loss[1] == 0 and got.gap[1] == 0
    assert_solution(got, w, h, mask)


def test_a_pruned_zero_costs_nothing(backend, use_backend):
    """The least loss is zero: no fraction of it can be reached, rounding is the limit."""
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(4, 40)
    w[~mask] = 0
    far = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    got = ops.obs_reconstruct(w.float(), h.float(), mask, start=far, tolerance=TIGHT)
    torch.testing.assert_close(got.weight.double(), w, rtol=0, atol=2e-4)
    assert bool(got.converged(1e-4).all())
    assert torch.equal(ops.obs_reconstruct(w.float(), h.float(), mask).weight, w.float())


def test_start_does_not_matter_and_a_sweep_saves_iterations(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, _ = problem(6, 48)
    factor = ops.obs_factor(h.float())
    swept = ops.obs_sweep(w.float(), factor.u, nm=(2, 4))
    args = (w.float(), h.float(), swept.mask)
    cold = ops.obs_reconstruct(*args, tolerance=TIGHT)
    warm = ops.obs_reconstruct(*args, start=swept.weight, factor=factor, tolerance=TIGHT)
    torch.testing.assert_close(warm.weight, cold.weight, rtol=0, atol=2e-4)
    assert bool((warm.loss <= 2 * swept.loss * (1 + 1e-5)).all())
    assert float(warm.loss.sum()) < 0.95 * 2 * float(swept.loss.sum())
    kept = warm.weight.view(6, -1, 4).ne(0).sum(2)
    assert torch.equal(kept, torch.full_like(kept, 2))
    if backend != "reference":
        loose = ops.obs_reconstruct(*args, start=swept.weight, factor=factor)
        assert bool((loose.iterations < cold.iterations).all()) and bool(
            (loose.iterations > 0).all()
        )


def test_gap_bounds_what_is_left(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(6, 90)
    least = losses(least_squares(w, h, mask), w, h)
    for count in (0, 1, 2, 3, 5):
        got = ops.obs_reconstruct(w.float(), h.float(), mask, max_iterations=count)
        excess = losses(got.weight.double(), w, h) - least
        assert bool((excess <= got.gap * got.loss * (1 + 1e-4) + 1e-5 * least).all())
        torch.testing.assert_close(
            got.loss, losses(got.weight.double(), w, h), rtol=1e-4, atol=1e-3
        )
        if backend != "reference":
            assert bool((got.iterations <= count).all())


def test_running_out_of_iterations_is_reported(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(6, 64)
    got = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=1e-6, max_iterations=2)
    assert bool(got.converged(1e-6).all()) == (backend == "reference")
    if backend != "reference":
        assert got.iterations.tolist() == [2] * 6 and not got.converged(1e-6).any()


@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_rank_deficient(backend, use_backend, tokens):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(4, 64, tokens=tokens)
    got = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=1e-8)
    best = losses(least_squares(w, h, mask), w, h)
    reached = losses(got.weight.double(), w, h)
    assert bool((reached <= best * (1 + 1e-3) + 1e-5 * losses(0 * w, w, h)).all())


@pytest.mark.parametrize("tokens", [1, 9, 31])
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_rank_deficient_with_hardly_any_damping(use_backend, tokens, damping):
    use_backend("native", OP, "cpu")
    w, h, mask = problem(4, 200, tokens=tokens)
    got = ops.obs_reconstruct(w.float(), h.float(), mask, damping=damping, max_iterations=500)
    assert bool(got.weight.isfinite().all())
    scale = (w @ h * w).sum(1)
    assert bool((((got.weight.double() - w) @ h * (got.weight - w)).sum(1) <= 1e-4 * scale).all())


def test_badly_scaled(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(3, 48)
    for scale in (1e-20, 1e20):
        got = ops.obs_reconstruct(w.float(), (h * scale).float(), mask, tolerance=TIGHT)
        torch.testing.assert_close(
            got.weight.double(), least_squares(w, h, mask), rtol=0, atol=2e-4
        )


@pytest.mark.parametrize("wide", [False, True], ids=["packed", "products"])
def test_powers_of_two_change_no_bit(backend, device, use_backend, monkeypatch, wide):
    """Some take no step, or a NaN, where the arithmetic sees these numbers as they are."""
    use_backend(backend, OP, device)
    monkeypatch.setattr(MODULE, "NATIVE_COLUMNS", 0 if wide else 2560)
    w, h, mask = problem(5, 40)
    mask[2] = True
    start = w + torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    w, h, start = w.float(), (h / h.diagonal().mean()).float(), start.float()
    mask = mask.to(device)

    def run(w, h, start):
        return ops.obs_reconstruct(
            w.to(device), h.to(device), mask, start=start.to(device), tolerance=1e-6
        )

    want = run(w, h, start)
    for h_power, w_power in (
        (42, 0), (-92, 0), (-110, 0), (126, 0), (0, 66), (0, -66), (-92, 66)
    ):  # fmt: skip
        by, powers = 2.0**w_power, (h_power, w_power)
        got = run(w * by, h * 2.0**h_power, start * by)
        assert torch.equal(got.weight, want.weight * by), powers
        assert torch.equal(got.loss, want.loss * 2.0**h_power * by**2), powers
        assert torch.equal(got.gap, want.gap), powers
        assert torch.equal(got.iterations, want.iterations), powers
        assert bool(got.converged(1e-6).all()), powers
        assert torch.equal(got.weight[2].cpu(), w[2] * by), powers


def test_each_matrix_and_row_has_its_own_scale(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(4, 30)
    w, h, mask = w.float().expand(3, -1, -1), h.float().expand(3, -1, -1), mask.expand(3, -1, -1)
    want = ops.obs_reconstruct(w, h, mask)
    by_h = torch.tensor([2.0**-96, 1, 2.0**80])[:, None, None]
    by_w = torch.tensor([1, 2.0**-70, 2.0**90, 2.0**-30])[:, None]
    got = ops.obs_reconstruct(w * by_w, h * by_h, mask)
    assert torch.equal(got.weight, want.weight * by_w)
    assert torch.equal(got.loss, want.loss * by_h[:, 0].double() * by_w[:, 0].double() ** 2)
    assert torch.equal(got.gap, want.gap)


def test_a_row_that_keeps_everything_keeps_its_smallest_weights(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w = torch.tensor([[1e38, 1e-30, 1.0]])
    got = ops.obs_reconstruct(w, torch.eye(3), torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(got.weight, w) and got.loss[0] == 0


def test_an_ordinary_scale_copies_nothing():
    w, h, mask = (t[None] for t in problem(3, 9))
    args = MODULE._Args(w, h, torch.zeros(1, 9), h, mask, w, 1e-3, 10)
    assert args.scaled(*args.scales()) is args
    by_w = args._replace(w=w * 2.0**30)
    assert by_w.scaled(*by_w.scales()).h is h


def test_dead_inputs_keep_their_weights(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, mask = problem(7, 30)
    h[[3, 20]] = 0
    h[:, [3, 20]] = 0
    mask[:, 3] = True
    mask[:, 20] = False
    got = ops.obs_reconstruct(w.float(), h.float(), mask, tolerance=TIGHT)
    torch.testing.assert_close(got.weight[:, 3], w[:, 3].float(), rtol=0, atol=1e-6)
    want = least_squares(w, h, mask)
    torch.testing.assert_close(got.weight.double(), want, rtol=0, atol=2e-4)
    # All of them dead: nothing is known, nothing moves.
    got = ops.obs_reconstruct(w.float(), torch.zeros(30, 30), mask)
    assert torch.equal(got.weight, torch.where(mask, w.float(), 0))


def test_batches_share_a_hessian_or_not(backend, use_backend):
    use_backend(backend, OP, "cpu")
    parts = [problem(2, 12, seed=s) for s in range(3)]
    w, h, mask = (torch.stack(t) for t in zip(*parts, strict=True))
    w, h = w.float(), h.float()
    for stack, each in ((h, h), (h[:1], h[[0, 0, 0]]), (h[0], h[[0, 0, 0]])):
        batch = ops.obs_reconstruct(w, stack, mask)
        for b in range(3):
            single = ops.obs_reconstruct(w[b], each[b], mask[b])
            for whole, part in zip(batch, single, strict=True):
                assert torch.equal(whole[b], part)


def test_strided_inputs_are_untouched(backend, use_backend):
    use_backend(backend, OP, "cpu")
    w, h, mask = (t.T.contiguous().T for t in problem(4, 20))
    w, h = w.float(), h.float()
    start = torch.randn(20, 4).T
    before = [t.clone() for t in (w, h, mask, start)]
    got = ops.obs_reconstruct(w, h, mask, start=start)
    for t, old in zip((w, h, mask, start), before, strict=True):
        assert torch.equal(t, old)
    same = ops.obs_reconstruct(*(t.contiguous() for t in (w, h, mask)), start=start.contiguous())
    torch.testing.assert_close(got.weight, same.weight, rtol=0, atol=1e-3)


def test_nothing_at_all(backend, use_backend):
    use_backend(backend, OP, "cpu")
    for shape in ((0, 8), (3, 0), (0, 4, 8)):
        got = ops.obs_reconstruct(
            torch.zeros(shape), torch.eye(shape[-1]), torch.ones(shape, dtype=torch.bool)
        )
        assert got.weight.shape == shape and got.gap.shape == shape[:-1]


def test_independent_of_thread_count(use_backend):
    use_backend("native", OP, "cpu")
    w, h, mask = problem(37, 70)
    threads = torch.get_num_threads()
    factor = ops.obs_factor(h.float())
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ops.obs_reconstruct(w.float(), h.float(), mask, factor=factor))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].iterations, results[1].iterations)
    torch.testing.assert_close(results[0].weight, results[1].weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(3)}, "w: expected"),
        ({"w": torch.zeros(2, 3, dtype=torch.int32)}, "w: expected bf16"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, "mask: expected shape"),
        ({"mask": torch.ones(2, 3)}, "mask: expected torch.bool"),
        ({"start": torch.ones(3, 3)}, "start: expected shape"),
        ({"h": torch.eye(4)}, r"h: expected shape \(1, 3, 3\)"),
        ({"tolerance": 0.0}, "tolerance: expected"),
        ({"max_iterations": -1}, "max_iterations: expected"),
        ({"h": torch.full((3, 3), float("nan"))}, "NaN or infinity"),
    ],
)
def test_bad_arguments(change, message):
    args = {"w": torch.zeros(2, 3), "h": torch.eye(3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    args |= change
    with pytest.raises(ValueError, match=message):
        ops.obs_reconstruct(args.pop("w"), args.pop("h"), args.pop("mask"), **args)


def test_opcheck():
    w, h, mask = problem(4, 9)
    w, h, mask = w[None].float(), h[None].float(), mask[None]
    u = ops.obs_factor(h).u
    for start in (None, torch.randn(1, 4, 9)):
        args = (w, h, torch.zeros(1, 9), u, mask, start, 1e-3, 10)
        torch.library.opcheck(torch.ops.pyprune.obs_reconstruct, args)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 70),
    tokens=st.integers(1, 150),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_fuzz(rows, cols, tokens, sparsity, seed):
    w, h, mask = problem(rows, cols, tokens, sparsity, seed)
    best = losses(least_squares(w, h, mask), w, h)
    energy = losses(0 * w, w, h)
    got = ops.obs_reconstruct(w.float(), h.float(), mask)
    assert bool(got.converged(1e-3).all()) and bool((got.weight[~mask] == 0).all())
    reached = losses(got.weight.double(), w, h)
    assert bool((reached <= best * 1.002 + 1e-5 * energy).all())


def test_a_shared_hessian_is_prepared_once(monkeypatch, use_backend):
    use_backend("native", OP, "cpu")
    calls = []
    real = MODULE.near_hessian
    monkeypatch.setattr(MODULE, "near_hessian", lambda *args: calls.append(1) or real(*args))
    w, h, mask = problem(2, 40)
    stack, masks = torch.stack([w, -w, 2 * w]).float(), torch.stack([mask, ~mask, mask])
    got = ops.obs_reconstruct(stack, h.float(), masks, tolerance=TIGHT)
    assert calls == [1]
    for b, each in enumerate(masks):
        assert_solution(ops.ObsReconstruct(*(t[b] for t in got)), stack[b].double(), h, each)
