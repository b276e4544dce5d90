import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.compressed import pack_24, pack_bitmap, random_24_mask
from ops.isa import AVAILABLE, restricted

from pyprune import ops
from pyprune.ops import registry
from pyprune.ops.sparse_linear import TRITON_ROWS

FORMATS = ["linear_24", "linear_bitmap", "linear_dense"]
# Those of the CPU; the CUDA ones are in test_linear_24_cuda.py and test_linear_bitmap_cuda.py.
BACKENDS = [(f, b) for f in FORMATS for b in registry.IMPLS[f] if b != "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every number of rows that a chunk which 2:4 gathers may hold comes up to rounding; then one and
# several chunks of those that have a table.
ROWS = [1, 2, 3, 5, 8, 12, 13, 16, 17, 64]
# One group; sizes that divide neither a word of mask nor a block of rows; several words.
SHAPES = [(1, 8), (5, 72), (37, 200), (18, 1096)]
# Rounding of the output, on top of fp32 sums.
OUTPUT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-14}


def rows_of(provider):
    """Triton's interpreter is slow: both sides of its switch, and blocks that are in part empty."""
    return ROWS if provider != "triton" else [1, 5, TRITON_ROWS, TRITON_ROWS + 1, 64]


def weight(fmt, shape, dtype, density=0.5, seed=0):
    """The op's weight tensors and the dense matrix they stand for."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=gen).to(dtype)
    if fmt == "linear_24":
        mask = random_24_mask(*shape, gen)
        return pack_24(w, mask), w * mask
    if fmt == "linear_bitmap":
        mask = torch.rand(shape, generator=gen) < density
        return pack_bitmap(w, mask), w * mask
    return (w,), w


def activations(m, cols, dtype=torch.float32, seed=1):
    return torch.randn(m, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_product(got, x, dense, bias=None):
    want = x.double() @ dense.double().T
    scale = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    assert got.dtype == x.dtype and got.shape == want.shape
    tolerance = OUTPUT[x.dtype] * scale + 1e-30
    worst = ((got.double() - want).abs() / tolerance).max() if got.numel() else 0.0
    assert worst <= 1, f"{worst:.1f} times the tolerance"


@pytest.mark.parametrize(("fmt", "provider"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(fmt, provider, use_backend, dtype, shape):
    use_backend(provider, fmt, "cpu")
    tensors, dense = weight(fmt, shape, dtype)
    for m in rows_of(provider):
        x = activations(m, shape[1])
        assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize(
    ("fmt", "provider", "x_dtype"),
    [(f, b, d) for f, b in BACKENDS for d in registry.IMPLS[f][b].dtypes if d != torch.float32],
)
def test_output_has_the_activations_dtype(fmt, provider, use_backend, x_dtype):
    use_backend(provider, fmt, "cpu", x_dtype)
    tensors, dense = weight(fmt, (21, 136), torch.bfloat16)
    for m in rows_of(provider):
        x = activations(m, 136, x_dtype)
        assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, fmt, dtype, use_isa):
    use_isa(isa)
    for shape in SHAPES:
        tensors, dense = weight(fmt, shape, dtype)
        for x_dtype in (torch.float32, torch.bfloat16):
            for m in ROWS:
                x = activations(m, shape[1], x_dtype)
                assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_widths_beyond_the_cached_piece_of_x(fmt, isa, use_isa):
    use_isa(isa)
    tensors, dense = weight(fmt, (19, 4168), torch.bfloat16)
    wide, wide_dense = weight(fmt, (3, 8264), torch.bfloat16)
    x = activations(20, 8264, torch.bfloat16)
    assert_product(getattr(ops, fmt)(x, *wide), x, wide_dense)
    for dtype, rows in ((torch.float32, (1, 4, 8, 13, 50)), (torch.bfloat16, (2, 13, 50, 130))):
        for m in rows:
            x = activations(m, 4168, dtype)
            assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_chunks_passes_and_blocks_of_every_kind(fmt, isa, use_isa):
    """Rows of x that make one or two chunks of 16, several of 32 with and without a rest, and more
    than one sweep over W; more rows of W than a block has, none of them a multiple of anything."""
    use_isa(isa)
    for shape, rows in (((301, 200), (11, 31, 33, 48, 49, 100)), ((6, 328), (577, 1100))):
        tensors, dense = weight(fmt, shape, torch.bfloat16)
        for m in rows:
            x = activations(m, shape[1], torch.bfloat16)
            bias = activations(1, shape[0], seed=m)[0] if m % 2 else None
            assert_product(getattr(ops, fmt)(x, *tensors, bias=bias), x, dense, bias)


@pytest.mark.parametrize("fmt", FORMATS)
def test_outputs_of_several_megabytes(fmt):
    tensors, dense = weight(fmt, (2100, 8), torch.bfloat16)
    x = activations(1100, 8, torch.bfloat16)
    assert x.shape[0] * 2100 * x.itemsize > 4 << 20  # huge pages are asked for
    assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_sums_are_rounded_once_and_to_even(fmt, isa, use_isa):
    """Whole numbers, so that sums in fp32 are exact and many lie between two bf16 numbers."""
    use_isa(isa)
    gen = torch.Generator().manual_seed(8)
    w = torch.randint(-8, 9, (50, 136), generator=gen).bfloat16()
    mask = random_24_mask(50, 136, gen)
    packed = {"linear_24": pack_24, "linear_bitmap": pack_bitmap}
    tensors = packed[fmt](w, mask) if fmt in packed else (w * mask,)
    for m in (5, 10, 11, 17, 40, 130):
        x = torch.randint(-8, 9, (m, 136), generator=gen).bfloat16()
        exact = x.double() @ (w * mask).double().T
        assert torch.equal(getattr(ops, fmt)(x, *tensors), exact.bfloat16())
    assert (exact.bfloat16() != exact).any()


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row_of_x(fmt, isa, value, use_isa):
    use_isa(isa)
    tensors, dense = weight(fmt, (21, 72), torch.bfloat16)
    for m in (5, 11, 17, 40, 130):
        x = activations(m, 72, torch.bfloat16)
        clean = getattr(ops, fmt)(x, *tensors)
        for column in (0, 5, 63, 71):
            bad = x.clone()
            bad[3, column] = value
            got = getattr(ops, fmt)(bad, *tensors)
            others = torch.arange(m) != 3
            assert torch.equal(got[others], clean[others])
            stored = dense[:, column] != 0
            torch.testing.assert_close(
                got[3, stored], value * dense[stored, column], equal_nan=True
            )


@pytest.mark.parametrize("provider", ["reference", "native", "triton"])
@pytest.mark.parametrize("cols", [1, 7, 9, 63, 65, 131])
def test_bitmap_of_any_width(provider, use_backend, cols):
    use_backend(provider, "linear_bitmap", "cpu")
    tensors, dense = weight("linear_bitmap", (11, cols), torch.bfloat16)
    for m in rows_of(provider):
        x = activations(m, cols)
        assert_product(ops.linear_bitmap(x, *tensors), x, dense)


@pytest.mark.parametrize("cols", [1, 7, 9, 63, 65, 131])
def test_dense_of_any_width(cols):
    tensors, dense = weight("linear_dense", (11, cols), torch.float16)
    for m in ROWS:
        x = activations(m, cols)
        assert_product(ops.linear_dense(x, *tensors), x, dense)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("m", [1, 8, 12, 64])
def test_empty_full_and_zero_rows(isa, m, use_isa):
    use_isa(isa)
    w = torch.randn(9, 150, generator=torch.Generator().manual_seed(3)).bfloat16()
    mask = torch.rand(9, 150, generator=torch.Generator().manual_seed(4)) < 0.3
    mask[2] = False
    mask[5] = True
    mask[8] = False
    x = activations(m, 150)
    assert_product(ops.linear_bitmap(x, *pack_bitmap(w, mask)), x, w * mask)
    nothing = torch.zeros_like(mask)
    bias = torch.randn(9)
    got = ops.linear_bitmap(x, *pack_bitmap(w, nothing), bias=bias)
    assert torch.equal(got, bias.expand(m, 9))
    everything = torch.ones_like(mask)
    assert_product(ops.linear_bitmap(x, *pack_bitmap(w, everything)), x, w)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("density", [0.02, 0.5, 0.8, 1.0])
def test_bitmap_tiles_of_any_density_and_width(density, isa, use_isa):
    """Whole tiles of rows and a rest; rows so long that half a tile is taken (9001 columns at 0.5)
    and that nothing is fetched as a stream (at 1.0); empty rows, one value, runs, long gaps."""
    use_isa(isa)
    gen = torch.Generator().manual_seed(9)
    for rows, cols, counts in ((101, 197, (11, 24, 25, 33, 49, 600)), (53, 9001, (25, 40))):
        w = torch.randn(rows, cols, generator=gen).bfloat16()
        mask = torch.rand(rows, cols, generator=gen) < density
        mask[[0, 1, 2, 30, 31, 52]] = False
        mask[0, -1] = mask[1, 0] = mask[52, 64] = True
        mask[30, 40:150] = True
        mask[31, ::61] = True
        for m in counts:
            x = activations(m, cols, torch.bfloat16)
            bias = activations(1, rows, seed=m)[0] if m % 2 else None
            got = ops.linear_bitmap(x, *pack_bitmap(w, mask), bias=bias)
            assert_product(got, x, w * mask, bias)


@pytest.mark.parametrize("provider", ["reference", "native", "triton"])
def test_stored_zeros_of_either_sign(provider, use_backend):
    use_backend(provider, "linear_24", "cpu")
    w = torch.tensor([[0.0, -0.0, 1.0, 0.0, -0.0, 0.0, 0.0, -2.0]])
    mask = torch.tensor([[True, True, False, False, True, False, False, True]])
    x = torch.full((1, 8), 3.0)
    assert ops.linear_24(x, *pack_24(w, mask)).item() == -6.0
    assert ops.linear_bitmap(x, *pack_bitmap(w, mask)).item() == -6.0


@pytest.mark.parametrize(("fmt", "provider"), BACKENDS)
def test_bias(fmt, provider, use_backend):
    use_backend(provider, fmt, "cpu")
    tensors, dense = weight(fmt, (13, 40), torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        bias = torch.randn(13, generator=torch.Generator().manual_seed(5)).to(dtype)
        for m in rows_of(provider):
            x = activations(m, 40)
            assert_product(getattr(ops, fmt)(x, *tensors, bias=bias), x, dense, bias)


@pytest.mark.parametrize(("fmt", "provider"), BACKENDS)
def test_strides_and_leading_dimensions(fmt, provider, use_backend):
    use_backend(provider, fmt, "cpu")
    tensors, dense = weight(fmt, (6, 48), torch.bfloat16)
    big = activations(16, 200)
    product = getattr(ops, fmt)
    for x in (big[::2, 3:51], big[:, ::4][:, :48], big.T[:48].T):
        assert_product(product(x, *tensors), x, dense)
    x = big[:, :48].reshape(2, 4, 2, 48)
    assert torch.equal(product(x, *tensors).reshape(16, 6), product(big[:, :48], *tensors))
    assert torch.equal(product(big[0, :48], *tensors), product(big[:1, :48], *tensors)[0])
    assert product(torch.empty(0, 48), *tensors).shape == (0, 6)
    assert product(torch.empty(3, 0, 48), *tensors).shape == (3, 0, 6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_independent_of_thread_count(fmt):
    tensors, _ = weight(fmt, (77, 328), torch.bfloat16)
    threads = torch.get_num_threads()
    for m, dtype in itertools.product((1, 5, 12, 80), (torch.float32, torch.bfloat16)):
        x = activations(m, 328, dtype)
        try:
            torch.set_num_threads(1)
            want = getattr(ops, fmt)(x, *tensors)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(getattr(ops, fmt)(x, *tensors), want)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("m", [1, 40])
def test_last_values_are_read_without_reaching_past_them(isa, m, use_isa):
    # NaN follows the last value: a load that reaches past it and is multiplied by zero would show.
    use_isa(isa)
    (values, bitmap, offsets), dense = weight("linear_bitmap", (3, 70), torch.float32)
    guarded = torch.cat([values, torch.full((64,), float("nan"))])[: len(values)]
    x = activations(m, 70)
    assert_product(ops.linear_bitmap(x, guarded, bitmap, offsets), x, dense)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_activations_of_any_magnitude(isa, fmt, use_isa):
    # One activation a row, stored by every row of W: the product is one multiplication.
    use_isa(isa)
    nan_in_the_last_bit = torch.tensor(0x7F800001).int().view(torch.float32).item()
    x = torch.zeros(2, 72)
    w = torch.zeros(5, 72, dtype=torch.bfloat16)
    w[:, 33] = torch.tensor([1.0, -0.5, 0.25, -1.0, 0.75], dtype=torch.bfloat16)
    mask = torch.arange(72).expand(5, 72) % 4 < 2
    tensors = {"linear_24": pack_24, "linear_bitmap": pack_bitmap}.get(fmt, lambda w, _: (w,))(
        w, mask
    )
    for value in (1 + 2**-23, 3.3e38, -3.4028234e38, 2.0e-30, float("inf"), -float("inf")):
        x[:, 33] = value
        got = getattr(ops, fmt)(x, *tensors)
        assert torch.equal(got, x[:, 33:34] * w[:, 33].float())
    x[:, 33] = nan_in_the_last_bit
    assert getattr(ops, fmt)(x, *tensors).isnan().all()


def _tampered(name):
    values, bitmap, offsets = pack_bitmap(
        torch.ones(4, 20), torch.rand(4, 20, generator=torch.Generator().manual_seed(6)) < 0.5
    )
    if name == "more bits than values":
        bitmap[2] = 255
        bitmap[2, 2] = 15
    elif name == "bits past the last column":
        bitmap[1, 2] |= 128
    elif name == "offsets past the end":
        offsets[4] += 5
    elif name == "offsets far past the end":
        offsets[3:] = 2**60
    elif name == "negative offset":
        offsets[0] = -3
    elif name == "falling offsets":
        offsets[1], offsets[2] = offsets[2].clone(), offsets[1].clone()
    else:
        values = values[:-1]
    return values, bitmap, offsets


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize(
    "name",
    ["more bits than values", "bits past the last column", "offsets past the end",
     "offsets far past the end", "negative offset", "falling offsets", "a value is missing"],
)  # fmt: skip
def test_inconsistent_bitmaps_are_refused_by_the_kernel(name, isa, use_isa):
    use_isa(isa)
    for m in (1, 8, 12, 64):
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match=r"row \d+ has bits that do not match"):
                ops.linear_bitmap(torch.ones(m, 20, dtype=dtype), *_tampered(name))


@pytest.mark.parametrize("shift", [5, 2**31 - 1, 2**60, -9])
def test_triton_reads_no_values_outside(shift, use_backend):
    """It has no way to refuse: sums are wrong then, but not of what is no value."""
    use_backend("triton", "linear_bitmap", "cpu")
    values, bitmap, offsets = _tampered("bits past the last column")
    guarded = torch.full((len(values) + 64,), float("nan"))
    guarded[16 : 16 + len(values)] = values
    got = ops.linear_bitmap(
        torch.ones(1, 20), guarded[16 : 16 + len(values)], bitmap, offsets + shift
    )
    assert not got.isnan().any()


@pytest.mark.parametrize("int8", [False, True])
def test_the_reference_refuses_what_kernels_do(int8):
    """In fp64, for instance, which no kernel multiplies."""
    values, bitmap, offsets = ops.pack_bitmap(torch.eye(4, 12, dtype=torch.float64) * 3)
    more = torch.cat([values, values])
    other_rows, past_the_end = offsets.clone(), bitmap.clone()
    other_rows[1] += 1
    past_the_end[2, 1] |= 1 << 5
    for packed in (
        (more, bitmap, offsets), (values[:-1], bitmap, offsets), (values, bitmap, other_rows),
        (values, past_the_end, offsets),
    ):  # fmt: skip
        x = torch.ones(2, 12, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"^(row_offsets|bitmap): expected"):
            if int8:
                ops.linear_bitmap_int8(x, packed[0].to(torch.int8), *packed[1:], torch.ones(4))
            else:
                ops.linear_bitmap(x, *packed)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_offsets_whose_difference_overflows_are_refused(isa, use_isa):
    """Their difference, taken modulo 2^64, is the row's number of bits."""
    use_isa(isa)
    bitmap = torch.full((1, 3), 255, dtype=torch.uint8)
    offsets = torch.tensor([2**63 - 4, 20 - 2**63])
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.ones(24, dtype=dtype)
        for m in (1, 8, 12, 64):
            with pytest.raises(ValueError, match="row 0 has bits that do not match"):
                ops.linear_bitmap(torch.ones(m, 24, dtype=dtype), values, bitmap, offsets)


