import pytest
import torch
from ops.compressed import pack_24, pack_bitmap, random_24_mask
from ops.isa import AVAILABLE

from pyprune import ops
from pyprune.ops import registry, sparse_int8
from pyprune.ops.sparse_int8 import (
    unpack_24_int8,
    unpack_bitmap_int8,
    unpack_int8,
    validate_24_int8,
    validate_bitmap_int8,
    validate_int8,
)
from pyprune.ops.sparse_linear import TRITON_ROWS

FORMATS = ["linear_24_int8", "linear_bitmap_int8", "linear_int8"]
BACKENDS = [(f, b) for f in FORMATS for b in registry.IMPLS[f]]
# Both sides of the switches from widening in registers to widening tiles or blocks of rows.
ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 64]
SHAPES = [(1, 8), (5, 72), (37, 200), (18, 1096)]
OUTPUT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-14}


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_int8_number(isa, dtype, use_isa):
    """One value a row, so that each product is one multiplication by an exact power of two."""
    use_isa(isa)
    q = torch.arange(-127, 128, dtype=torch.int8)
    for column in (0, 9, 63, 70):
        mask = torch.zeros(255, 72, dtype=torch.bool)
        mask[:, column] = True
        x = torch.zeros(1, 72, dtype=dtype)
        x[0, column] = 0.25
        for m in (1, 4):
            got = ops.linear_bitmap_int8(x.expand(m, 72), *pack_bitmap(q[:, None] * mask, mask),
                                         torch.ones(255))  # fmt: skip
            assert torch.equal(got, (q * 0.25).to(dtype).expand(m, 255))
        for m in (1, 4, 9):
            got = ops.linear_int8(x.expand(m, 72), q[:, None] * mask, torch.ones(255))
            assert torch.equal(got, (q * 0.25).to(dtype).expand(m, 255))
        mask[:, column ^ 1] = True
        values, meta = pack_24(q[:, None] * mask, full_24(mask))
        got = ops.linear_24_int8(x, values, meta, torch.ones(255))
        assert torch.equal(got[0], (q * 0.25).to(dtype))


def full_24(mask):
    """`mask`, where a group of four keeps none made to keep its first two."""
    groups = mask.view(len(mask), -1, 4).clone()
    groups[..., :2] |= ~groups.any(-1, keepdim=True)
    return groups.view(mask.shape)


def rows_of(provider):
    return ROWS if provider != "triton" else [1, TRITON_ROWS, TRITON_ROWS + 1, 64]


