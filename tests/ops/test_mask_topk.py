import pytest
import selection
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops import registry

OP = "mask_topk"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def counts(cols: int) -> list[int]:
    return sorted({0, 1, cols // 3, cols // 2, cols - 1, cols})


@pytest.mark.parametrize("cols", [1, 5, 64, 131, 700])
@pytest.mark.parametrize("kind", selection.KINDS)
def test_matches_brute_force(backend, device, use_backend, kind, cols):
    use_backend(backend, OP, device, torch.bfloat16)
    w = selection.weights(kind, 3, cols, torch.bfloat16)
    for pruned in counts(cols):
        got = ops.mask_topk(w.to(device), pruned)
        assert torch.equal(got.cpu(), selection.brute_force_groups(w, cols, pruned))


@pytest.mark.parametrize("names", selection.TERMS.values(), ids=selection.TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_terms(backend, device, use_backend, dtype, names):
    use_backend(backend, OP, device, dtype)
    w = selection.weights("ties", 4, 203, dtype).to(device)
    given = selection.terms(names, 4, 203, device)
    for pruned in (0, 20, 110, 203):
        want = selection.brute_force_groups(w, 203, pruned, **given)
        assert torch.equal(ops.mask_topk(w, pruned, **given).cpu(), want)


def test_strided_input(backend, device, use_backend):
    use_backend(backend, OP, device)
    big = selection.weights("ties", 12, 90, torch.float32).to(device)
    for w in (big[::2, 5:70], big.T[3:15], big[:, ::3]):
        want = selection.brute_force_groups(w, w.shape[1], 11)
        assert torch.equal(ops.mask_topk(w, 11).cpu(), want)


def hard_rows(cols: int) -> torch.Tensor:
    """Rows whose regular samples mislead the search: sorted, periodic, two values, one outlier,
    keys an exponential distance apart."""
    ramp = torch.arange(cols, dtype=torch.float32)
    return torch.stack(
        [ramp, -ramp.flip(0), (ramp % 64 == 0).float(), (ramp % 5) + 1e-7 * ramp,
         torch.where(ramp == cols // 2, 1e30, 1.0), torch.exp2(ramp % 250 - 125),
         torch.where(ramp < cols // 2, ramp, float("nan"))]
    )  # fmt: skip


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, use_isa):
    use_isa(isa)
    for dtype in registry.HALF_OR_SINGLE:
        for kind in selection.KINDS:
            w = selection.weights(kind, 2, 333, dtype)
            given = selection.terms(selection.TERMS["all"], 2, 333, "cpu")
            for extra in ({}, given):
                want = selection.brute_force_groups(w, 333, 170, **extra)
                assert torch.equal(ops.mask_topk(w, 170, **extra), want)
    w = hard_rows(5000)
    for pruned in (1, 40, 1234, 2500, 4999):
        assert torch.equal(ops.mask_topk(w, pruned), selection.brute_force_groups(w, 5000, pruned))


def crowded_rows(cols: int) -> torch.Tensor:
    """Rows that the leading 16 bits of a score hardly tell apart: one value up to its last bits,
    all subnormal, mostly zero, infinities beside NaN, two neighbouring leading digits."""
    gen = torch.Generator().manual_seed(9)
    last_bits = torch.randint(0, 1 << 14, (cols,), generator=gen)
    near_one = (last_bits.int() + 0x3F800000).view(torch.float32)
    signs = torch.where(torch.rand(cols, generator=gen) < 0.5, -1.0, 1.0)
    high = torch.where(torch.rand(cols, generator=gen) < 0.5, float("inf"), float("nan"))
    zeros = torch.where(torch.rand(cols, generator=gen) < 0.8, 0.0, near_one)
    digits = (last_bits.int() % 2 * (1 << 16) + 0x3F800000 + last_bits.int() // 2).view(
        near_one.dtype
    )
    return torch.stack(
        [near_one * signs, last_bits.int().view(torch.float32), zeros * signs, high, digits]
    )


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("cols", [63, 64, 65, 1000])
def test_scores_that_share_their_leading_digits(isa, use_isa, cols):
    use_isa(isa)
    w = crowded_rows(cols)
    scale = torch.rand(cols, generator=torch.Generator().manual_seed(2)) + 0.5
    for dtype in registry.HALF_OR_SINGLE:
        for extra in ({}, {"column_scale": scale}, {"row_scale": torch.linspace(0.5, 2, 5)}):
            for pruned in (1, cols // 3, cols // 2, cols - 1):
                want = selection.brute_force_groups(w.to(dtype), cols, pruned, **extra)
                assert torch.equal(ops.mask_topk(w.to(dtype), pruned, **extra), want)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("cols", [4096, 4095])
def test_masks_beyond_the_cache(isa, use_isa, cols):
    """Large enough that whole lines of the mask are streamed; rows of 4095 are never aligned."""
    use_isa(isa)
    w = selection.weights("normal", 300, cols, torch.bfloat16)
    want = ops.select.mask_topk_reference(w, cols // 2, *[None] * 4)
    assert torch.equal(ops.mask_topk(w, cols // 2), want)


def test_rows_like_the_one_before_and_unlike_it():
    # A row starts from the cut of the row before it: shifts of scale must not matter.
    w = torch.randn(12, 2000, generator=torch.Generator().manual_seed(5))
    w *= torch.tensor([1, 1, 1.05, 100, 1e-30, 1, 1, 0, 1, 1e30, 1, 1])[:, None]
    for pruned in (1, 900, 1999):
        assert torch.equal(ops.mask_topk(w, pruned), selection.brute_force_groups(w, 2000, pruned))


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_one_long_row_is_shared_out(backend, device, use_backend, kind):
    use_backend(backend, OP, device, torch.bfloat16)
    cols = 140_003 if backend != "cuda" else 32_761  # its most, but for an odd few
    w = selection.weights(kind, 1, cols, torch.bfloat16).to(device)
    scale = torch.rand(cols, generator=torch.Generator().manual_seed(3)).to(device)
    for pruned, extra in ((1, {}), (cols // 2, {"column_scale": scale})):
        given = (extra.get("column_scale"), None, None, None)
        want = ops.select.mask_topk_reference(w, pruned, *given)
        assert torch.equal(ops.mask_topk(w, pruned, **extra), want)


@pytest.mark.parametrize("cols", [2100, 4096, 9000, 14336, 32_768])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_rows_of_layers(backend, device, use_backend, kind, cols):
    use_backend(backend, OP, device, torch.bfloat16)
    w = selection.weights(kind, 2, cols, torch.bfloat16).to(device)
    scale = torch.rand(cols, generator=torch.Generator().manual_seed(3)).to(device)
    counts = (1, cols // 2, cols - 1)
    if backend == "triton" and device == "cpu" and cols > 4096:
        counts = (cols // 2,)  # of the interpreter; its loop over blocks of 2048 is that of 4096
    for pruned in counts:
        for columns in (None, scale):
            want = ops.select.mask_topk_reference(w, pruned, columns, None, None, None)
            assert torch.equal(ops.mask_topk(w, pruned, column_scale=columns), want)


def test_cuda_kernel_declines_longer_rows():
    limits = registry.IMPLS[OP]["cuda"].limits
    most = ops.select.TOPK_COLUMNS
    assert limits(torch.empty(1, most), 1) == ""
    assert f"not {most + 1}" in limits(torch.empty(1, most + 1), 1)


def test_masks_are_nested(backend, device, use_backend):
    use_backend(backend, OP, device, torch.bfloat16)
    w = selection.weights("ties", 3, 100, torch.bfloat16).to(device)
    smaller = ops.mask_topk(w, 100)
    for pruned in range(90, -1, -10):
        larger = ops.mask_topk(w, pruned)
        assert (larger.sum(1) == 100 - pruned).all() and not (smaller & ~larger).any()
        smaller = larger


def test_already_pruned_weights_are_pruned_again(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = selection.weights("normal", 3, 90, torch.float32).to(device)
    mask = ops.mask_topk(w, 45)
    assert torch.equal(ops.mask_topk(w * mask, 45), mask)


def test_forbidden_beyond_the_quota(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = selection.weights("normal", 2, 80, torch.float32).to(device)
    preserve = torch.zeros(2, 80, dtype=torch.bool, device=device)
    preserve[1, 7] = True
    for pruned in (0, 10, 79):
        assert torch.equal(ops.mask_topk(w, pruned, preserve=preserve), preserve)


def test_goldens(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = selection.golden_weights().to(device, torch.float32)
    norms = selection.golden_column_norms().to(device, torch.float32)
    rows = selection.pruned_pattern(ops.mask_topk(w, 4))
    assert rows == ".1.1.11. / 11..1..1 / 11....11 / ....1111"
    wanda = selection.pruned_pattern(ops.mask_topk(w, 4, column_scale=norms))
    assert wanda == ".1...111 / 11..1..1 / 11....11 / ....1111"
    layer = ops.mask_topk(w.reshape(1, -1), 16).view(4, 8)
    assert selection.pruned_pattern(layer) == ".1.1.1.. / 11..1..1 / 11....11 / ...11111"


def test_empty(backend, device, use_backend):
    use_backend(backend, OP, device)
    for shape in ((0, 8), (3, 0)):
        assert ops.mask_topk(torch.empty(shape, device=device), 0).shape == shape


def test_independent_of_thread_count():
    threads = torch.get_num_threads()
    cases = [selection.weights("ties", *s, torch.bfloat16) for s in ((7, 999), (1, 300_000))]
    want = [ops.mask_topk(w, 400) for w in cases]
    try:
        torch.set_num_threads(1)
        for w, mask in zip(cases, want, strict=True):
            assert torch.equal(ops.mask_topk(w, 400), mask)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzz(data):
    rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 300))
    pruned = data.draw(st.integers(0, cols))
    kind = data.draw(st.sampled_from(selection.KINDS))
    dtype = data.draw(st.sampled_from(DTYPES))
    names = data.draw(st.sampled_from(list(selection.TERMS.values())))
    w = selection.weights(kind, rows, cols, dtype, seed=data.draw(st.integers(0, 99)))
    given = selection.terms(names, rows, cols, "cpu")
    want = selection.brute_force_groups(w, cols, pruned, **given)
    assert torch.equal(ops.mask_topk(w, pruned, **given), want)


@pytest.mark.parametrize("pruned", [-1, 9])
def test_bad_count(pruned):
    with pytest.raises(ValueError, match=f"pruned: expected 0 to 8 .*got {pruned}"):
        ops.mask_topk(torch.zeros(2, 8), pruned)


@pytest.mark.parametrize("names", selection.TERMS.values(), ids=selection.TERMS)
@pytest.mark.parametrize("shared", [False, True], ids=["own scales", "shared scales"])
def test_a_stack_is_its_matrices(backend, device, use_backend, names, shared):
    use_backend(backend, OP, device, torch.bfloat16)
    selection.check_stack(lambda w, **t: ops.mask_topk(w, 5, **t), names, shared, device)


def test_a_stack_with_its_own_scales_is_one_call(monkeypatch):
    calls = []
    implementation = registry.Impl(lambda w, *rest: calls.append(w.shape) or w.bool())
    monkeypatch.setitem(registry.IMPLS, OP, {"reference": implementation})
    ops.mask_topk(torch.ones(4, 3, 12), 5, column_scale=torch.ones(4, 12))
    assert calls == [(4, 3, 12)]


def test_stacks_without_a_matrix_and_without_rows():
    for shape in ((0, 3, 12), (4, 0, 12), (4, 3, 0)):
        w, scale = torch.empty(shape), torch.empty(shape[0], shape[2])
        for columns in (None, scale[0] if len(scale) else torch.ones(12), scale):
            got = ops.mask_topk(w, 0, column_scale=columns)
            assert got.shape == shape and got.dtype == torch.bool


@pytest.mark.parametrize(("change", "message"), selection.BAD_STACKS)
def test_bad_stacks(change, message):
    w = torch.zeros(4, 3, 8)
    with pytest.raises(ValueError, match=message):
        ops.mask_topk(**({"w": w} | change), pruned=5)


def test_opcheck():
    for stack in ((), (4,)):
        w, scale = torch.randn(*stack, 5, 12), torch.rand(*stack, 12)
        for columns in (None, scale):
            torch.library.opcheck(torch.ops.pyprune.mask_topk, (w, 3, columns, None, None, None))


def test_compiles_without_graph_breaks():
    def f(w, s):
        return w * ops.mask_topk(w, 5, column_scale=s)

    for w, s in ((torch.randn(9, 12), torch.rand(12)), (torch.randn(4, 9, 12), torch.rand(4, 12))):
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(w, s)
        assert torch.equal(got, f(w, s))


def test_shape_without_data():
    """On the meta device, for a matrix and a stack with scales of its own."""
    for shape in ((9, 12), (4, 9, 12)):
        w = torch.empty(shape, device="meta")
        got = ops.mask_topk(w, 5, column_scale=torch.empty(*shape[:-2], 12, device="meta"))
        assert got.is_meta and got.shape == shape and got.dtype == torch.bool