def test_any_24_metadata_stays_inside_its_buffers(use_isa):
    values = torch.randn(6, 32)
    meta = torch.randint(0, 256, (6, 8), generator=torch.Generator().manual_seed(7))
    for isa in AVAILABLE:
        use_isa(isa)
        for m, dtype in itertools.product((1, 8, 12, 40, 64), (torch.float32, torch.bfloat16)):
            x = torch.ones(m, 64, dtype=dtype)
            for v in (values, values.bfloat16()):
                assert ops.linear_24(x, v, meta.to(torch.uint8)).isfinite().all()


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        ("linear_24", (torch.zeros(2, 12), torch.zeros(3, 6), torch.zeros(3, 1)), "multiple of 8"),
        (
            "linear_24",
            (torch.zeros(2, 8), torch.zeros(3, 5), torch.zeros(3, 1)),
            "values: expected",
        ),
        ("linear_24", (torch.zeros(2, 8), torch.zeros(3, 4), torch.zeros(3, 1)), "meta: expected"),
        (
            "linear_24",
            (torch.zeros(2, 8), torch.zeros(12), torch.zeros(3, 1)),
            "values: expected 2",
        ),
        (
            "linear_bitmap",
            (torch.zeros(2, 9), torch.zeros(4), torch.zeros(3, 1).byte(), torch.zeros(4).long()),
            "bitmap: expected shape",
        ),
        (
            "linear_bitmap",
            (torch.zeros(2, 8), torch.zeros(4), torch.zeros(3, 1).byte(), torch.zeros(3).long()),
            "row_offsets: expected shape",
        ),
        (
            "linear_bitmap",
            (torch.zeros(2, 8), torch.zeros(4), torch.zeros(3, 1).byte(), torch.zeros(4).int()),
            "row_offsets: expected torch.int64",
        ),
        ("linear_dense", (torch.zeros(2, 8), torch.zeros(3, 9)), "weight: expected shape"),
        ("linear_dense", (torch.zeros(2, 8).int(), torch.zeros(3, 8)), "x: expected bf16"),
        ("linear_dense", (torch.zeros(2, 0), torch.zeros(3, 0)), "C > 0"),
    ],
)
def test_bad_arguments(op, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args)
    with pytest.raises(ValueError, match="bias: expected shape"):
        ops.linear_dense(torch.zeros(2, 8), torch.zeros(3, 8), bias=torch.zeros(4))


@pytest.mark.parametrize("fmt", FORMATS)
def test_opcheck(fmt):
    tensors, _ = weight(fmt, (5, 16), torch.bfloat16)
    for bias in (None, torch.randn(5)):
        torch.library.opcheck(getattr(torch.ops.pyprune, fmt), (activations(3, 16), *tensors, bias))


@pytest.mark.parametrize("fmt", FORMATS)
def test_compiles_without_graph_breaks(fmt):
    tensors, _ = weight(fmt, (5, 16), torch.bfloat16)

    def f(x):
        return getattr(ops, fmt)(x, *tensors).relu()

    x = activations(3, 16)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, f(x))


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    m=st.integers(1, 40),
    rows=st.integers(1, 40),
    groups=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 999),
)
def test_fuzz_native_against_float64(fmt, m, rows, groups, dtype, x_dtype, density, isa, seed):
    tensors, dense = weight(fmt, (rows, 8 * groups), dtype, density, seed)
    x = activations(m, 8 * groups, x_dtype, seed + 1)
    with restricted(isa):
        got = getattr(ops, fmt)(x, *tensors)
    assert_product(got, x, dense)
