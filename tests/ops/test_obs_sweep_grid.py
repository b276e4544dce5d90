"""The sweep that rounds what it keeps: joint sparsification and quantisation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isa import AVAILABLE, restricted
from ops.layers import damped, quadratic, random_layer, random_mask

from pyprune import ops
from pyprune.ops.registry import IMPLS

OP = "obs_sweep"
ISAS = ["portable", "avx2", "avx512"]
RULES = [{"sparsity": 0.5}, {"sparsity": 0.4, "scope": "row"}, {"nm": (2, 4)}]


def quantise(row, bits):
    """One row's values on its min-max grid, by the formula of the SparseGPT code."""
    least, most = min(0.0, float(row.min())), max(0.0, float(row.max()))
    if least == most:
        least, most = -1.0, 1.0
    levels = 2**bits - 1
    scale = (most - least) / levels
    zero = round(-least / scale)
    return lambda x: scale * (min(max(round(x / scale) + zero, 0), levels) - zero)


def oracle(w, h, mask, bits):
    """Weight by weight, on the rows of the inverse Hessian's Cholesky factor (fp64)."""
    u = torch.linalg.cholesky(torch.linalg.inv(damped(h)), upper=True)
    out = w.clone()
    for r in range(len(w)):
        rounded = quantise(w[r], bits)
        for j in range(w.shape[1]):
            value = rounded(float(out[r, j])) if mask[r, j] else 0.0
            error = (out[r, j] - value) / u[j, j]
            out[r, j + 1 :] -= error * u[j, j + 1 :]
            out[r, j] = value
    return out


def codes(weight, grid):
    return weight.double() / grid.step.double()[..., None]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_reference_is_the_algorithm(bits):
    w, h = random_layer(5, 24)
    mask = random_mask(5, 24)
    got = ops.obs_sweep(w, ops.obs_factor(h).u, mask=mask, grid=ops.row_grid(w, bits))
    torch.testing.assert_close(got.weight, oracle(w, h, mask, bits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_loss_is_the_quadratic_form(rule):
    w, h = random_layer(9, 64)
    got = ops.obs_sweep(w, ops.obs_factor(h).u, grid=ops.row_grid(w, 4), **rule)
    torch.testing.assert_close(got.loss, quadratic(got.weight - w, damped(h)), rtol=1e-9, atol=0)
    # The errors of rounding are spread as well: less than rounding what a plain sweep leaves.
    plain = ops.obs_sweep(w, ops.obs_factor(h).u, **rule)
    after = ops.round_to_grid(plain.weight, ops.row_grid(w, 4))
    assert float(got.loss.sum()) < float(quadratic(after - w, damped(h)).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rule", [*RULES, {"mask": True}], ids=str)
def test_matches_float64(backend, device, use_backend, rule, bits):
    """A weight half-way between two values may fall either way, and moves those after it."""
    rows, cols = 33, 40 if backend == "triton" else 200
    w, h = random_layer(rows, cols)
    rule = {"mask": random_mask(rows, cols)} if "mask" in rule else rule
    u, grid = ops.obs_factor(h).u, ops.row_grid(w, bits)
    want = ops.obs_sweep(w, u, grid=grid, **rule)
    use_backend(backend, OP, device)
    on_device = {k: v.to(device) if k == "mask" else v for k, v in rule.items()}
    single = ops.RowGrid(*(t.float().to(device) for t in grid))
    got = ops.obs_sweep(w.float().to(device), u.float().to(device), grid=single, **on_device)
    got = ops.ObsSweep(*(t.cpu() for t in got))
    level = codes(got.weight, grid)
    assert float((level - level.round()).abs().max()) < 1e-3
    assert bool((level.round() >= grid.low[:, None]).all())
    assert bool((level.round() <= grid.high[:, None]).all())
    assert bool((got.weight[~got.mask] == 0).all())
    assert not bool(torch.signbit(got.weight[got.weight == 0]).any())
    same = (level.round() == codes(want.weight, grid).round()).double().mean()
    assert same > (0.98 if bits == 4 else 0.9)
    torch.testing.assert_close(got.loss.double().sum(), want.loss.sum(), rtol=2e-2, atol=0)
    assert (got.mask == want.mask).double().mean() > 0.98


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, use_isa, use_backend):
    """Sixteen bits: the grid is fine enough to compare with the sweep that does not round."""
    use_backend("native", OP, "cpu")
    w, h = random_layer(61, 150)
    mask = random_mask(61, 150)
    u = ops.obs_factor(h).u
    want = ops.obs_sweep(w.float(), u.float(), mask=mask)
    use_isa(isa)
    wide = ops.row_grid(w.float() * 4, 16)  # updated weights leave the dense row's range
    got = ops.obs_sweep(w.float(), u.float(), mask=mask, grid=wide)
    torch.testing.assert_close(got.weight, want.weight, rtol=0, atol=2e-3)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-3, atol=1e-4)


def test_batch_equals_one_by_one(backend, device, use_backend):
    use_backend(backend, OP, device)
    layers = [random_layer(11, 24, seed=s) for s in range(3)]
    w = torch.stack([w for w, _ in layers]).float().to(device)
    u = torch.stack([ops.obs_factor(h).u for _, h in layers]).float().to(device)
    grid = ops.row_grid(w, 4)
    batch = ops.obs_sweep(w, u, nm=(2, 4), grid=grid)
    for b in range(3):
        single = ops.obs_sweep(w[b], u[b], nm=(2, 4), grid=ops.RowGrid(*(t[b] for t in grid)))
        for whole, part in zip(batch, single, strict=True):
            assert torch.equal(whole[b], part)


def test_row_grid():
    w = torch.tensor([[-1.0, 0.5, 2.0], [0, 0, 0], [1, 2, 3], [-3, -2, -1]])
    grid = ops.row_grid(w, 2)
    torch.testing.assert_close(grid.step, torch.tensor([1.0, 2 / 3, 1, 1]))
    assert grid.low.tolist() == [-1, -2, 0, -3] and grid.high.tolist() == [2, 1, 3, 0]
    rounded = ops.round_to_grid(w, grid)
    assert rounded.tolist() == [[-1, 0, 2], [0, 0, 0], [1, 2, 3], [-3, -2, -1]]
    for row, values in zip(w, ops.round_to_grid(3 * w, grid), strict=True):
        by_formula = quantise(row, 2)
        assert values.tolist() == pytest.approx([by_formula(3 * float(x)) for x in row])
    for scale in (1e-38, 1e38):
        far = ops.row_grid(w * scale, 8)
        assert bool(ops.round_to_grid(w * scale, far).isfinite().all())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"w": torch.zeros(2, 3), "bits": 0}, "bits: expected 1 to 16"),
        ({"w": torch.zeros(2, 3), "bits": 17}, "bits: expected 1 to 16"),
        ({"w": torch.zeros(2, 0), "bits": 4}, "w: expected at least one column"),
        ({"w": torch.zeros(2), "bits": 4}, "w: expected 2 or 3 dimensions"),
    ],
)
def test_bad_grids(args, message):
    with pytest.raises(ValueError, match=message):
        ops.row_grid(**args)