def weight(fmt, shape, density=0.5, seed=0):
    """The op's weight tensors and the dense fp64 matrix they stand for."""
    gen = torch.Generator().manual_seed(seed)
    rows = shape[0]
    q = torch.randint(-127, 128, shape, generator=gen, dtype=torch.int64).to(torch.int8)
    scales = torch.rand(rows, generator=gen) / 100
    scales[rows // 2] = 0.0
    if fmt == "linear_int8":
        packed, mask = (q,), True
    elif fmt == "linear_24_int8":
        mask = random_24_mask(*shape, gen)
        packed = pack_24(q, mask)
    else:
        mask = torch.rand(shape, generator=gen) < density
        packed = pack_bitmap(q, mask)
    return (*packed, scales), (q * mask).double() * scales.double()[:, None]


def activations(m, cols, dtype=torch.float32, seed=1):
    return torch.randn(m, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_product(got, x, dense, bias=None):
    want = x.double() @ dense.T
    scale = x.double().abs() @ dense.abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    assert got.dtype == x.dtype and got.shape == want.shape
    tolerance = OUTPUT[x.dtype] * scale + 1e-30
    worst = ((got.double() - want).abs() / tolerance).max() if got.numel() else 0.0
    assert worst <= 1, f"{worst:.1f} times the tolerance"


@pytest.mark.parametrize(("fmt", "provider"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(fmt, provider, use_backend, shape):
    tensors, dense = weight(fmt, shape)
    for dtype in registry.IMPLS[fmt][provider].dtypes:
        use_backend(provider, fmt, "cpu", dtype)
        # Triton's interpreter is slow, and its kernels see fp32 whatever x is.
        for m in rows_of(provider) if dtype == torch.float32 else (2,):
            x = activations(m, shape[1], dtype)
            assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_instruction_set(isa, fmt, use_isa):
    use_isa(isa)
    for shape in (*SHAPES, (19, 4168)):
        tensors, dense = weight(fmt, shape)
        for dtype in (torch.float32, torch.bfloat16):
            for m in (1, 4, 8, 50) if shape[1] > 4000 else ROWS:
                x = activations(m, shape[1], dtype)
                assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_more_rows_than_are_widened_at_once(isa, use_isa):
    use_isa(isa)
    for fmt in FORMATS:
        tensors, dense = weight(fmt, (2051, 40))
        x = activations(17, 40)
        assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_large_sums(isa, use_isa):
    """As large as every instruction set can take them: with AVX2 they are 2^24 times as large
    meanwhile."""
    use_isa(isa)
    packed = ops.pack_bitmap(torch.full((4, 64), 127.0).bfloat16())
    packed = (packed[0].to(torch.int8), *packed[1:], torch.tensor([2.0**-100] * 4))
    for m in (1, 3, 8, 12, 40):
        y = ops.linear_bitmap_int8(torch.full((m, 64), 2.0**90), *packed)
        assert torch.equal(y, torch.full((m, 4), 64 * 127 / 1024))


@pytest.mark.parametrize("isa", AVAILABLE)
def test_sums_are_scaled_before_they_are_rounded(isa, use_isa):
    """Sums of whole numbers are exact in fp32, so there is one result for each."""
    use_isa(isa)
    for fmt in FORMATS:
        (*packed, scales), dense = weight(fmt, (40, 136))
        whole = torch.where(scales[:, None] > 0, dense / scales.double()[:, None], 0.0).round()
        for m in (1, 12, 17, 24, 40):
            x = torch.randint(-8, 9, (m, 136), generator=torch.Generator().manual_seed(m))
            want = (x.double() @ whole.T).float() * scales
            got = getattr(ops, fmt)(x.to(torch.bfloat16), *packed, scales)
            assert torch.equal(got, want.to(torch.bfloat16))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("cols", [1, 7, 9, 63, 65, 131])
@pytest.mark.parametrize("fmt", ["linear_bitmap_int8", "linear_int8"])
def test_any_width(fmt, isa, use_isa, cols):
    use_isa(isa)
    tensors, dense = weight(fmt, (11, cols))
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 3, 12, 17):
            x = activations(m, cols, dtype)
            assert_product(getattr(ops, fmt)(x, *tensors), x, dense)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_any_density(isa, density, use_isa):
    use_isa(isa)
    tensors, dense = weight("linear_bitmap_int8", (9, 150), density)
    bias = torch.randn(9, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 8, 12, 17):
            x = activations(m, 150, dtype)
            assert_product(ops.linear_bitmap_int8(x, *tensors, bias=bias), x, dense, bias)


@pytest.mark.parametrize(("fmt", "provider"), BACKENDS)
def test_bias_scales_and_strides_of_any_kind(fmt, provider, use_backend):
    use_backend(provider, fmt, "cpu")
    (*tensors, scales), _ = weight(fmt, (13, 40))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scaled = scales.to(dtype)
        q = unpack_any(fmt, (*tensors, torch.ones(13)), 40).double()
        dense = q * scaled.double()[:, None]
        bias = activations(1, 13, dtype)[0]
        for m in (1, 8, 9):
            x = activations(40, m).T
            assert_product(getattr(ops, fmt)(x, *tensors, scaled, bias=bias), x, dense, bias)
        batch = activations(6, 40).view(2, 3, 40)
        got = getattr(ops, fmt)(batch, *tensors, scaled)
        assert_product(got.view(6, 13), batch.view(6, 40), dense)


def unpack_any(fmt, tensors, cols):
    if fmt == "linear_int8":
        return unpack_int8(*tensors)
    return unpack_24_int8(*tensors) if "24" in fmt else unpack_bitmap_int8(*tensors, cols)


@pytest.mark.parametrize("fmt", FORMATS)
def test_independent_of_thread_count(fmt):
    tensors, _ = weight(fmt, (77, 328))
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 5, 12, 17):
            x = activations(m, 328, dtype)
            want = getattr(ops, fmt)(x, *tensors)
            try:
                torch.set_num_threads(1)
                assert torch.equal(getattr(ops, fmt)(x, *tensors), want)
            finally:
                torch.set_num_threads(threads)


def _tampered(name):
    (values, bitmap, offsets, scales), _ = weight("linear_bitmap_int8", (4, 20), seed=6)
    if name == "more bits than values":
        bitmap[2] = 255
        bitmap[2, 2] = 15
    elif name == "bits past the last column":
        bitmap[1, 2] |= 128
    elif name == "offsets past the end":
        offsets[4] += 5
    elif name == "negative offset":
        offsets[0] = -3
    elif name == "a huge offset":
        offsets[2] = 1 << 62
    elif name == "a row longer than the matrix is wide":
        values = values.repeat(20)
        offsets[3:] = len(values)
    elif name == "falling offsets":
        offsets[1], offsets[2] = offsets[2].clone(), offsets[1].clone()
    else:
        values = values[:-1]
    return values, bitmap, offsets, scales


@pytest.mark.parametrize("isa", AVAILABLE)
def test_offsets_whose_difference_overflows_are_refused(isa, use_isa):
    use_isa(isa)
    bitmap, scales = torch.full((1, 3), 255, dtype=torch.uint8), torch.ones(1)
    weight = (torch.ones(24, dtype=torch.int8), bitmap, torch.tensor([2**63 - 4, 20 - 2**63]))
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 8, 12, 17):
            with pytest.raises(ValueError, match="row 0 has bits that do not match"):
                ops.linear_bitmap_int8(torch.ones(m, 24, dtype=dtype), *weight, scales)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize(
    "name",
    ["more bits than values", "bits past the last column", "offsets past the end",
     "negative offset", "a huge offset", "a row longer than the matrix is wide", "falling offsets",
     "a value is missing"],
)  # fmt: skip
def test_inconsistent_bitmaps_are_refused_by_the_kernel(name, isa, use_isa):
    use_isa(isa)
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 8, 12, 17):
            with pytest.raises(ValueError, match=r"row [0-3] has bits that do not match"):
                ops.linear_bitmap_int8(torch.ones(m, 20, dtype=dtype), *_tampered(name))


