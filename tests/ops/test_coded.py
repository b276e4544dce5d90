import pytest
import torch
from ops.isa import AVAILABLE
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune import ops
from pyprune.ops import coded, registry
from pyprune.ops.sparse_linear import TRITON_ROWS

BACKENDS = list(registry.IMPLS["linear_coded"])
# Both sides of the switches from decoding in registers to decoding tiles.
ROWS = [1, 2, 3, 4, 5, 8, 9, 11, 12, 17, 64]
SHAPES = [(1, 8), (5, 72), (37, 200), (18, 1096)]
OUTPUT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-14}
PARTS = ("low", "codes", "bases", "escapes", "row_offsets")


def patterns():
    """Every bf16 there is, infinities, NaNs, subnormals and both zeros among them."""
    return torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)


def weight(shape, seed=0, decades=6):
    """Rows of very different sizes, with zeros of both signs."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=gen) * torch.logspace(-decades, decades, shape[0])[:, None]
    w[torch.rand(shape, generator=gen) < 0.02] = 0.0
    w[torch.rand(shape, generator=gen) < 0.02] = -0.0
    return w.bfloat16()


def activations(m, cols, dtype=torch.float32, seed=1):
    return torch.randn(m, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


def assert_product(got, x, w, bias=None):
    want, scale = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    assert got.dtype == x.dtype and got.shape == want.shape
    worst = ((got.double() - want).abs() / (OUTPUT[x.dtype] * scale + 1e-30)).max()
    assert worst <= 1, f"{worst:.1f} times the tolerance"


# --- the layout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 256), (1, 2**16), (2**13, 8), (2**10, 63)])
def test_every_pattern_comes_back(shape, use_isa):
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(3))
    w = patterns()[order][: shape[0] * shape[1]].view(shape)
    packed = ops.pack_coded(w)
    ops.validate_coded(*packed)
    assert coded.count_escapes(w) == len(packed[3])
    assert same_bits(coded.unpack_coded_reference(*packed, None), w)
    some = torch.randint(0, shape[0], (40,), generator=torch.Generator().manual_seed(4))
    for isa in AVAILABLE:
        use_isa(isa)
        assert same_bits(ops.unpack_coded(*packed), w)
        assert same_bits(ops.unpack_coded(*packed, rows=some), w[some])


def test_what_the_layout_says():
    """By hand: exponents 100 to 106 have codes, 99 and 107 escape."""
    exponents = [100, 106, 99, 103, 107, 101, 102, 104, 105, 106, 100]
    bits = [(k % 2) << 15 | e << 7 | (9 * k + 1) for k, e in enumerate(exponents)]
    w = torch.tensor([bits]).to(torch.uint16).view(torch.bfloat16)
    low, codes, bases, escapes, offsets = ops.pack_coded(w)
    assert low.tolist() == [[(9 * k + 1) << 1 | k % 2 for k in range(11)]]
    first = sum(c << 3 * k for k, c in enumerate([0, 6, 7, 3, 7, 1, 2, 4]))
    assert codes.tolist() == [[*first.to_bytes(3, "little"), 5 | 6 << 3, 0, 0]]
    assert (bases.tolist(), escapes.tolist(), offsets.tolist()) == ([100], [99, 107], [0, 2])


def test_bases_leave_the_fewest_escapes():
    gen = torch.Generator().manual_seed(5)
    exponents = torch.randint(0, 256, (40, 30), generator=gen)
    exponents[:20] = torch.randint(118, 130, (20, 30), generator=gen)
    exponents[0], exponents[1] = 255, 0
    w = (exponents << 7).to(torch.uint16).view(torch.bfloat16)
    _, _, bases, escapes, offsets = ops.pack_coded(w)
    for row, base, count in zip(exponents, bases.tolist(), offsets.diff().tolist(), strict=True):
        outside = [int(((row < b) | (row > b + 6)).sum()) for b in range(250)]
        assert count == min(outside) and base == outside.index(min(outside))
    assert len(escapes) == offsets[-1] and bases[0] == 249 and bases[1] == 0


def test_size_and_blocks_of_rows(monkeypatch):
    w = (torch.randn(300, 512, generator=torch.Generator().manual_seed(0)) / 20).bfloat16()
    packed = ops.pack_coded(w)
    assert 0.69 < sum(t.nbytes for t in packed) / w.nbytes < 0.73
    monkeypatch.setattr(coded, "_BLOCK_ELEMENTS", 5000)
    for got, want in zip(ops.pack_coded(w), packed, strict=True):
        assert torch.equal(got, want)
    ops.validate_coded(*packed)
    assert same_bits(coded.unpack_coded_reference(*packed, None), w)
    x = activations(2, 512)
    assert_product(coded.linear_coded_reference(x, *packed, None), x, w)


class Int64(TorchDispatchMode):
    """The sizes of the int64 tensors that operators make."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.int64:
            self.sizes.append(out.numel())
        return out


