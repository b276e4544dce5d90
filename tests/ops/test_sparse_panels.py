"""Compressed weights with so many rows of x that AVX2 lists their kept columns (sparse_panels.h):
from 25 rows on, of matrices that keep at most 0.7 of them."""

import pytest
import torch
from ops.compressed import pack_24, pack_bitmap, random_24_mask
from ops.isa import AVAILABLE

from pyprune import ops

pytestmark = [
    pytest.mark.skipif("avx2" not in AVAILABLE, reason="this processor does not have avx2"),
    pytest.mark.usefixtures("avx2"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]


@pytest.fixture
def avx2(use_isa):
    use_isa("avx2")


def product(w, mask, x, two_of_four=False, bias=None):
    """The op's result, and the result and the sum of magnitudes in fp64."""
    packed = (pack_24 if two_of_four else pack_bitmap)(w, mask)
    name = "linear_24" if two_of_four else "linear_bitmap"
    dense = (w * mask).double()
    if w.dtype == torch.int8:
        scales = torch.rand(len(w), generator=torch.Generator().manual_seed(3)) / 100
        got = getattr(ops, f"{name}_int8")(x, *packed, scales, bias=bias)
        dense *= scales.double()[:, None]
    else:
        got = getattr(ops, name)(x, *packed, bias=bias)
    shift = 0.0 if bias is None else bias.double()
    return got, x.double() @ dense.T + shift, x.double().abs() @ dense.abs().T + abs(shift)


def random_mask(rows, cols, density):
    """Exactly so dense, rounded down, and so listed."""
    count = int(density * rows * cols)
    assert count <= 0.7 * rows * cols
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(rows))
    return (order < count).view(rows, cols)


def weights(rows, cols, dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, cols), generator=gen, dtype=torch.int16).to(dtype)
    return torch.randn(rows, cols, generator=gen).to(dtype)


def activations(m, cols, dtype=torch.float32):
    return torch.randn(m, cols, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_close(got, want, scale):
    rounding = 2**-8 if got.dtype == torch.bfloat16 else 2e-6
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= rounding * scale + 1e-30).all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 0.5, 0.7])
def test_bitmaps_match_float64(density, dtype, x_dtype):
    """One kept column of all; rows that are no multiple of four or of a block; widths that end in a
    word, in a piece of 128 columns and past one; panels of four, three and two vectors of tokens,
    full and not."""
    for rows, cols in ((1, 2), (3, 131), (66, 64), (37, 257), (131, 130)):
        w = weights(rows, cols, dtype, rows)
        mask = random_mask(rows, cols, density)
        for m in (25, 32, 40, 51, 72, 96):
            bias = torch.randn(rows) if m % 2 else None
            x = activations(m, cols, x_dtype)
            assert_close(*product(w, mask, x, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_24_matches_float64(dtype):
    for rows, cols in ((2, 8), (67, 264)):
        w = weights(rows, cols, dtype)
        mask = random_24_mask(rows, cols, torch.Generator().manual_seed(2))
        for m in (25, 33, 100):
            assert_close(*product(w, mask, activations(m, cols), two_of_four=True))


def test_more_rows_of_x_than_a_sweep_takes():
    w, mask = weights(70, 200, torch.bfloat16), random_mask(70, 200, 0.5)
    for m in (512, 513, 1060):
        assert_close(*product(w, mask, activations(m, 200, torch.bfloat16)))


def test_rows_of_x_that_lie_apart():
    w, mask = weights(70, 200, torch.bfloat16), random_mask(70, 200, 0.5)
    for dtype in (torch.float32, torch.bfloat16):
        assert_close(*product(w, mask, activations(40, 333, dtype)[:, 100:300]))


def test_what_is_not_kept_is_not_multiplied():
    """Tiles would make a NaN of infinity times zero: so this shows that lists are used."""
    w, mask = weights(70, 200, torch.float32), random_mask(70, 200, 0.5)
    mask[:, 77] = False
    x = activations(25, 200)
    want = x.double() @ (w * mask).double().T
    x[:, 77] = torch.inf
    assert torch.allclose(ops.linear_bitmap(x, *pack_bitmap(w, mask)).double(), want, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("row", [0, 69])
def test_inconsistent_rows_are_refused(dtype, row):
    values, bits, offsets = pack_bitmap(weights(70, 200, dtype), random_mask(70, 200, 0.5))
    x = activations(40, 200)

    def run(bits, offsets):
        if dtype == torch.int8:
            return ops.linear_bitmap_int8(x, values, bits, offsets, torch.ones(70))
        return ops.linear_bitmap(x, values, bits, offsets)

    flipped = bits.clone()
    flipped[row, 3] ^= 1
    # Their difference, modulo 2^64, is the number of bits.
    wrapped, kept = offsets.clone(), int(offsets[row + 1] - offsets[row])
    wrapped[row], wrapped[row + 1] = 2**63 - 4, kept - 4 - 2**63
    for arguments in ((flipped, offsets), (bits, wrapped)):
        with pytest.raises(ValueError, match="bits that do not match"):
            run(*arguments)
    run(bits, offsets)


def test_rows_of_very_different_length():
    """Lists are filled up to the longest of four: with what adds nothing, not even where x is
    infinite in the first column, which is kept in every row."""
    w = weights(65, 384, torch.float32).abs() + 0.1
    gen = torch.Generator().manual_seed(4)
    mask = torch.rand(w.shape, generator=gen) < torch.rand(65, 1, generator=gen) ** 2
    mask[::7, 1:] = False
    mask[:, 0] = True
    mask[3] = True
    x = activations(40, 384)
    assert_close(*product(w, mask, x))
    x[:, 0] = torch.inf
    got = ops.linear_bitmap(x, *pack_bitmap(w, mask))
    assert (got == torch.inf).all()


def test_results_do_not_depend_on_the_number_of_threads():
    packed = pack_bitmap(weights(203, 300, torch.bfloat16), random_mask(203, 300, 0.5))
    threads = torch.get_num_threads()
    for m in (70, 530):
        x, results = activations(m, 300), []
        try:
            for count in (1, 2, 3, 64):
                torch.set_num_threads(count)
                results.append(ops.linear_bitmap(x, *packed))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)
