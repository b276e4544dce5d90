"""Bitmaps with bf16 x of so many rows that tables of pairs of activations pay (bitmap_table.h)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.compressed import pack_bitmap
from ops.isa import AVAILABLE, restricted

from pyprune import ops

BF16 = torch.bfloat16


def matrix(rows, cols, density, seed=0, int8=False):
    """The op, its weight tensors, and the dense fp64 matrix they stand for."""
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=gen) < density
    if int8:
        q = torch.randint(-127, 128, (rows, cols), generator=gen, dtype=torch.int16).to(torch.int8)
        scales = torch.rand(rows, generator=gen) / 100
        dense = (q * mask).double() * scales.double()[:, None]
        return ops.linear_bitmap_int8, (*pack_bitmap(q, mask), scales), dense
    w = torch.randn(rows, cols, generator=gen).to(BF16)
    return ops.linear_bitmap, pack_bitmap(w, mask), (w * mask).double()


def activations(m, cols, seed=1):
    return torch.randn(m, cols, generator=torch.Generator().manual_seed(seed)).to(BF16)


def assert_product(got, x, dense, bias=None):
    want, scale = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    assert got.dtype == BF16 and got.shape == want.shape
    assert ((got.double() - want).abs() <= 2**-8 * scale + 1e-30).all()


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 0.5, 0.74, 0.9, 1.0])
def test_matches_float64(density, int8, isa, use_isa):
    """Rows of x that fill their last chunk of 32, leave 16 or fewer, or one more than that; widths
    that end anywhere in a word, a group or a pair; blocks of rows that are no multiple of four."""
    use_isa(isa)
    for rows, cols in ((1, 1), (3, 131), (9, 64), (6, 258), (37, 200)):
        linear, packed, dense = matrix(rows, cols, density, rows, int8)
        for m in (64, 161, 180, 241, 256):
            x = activations(m, cols)
            bias = torch.randn(rows) if m % 2 else None
            assert_product(linear(x, *packed, bias=bias), x, dense, bias)


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_more_rows_than_a_block_and_a_sweep_take(int8):
    linear, packed, dense = matrix(1543, 100, 0.4, int8=int8)
    x = activations(200, 100)
    assert_product(linear(x, *packed), x, dense)
    linear, packed, dense = matrix(7, 300, 0.4, int8=int8)
    for m in (512, 513, 1040):
        x = activations(m, 300)
        assert_product(linear(x, *packed), x, dense)


def test_every_mask_of_a_group():
    """All 16 masks of four columns, in every group of a word, and in the odd ends of a row."""
    masks = torch.tensor(list(itertools.product([False, True], repeat=4)))
    x = activations(256, 64)
    for cols in (64, 62, 61):
        mask = torch.zeros(16 * 16, 64, dtype=torch.bool)
        for group in range(16):
            mask[16 * group : 16 * (group + 1), 4 * group : 4 * group + 4] = masks
        mask = mask[:, :cols]
        w = torch.randn(mask.shape, generator=torch.Generator().manual_seed(cols)).to(BF16)
        got = ops.linear_bitmap(x[:, :cols], *pack_bitmap(w, mask))
        assert_product(got, x[:, :cols], (w * mask).double())


def test_a_row_does_not_depend_on_the_rows_beside_it():
    """Rows of like lists go side by side: whichever these are, and how many threads there are."""
    gen = torch.Generator().manual_seed(3)
    density = torch.rand(300, 1, generator=gen) * 0.8
    mask = torch.rand(300, 450, generator=gen) < density
    w = torch.randn(300, 450, generator=gen).to(BF16)
    x = activations(300, 450)
    whole = ops.linear_bitmap(x, *pack_bitmap(w, mask))
    order = torch.randperm(300, generator=gen)
    shuffled = ops.linear_bitmap(x, *pack_bitmap(w[order], mask[order]))
    assert torch.equal(shuffled, whole[:, order])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.linear_bitmap(x, *pack_bitmap(w, mask)), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_meets_zeros_only_where_they_are(value):
    """What a dense matrix with zeros gives, or what a sum over the kept weights alone gives: a lone
    column is paired with one that is not kept, so that no weight is multiplied by zero besides."""
    linear, packed, dense = matrix(64, 128, 0.5)
    x = activations(256, 128)
    for column in range(8):
        x[column, column] = value
    got, dense_sums = linear(x, *packed).double(), x.double() @ dense.T
    kept = (x[:8, None].double() * dense).where(dense != 0, 0.0).sum(-1)
    assert kept.isfinite().any() and not kept.isfinite().all()
    got, met = got[:8], dense_sums[:8]
    as_kept = (got == kept) | (got.isfinite() & kept.isfinite()) | (got.isnan() & kept.isnan())
    assert (as_kept | (got.isnan() & met.isnan())).all()
    assert_product(linear(x[8:], *packed), x[8:], dense)


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize(
    "name", ["a bit more", "a stray bit", "offsets past the end", "negative offset", "no value"]
)
def test_inconsistent_rows_are_refused(name, int8):
    linear, packed, _ = matrix(40, 131, 0.4, int8=int8)
    values, bitmap, offsets, *scales = packed
    if name == "a bit more":
        bitmap[33, 5] ^= 1
    elif name == "a stray bit":
        bitmap[33, 16] |= 128
    elif name == "offsets past the end":
        offsets[34:] += 2**40
    elif name == "negative offset":
        offsets[0] = -1
    else:
        values = values[:-1]
    with pytest.raises(ValueError, match=r"row \d+ has bits that do not match its row_offsets"):
        linear(activations(300, 131), values, bitmap, offsets, *scales)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(40, 300),
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    density=st.floats(0, 1),
    int8=st.booleans(),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 2**20),
)
def test_fuzz_against_float64(m, rows, cols, density, int8, isa, seed):
    linear, packed, dense = matrix(rows, cols, density, seed, int8)
    x = activations(m, cols, seed)
    with restricted(isa):
        assert_product(linear(x, *packed), x, dense)
