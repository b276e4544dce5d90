from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops.obs_factor import damping_ladder

OP = "obs_factor"

# One column, LAPACK leaves only, odd splits of the recursion, several levels of it.
SIZES = [1, 2, 37, 128, 129, 300, 700]


def hessian(n: int, tokens: int | None = None, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 2 * n, n, generator=gen, dtype=torch.float64)
    return x.T @ x


def damped(h: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def residual(u: torch.Tensor, h: torch.Tensor) -> float:
    """How far `U H U^T` is from the identity: zero for the exact factor."""
    u = u.double()
    return float((u @ h @ u.T - torch.eye(len(h), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_the_inverse(backend, device, use_backend, n, dtype):
    use_backend(backend, OP, device, dtype)
    h = hessian(n)
    u, dead, damping = ops.obs_factor(h.to(dtype).to(device))
    u = u.cpu()
    assert u.dtype == dtype and torch.equal(u, u.triu()) and bool((u.diagonal() > 0).all())
    assert residual(u, damped(h)) < (1e-4 if dtype == torch.float32 else 1e-11)
    assert not dead.any() and damping.item() == 0.01 and damping.dtype == torch.float64


def test_is_the_factor_of_three_factorisations(backend, use_backend):
    use_backend(backend, OP, "cpu")
    h = damped(hessian(150))
    want = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    torch.testing.assert_close(ops.obs_factor(hessian(150)).u, want, rtol=1e-10, atol=1e-14)


def test_diagonal_is_the_first_entry_of_the_trailing_inverse():
    h = hessian(9)
    u = ops.obs_factor(h).u
    for j in range(9):
        inverse = torch.linalg.inv(damped(h)[j:, j:])
        torch.testing.assert_close(u[j, j] * u[j, j:], inverse[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(40,), (3, 40)])
def test_inverse_diagonal(shape):
    h = torch.stack([hessian(40, seed=s) for s in range(3)]) if len(shape) == 2 else hessian(40)
    got = ops.inverse_diagonal(ops.obs_factor(h).u)
    stack = h if h.dim() == 3 else h[None]
    want = torch.stack([torch.linalg.inv(damped(m)).diagonal() for m in stack]).view(shape)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_batch_equals_one_by_one_and_input_is_untouched(backend, use_backend):
    use_backend(backend, OP, "cpu")
    h = torch.stack([hessian(33, seed=s) for s in range(4)]).float()
    h[2] = 0
    before = h.clone()
    batch = ops.obs_factor(h)
    assert torch.equal(h, before)
    for b in range(4):
        for whole, single in zip(batch, ops.obs_factor(h[b]), strict=True):
            assert torch.equal(whole[b], single)


def test_strided_input(backend, use_backend):
    use_backend(backend, OP, "cpu")
    big = torch.zeros(100, 120, dtype=torch.float64)
    view = big[::2, 10:110:2]
    view.copy_(hessian(50))
    assert not view.is_contiguous()
    assert torch.equal(ops.obs_factor(view).u, ops.obs_factor(hessian(50)).u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_dead_inputs_get_a_unit_diagonal_that_counts_in_the_mean(
    backend, use_backend, dtype, scale
):
    """As in the SparseGPT code, which writes the ones before it takes the mean. So the scale of H
    matters then: with small inputs the ones are most of the mean, with large ones next to none."""
    use_backend(backend, OP, "cpu")
    h = scale * hessian(12)
    h[[3, 7]] = 0
    h[:, [3, 7]] = 0
    u, dead, _ = ops.obs_factor(h.to(dtype))
    assert dead.nonzero().flatten().tolist() == [3, 7]
    filled = h.clone()
    filled[[3, 7], [3, 7]] = 1
    # A mean without the ones would be seen.
    assert abs(filled.diagonal().mean() / h.diagonal()[~dead].mean() - 1) > 0.05
    assert residual(u, damped(filled)) < (1e-4 if dtype == torch.float32 else 1e-11)
    # No input at all: the identity, damped.
    u, dead, _ = ops.obs_factor(torch.zeros(5, 5))
    assert bool(dead.all())
    torch.testing.assert_close(u, torch.eye(5) / 1.01**0.5)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_deficient(backend, use_backend, tokens, dtype):
    use_backend(backend, OP, "cpu")
    h = hessian(64, tokens)
    u, _, damping = ops.obs_factor(h.to(dtype))
    assert damping == 0.01
    assert residual(u, damped(h)) < (2e-3 if dtype == torch.float32 else 1e-9)


def test_badly_scaled(backend, use_backend):
    use_backend(backend, OP, "cpu")
    scale = torch.logspace(-6, 6, 80, dtype=torch.float64)
    for h in (hessian(80) * scale.outer(scale), hessian(80) * 1e-25, hessian(80) * 1e25):
        u = ops.obs_factor(h.float()).u
        assert residual(u, damped(h)) < 1e-3


def test_single_precision_is_retried_in_double_before_damping_grows(backend, use_backend):
    use_backend(backend, OP, "cpu")
    # Definite by 1e-6 of its scale: of the order of the rounding error of fp32.
    h = damped(hessian(300, 10), 1e-6).float()
    assert torch.linalg.cholesky_ex(h.flip(0, 1)).info != 0
    factor = ops.obs_factor(h, damping=0.0)
    assert factor.damping == 0 and factor.u.dtype == torch.float32
    want = ops.obs_factor(h.double(), damping=0.0).u
    torch.testing.assert_close(factor.u.double(), want, rtol=1e-5, atol=1e-6)


def test_damping_ladder_is_climbed_and_reported(backend, use_backend):
    use_backend(backend, OP, "cpu")
    h = hessian(30)
    h -= 0.5 * h.diagonal().mean() * torch.eye(30, dtype=h.dtype)
    lowest = torch.linalg.eigvalsh(h)[0] / h.diagonal().mean()
    assert -1 < lowest < -0.1
    factor = ops.obs_factor(h)
    assert factor.damping == 1.0 and residual(factor.u, damped(h, 1.0)) < 1e-10
    assert damping_ladder(0.01, 1.0) == [0.01, 0.1, 1.0]
    assert damping_ladder(0.02, 1.0) == [0.02, 0.2]
    assert damping_ladder(0.0, 1e-5) == pytest.approx([0.0, 1e-6, 1e-5])


def test_not_positive_definite_lists_the_dampings(backend, use_backend):
    use_backend(backend, OP, "cpu")
    h = torch.diag(torch.tensor([1.0, 1.0, -0.9]))
    with pytest.raises(ops.NotPositiveDefiniteError, match=r"0\.01, 0\.1, 1 times"):
        ops.obs_factor(h)
    stack = torch.stack([torch.eye(3), h])
    with pytest.raises(ops.NotPositiveDefiniteError, match=r"matrices \[1\]"):
        ops.obs_factor(stack)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [(1, 4), (4, 1), (2, 2)])
def test_non_finite(backend, use_backend, value, at):
    use_backend(backend, OP, "cpu")
    h = hessian(6)
    h[at] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        ops.obs_factor(h)


def test_an_overflowing_sum_is_still_finite(backend, use_backend):
    use_backend(backend, OP, "cpu")
    h = torch.eye(300) * 2e37
    assert not h.sum().isfinite()
    assert residual(ops.obs_factor(h).u, damped(h.double())) < 1e-5


def test_no_columns(backend, use_backend):
    use_backend(backend, OP, "cpu")
    assert ops.obs_factor(torch.zeros(0, 0)).u.shape == (0, 0)
    assert ops.obs_factor(torch.zeros(0, 4, 4)).u.shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"h": torch.zeros(3)}, "h: expected shape"),
        ({"h": torch.zeros(3, 4)}, "h: expected shape"),
        ({"h": torch.zeros(3, 3, dtype=torch.bfloat16)}, "h: expected fp32 or fp64"),
        ({"h": torch.eye(3), "damping": -1.0}, "damping: expected"),
        ({"h": torch.eye(3), "damping": float("nan")}, "damping: expected"),
        ({"h": torch.eye(3), "max_damping": 0.001}, "max_damping: expected"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        ops.obs_factor(args.pop("h"), **args)


def test_opcheck():
    for h in (hessian(9).float(), torch.stack([hessian(9), hessian(9)])):
        torch.library.opcheck(torch.ops.pyprune.obs_factor, (h, 0.01, 1.0))


def test_compiles_without_graph_breaks():
    def f(h):
        return ops.inverse_diagonal(torch.ops.pyprune.obs_factor(h, 0.01, 1.0)[0])

    h = hessian(9)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(h)
    torch.testing.assert_close(got, f(h))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 90),
    tokens=st.integers(1, 200),
    leaf=st.integers(1, 40),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
)
def test_fuzz_every_split(n, tokens, leaf, seed, scale):
    h = hessian(n, tokens, seed) * scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("pyprune.ops.obs_factor"), "LEAF", {"cpu": leaf})
        u = ops.obs_factor(h).u
    assert residual(u, damped(h)) < 1e-9