def test_any_24_metadata_stays_inside_its_buffers(use_isa):
    gen = torch.Generator().manual_seed(7)
    values = torch.full((6, 36), 127, dtype=torch.int8)
    meta = torch.randint(0, 256, (6, 9), generator=gen).to(torch.uint8)
    for isa in AVAILABLE:
        use_isa(isa)
        for dtype in (torch.float32, torch.bfloat16):
            for m in (1, 8, 12, 17, 40):
                x = torch.ones(m, 72, dtype=dtype)
                assert ops.linear_24_int8(x, values, meta, torch.ones(6)).isfinite().all()


# --- quantization --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_weight_is_off_by_more_than_half_its_scale(dtype):
    gen = torch.Generator().manual_seed(3)
    w = torch.randn(40, 300, generator=gen, dtype=torch.float64).to(dtype)
    w *= torch.logspace(-6, 2, 40, dtype=torch.float64).to(dtype)[:, None]
    w[7], w[:, 11] = 0, 0
    q, scales = ops.quantize_rows(w)
    assert q.dtype == torch.int8 and scales.dtype == dtype and scales.shape == (40,)
    off = (w.double() - q.double() * scales.double()[:, None]).abs()
    assert (off <= scales.double()[:, None] / 2 * (1 + 1e-4)).all()
    assert scales[7] == 0 and not q[7].any() and not q[:, 11].any()
    # No scale is larger than the next number above what the largest weight needs.
    assert (scales.double() * 127 <= w.double().abs().amax(1) * (1 + 2**-7) + 127 * 6e-8).all()
    torch.testing.assert_close(
        ops.dequantize_rows(q, scales).double(), q.double() * scales.double()[:, None],
        rtol={2: 2**-8, 4: 1e-6, 8: 1e-15}[w.itemsize], atol=6e-8,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_numbers_stay_finite(dtype):
    most = torch.finfo(dtype).max
    w = torch.tensor([[most, 1.0], [-most, most / 2], [most * 0.99, 0.0]], dtype=dtype)
    q, scales = ops.quantize_rows(w)
    assert q[:, 0].tolist() == [127, -127, 127]
    back = ops.dequantize_rows(q, scales)
    assert back.isfinite().all()
    assert ((w.double() - back.double()).abs() <= scales.double()[:, None] / 2).all()


def test_rows_are_quantized_some_at_a_time(monkeypatch):
    w = torch.randn(23, 16, generator=torch.Generator().manual_seed(5)).bfloat16()
    whole = ops.quantize_rows(w)
    monkeypatch.setattr(sparse_int8, "_BLOCK_ELEMENTS", 80)
    quantize, sizes = sparse_int8._quantize, []

    def counted(part, first):
        sizes.append(len(part))
        return quantize(part, first)

    monkeypatch.setattr(sparse_int8, "_quantize", counted)
    for got, want in zip(ops.quantize_rows(w), whole, strict=True):
        assert torch.equal(got, want)
    assert sizes == [5, 5, 5, 5, 3]
    assert torch.equal(
        ops.dequantize_rows(*whole), (whole[0] * whole[1].float()[:, None]).bfloat16()
    )
    w[17, 2] = float("nan")
    with pytest.raises(ValueError, match="in row 17"):
        ops.quantize_rows(w)


def test_numbers_that_need_no_rounding_survive():
    q = torch.randint(-127, 128, (20, 64), generator=torch.Generator().manual_seed(4))
    q[:, 5] = 127
    scales = 2.0 ** torch.arange(-10, 10)
    got, found = ops.quantize_rows((q * scales[:, None]).bfloat16())
    assert torch.equal(got, q.to(torch.int8)) and torch.equal(found, scales.bfloat16())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_cannot_be_quantized(value):
    w = torch.ones(4, 8)
    w[2, 3] = value
    with pytest.raises(ValueError, match=r"expected finite weights .* in row 2"):
        ops.quantize_rows(w)
    with pytest.raises(ValueError, match="2 dimensions"):
        ops.quantize_rows(w[0])
    assert [t.shape for t in ops.quantize_rows(torch.ones(0, 8))] == [(0, 8), (0,)]
    assert ops.quantize_rows(torch.ones(3, 0))[1].tolist() == [0, 0, 0]


def test_unpacked_is_what_was_packed():
    for fmt in FORMATS:
        tensors, dense = weight(fmt, (21, 88))
        got = unpack_any(fmt, tensors, 88)
        assert torch.equal(got, dense.float())
        half = (*tensors[:-1], tensors[-1].bfloat16())
        assert unpack_any(fmt, half, 88).dtype == torch.bfloat16


def test_validation():
    (values, meta, scales), _ = weight("linear_24_int8", (6, 64))
    validate_24_int8(values, meta, scales)
    with pytest.raises(ValueError, match=r"values: expected torch\.int8, got torch\.float32"):
        validate_24_int8(values.float(), meta, scales)
    with pytest.raises(ValueError, match=r"scales: expected shape \(6,\)"):
        validate_24_int8(values, meta, scales[:-1])
    with pytest.raises(ValueError, match="meta: expected two ascending"):
        validate_24_int8(values, meta * 0, scales)
    for value in (float("nan"), float("inf"), -1.0):
        bad = scales.clone()
        bad[4] = value
        with pytest.raises(ValueError, match=r"scales: expected finite .* got .* in row 4"):
            validate_24_int8(values, meta, bad)
    lowest = values.clone()
    lowest[2, 5] = -128
    with pytest.raises(ValueError, match="values: expected numbers from -127 to 127, got -128"):
        validate_24_int8(lowest, meta, scales)
    validate_int8(lowest.clamp(-127), scales)
    with pytest.raises(ValueError, match="values: expected numbers from -127 to 127, got -128"):
        validate_int8(lowest, scales)
    with pytest.raises(ValueError, match=r"scales: expected shape \(6,\), got \(5,\)"):
        validate_int8(values, scales[1:])
    with pytest.raises(ValueError, match="values: expected 2 dimensions"):
        validate_int8(values[0], scales)
    (values, bitmap, offsets, scales), _ = weight("linear_bitmap_int8", (6, 61))
    validate_bitmap_int8(values, bitmap, offsets, scales, 61)
    nothing = torch.zeros(0, dtype=torch.int8)
    validate_bitmap_int8(nothing, bitmap * 0, offsets * 0, scales, 61)
    with pytest.raises(ValueError, match="row_offsets: expected to run"):
        validate_bitmap_int8(values[:-1], bitmap, offsets, scales, 61)
    with pytest.raises(ValueError, match="values: expected 1 dimension"):
        validate_bitmap_int8(values[None], bitmap, offsets, scales, 61)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12)}, "multiple of 8"),
        ({"x": torch.zeros(2, 8).int()}, "x: expected bf16"),
        ({"x": torch.zeros(2, 0)}, "C > 0"),
        ({"values": torch.zeros(3, 4)}, r"values: expected torch\.int8"),
        ({"values": torch.zeros(3, 5).char()}, "values: expected shape"),
        ({"values": torch.zeros(12).char()}, "values: expected 2"),
        ({"meta": torch.zeros(3, 2).byte()}, "meta: expected shape"),
        ({"meta": torch.zeros(3, 1)}, r"meta: expected torch\.uint8"),
        ({"scales": torch.zeros(2)}, "scales: expected shape"),
        ({"scales": torch.zeros(3).int()}, "scales: expected bf16"),
        ({"bias": torch.zeros(2)}, "bias: expected shape"),
    ],
)
def test_bad_arguments(change, message):
    given = {
        "x": torch.zeros(2, 8), "values": torch.zeros(3, 4).char(),
        "meta": torch.zeros(3, 1).byte(), "scales": torch.zeros(3), "bias": None,
    }  # fmt: skip
    bias = change.get("bias")
    x, values, meta, scales, _ = {**given, **change}.values()
    with pytest.raises(ValueError, match=message):
        ops.linear_24_int8(x, values, meta, scales, bias=bias)


