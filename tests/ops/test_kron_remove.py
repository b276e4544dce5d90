import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops

OP = "kron_remove"
DTYPES = (torch.float32, torch.float64)


def definite(n, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 3, n, generator=gen, dtype=torch.float64)
    return x.T @ x / max(n, 1) + 0.1 * torch.eye(n, dtype=torch.float64)


def problem(rows, cols, gone_rows, gone_cols, seed=0):
    """W, the indices that go, A, G and their inverses, fp64."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    p = torch.randperm(rows, generator=gen)[:gone_rows]
    q = torch.randperm(cols, generator=gen)[:gone_cols]
    a, g = definite(cols, seed + 1), definite(rows, seed + 2)
    return w, p, q, a, g, torch.linalg.inv(a), torch.linalg.inv(g)


def least_squares(w, p, q, a, g):
    """By the kept block of the whole Kronecker matrix."""
    kept = torch.ones_like(w, dtype=torch.bool)
    kept[p], kept[:, q] = False, False
    f, k, flat = torch.kron(g, a), kept.flatten(), w.flatten()
    d = torch.where(k, 0.0, -flat)
    d[k] = torch.linalg.solve(f[k][:, k], -f[k] @ d)
    return (flat + d).view_as(w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gone", [(0, 0), (2, 0), (0, 3), (2, 3), (5, 1), (1, 7), (5, 7)], ids=str)
def test_equals_brute_force(backend, device, use_backend, dtype, gone):
    use_backend(backend, OP, device, dtype)
    w, p, q, a, g, ai, gi = problem(5, 7, *gone)
    args = [t.to(dtype).to(device) for t in (w, ai, gi)]
    got = ops.kron_remove(args[0], p.to(device), q.to(device), *args[1:]).cpu()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got.double(), least_squares(w, p, q, a, g), rtol=0, atol=tolerance)
    assert not got[p].any() and not got[:, q].any()


def test_strided_input_is_untouched(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float64)
    w, p, q, _, _, ai, gi = (t.to(device) for t in problem(9, 6, 2, 2))
    turned, before = w.T.contiguous().T, w.clone()
    got = ops.kron_remove(turned, p, q, ai.T.contiguous().T, gi)
    torch.testing.assert_close(got, ops.kron_remove(w, p, q, ai, gi))
    assert torch.equal(turned, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_widened(dtype):
    w, p, q, _, _, ai, gi = problem(5, 7, 2, 3)
    given = (p, q, ai.float(), gi.float())
    got = ops.kron_remove(w.to(dtype), *given)
    assert torch.equal(got, ops.kron_remove(w.to(dtype).float(), *given))


def test_opcheck():
    w, p, q, _, _, ai, gi = problem(5, 7, 2, 3)
    torch.library.opcheck(torch.ops.pyprune.kron_remove.default, (w, p, q, ai, gi))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(3)}, "w: expected 2 dimensions"),
        ({"w": torch.ones(5, 7).int()}, "w: expected bf16, fp16, fp32 or fp64"),
        ({"w": torch.ones(5, 7).half()}, "a_inverse: expected torch.float32 as w"),
        ({"rows": torch.ones(2)}, "rows: expected int64"),
        ({"columns": torch.ones(2, 2).long()}, "columns: expected int64"),
        ({"a_inverse": torch.eye(5).double()}, "a_inverse: expected shape"),
        ({"g_inverse": torch.eye(5)}, "g_inverse: expected torch.float64"),
    ],
    ids=["matrix", "integers", "half", "rows", "columns", "side", "dtype"],
)
def test_wrong_arguments(change, message):
    w, p, q, _, _, ai, gi = problem(5, 7, 2, 3)
    args = {"w": w, "rows": p, "columns": q, "a_inverse": ai, "g_inverse": gi, **change}
    with pytest.raises(ValueError, match=message):
        ops.kron_remove(**args)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 60),
    share_rows=st.floats(0, 1),
    share_cols=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_fuzz_at_once_against_one_after_the_other(rows, cols, share_rows, share_cols, seed):
    w, p, q, _, _, ai, gi = problem(
        rows, cols, int(share_rows * rows), int(share_cols * cols), seed
    )
    want = ops.registry.IMPLS[OP]["reference"].resolve()(w, p, q, ai, gi)
    single = ops.kron_remove(w.float(), p, q, ai.float(), gi.float())
    torch.testing.assert_close(ops.kron_remove(w, p, q, ai, gi), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(single.double(), want, rtol=1e-3, atol=1e-3)


def test_stacks(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float64)
    made = [problem(9, 6, 2, 3, seed) for seed in range(3)]
    w, p, q, _, _, ai, gi = (torch.stack(ts).to(device) for ts in zip(*made, strict=True))
    each = [ops.kron_remove(*args) for args in zip(w, p, q, ai, gi, strict=True)]
    assert torch.equal(ops.kron_remove(w, p, q, ai, gi), torch.stack(each))
    shared = [ops.kron_remove(w[b], p[0], q[b], ai[0], gi[b]) for b in range(3)]
    assert torch.equal(ops.kron_remove(w, p[0], q, ai[0], gi), torch.stack(shared))
    assert ops.kron_remove(w[:0], p[:0], q[:0], ai[:0], gi[:0]).shape == (0, 9, 6)
    with pytest.raises(ValueError, match="one size, got w 3, rows 2"):
        ops.kron_remove(w, p[:2], q, ai, gi)
