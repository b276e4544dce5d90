import pytest
import selection
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops import registry

OP = "mask_nm"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# 2:4 and other groups that fit a vector, groups that do not, one that is a whole long row.
PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 4), (4, 8), (7, 16), (1, 2), (2, 3), (5, 24), (30, 70)]


def force(use_backend, backend, device, dtype, n, m):
    limits = registry.IMPLS[OP][backend].limits
    if limits is not None and limits(torch.empty(0, m), n, m):
        pytest.skip("no kernel for this pattern")  # cuda's, on a GPU: the limits are tested below
    use_backend(backend, OP, device, dtype)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_matches_brute_force(backend, device, use_backend, pattern):
    n, m = pattern
    force(use_backend, backend, device, torch.float32, n, m)
    for kind in selection.KINDS:
        for rows, cols in ((1, m), (2, 5 * m)):
            w = selection.weights(kind, rows, cols, torch.float32)
            got = ops.mask_nm(w.to(device), n, m)
            assert torch.equal(got.cpu(), selection.brute_force_groups(w, m, m - n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(backend, device, use_backend, dtype):
    use_backend(backend, OP, device, dtype)
    for kind in selection.KINDS:
        w = selection.weights(kind, 3, 76, dtype)
        got = ops.mask_nm(w.to(device), 2, 4)
        assert torch.equal(got.cpu(), selection.brute_force_groups(w, 4, 2))


@pytest.mark.parametrize("names", selection.TERMS.values(), ids=selection.TERMS)
@pytest.mark.parametrize("pattern", [(2, 4), (3, 5), (5, 8), (8, 16), (20, 50)], ids=str)
def test_score_terms(backend, device, use_backend, pattern, names):
    n, m = pattern
    force(use_backend, backend, device, torch.bfloat16, n, m)
    w = selection.weights("ties", 3, 3 * m, torch.bfloat16).to(device)
    given = selection.terms(names, 3, 3 * m, device)
    want = selection.brute_force_groups(w, m, m - n, **given)
    assert torch.equal(ops.mask_nm(w, n, m, **given).cpu(), want)


def test_strided_input(backend, device, use_backend):
    use_backend(backend, OP, device)
    big = selection.weights("normal", 40, 96, torch.float32).to(device)
    extra = torch.rand(40, 96).to(device)
    allowed = (torch.rand(40, 96) < 0.8).to(device)
    views = (
        lambda t: t[::2, 4:68],
        lambda t: t.T[:9, :36],
        lambda t: t[:7, ::2],
        lambda t: t[:, 1:5],
    )
    for view in views:
        w, addend, preserve = view(big), view(extra), view(allowed)
        want = selection.brute_force_groups(w, 4, 2, addend=addend, preserve=preserve)
        got = ops.mask_nm(w, 2, 4, addend=addend, preserve=preserve)
        assert torch.equal(got.cpu(), want) and got.is_contiguous()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("pattern", [*PATTERNS, (10, 32), (3000, 5000)], ids=str)
def test_every_instruction_set(isa, use_isa, pattern):
    use_isa(isa)
    n, m = pattern
    for dtype in registry.HALF_OR_SINGLE:
        for kind in ("special", "ties"):
            w = selection.weights(kind, 2, m * max(1, 131 // m), dtype)
            given = selection.terms(selection.TERMS["all"], *w.shape, "cpu")
            got = ops.mask_nm(w, n, m, **given)
            assert torch.equal(got, selection.brute_force_groups(w, m, m - n, **given))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("m", [4, 8])
def test_every_quota_in_whole_blocks(isa, use_isa, m):
    """Several hundred columns: the code for 64 or 128 at a time and what is left over; every N."""
    use_isa(isa)
    cols = 3 * 128 + 64 + m
    for kind in selection.KINDS:
        for names in (), ("column_scale",), ("preserve",), selection.TERMS["all"]:
            dtype = torch.bfloat16 if names == ("column_scale",) else torch.float32
            w = selection.weights(kind, 3, cols, dtype)
            given = selection.terms(names, 3, cols, "cpu")
            for n in range(1, m + 1):
                want = selection.brute_force_groups(w, m, m - n, **given)
                assert torch.equal(ops.mask_nm(w, n, m, **given), want), (kind, n)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_order_of_a_group(isa, use_isa):
    """All orders of four scores, ties included, and of eight that take three values."""
    use_isa(isa)
    for m, values in ((4, 4), (8, 3)):
        w = torch.cartesian_prod(*[torch.arange(float(values))] * m).reshape(1, -1)
        for n in range(1, m + 1):
            got = ops.mask_nm(w, n, m)
            assert torch.equal(got, ops.select.mask_nm_reference(w, n, m, *[None] * 4)), (n, m)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("offset", [0, 4])
def test_masks_beyond_the_cache(isa, use_isa, offset):
    """Large enough that whole lines of the mask are streamed, aligned and not."""
    use_isa(isa)
    w = selection.weights("normal", 300, 4096 - offset, torch.bfloat16)
    want = ops.select.mask_nm_reference(w, 2, 4, *[None] * 4)
    assert torch.equal(ops.mask_nm(w, 2, 4), want)


def test_rows_longer_than_a_work_item():
    w = selection.weights("ties", 2, 9000, torch.bfloat16)
    for n, m in ((2, 4), (2, 3)):
        assert torch.equal(ops.mask_nm(w, n, m), ops.select.mask_nm_reference(w, n, m, *[None] * 4))


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_more_rows_than_a_gpu_holds_at_once(use_backend, scaled):
    use_backend("cuda", OP, "cuda", torch.bfloat16)
    w = torch.randn(9001, 4096, device="cuda").bfloat16()
    scale = torch.rand(4096, device="cuda") - 0.3 if scaled else None
    want = ops.select.mask_nm_reference(w, 2, 4, scale, None, None, None)
    assert torch.equal(ops.mask_nm(w, 2, 4, column_scale=scale), want)


def test_exactly_n_in_each_group(backend, device, use_backend):
    use_backend(backend, OP, device, torch.bfloat16)
    for kind in selection.KINDS:
        w = selection.weights(kind, 5, 64, torch.bfloat16).to(device)
        assert (ops.mask_nm(w, 2, 4).view(5, 16, 4).sum(-1) == 2).all()


def test_forbidden_positions_fill_the_quota_first(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4, 0, 0, 0, 0]], device=device)
    preserve = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0]], device=device).bool()
    got = ops.mask_nm(w, 2, 4, preserve=preserve).cpu().int().tolist()
    assert got == [[0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 0]]


