import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isa import AVAILABLE, restricted

from pyprune import ops

OP = "kron_quadratic"
ISAS = ["portable", "avx2", "avx512"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def exact(w, h):
    return ((w.double() @ h.double()) * w.double()).sum(1)


def problem(rows, cols, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    x = torch.randn(2 * cols + 1, cols, generator=gen, dtype=torch.float64)
    return w.to(dtype), (x.T @ x / len(x)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (300, 5), (70, 513), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_whole_product(backend, device, use_backend, shape, dtype):
    use_backend(backend, OP, device, dtype)
    w, h = problem(*shape, dtype)
    got = ops.kron_quadratic(w.to(device), h.to(device)).cpu().double()
    torch.testing.assert_close(got, exact(w, h), rtol=TOLERANCE[dtype], atol=0)


def test_columns_by_a_transposed_view(backend, device, use_backend):
    use_backend(backend, OP, device)
    w, _ = problem(70, 90, torch.float32)
    _, g = problem(1, 70, torch.float32, seed=1)
    want = (w.double().T @ g.double() @ w.double()).diagonal()
    got = ops.kron_quadratic(w.to(device).T, g.to(device)).cpu().double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_zero_row_is_zero_and_infinity_propagates(backend, device, use_backend):
    use_backend(backend, OP, device)
    w, h = problem(4, 20, torch.float32)
    w[1], w[2, 3] = 0, float("inf")
    got = ops.kron_quadratic(w.to(device), h.to(device)).cpu()
    assert got[1] == 0
    assert not got[2].isfinite()
    assert got[[0, 3]].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 23, 24, 48, 49, 97, 481, 530])
def test_every_instruction_set(isa, use_isa, use_backend, cols):
    """Around a panel's and a round's end, rows and columns as the operand lies."""
    use_backend("native", OP, "cpu")
    use_isa(isa)
    w, h = problem(61, cols, torch.float32)
    for same in (w, w.T.contiguous().T, torch.cat([w, w], dim=1)[:, :cols]):
        torch.testing.assert_close(
            ops.kron_quadratic(same, h).double(), exact(w, h), rtol=1e-5, atol=0
        )


def test_neither_dimension_of_unit_stride(backend, device, use_backend):
    use_backend(backend, OP, device)
    w, h = problem(5, 30, torch.float32)
    wide, tall = torch.zeros(10, 60), torch.zeros(60, 60)
    wide[::2, ::2], tall[::2, ::2] = w, h
    got = ops.kron_quadratic(wide.to(device)[::2, ::2], tall.to(device)[::2, ::2])
    torch.testing.assert_close(got.cpu().double(), exact(w, h), rtol=1e-5, atol=0)


def test_lower_blocks_are_not_read(backend, device, use_backend):
    """Beyond any panel's or tile's height below the diagonal."""
    use_backend(backend, OP, device)
    w, h = problem(7, 600, torch.float32)
    want = exact(w, h)
    h[300:, :40] = float("nan")
    got = ops.kron_quadratic(w.to(device), h.to(device)).cpu().double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_independent_of_thread_count(use_backend):
    use_backend("native", OP, "cpu")
    w, h = problem(133, 500, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.kron_quadratic(w, h))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_widened(dtype):
    w, h = problem(5, 7, torch.float32)
    got = ops.kron_quadratic(w.to(dtype), h)
    assert got.dtype == torch.float32
    assert torch.equal(got, ops.kron_quadratic(w.to(dtype).float(), h))


def test_opcheck():
    w, h = problem(5, 7, torch.float32)
    torch.library.opcheck(torch.ops.pyprune.kron_quadratic.default, (w, h))


@pytest.mark.parametrize(
    ("w", "h", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "h: expected shape"),
        (torch.ones(3), torch.ones(3, 3), "w: expected 2 dimensions"),
        (torch.ones(2, 3), torch.ones(3, 3).double(), "h: expected torch.float32 as w"),
        (torch.ones(2, 3).half(), torch.ones(3, 3).half(), "h: expected torch.float32 as w"),
        (torch.ones(2, 3).int(), torch.ones(3, 3), "w: expected bf16, fp16, fp32 or fp64"),
    ],
    ids=["square", "matrix", "dtypes", "half", "integers"],
)
def test_wrong_arguments(w, h, message):
    with pytest.raises(ValueError, match=message):
        ops.kron_quadratic(w, h)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 120),
    cols=st.integers(1, 600),
    scale=st.sampled_from([1e-12, 1.0, 1e9]),
    turned=st.booleans(),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 999),
)
def test_fuzz_native_against_float64(rows, cols, scale, turned, isa, seed):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen)
    x = torch.randn(3, cols, generator=gen) * scale  # rank 3: hardly any row cancels
    h = x.T @ x
    with restricted(isa):
        got = ops.kron_quadratic(w.T.contiguous().T if turned else w, h)
    size = w.double().abs() @ h.double().abs()
    bound = 3e-6 * (size * w.double().abs()).sum(1)
    assert bool(((got.double() - exact(w, h)).abs() <= bound).all())


def test_stacks(backend, device, use_backend):
    use_backend(backend, OP, device)
    made = [problem(7, 60, torch.float32, seed) for seed in range(3)]
    w, h = (torch.stack(ts).to(device) for ts in zip(*made, strict=True))
    each = torch.stack([ops.kron_quadratic(a, b) for a, b in zip(w, h, strict=True)])
    assert torch.equal(ops.kron_quadratic(w, h), each)
    torch.testing.assert_close(
        ops.kron_quadratic(w, h[0]), torch.stack([ops.kron_quadratic(a, h[0]) for a in w])
    )
    assert ops.kron_quadratic(w[:0], h[:0]).shape == (0, 7)
    with pytest.raises(ValueError, match="one size, got w 3, h 2"):
        ops.kron_quadratic(w, h[:2])