def test_bad_bitmaps():
    x, values = torch.zeros(2, 9), torch.zeros(4).char()
    bitmap, offsets, scales = torch.zeros(3, 2).byte(), torch.zeros(4).long(), torch.zeros(3)
    for args, message in (
        ((values[None], bitmap, offsets, scales), "values: expected 1"),
        ((values, bitmap[0], offsets, scales), "bitmap: expected 2"),
        ((values, bitmap[:, :1], offsets, scales), "bitmap: expected shape"),
        ((values, bitmap, offsets[1:], scales), "row_offsets: expected shape"),
        ((values, bitmap, offsets.int(), scales), r"row_offsets: expected torch\.int64"),
        ((values, bitmap, offsets, scales[1:]), "scales: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_bitmap_int8(x, *args)


def test_bad_dense_rows():
    x, values, scales = torch.zeros(2, 9), torch.zeros(3, 9).char(), torch.zeros(3)
    for args, message in (
        ((x, values[0], scales), "values: expected 2"),
        ((x, values[:, 1:], scales), r"values: expected shape \(3, 9\), got \(3, 8\)"),
        ((x, values.float(), scales), r"values: expected torch\.int8"),
        ((x, values, scales[1:]), "scales: expected shape"),
        ((x[:, :0], values, scales), "C > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_int8(*args)
    with pytest.raises(ValueError, match="bias: expected shape"):
        ops.linear_int8(x, values, scales, bias=torch.zeros(2))


@pytest.mark.parametrize("isa", AVAILABLE)
def test_dense_sums_are_rounded_once(isa, use_isa):
    """bf16 in and out: each output is the fp32 sum scaled, then rounded, at any number of rows."""
    use_isa(isa)
    (q, scales), _ = weight("linear_int8", (50, 72))
    for m in (3, 13, 14, 17, 21, 22, 60, 600):
        x = torch.randint(-8, 9, (m, 72), generator=torch.Generator().manual_seed(2)).bfloat16()
        exact = (x.double() @ q.double().T).float() * scales  # whole numbers below 2^24
        assert torch.equal(ops.linear_int8(x, q, scales), exact.bfloat16())


def test_24_sums_are_rounded_once_where_bf16_is_native(use_isa):
    use_isa("avx512_bf16")
    (values, meta, scales), _ = weight("linear_24_int8", (50, 72))
    q = unpack_24_int8(values, meta, torch.ones(50)).double()
    for m in (3, 10, 11, 16, 33, 49, 600):
        x = torch.randint(-8, 9, (m, 72), generator=torch.Generator().manual_seed(2)).bfloat16()
        exact = (x.double() @ q.T).float() * scales
        assert torch.equal(ops.linear_24_int8(x, values, meta, scales), exact.bfloat16())


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_more_rows_than_a_block_and_a_sweep(fmt, isa, use_isa):
    use_isa(isa)
    for shape, rows in (((301, 200), (11, 31, 48)), ((6, 328), (577, 1100))):
        tensors, dense = weight(fmt, shape)
        for m in rows:
            x = activations(m, shape[1], torch.bfloat16)
            bias = activations(1, shape[0], seed=m)[0] if m % 2 else None
            assert_product(getattr(ops, fmt)(x, *tensors, bias=bias), x, dense, bias)


@pytest.mark.parametrize("fmt", FORMATS)
def test_opcheck_and_compile(fmt):
    tensors, _ = weight(fmt, (5, 16))
    op = getattr(ops, fmt)
    for bias in (None, torch.randn(5)):
        torch.library.opcheck(getattr(torch.ops.pyprune, fmt), (activations(3, 16), *tensors, bias))
    x = activations(3, 16)
    compiled = torch.compile(lambda x: op(x, *tensors).relu(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), op(x, *tensors).relu())
    assert op(torch.empty(0, 16), *tensors).shape == (0, 5)