@pytest.fixture
def with_threads():
    """Calls a function with a number of threads; the number is restored in the end."""
    threads = torch.get_num_threads()

    def run(count, function):
        torch.set_num_threads(count)
        return function()

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("n", [1, 49, 96, 145, 500])
def test_independent_of_thread_count(use_backend, with_threads, n):
    """From strips for all threads to threads without a strip."""
    use_backend("native", OP, "cpu", torch.float32)
    h = hessian(n).float()
    want = with_threads(1, lambda: ops.obs_factor(h).u)
    for count in (2, 3, 5):
        assert torch.equal(with_threads(count, lambda: ops.obs_factor(h).u), want)


@pytest.mark.parametrize("at", [0, 130, 399])
def test_a_pivot_that_fails_stops_all_threads(use_backend, with_threads, at):
    """Whichever block it is in: no thread waits for what is not coming."""
    use_backend("native", OP, "cpu", torch.float32)
    h = hessian(400).float()
    h[at, at] = -1e6
    for count in (1, 2, 3):
        with pytest.raises(ops.NotPositiveDefiniteError):
            with_threads(count, lambda: ops.obs_factor(h, max_damping=0.01))


@pytest.mark.parametrize("at", [(90, 7), (7, 90), (50, 50), (99, 99)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_any_entry_that_is_not_finite_is_found(use_backend, at, value):
    """In whichever triangle it is: the native kernel computes with one of them only."""
    use_backend("native", OP, "cpu", torch.float32)
    h = hessian(100).float()
    h[at] = value
    with pytest.raises(ValueError, match="expected finite values"):
        ops.obs_factor(h)


def test_one_of_a_stack_is_retried_in_double(use_backend):
    use_backend("native", OP, "cpu", torch.float32)
    poor = damped(hessian(300, 10), 1e-6).float()
    stack = torch.stack([hessian(300).float(), poor])
    factor = ops.obs_factor(stack, damping=0.0)
    assert factor.damping.tolist() == [0.0, 0.0]
    for h, u in zip(stack, factor.u, strict=True):
        assert torch.equal(ops.obs_factor(h, damping=0.0).u, u)