def test_grid_of_another_matrix():
    w, h = random_layer(5, 8)
    with pytest.raises(ValueError, match=r"grid.step: expected shape \(5,\)"):
        ops.obs_sweep(w, ops.obs_factor(h).u, nm=(2, 4), grid=ops.row_grid(w[:3], 4))


def test_opcheck():
    w, h = random_layer(5, 8)
    w, u = w.float()[None], ops.obs_factor(h).u.float()[None]
    grid = torch.stack(list(ops.row_grid(w, 4)), dim=1)
    op = torch.ops.pyprune.obs_sweep
    scale = torch.rand(1, 8)
    torch.library.opcheck(op, (w, u, None, None, None, 2, 4, 8, False, scale, grid))
    torch.library.opcheck(op, (w, u, None, random_mask(5, 8)[None], None, 0, 0, 8, False),
                          {"grid": grid})  # fmt: skip


def test_compiles_without_graph_breaks():
    w, h = random_layer(5, 8)
    w, u = w.float(), ops.obs_factor(h).u.float()

    def f(w, u):
        return ops.obs_sweep(w, u, nm=(2, 4), grid=ops.row_grid(w, 4)).weight * 2

    got = torch.compile(f, fullgraph=True, backend="aot_eager")(w, u)
    torch.testing.assert_close(got, f(w, u))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 150),
    bits=st.integers(1, 8),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 10_000),
)
def test_fuzz_without_correlation_is_rounding(rows, cols, bits, scale, isa, seed):
    """With U = I nothing is updated: every instruction set must round as the reference does, to
    the bit."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen) * scale
    mask = torch.rand(rows, cols, generator=gen) < 0.7
    grid = ops.row_grid(w, bits)
    with restricted(isa):
        got = ops.obs_sweep(w, torch.eye(cols), mask=mask, grid=grid)
    assert torch.equal(got.weight, torch.where(mask, ops.round_to_grid(w, grid), 0))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 200),
    bits=st.integers(2, 8),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    block_size=st.sampled_from([1, 8, 128]),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 10_000),
)
def test_fuzz_native_against_float64(rows, cols, bits, density, block_size, isa, seed):
    """By the loss: it hardly sees which way a weight half-way between two values falls."""
    w, h = random_layer(rows, cols, seed)
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    u, grid = ops.obs_factor(h).u, ops.row_grid(w, bits)
    want = IMPLS[OP]["reference"].resolve()(
        w[None], u[None], None, mask[None], None, 0, 0, 128, False, None,
        torch.stack(list(grid))[None],
    )[2][0]  # fmt: skip
    single = ops.RowGrid(*(t.float() for t in grid))
    with restricted(isa):
        got = ops.obs_sweep(w.float(), u.float(), mask=mask, grid=single, block_size=block_size)
    level = codes(got.weight, grid)
    assert float((level - level.round()).abs().max()) < 1e-3
    assert float(got.loss.sum()) == pytest.approx(float(want.sum()), rel=0.05, abs=1e-4)
