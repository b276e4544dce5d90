import pytest
import torch

from pyprune import ops

OP = "kron_quadratic"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def problem(rows, cols, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    x = torch.randn(2 * cols + 1, cols, generator=gen, dtype=torch.float64)
    return w.to(dtype), (x.T @ x / len(x)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (300, 5), (257, 513), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_whole_product(backend, device, use_backend, shape, dtype):
    use_backend(backend, OP, device, dtype)
    w, h = problem(*shape, dtype)
    want = ((w.double() @ h.double()) * w.double()).sum(1)
    got = ops.kron_quadratic(w.to(device), h.to(device)).cpu().double()
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=0)


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


def test_opcheck():
    w, h = problem(5, 7, torch.float32)
    torch.library.opcheck(torch.ops.pyprune.kron_quadratic.default, (w, h))


@pytest.mark.parametrize(
    ("w", "h", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "h: expected shape"),
        (torch.ones(3), torch.ones(3, 3), "w: expected 2 dimensions"),
        (torch.ones(2, 3), torch.ones(3, 3).double(), "h: expected fp32 or fp64"),
        (torch.ones(2, 3).half(), torch.ones(3, 3).half(), "w: expected fp32 or fp64"),
    ],
    ids=["square", "matrix", "dtypes", "half"],
)
def test_wrong_arguments(w, h, message):
    with pytest.raises(ValueError, match=message):
        ops.kron_quadratic(w, h)