def test_places_of_escapes_are_no_wider_than_needed(monkeypatch):
    """Some rows of W are unpacked for many rows of x on a GPU: what is moved for it is its time."""
    w = weight((64, 200))
    packed = ops.pack_coded(w)
    with Int64() as wide:
        assert same_bits(coded.unpacked_rows(*packed, slice(0, 64)), w)
    assert max(wide.sizes) <= 65
    monkeypatch.setattr(coded, "LARGEST_INT32", len(packed[3]) + 198)
    with Int64() as wide:
        assert same_bits(coded.unpacked_rows(*packed, slice(0, 64)), w)
    assert max(wide.sizes) == w.numel()


def test_of_any_strides_and_empty():
    w = weight((24, 40))
    for got, want in zip(ops.pack_coded(w.T), ops.pack_coded(w.T.contiguous()), strict=True):
        assert torch.equal(got, want)
    for shape in ((0, 8), (0, 0), (3, 0)):
        packed = ops.pack_coded(torch.empty(shape, dtype=torch.bfloat16))
        ops.validate_coded(*packed)
        assert ops.unpack_coded(*packed).shape == shape
    none = torch.empty(0, dtype=torch.int64)
    assert ops.unpack_coded(*ops.pack_coded(w), rows=none).shape == (0, 40)


@pytest.mark.parametrize("w", [torch.ones(2, 8), torch.ones(2, 8).half(), torch.ones(8).bfloat16()])
def test_bf16_alone_is_coded(w):
    for function in (ops.pack_coded, coded.count_escapes):
        with pytest.raises(ValueError, match="w: expected a bf16 matrix"):
            function(w)


def test_rows_that_are_not_there():
    packed = ops.pack_coded(weight((4, 16)))
    for backend in (ops.unpack_coded, lambda *p, rows: coded.unpack_coded_reference(*p, rows)):
        for wrong in (-1, 4, 2**40):
            with pytest.raises(
                IndexError, match=f"rows: expected numbers from 0 to 3, got {wrong}"
            ):
                backend(*packed, rows=torch.tensor([1, wrong]))
    with pytest.raises(ValueError, match="rows: expected"):
        ops.unpack_coded(*packed, rows=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="rows: expected"):
        ops.unpack_coded(*packed, rows=torch.tensor([1.0]))


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(provider, shape, use_backend):
    w = weight(shape, decades=1)
    packed = ops.pack_coded(w)
    for dtype in registry.IMPLS["linear_coded"][provider].dtypes:
        use_backend(provider, "linear_coded", "cpu", dtype)
        rows = ROWS if dtype == torch.float32 else [2]
        if provider == "triton":  # its interpreter is slow, and its kernel sees fp32 whatever x is
            rows = (
                [TRITON_ROWS, TRITON_ROWS + 1]
                if dtype == torch.float32
                else [2]
                if shape[0] < 10
                else []
            )
        for m in rows:
            x = activations(m, shape[1], dtype)
            assert_product(ops.linear_coded(x, *packed), x, w)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_every_instruction_set(isa, use_isa):
    use_isa(isa)
    for shape in (*SHAPES, (19, 4168)):
        w = weight(shape)
        packed = ops.pack_coded(w)
        for dtype in (torch.float32, torch.bfloat16):
            for m in (1, 4, 8, 50) if shape[1] > 4000 else ROWS:
                x = activations(m, shape[1], dtype)
                assert_product(ops.linear_coded(x, *packed), x, w)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("cols", [1, 7, 9, 63, 65, 131])
def test_any_width(isa, use_isa, cols):
    use_isa(isa)
    w = weight((11, cols))
    packed = ops.pack_coded(w)
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 3, 12, 17):
            x = activations(m, cols, dtype)
            assert_product(ops.linear_coded(x, *packed), x, w)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("kind", ["no escapes", "all escapes", "one row"])