def test_goldens(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = selection.golden_weights().to(device, torch.float32)
    norms = selection.golden_column_norms().to(device, torch.float32)
    got = selection.pruned_pattern(ops.mask_nm(w, 2, 4, column_scale=norms))
    assert got == ".11..11. / 11..1..1 / 11....11 / .11...11"


def test_empty(backend, device, use_backend):
    use_backend(backend, OP, device)
    for shape in ((0, 8), (3, 0)):
        got = ops.mask_nm(torch.empty(shape, device=device), 2, 4)
        assert got.shape == shape and got.dtype == torch.bool


def test_independent_of_thread_count():
    w = selection.weights("ties", 7, 10_000, torch.bfloat16)
    threads = torch.get_num_threads()
    want = ops.mask_nm(w, 2, 4)
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.mask_nm(w, 2, 4), want)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzz(data):
    m = data.draw(st.integers(1, 40))
    n = data.draw(st.integers(1, m))
    rows, cols = data.draw(st.integers(1, 4)), m * data.draw(st.integers(1, 6))
    kind = data.draw(st.sampled_from(selection.KINDS))
    dtype = data.draw(st.sampled_from(DTYPES))
    names = data.draw(st.sampled_from(list(selection.TERMS.values())))
    w = selection.weights(kind, rows, cols, dtype, seed=data.draw(st.integers(0, 99)))
    given = selection.terms(names, rows, cols, "cpu")
    want = selection.brute_force_groups(w, m, m - n, **given)
    assert torch.equal(ops.mask_nm(w, n, m, **given), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(8)}, "w: expected 2 or 3 dimensions"),
        ({"w": torch.zeros(2, 8, dtype=torch.int8)}, "w: expected bf16, fp16, fp32 or fp64"),
        ({"m": 3}, "m: expected a divisor of w's 8 columns, got 3"),
        ({"n": 5}, "1 <= n <= m"),
        ({"n": 0}, "1 <= n <= m"),
        ({"column_scale": torch.ones(7)}, "column_scale: expected shape"),
        ({"row_scale": torch.ones(8)}, "row_scale: expected shape"),
        ({"addend": torch.ones(8)}, "addend: expected shape"),
        ({"column_scale": torch.ones(8).int()}, "column_scale: expected bf16"),
        ({"preserve": torch.ones(2, 8)}, "preserve: expected torch.bool"),
        ({"w": torch.zeros(2, 8, device="meta"), "column_scale": torch.ones(8)}, "one device"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"w": torch.zeros(2, 8), "n": 2, "m": 4, **change}
    w, n, m = (arguments.pop(k) for k in ("w", "n", "m"))
    with pytest.raises(ValueError, match=message):
        ops.mask_nm(w, n, m, **arguments)


