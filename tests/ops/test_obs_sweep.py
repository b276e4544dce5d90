import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isa import AVAILABLE, restricted
from ops.layers import damped, quadratic, random_layer, random_mask
from ops.sweep import ISAS, ONE_OF_EACH, OP, RULE_IDS, RULES, SHAPES, fewer, float64_sweep

from pyprune import ops

# --- goldens: of an fp64 reference ----------------------------------------------------------


def golden() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    i = torch.arange(4, dtype=torch.float64)[:, None]
    j = torch.arange(8, dtype=torch.float64)[None]
    t = torch.arange(32, dtype=torch.float64)[:, None]
    w = torch.cos(2.3 * i + 1.7 * j + 0.5 * i * j)
    waves = torch.cos(0.4 + 0.5 * t) + 0.6 * torch.sin(0.9 * t + 0.8 * j)
    x = (1 + 3 * (j == 3)) * (waves + 0.3 * torch.cos(2.1 * t * (j + 1)))
    return w, x, x.T @ x  # H = 2/N X^T X with N = 2


def pruned_rows(text: str) -> torch.Tensor:
    """`1` = pruned, rows separated by slashes, as a mask of kept weights."""
    return torch.tensor([[c == "." for c in row] for row in text.split(" / ")])


# arguments, mask, loss with the damped and the undamped Hessian, (row, its new weights)
GOLDENS = {
    "block8-reference": (
        {"sparsity": 0.5, "block_size": 8, "reference_count": True},
        "11...1.. / 111.1... / 111...11 / 111..11.",
        (7.154940449291, 3.647423537403),
        (0, [0, 0, -0.737524, 0.449357, 0.520511, 0, -1.188724, 1.532699]),
    ),
    "block4-reference": (
        {"sparsity": 0.5, "block_size": 4, "reference_count": True},
        "11....1. / 11..1..1 / 11....11 / 111.1111",
        (5.275559764693, 2.852104390097),
        None,
    ),
    "block8": (
        {"sparsity": 0.5, "block_size": 8},
        "11...1.. / 11..1... / 111...11 / 111..11.",
        (7.035837749862, 3.841934283667),
        (3, [0, 0, 0, -0.517655, -0.046939, 0, 0, 0.141728]),
    ),
    "block4": (
        {"sparsity": 0.5, "block_size": 4},
        "11..1.1. / 11..1..1 / 11...111 / 11...1..",
        (7.210664753279, 4.943516555209),
        (3, [0, 0, 0.665228, -0.742024, 0.534049, 0, 0.334119, -0.395206]),
    ),
    "2:4": (
        {"nm": (2, 4)},
        "11..1.1. / 11..1..1 / 11....11 / 11..11..",
        (6.347007395917, 4.116068904676),
        (0, [0, 0, -0.737524, 0.449357, 0, -0.466518, 0, 1.119958]),
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden(backend, device, use_backend, name, dtype):
    use_backend(backend, OP, device, dtype)
    kwargs, mask, (loss, undamped), row = GOLDENS[name]
    w, _, h = golden()
    u = ops.obs_factor(h).u.to(dtype)
    got = ops.obs_sweep(w.to(dtype).to(device), u.to(device), **kwargs)
    tight = dtype == torch.float64
    assert torch.equal(got.mask.cpu(), pruned_rows(mask))
    weight = got.weight.cpu().double()
    assert float(got.loss.double().sum()) == pytest.approx(loss, rel=1e-11 if tight else 1e-5)
    assert float(quadratic(weight - w, h).sum()) == pytest.approx(
        undamped, rel=1e-11 if tight else 1e-5
    )
    if row is not None:
        torch.testing.assert_close(weight[row[0]], torch.tensor(row[1]).double(), atol=2e-6, rtol=0)


def test_golden_wanda_mask_with_update(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, _, h = golden()
    mask = pruned_rows(".1...111 / 11..1..1 / 11....11 / ....1111")
    assert float(quadratic(-w * ~mask, h).sum()) == pytest.approx(14.326415945907, rel=1e-12)
    u = ops.obs_factor(h).u.float()
    got = ops.obs_sweep(w.float().to(device), u.to(device), mask=mask.to(device))
    delta = got.weight.cpu().double() - w
    assert float(quadratic(delta, h).sum()) == pytest.approx(10.566825969003, rel=1e-5)


# --- every backend against the fp64 reference, masks given ----------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [20, 128])
def test_given_mask_matches_float64(backend, device, use_backend, shape, block_size):
    rows, cols = shape[0], fewer(backend, shape[1], min(shape[1], 50))
    w, h = random_layer(rows, cols)
    u, mask = ops.obs_factor(h).u, random_mask(rows, cols)
    want = ops.obs_sweep(w, u, mask=mask)
    use_backend(backend, OP, device, torch.float32)
    got = ops.obs_sweep(
        w.float().to(device), u.float().to(device), mask=mask.to(device), block_size=block_size
    )
    assert torch.equal(got.mask.cpu(), mask)
    assert bool((got.weight.cpu()[~mask] == 0).all())
    torch.testing.assert_close(got.weight.cpu().double(), want.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.loss.cpu().double(), want.loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_chosen_masks_match_float64(backend, device, use_backend, rule):
    """Near ties may fall either way in fp32: on a Gaussian layer that is well under 1 in 1000."""
    w, h = random_layer(50, fewer(backend, 280, 40))
    u = ops.obs_factor(h).u
    want = ops.obs_sweep(w, u, **rule)
    use_backend(backend, OP, device, torch.float32)
    got = ops.obs_sweep(w.float().to(device), u.float().to(device), **rule)
    agreement = (got.mask.cpu() == want.mask).double().mean()
    assert agreement > 0.998
    torch.testing.assert_close(got.loss.cpu().double().sum(), want.loss.sum(), rtol=1e-3, atol=0)
    # With its own mask the result is reproduced, so mask and weights belong together.
    again = ops.obs_sweep(w.float().to(device), u.float().to(device), mask=got.mask)
    assert torch.equal(again.mask, got.mask)
    torch.testing.assert_close(again.weight, got.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rule", [*RULES, {"mask": True}], ids=[*RULE_IDS, "mask"])
def test_every_instruction_set(isa, use_isa, rule):
    w, h = random_layer(61, 200)
    rule = dict(rule, mask=random_mask(61, 200)) if "mask" in rule else rule
    u = ops.obs_factor(h).u
    want = ops.obs_sweep(w, u, **rule)
    use_isa(isa)
    got = ops.obs_sweep(w.float(), u.float(), **rule)
    assert (got.mask == want.mask).double().mean() > 0.998
    fixed = ops.obs_sweep(w.float(), u.float(), mask=want.mask)
    torch.testing.assert_close(fixed.weight.double(), want.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(3, 70), (61, 200), (100, 64), (97, 321)], ids=str)
@pytest.mark.parametrize("kept", [0.9, 0.5])
def test_errors_without_zeros_change_nothing(isa, use_isa, shape, kept):
    """Where most weights stay the kernel multiplies the errors of the pruned ones only. Rows do not
    see each other: with many that are pruned whole beside them it holds all errors, zeros too."""
    use_isa(isa)
    rows, cols = shape
    w, h = random_layer(rows, cols)
    w, u = w.float(), ops.obs_factor(h).u.float()
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0)) < kept
    few = ops.obs_sweep(w, u, mask=mask)
    others = torch.zeros(20 * rows, cols, dtype=torch.bool)
    most = ops.obs_sweep(w.repeat(21, 1), u, mask=torch.cat([mask, others]))
    assert torch.equal(few.weight, most.weight[:rows])
    assert torch.equal(few.loss, most.loss[:rows])


@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_chosen_and_given_mask_agree_bit_for_bit(rule):
    w, h = random_layer(97, 360)
    w, u = w.float(), ops.obs_factor(h).u.float()
    chosen = ops.obs_sweep(w, u, **rule)
    given = ops.obs_sweep(w, u, mask=chosen.mask)
    assert torch.equal(chosen.weight, given.weight)
    # Summed over the columns of a group and of a tile.
    torch.testing.assert_close(chosen.loss, given.loss, rtol=1e-5, atol=0)


# --- what the mathematics says --------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_loss_is_the_quadratic_form(rule):
    w, h = random_layer(30, 200)
    got = ops.obs_sweep(w, ops.obs_factor(h).u, **rule)
    torch.testing.assert_close(got.loss, quadratic(got.weight - w, damped(h)), rtol=1e-9, atol=0)


def test_loss_of_a_long_row_in_single_precision(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(4, fewer(backend, 600, 100))
    u = ops.obs_factor(h).u.float().to(device)
    got = ops.obs_sweep(w.float().to(device), u, sparsity=0.5, scope="row")
    want = quadratic(got.weight.cpu().double() - w, damped(h))
    torch.testing.assert_close(got.loss.cpu().double(), want, rtol=1e-4, atol=0)


def test_one_column_is_the_closed_form():
    """Removing weight 0: delta = -(w_0 / [H^-1]_00) H^-1 e_0 (OBS), in every row."""
    w, h = random_layer(6, 30)
    mask = torch.ones(6, 30, dtype=torch.bool)
    mask[:, 0] = False
    inverse = torch.linalg.inv(damped(h))
    want = w - w[:, :1] / inverse[0, 0] * inverse[0]
    got = ops.obs_sweep(w, ops.obs_factor(h).u, mask=mask)
    torch.testing.assert_close(got.weight, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.loss, 0.5 * w[:, 0] ** 2 / inverse[0, 0], rtol=1e-9, atol=0)


def test_equals_iterated_closed_forms_on_the_columns_to_the_right():
    w, h = random_layer(5, 20)
    mask = random_mask(5, 20)
    want = w.clone()
    for j in range(20):
        inverse = torch.linalg.inv(damped(h)[j:, j:])
        for r in (~mask[:, j]).nonzero().flatten().tolist():
            want[r, j:] -= want[r, j] / inverse[0, 0] * inverse[0]
    got = ops.obs_sweep(w, ops.obs_factor(h).u, mask=mask)
    torch.testing.assert_close(got.weight, want, rtol=1e-9, atol=1e-12)


def test_is_between_exact_least_squares_and_zeroing():
    w, h = random_layer(12, 40)
    got = ops.obs_sweep(w, ops.obs_factor(h).u, sparsity=0.5)
    inverse = torch.linalg.inv(damped(h))
    for r in range(12):
        q = (~got.mask[r]).nonzero().flatten()
        exact = 0.5 * w[r, q] @ torch.linalg.solve(inverse[q][:, q], w[r, q])
        zeroed = quadratic(-w[r : r + 1] * ~got.mask[r], damped(h))[0]
        assert exact <= got.loss[r] * (1 + 1e-12) and got.loss[r] <= zeroed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_block_size_does_not_matter_with_a_given_mask(backend, device, use_backend, dtype):
    use_backend(backend, OP, device, dtype)
    cols = fewer(backend, 150, 40)
    w, h = random_layer(20, cols)
    u, mask = ops.obs_factor(h).u.to(dtype).to(device), random_mask(20, cols).to(device)
    results = [ops.obs_sweep(w.to(dtype).to(device), u, mask=mask, block_size=b).weight
               for b in (1, 10, 128, 1000)]  # fmt: skip
    for other in results[1:]:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(other, results[0], rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("rule", [{"sparsity": 0.5}, {"nm": (2, 4)}], ids=str)
def test_rows_are_equivariant(backend, device, use_backend, rule):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(40, 64)
    u = ops.obs_factor(h).u.float().to(device)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    straight = ops.obs_sweep(w.float().to(device), u, **rule)
    shuffled = ops.obs_sweep(w.float()[order].to(device), u, **rule)
    for a, b in zip(shuffled, straight, strict=True):
        torch.testing.assert_close(a, b[order.to(device)], rtol=1e-5, atol=1e-6)


def test_diagonal_hessian_is_wanda(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, _ = random_layer(10, 60)
    norms = torch.rand(60, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    u = ops.obs_factor(torch.diag(norms**2), damping=0.0).u
    got = ops.obs_sweep(w.float().to(device), u.float().to(device), sparsity=0.5, scope="layer")
    assert torch.equal(got.weight.cpu(), (w.float() * got.mask.cpu()))
    score = (w.abs() * norms).flatten()
    want = torch.ones(600, dtype=torch.bool)
    want[score.argsort()[:300]] = False
    assert torch.equal(got.mask.cpu().flatten(), want)


def test_scaling_the_inputs_changes_nothing(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(10, 64)
    base, scaled = (
        ops.obs_sweep(w.float().to(device), ops.obs_factor(m).u.float().to(device), sparsity=0.5)
        for m in (h, h * 2.0**20)
    )
    torch.testing.assert_close(scaled.weight, base.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled.loss, base.loss * 2.0**20, rtol=1e-5, atol=0)


def test_dead_columns_are_pruned_first_and_disturb_nothing(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(8, 40)
    live = [j for j in range(40) if j not in (4, 21)]
    small = h[live][:, live]
    h = torch.zeros(40, 40, dtype=torch.float64)
    h[torch.tensor(live)[:, None], torch.tensor(live)] = small
    factor = ops.obs_factor(h)
    w[:, factor.dead] = 0
    got = ops.obs_sweep(w.float().to(device), factor.u.float().to(device), sparsity=0.5)
    assert factor.dead.nonzero().flatten().tolist() == [4, 21]
    assert not got.mask.cpu()[:, factor.dead].any()
    want = float64_sweep(w, factor.u, got.mask)
    torch.testing.assert_close(got.weight.cpu().double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7])
def test_fewer_tokens_than_columns(backend, device, use_backend, tokens):
    use_backend(backend, OP, device, torch.float32)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 70, generator=gen, dtype=torch.float64)
    w = torch.randn(9, 70, generator=gen, dtype=torch.float64)
    u = ops.obs_factor(x.T @ x).u
    got = ops.obs_sweep(w.float().to(device), u.float().to(device), sparsity=0.5)
    want = float64_sweep(w, u, got.mask)
    torch.testing.assert_close(got.weight.cpu().double(), want, rtol=1e-3, atol=1e-3)


# --- shapes, dtypes, strides ----------------------------------------------------------------


@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_batch_equals_one_by_one(backend, device, use_backend, rule, shared):
    use_backend(backend, OP, device, torch.float32)
    layers = [random_layer(11, fewer(backend, 144, 24), seed=s) for s in range(3)]
    w = torch.stack([w for w, _ in layers]).float().to(device)
    u = torch.stack([ops.obs_factor(h).u for _, h in layers]).float().to(device)
    us = u[0] if shared else u
    batch = ops.obs_sweep(w, us, **rule)
    for b in range(3):
        single = ops.obs_sweep(w[b], u[0 if shared else b], **rule)
        for whole, part in zip(batch, single, strict=True):
            assert torch.equal(whole[b], part)


def test_strided_inputs(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(24, 60)
    w, u = w.float().to(device), ops.obs_factor(h).u.float().to(device)
    mask = random_mask(24, 60).to(device)
    want = ops.obs_sweep(w, u, mask=mask)
    wide = torch.zeros(48, 90, device=device)
    wide[::2, 10:70] = w
    turned = mask.T.contiguous().T
    for other in (wide[::2, 10:70], w.T.contiguous().T):
        assert not other.is_contiguous()
        got = ops.obs_sweep(other, u.T.contiguous().T, mask=turned)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_widened(backend, device, use_backend, dtype):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(6, 40)
    u, half = ops.obs_factor(h).u.float().to(device), w.to(dtype).to(device)
    got, want = ops.obs_sweep(half, u, sparsity=0.5), ops.obs_sweep(half.float(), u, sparsity=0.5)
    assert got.weight.dtype == torch.float32
    assert torch.equal(got.weight, want.weight)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 4, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=str)
def test_empty(backend, device, use_backend, shape, rule):
    use_backend(backend, OP, device, torch.float32)
    got = ops.obs_sweep(
        torch.zeros(shape, device=device), torch.eye(shape[-1], device=device), **rule
    )
    assert got.weight.shape == shape and got.mask.shape == shape
    assert got.loss.shape == shape[:-1] and bool((got.loss == 0).all())


def test_weights_are_not_modified(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(6, 40)
    w, u = w.float().to(device), ops.obs_factor(h).u.float().to(device)
    before = w.clone()
    ops.obs_sweep(w, u, sparsity=0.5)
    assert torch.equal(w, before)


def test_nan_weights_are_kept_and_stay_in_their_place(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(6, 40)
    w, u = w.float().to(device), ops.obs_factor(h).u.float().to(device)
    w[2, 5] = -float("nan")
    for rule in ({"sparsity": 0.9, "scope": "row"}, {"sparsity": 0.5}, {"nm": (1, 4)}):
        got = ops.obs_sweep(w, u, **rule)
        assert bool(got.mask[2, 5]) and int(got.weight.isnan().sum()) == 1


@pytest.mark.parametrize("rule", [
    {"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"nm": (2, 4)},
    {"sparsity": 0.5, "scope": "layer"},
])  # fmt: skip
@pytest.mark.parametrize("shape", [(200, 300), (30, 800)])
def test_independent_of_thread_count(shape, rule):
    """5 threads take the narrow strips; 800 columns in one block, one panel for all threads."""
    w, h = random_layer(*shape)
    w, u = w.float(), ops.obs_factor(h).u.float()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.obs_sweep(w, u, **rule))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"w": torch.zeros(8)}, "w: expected"),
        ({"w": torch.zeros(3, 8, dtype=torch.int32)}, "w: expected bf16"),
        ({"u": torch.eye(7)}, "u: expected shape"),
        ({"u": torch.eye(8).double()}, "both fp32 or both fp64"),
        ({"sparsity": None}, "exactly one of"),
        ({"nm": (2, 4)}, "exactly one of"),
        ({"sparsity": 1.5}, "sparsity: expected a fraction"),
        ({"sparsity": float("nan")}, "sparsity: expected a fraction"),
        ({"scope": "global"}, "scope: expected"),
        ({"sparsity": None, "nm": (2, 3)}, "m dividing the columns"),
        ({"sparsity": None, "nm": (5, 4)}, "1 <= n <= m"),
        ({"sparsity": None, "mask": torch.ones(3, 8)}, "mask: expected torch.bool"),
        ({"sparsity": None, "mask": torch.ones(8) > 0}, "mask: expected shape"),
        ({"preserve": torch.ones(3, 9) > 0}, "preserve: expected shape"),
        ({"block_size": 0}, "block_size: expected"),
        ({"reference_count": True, "scope": "row"}, "reference_count: expected"),
        ({"reference_count": True, "sparsity": 1.0}, "reference_count: expected"),
    ],
)
def test_bad_arguments(args, message):
    args = {"w": torch.zeros(3, 8), "u": torch.eye(8), "sparsity": 0.5, **args}
    with pytest.raises(ValueError, match=message):
        ops.obs_sweep(args.pop("w"), args.pop("u"), **args)


def test_opcheck():
    w, h = random_layer(5, 8)
    w, u = w.float()[None], ops.obs_factor(h).u.float()[None]
    counts, mask = torch.tensor([[[10, 10]]], dtype=torch.int32), random_mask(5, 8)[None]
    op = torch.ops.pyprune.obs_sweep
    torch.library.opcheck(op, (w, u, counts, None, None, 0, 0, 4, False))
    torch.library.opcheck(op, (w, u, counts.expand(1, 5, 2) // 5, None, mask, 0, 0, 4, False))
    torch.library.opcheck(op, (w, u, None, mask, None, 0, 0, 128, False))
    torch.library.opcheck(op, (w.double(), u.double(), None, None, None, 2, 4, 128, False))


def test_compiles_without_graph_breaks():
    w, h = random_layer(5, 8)
    w, u = w.float(), ops.obs_factor(h).u.float()
    for rule in ({"sparsity": 0.5}, {"sparsity": 0.5, "scope": "layer"}, {"nm": (2, 4)}):

        def f(w, u, rule=rule):
            return ops.obs_sweep(w, u, **rule).weight * 2

        got = torch.compile(f, fullgraph=True, backend="aot_eager")(w, u)
        torch.testing.assert_close(got, f(w, u))


# --- fuzz -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 120),
    cols=st.integers(1, 290),
    block_size=st.sampled_from([1, 5, 8, 64, 128, 500]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.95]),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 10_000),
)
def test_fuzz_native_against_float64(rows, cols, block_size, density, isa, seed):
    w, h = random_layer(rows, cols, seed)
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    u = ops.obs_factor(h).u
    want = ops.obs_sweep(w, u, mask=mask)
    with restricted(isa):
        got = ops.obs_sweep(w.float(), u.float(), mask=mask, block_size=block_size)
    torch.testing.assert_close(got.weight.double(), want.weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-3, atol=1e-6)