def test_any_number_of_escapes(isa, kind, use_isa):
    use_isa(isa)
    exponents = torch.full((9, 150), 125)
    if kind == "all escapes":
        exponents[:, ::2] = 120
    elif kind == "one row":
        exponents[4] = 110 + torch.arange(150) % 20
    w = (exponents << 7 | torch.arange(150) % 128).to(torch.uint16).view(torch.bfloat16)
    packed = list(ops.pack_coded(w))
    if kind == "all escapes":  # as nobody would write it, but could
        packed[1] = coded._pack_codes(torch.full((9, 150), 7))
        packed[3] = exponents.flatten().to(torch.uint8)
        packed[4] = 150 * torch.arange(10)
        ops.validate_coded(*packed)
    bias = activations(1, 9)[0]
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 8, 12, 17):
            x = activations(m, 150, dtype)
            assert_product(ops.linear_coded(x, *packed, bias=bias), x, w, bias)
    assert same_bits(ops.unpack_coded(*packed), w)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_more_rows_than_a_tile_and_a_sweep(isa, use_isa):
    use_isa(isa)
    for shape, rows in (((301, 200), (11, 31, 48)), ((6, 328), (577, 1100))):
        w = weight(shape)
        packed = ops.pack_coded(w)
        for m in rows:
            x = activations(m, shape[1], torch.bfloat16)
            bias = activations(1, shape[0], seed=m)[0] if m % 2 else None
            assert_product(ops.linear_coded(x, *packed, bias=bias), x, w, bias)


@pytest.mark.parametrize("provider", BACKENDS)
def test_bias_and_strides_of_any_kind(provider, use_backend):
    use_backend(provider, "linear_coded", "cpu")
    w = weight((13, 40), decades=1)
    packed = ops.pack_coded(w)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = activations(1, 13, dtype)[0]
        for m in (1, 8, 9):
            x = activations(40, m).T
            assert_product(ops.linear_coded(x, *packed, bias=bias), x, w, bias)
    batch = activations(6, 40).view(2, 3, 40)
    assert_product(ops.linear_coded(batch, *packed).view(6, 13), batch.view(6, 40), w)
    assert ops.linear_coded(torch.empty(0, 40), *packed).shape == (0, 13)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_sums_are_rounded_once(isa, use_isa):
    """Whole numbers below 2^24: the fp32 sums are exact."""
    use_isa(isa)
    gen = torch.Generator().manual_seed(2)
    w = torch.randint(-127, 128, (50, 72), generator=gen).bfloat16()
    for m in (3, 11, 12, 13, 17, 60, 600):
        x = torch.randint(-8, 9, (m, 72), generator=gen).bfloat16()
        exact = x.double() @ w.double().T
        assert torch.equal(ops.linear_coded(x, *ops.pack_coded(w)), exact.bfloat16())


@pytest.mark.parametrize("isa", AVAILABLE)
def test_infinities_and_nans_spread_to_their_rows_alone(isa, use_isa):
    use_isa(isa)
    w = weight((6, 100))
    w[2, 70], w[4, 99] = float("inf"), float("nan")
    for m in (1, 3, 12, 17):
        for dtype in (torch.float32, torch.bfloat16):
            y = ops.linear_coded(activations(m, 100, dtype), *ops.pack_coded(w))
            assert y[:, 4].isnan().all() and not y[:, 2].isfinite().any()
            assert y[:, [0, 1, 3, 5]].isfinite().all()


def test_on_any_device(device):
    w = weight((40, 72), decades=1).to(device)
    packed = ops.pack_coded(w)
    ops.validate_coded(*packed)
    assert all(t.device == w.device for t in packed)
    for t, want in zip(packed, ops.pack_coded(w.cpu()), strict=True):
        assert torch.equal(t.cpu(), want)
    assert same_bits(ops.unpack_coded(*packed), w)
    rows = torch.tensor([39, 0, 7], device=device)
    assert same_bits(ops.unpack_coded(*packed, rows=rows), w[rows])
    for m in (1, 16, 40):
        for dtype in (torch.float32, torch.bfloat16):
            x = activations(m, 72, dtype).to(device)
            assert_product(ops.linear_coded(x, *packed).cpu(), x.cpu(), w.cpu())


def test_independent_of_thread_count():
    w = weight((77, 328))
    packed = ops.pack_coded(w)
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 5, 12, 17):
            x = activations(m, 328, dtype)
            want = ops.linear_coded(x, *packed)
            try:
                torch.set_num_threads(1)
                assert torch.equal(ops.linear_coded(x, *packed), want)
            finally:
                torch.set_num_threads(threads)


# --- what does not describe a matrix --------------------------------------------------------------