def test_cuda_kernel_declines_other_patterns():
    limits = registry.IMPLS[OP]["cuda"].limits
    for n, m in ((2, 4), (3, 4), (4, 8), (8, 8), (8, 16)):
        assert limits(torch.zeros(1, m), n, m) == ""
    for n, m in ((1, 2), (7, 16), (3, 6), (8, 32)):
        assert f"not {n}:{m}" in limits(torch.zeros(1, m), n, m)


@pytest.mark.parametrize("names", selection.TERMS.values(), ids=selection.TERMS)
@pytest.mark.parametrize("shared", [False, True], ids=["own scales", "shared scales"])
def test_a_stack_is_its_matrices(backend, device, use_backend, names, shared):
    use_backend(backend, OP, device, torch.bfloat16)
    selection.check_stack(lambda w, **t: ops.mask_nm(w, 2, 4, **t), names, shared, device)


def test_a_stack_with_its_own_scales_is_one_call(monkeypatch):
    calls = []
    implementation = registry.Impl(lambda w, *rest: calls.append(w.shape) or w.bool())
    monkeypatch.setitem(registry.IMPLS, OP, {"reference": implementation})
    ops.mask_nm(torch.ones(4, 3, 12), 2, 4, column_scale=torch.ones(4, 12))
    assert calls == [(4, 3, 12)]


def test_stacks_without_a_matrix_and_without_rows():
    for shape in ((0, 3, 12), (4, 0, 12), (4, 3, 0)):
        w, scale = torch.empty(shape), torch.empty(shape[0], shape[2])
        for columns in (None, scale[0] if len(scale) else torch.ones(12), scale):
            got = ops.mask_nm(w, 2, 4, column_scale=columns)
            assert got.shape == shape and got.dtype == torch.bool


@pytest.mark.parametrize(("change", "message"), selection.BAD_STACKS)
def test_bad_stacks(change, message):
    w = torch.zeros(4, 3, 8)
    with pytest.raises(ValueError, match=message):
        ops.mask_nm(**({"w": w} | change), n=2, m=4)


@pytest.mark.parametrize("own", [False, True], ids=["shared scales", "own scales"])
def test_opcheck(own):
    stack = (4,) if own else ()
    given = [selection.terms(selection.TERMS["all"], 5, 12, "cpu", seed=b) for b in range(4)]
    terms = [
        torch.stack([one[k] for one in given]) if own else given[0][k]
        for k in ("column_scale", "row_scale", "addend", "preserve")
    ]
    for extra in ([None] * 4, terms):
        torch.library.opcheck(torch.ops.pyprune.mask_nm, (torch.randn(*stack, 5, 12), 2, 4, *extra))


def test_compiles_without_graph_breaks():
    def f(w, s):
        return w * ops.mask_nm(w, 2, 4, column_scale=s)

    for w, s in ((torch.randn(9, 12), torch.rand(12)), (torch.randn(4, 9, 12), torch.rand(4, 12))):
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(w, s)
        assert torch.equal(got, f(w, s))


def test_shape_without_data():
    """On the meta device, for a matrix and a stack with scales of its own."""
    for shape in ((9, 12), (4, 9, 12)):
        w = torch.empty(shape, device="meta")
        got = ops.mask_nm(w, 2, 4, column_scale=torch.empty(*shape[:-2], 12, device="meta"))
        assert got.is_meta and got.shape == shape and got.dtype == torch.bool
