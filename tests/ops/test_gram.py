import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isa import AVAILABLE, restricted

from pyprune import ops

OP = "gram"
# Sums of bf16 pairs are chains of 1,024 products, twice as long as others.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-6, torch.float16: 2e-6, torch.float64: 1e-13}

# One token, one column, sizes that divide no tile, more tokens than a packed chunk, several groups
# of tiles.
SHAPES = [(1, 1), (1, 70), (5, 3), (33, 129), (600, 65), (130, 200)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    x = x.cpu().double()
    w = torch.ones(x.shape[:-1]) if weight is None else weight.cpu()
    return (x * w.double()[..., None]).mT @ x


def assert_gram(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Within rounding of the largest sum, and symmetric to the bit."""
    # Matrix units cut off bits where other sums round.
    tolerance = 5e-6 if got.is_cuda and dtype.itemsize == 2 else TOLERANCE[dtype]
    tolerance *= want.abs().max().item()
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=tolerance)
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_float64(backend, device, use_backend, shape, dtype, weighted):
    use_backend(backend, OP, device, dtype)
    x = randn(*shape).to(dtype).to(device)
    weight = randn(shape[0], seed=1).abs().to(device) if weighted else None
    assert_gram(ops.gram(x, weight=weight), expected(x, weight), dtype)


@pytest.mark.parametrize("weighted", [False, True])
def test_batch(backend, device, use_backend, weighted):
    use_backend(backend, OP, device)
    x = randn(3, 40, 50).to(device)
    weight = randn(3, 40, seed=1).abs().to(device) if weighted else None
    assert_gram(ops.gram(x, weight=weight), expected(x, weight), torch.float32)


def test_accumulates_in_place_and_batches_add_up(backend, device, use_backend):
    use_backend(backend, OP, device)
    x = randn(90, 37).to(device)
    out = torch.full((37, 37), 2.0, device=device)
    assert ops.gram(x[:31], out=out) is out
    ops.gram(x[31:], out=out)
    assert_gram(out, 2 + expected(x), torch.float32)


def test_diagonal_is_column_norms(backend, device, use_backend):
    use_backend(backend, OP, device)
    x = randn(60, 45).to(device)
    norms = ops.column_norms(x)
    torch.testing.assert_close(ops.gram(x).diagonal(), norms, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_ones_column(backend, device, use_backend, dtype, weighted):
    """Every place the virtual column can take in a panel or tile: alone in a new one too."""
    use_backend(backend, OP, device, dtype)
    for columns in (1, 31, 32, 47, 48):
        x = randn(33, columns).to(dtype).to(device)
        weight = randn(33, seed=1).abs().to(device) if weighted else None
        ones = torch.ones(33, 1, dtype=dtype, device=device)
        want = expected(torch.cat([x, ones], dim=1), weight)
        assert_gram(ops.gram(x, weight=weight, ones_column=True), want, dtype)


def test_weight_zero_drops_infinities_and_nan(backend, device, use_backend):
    use_backend(backend, OP, device)
    x = randn(20, 11).to(device)
    x[4], x[9] = float("inf"), float("nan")
    keep = torch.ones(20, device=device)
    keep[[4, 9]] = 0
    for weight in (keep, keep * 0.75):
        for ones_column in (False, True):
            got = ops.gram(x, weight=weight, ones_column=ones_column)
            clean = ops.gram(x[keep > 0], weight=weight[keep > 0], ones_column=ones_column)
            assert got.isfinite().all()
            torch.testing.assert_close(got, clean, rtol=1e-6, atol=1e-6)


def test_all_tokens_weight_zero(backend, device, use_backend):
    use_backend(backend, OP, device)
    x = torch.full((6, 5), float("nan"), device=device)
    out = torch.eye(5, device=device)
    ops.gram(x, weight=torch.zeros(6, device=device), out=out)
    assert torch.equal(out.cpu(), torch.eye(5))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy under the interpreter
def test_infinity_and_nan_stay_in_their_row_and_column(backend, device, use_backend):
    use_backend(backend, OP, device)
    x = torch.ones(4, 6, device=device)
    x[1, 2], x[2, 4] = float("inf"), float("nan")
    got = ops.gram(x).cpu()
    assert got[4].isnan().all() and got[:, 4].isnan().all()
    assert (got[2, [0, 1, 2, 3, 5]] == float("inf")).all()
    rest = torch.tensor([0, 1, 3, 5])
    assert torch.equal(got[rest][:, rest], torch.full((4, 4), 4.0))


def test_strided_input_and_accumulator(backend, device, use_backend):
    use_backend(backend, OP, device)
    big = randn(40, 90, seed=2).to(device)
    for x in (big[::2, 5:70], big.T[3:80], big[:, ::3]):
        columns = x.shape[1]
        out = torch.zeros(columns, 2 * columns, device=device)[:, ::2]
        assert ops.gram(x, out=out) is out
        assert_gram(out, expected(x), torch.float32)
    stack = randn(40, 3, 20, seed=3).to(device).transpose(0, 1)
    assert_gram(ops.gram(stack), expected(stack), torch.float32)


def test_nothing_to_add(backend, device, use_backend):
    use_backend(backend, OP, device)
    out = torch.eye(3, device=device)
    assert torch.equal(ops.gram(torch.empty(0, 3, device=device), out=out).cpu(), torch.eye(3))
    assert ops.gram(torch.empty(4, 0, device=device)).shape == (0, 0)
    assert ops.gram(torch.empty(0, 4, 3, device=device)).shape == (0, 3, 3)
    assert ops.gram(torch.empty(4, 0, device=device), ones_column=True).tolist() == [[4.0]]


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("columns", [1, 23, 24, 25, 47, 49, 100])
def test_every_instruction_set(isa, use_isa, columns):
    use_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = randn(1061, columns).to(dtype)
        weight = randn(1061, seed=1).abs()
        assert_gram(ops.gram(x[:530]), expected(x[:530]), dtype)
        assert_gram(ops.gram(x), expected(x), dtype)
        assert_gram(ops.gram(x, weight=weight), expected(x, weight), dtype)
        ones = torch.cat([x, torch.ones(1061, 1, dtype=dtype)], dim=1)
        kept = (weight > 0.5).float()
        assert_gram(ops.gram(x, weight=kept, ones_column=True), expected(ones, kept), dtype)
        assert_gram(ops.gram(x, weight=weight, ones_column=True), expected(ones, weight), dtype)


def test_native_takes_several_rounds(use_backend):
    """More tokens of many columns (512, or 1024 pairs) and of few (5120) than the native kernel
    packs at a time, the last round short."""
    use_backend("native", OP, "cpu")
    for shape in ((2301, 700), (11_001, 40)):
        x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).float()
        for values in (x, x.bfloat16()):
            assert torch.equal(ops.gram(values), x.T @ x)  # sums of small integers are exact
            for weight in ((torch.arange(shape[0]) % 3).float(), (x[:, 0] > 0).float()):
                want = (x * weight[:, None]).T @ x
                assert torch.equal(ops.gram(values, weight=weight), want)


def test_triton_splits_the_tokens(use_backend, monkeypatch):
    from pyprune.kernels import gram as kernel

    use_backend("triton", OP, "cpu")
    monkeypatch.setattr(kernel, "MIN_SPLIT_TOKENS", 64)
    monkeypatch.setattr(kernel, "SPLIT_COST", 0)
    reduced = []
    launch = kernel._gram_reduce_kernel.__getitem__

    class Recorder:
        def __getitem__(self, grid):
            reduced.append(grid)
            return launch(grid)

    monkeypatch.setattr(kernel, "_gram_reduce_kernel", Recorder())
    x, start = randn(190, 20), torch.eye(20)
    got = ops.gram(x, out=start.clone())
    assert reduced == [(1, 2)]
    assert_gram(got, expected(x) + start, torch.float32)


def test_triton_shares_the_tokens_of_the_last_tiles(use_backend, monkeypatch):
    """Ten tiles of each matrix, twelve programs at a time: three share each of the last eight."""
    from pyprune.kernels import gram as kernel

    use_backend("triton", OP, "cpu")
    monkeypatch.setattr(kernel, "_slots", lambda x, num_warps: 12)
    monkeypatch.setattr(kernel, "MIN_SPLIT_TOKENS", 64)
    monkeypatch.setattr(kernel, "SPLIT_COST", 0)
    launches = []
    for name in ("_gram_kernel", "_gram_reduce_kernel"):
        launch = getattr(kernel, name).__getitem__
        recorder = type("Recorder", (), {})
        recorder.__getitem__ = lambda self, grid, launch=launch: (
            launches.append(grid) or launch(grid)
        )
        monkeypatch.setattr(kernel, name, recorder())
    for dtype in (torch.bfloat16, torch.float32):
        x, start = randn(2, 300, 104).to(dtype), torch.eye(104)
        got = ops.gram(x, out=start.repeat(2, 1, 1))
        assert_gram(got, expected(x) + start, dtype)
    assert launches == 2 * [(12 + 8 * 3,), (8, 2)]


def recorded_launches(kernel, monkeypatch):
    """The options of every launch of the kernel from here on."""
    options, launch = [], kernel._gram_kernel.__getitem__

    class Recorder:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                options.append(kwargs)
                return launch(grid)(*args, **kwargs)

            return run

    monkeypatch.setattr(kernel, "_gram_kernel", Recorder())
    return options


@pytest.mark.parametrize("ones", [False, True])
def test_triton_takes_no_more_tokens_a_launch_than_an_accumulator_bears(
    use_backend, monkeypatch, ones
):
    from pyprune.kernels import gram as kernel

    use_backend("triton", OP, "cpu", torch.bfloat16)
    monkeypatch.setattr(kernel, "LAUNCH_TOKENS", 64)
    blocks = kernel._blocks(torch.empty(1, 1, 1), False, True) | {"CHUNK": 0}
    monkeypatch.setattr(kernel, "_blocks", lambda x, upcast, described: blocks)
    monkeypatch.setattr(kernel, "_is_interpreted", lambda: True)
    launches = recorded_launches(kernel, monkeypatch)
    x, weight = randn(150, 24).bfloat16(), randn(150, seed=1).abs()
    got = ops.gram(x, weight=weight if ones else None, ones_column=ones)
    full = torch.cat([x, torch.ones(150, 1).bfloat16()], dim=1) if ones else x
    assert_gram(got, expected(full, weight if ones else None), torch.bfloat16)
    assert len(launches) == 3


@pytest.mark.parametrize("alive", [0.0, 0.5])
def test_triton_copies_the_tokens_that_count(use_backend, monkeypatch, alive):
    from pyprune.kernels import gram as kernel

    use_backend("triton", OP, "cpu", torch.bfloat16)
    monkeypatch.setattr(kernel, "_is_interpreted", lambda: True)
    launches = recorded_launches(kernel, monkeypatch)
    x, weight = randn(90, 40).bfloat16(), (randn(90, seed=1).abs() < alive).float()
    x[weight == 0] = float("nan")  # padding may hold anything
    got = ops.gram(x, weight=weight)
    assert_gram(got, expected(x[weight > 0]), torch.bfloat16)
    assert [(kw["DESCRIPTORS"], kw["WEIGHT"]) for kw in launches] == [(True, 0)] * bool(alive)


@pytest.mark.parametrize(("tiles", "slots"), [(8, 132), (100, 132), (131, 132), (0, 132), (1, 1)])
def test_splits_never_take_longer_than_whole_tiles(tiles, slots):
    from pyprune.kernels import gram as kernel

    def steps(splits: int) -> float:
        return -(-tiles * splits // slots) * (16384 / splits + (splits > 1) * kernel.SPLIT_COST)

    splits = kernel._splits(tiles, slots, 16384)
    assert 1 <= splits <= 16384 // kernel.MIN_SPLIT_TOKENS
    assert steps(splits) == min(steps(s) for s in range(1, 17))
    assert kernel._splits(tiles, slots, 100) == 1


def test_triton_restarts_the_accumulator(use_backend):
    """More tokens than go into one, the last ones few."""
    use_backend("triton", OP, "cpu")
    for x in (randn(520, 40).to(torch.bfloat16), randn(520, 33)):
        weight = randn(520, seed=1).abs()
        assert_gram(ops.gram(x), expected(x), x.dtype)
        assert_gram(ops.gram(x, weight=weight), expected(x, weight), x.dtype)


def test_bulk_copies_read_aligned_rows_only(use_backend):
    """The descriptors' path and the pointers' path, by what the layout allows; and one token or one
    matrix, whose strides mean nothing."""
    from pyprune.kernels import gram as kernel

    use_backend("triton", OP, "cpu")
    big = randn(3, 70, 96).to(torch.float16)
    for x, aligned in [
        (big, True),
        (big[:, ::2, 8:72], True),
        (big[1:2, :1, :33], True),
        (big[:1, :, :33].contiguous()[:, :1], True),
        (big[:, :, 1:], False),
        (big[..., :90].contiguous(), False),
        (big.mT, False),
        (big[:1].expand(3, -1, -1), False),
        (big[:, :, ::2], False),
    ]:
        assert kernel._describable(x) == aligned
        assert_gram(ops.gram(x), expected(x), x.dtype)


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("block_n", [32, 64])
def test_triton_tiles_cover_the_triangle_once(monkeypatch, use_backend, group, block_n):
    """Groups of several tiles and tiles wider than high, which only GPUs use by default."""
    from pyprune.kernels import gram as kernel

    use_backend("triton", OP, "cpu")
    blocks = {"BLOCK_M": 32, "BLOCK_N": block_n, "BLOCK_K": 32, "CHUNK": 0, "PART": 16}
    blocks |= {"num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(kernel, "_blocks", lambda x, upcast, described: blocks)
    monkeypatch.setattr(kernel, "GROUP", group)
    monkeypatch.setattr(kernel, "_tiles", kernel._tiles.__wrapped__)
    x = randn(20, 150)
    assert_gram(ops.gram(x), expected(x), torch.float32)


def test_independent_of_thread_count():
    x, weight = randn(500, 300, seed=4), randn(500, seed=5).abs()
    threads = torch.get_num_threads()
    want = ops.gram(x), ops.gram(x, weight=weight)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.gram(x), want[0])
            assert torch.equal(ops.gram(x, weight=weight), want[1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.zeros(3)}, "x: expected 2 or 3 dimensions"),
        ({"x": torch.zeros(3, 2, dtype=torch.int32)}, "x: expected bf16, fp16, fp32 or fp64"),
        ({"x": torch.zeros(3, 2), "weight": torch.zeros(2)}, "weight: expected shape"),
        ({"x": torch.zeros(2, 3, 2), "weight": torch.zeros(3)}, "weight: expected shape"),
        ({"x": torch.zeros(3, 2), "out": torch.zeros(3, 3)}, r"out: expected shape \(2, 2\)"),
        ({"x": torch.zeros(3, 2), "out": torch.zeros(2, 2).double()}, "out: expected torch.float3"),
        (
            {"x": torch.zeros(3, 2), "out": torch.zeros(2, 2), "ones_column": True},
            r"out: expected shape \(3, 3\) with ones_column",
        ),
        ({"x": torch.zeros(3, 2), "out": torch.zeros(2, device="meta")}, "out: expected shape"),
        ({"x": torch.zeros(3, 2), "out": torch.zeros(2, 2, device="meta")}, "on one device"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.gram(kwargs.pop("x"), **kwargs)


def test_opcheck():
    for x, out in ((randn(5, 7), torch.zeros(7, 7)), (randn(2, 5, 7), torch.zeros(2, 8, 8))):
        for weight in (None, torch.rand(x.shape[:-1])):
            torch.library.opcheck(torch.ops.pyprune.gram, (out.clone(), x, weight))


def test_compiles_without_graph_breaks():
    def f(x):
        return ops.gram(x, ones_column=True) * 2

    x = randn(9, 11)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, f(x))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 700),
    columns=st.integers(1, 130),
    dtype=st.sampled_from([d for d in TOLERANCE if d != torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    weights=st.sampled_from(["none", "mask", "any"]),
    ones_column=st.booleans(),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 999),
)
def test_fuzz_native_against_float64(
    tokens, columns, dtype, scale, weights, ones_column, isa, seed
):
    x = (randn(tokens, columns, seed=seed) * scale).to(dtype)
    weight = None if weights == "none" else randn(tokens, seed=seed + 1).abs()
    if weight is not None and weights == "mask":
        weight = (weight > 0.5).float()
    whole = torch.cat([x, torch.ones(tokens, 1, dtype=dtype)], dim=1) if ones_column else x
    want = expected(whole, weight)
    with restricted(isa):
        got = ops.gram(x, weight=weight, ones_column=ones_column)
    assert torch.equal(got, got.mT)
    # Relative to the columns' norms, which rounding is proportional to.
    norms = want.diagonal().sqrt()
    assert bool(((got.double() - want).abs() <= 1e-5 * torch.outer(norms, norms)).all())