SPOILT = {
    "an escape more": lambda p: p["codes"][1, :30].fill_(255),
    "an escape less": lambda p: p["codes"][2].fill_(0),
    "offsets past the end": lambda p: p["row_offsets"][4].add_(5),
    "negative offset": lambda p: p["row_offsets"][0].fill_(-3),
    "a huge offset": lambda p: p["row_offsets"][2].fill_(1 << 62),
    "falling offsets": lambda p: p["row_offsets"][1:3].copy_(p["row_offsets"][1:3].flip(0)),
    "a difference that overflows": lambda p: p["row_offsets"][1:3].copy_(
        torch.tensor([2**63 - 4, 20 - 2**63])
    ),
    "an escape is missing": lambda p: p.__setitem__("escapes", p["escapes"][:-1].clone()),
    "none at all": lambda p: p.__setitem__("escapes", p["escapes"][:0].clone()),
}


def spoilt(name):
    """A matrix each of whose rows has escapes."""
    w = weight((4, 100), seed=6)
    w[:, ::9] *= 2.0**-40
    packed = dict(zip(PARTS, ops.pack_coded(w), strict=True))
    assert (packed["row_offsets"].diff() > 0).all()
    SPOILT[name](packed)
    return tuple(packed.values())


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("name", SPOILT)
def test_inconsistent_rows_are_refused_by_the_kernels(name, isa, use_isa):
    use_isa(isa)
    packed = spoilt(name)
    message = r"codes: row [0-3] has escapes that do not match its row_offsets"
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 8, 12, 17):
            with pytest.raises(ValueError, match=message):
                ops.linear_coded(torch.ones(m, 100, dtype=dtype), *packed)
    with pytest.raises(ValueError, match=message):
        ops.unpack_coded(*packed)
    with pytest.raises(ValueError, match=r"row_offsets|codes: expected as many escapes"):
        ops.validate_coded(*packed)


@pytest.mark.parametrize("provider", ["reference", "triton"])
@pytest.mark.parametrize("name", SPOILT)
def test_inconsistent_rows_stay_inside_elsewhere(name, provider, use_backend):
    use_backend(provider, "linear_coded", "cpu")
    assert ops.linear_coded(torch.ones(2, 100), *spoilt(name)).shape == (2, 4)


def test_validation():
    low, codes, bases, escapes, offsets = packed = ops.pack_coded(weight((6, 61)))
    ops.validate_coded(*packed)
    stray = codes.clone()
    stray[3, -1] |= 0x80
    with pytest.raises(ValueError, match="codes: expected no bits past column 60"):
        ops.validate_coded(low, stray, bases, escapes, offsets)
    large = bases.clone()
    large[5] = 250
    with pytest.raises(ValueError, match="bases: expected at most 249, got 250 in row 5"):
        ops.validate_coded(low, codes, large, escapes, offsets)
    for change, message in (
        ({"low": low[0]}, "low: expected 2 dimensions"),
        (
            {"low": low.short()},
            r"low: expected 2 dimensions of torch\.uint8, got 2 of torch\.int16",
        ),
        ({"codes": codes[:, 3:]}, r"codes: expected shape \(6, 24\), got \(6, 21\)"),
        ({"bases": bases[1:]}, r"bases: expected shape \(6,\)"),
        ({"escapes": escapes[None]}, "escapes: expected 1 dimensions"),
        ({"row_offsets": offsets.int()}, r"row_offsets: expected torch\.int64"),
        ({"row_offsets": offsets[1:]}, r"row_offsets: expected shape \(7,\)"),
    ):
        given = {**dict(zip(PARTS, packed, strict=True)), **change}
        for function in (ops.validate_coded, ops.unpack_coded):
            with pytest.raises(ValueError, match=message):
                function(**given)
        with pytest.raises(ValueError, match=message):
            ops.linear_coded(torch.zeros(2, 61), **given)


def test_bad_arguments():
    packed = ops.pack_coded(weight((3, 9)))
    for x, bias, message in (
        (torch.zeros(2, 8), None, r"low: expected shape \(3, 8\), got \(3, 9\)"),
        (torch.zeros(2, 9).int(), None, "x: expected bf16"),
        (torch.zeros(2, 0), None, "C > 0"),
        (torch.zeros(2, 9), torch.zeros(2), "bias: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_coded(x, *packed, bias=bias)


def test_opcheck_and_compile():
    packed = ops.pack_coded(weight((5, 16)))
    for bias in (None, torch.randn(5)):
        torch.library.opcheck(torch.ops.pyprune.linear_coded, (activations(3, 16), *packed, bias))
    rows = torch.tensor([4, 0, 0])
    for chosen in (None, rows):
        torch.library.opcheck(torch.ops.pyprune.unpack_coded, (*packed, chosen))

    def step(x):
        return ops.linear_coded(x, *packed).relu() + ops.unpack_coded(*packed, rows=rows)[:, :5]

    x = activations(3, 16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))
