"""Bitmap rows whose bits do not match their number of values, anywhere in the matrix. Where a mask
is whole words, kernels count its bits as they take its values, except near the end of the matrix,
where a wrong one could lead past it."""

from functools import partial

import pytest
import torch
from ops.compressed import pack_bitmap
from ops.isa import AVAILABLE

from pyprune import ops

ROWS, COLS = 24, 128
# Of x: one of each way through the kernels.
TOKENS = (1, 2, 3, 8, 12, 24, 40, 64, 200)


def _packed(dtype: torch.dtype, cols: int = COLS) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    mask = torch.rand(ROWS, cols, generator=gen) < 0.5
    mask[:, 0] = True  # a bit to take away
    return pack_bitmap(torch.randn(ROWS, cols, generator=gen).to(dtype), mask)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("row", [0, 11, ROWS - 3, ROWS - 1])
@pytest.mark.parametrize("change", ["one more", "one less", "all", "none", "moved from the next"])
def test_a_wrong_mask_is_refused_anywhere(change, row, isa, use_isa):
    use_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values, bitmap, offsets = _packed(dtype)
        kept = bitmap[row]
        if change == "one more":
            byte = int((kept != 255).nonzero()[0])
            kept[byte] |= kept[byte] + 1  # the lowest bit that is not set
        elif change == "one less":
            kept[0] &= 254
        elif change == "moved from the next":
            offsets[row + 1 if row + 1 < ROWS else row] -= 1
        else:
            kept.fill_(255 if change == "all" else 0)
        int8 = (values.to(torch.int8), bitmap, offsets, torch.ones(ROWS))
        for m in TOKENS:
            for x_dtype in (torch.float32, torch.bfloat16):
                x = torch.ones(m, COLS, dtype=x_dtype)
                for product in (
                    partial(ops.linear_bitmap, x, values, bitmap, offsets),
                    partial(ops.linear_bitmap_int8, x, *int8),
                ):
                    with pytest.raises(ValueError, match=r"bits that do not match") as got:
                        product()
                    named = int(str(got.value).split("row ")[1].split()[0])
                    assert abs(named - row) <= (change == "moved from the next")


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("byte", [0, 70, 143])
def test_a_wrong_mask_of_several_pieces(byte, isa, use_isa):
    """Wider than the columns that kernels take at a time."""
    use_isa(isa)
    for dtype in (torch.float32, torch.bfloat16):
        values, bitmap, offsets = _packed(dtype, 1152)
        bitmap[11, byte] ^= 4
        for m in (1, 3, 12, 40):
            x = torch.ones(m, 1152, dtype=dtype)
            with pytest.raises(ValueError, match="row 11 has bits that do not match"):
                ops.linear_bitmap(x, values, bitmap, offsets)
            with pytest.raises(ValueError, match="row 11 has bits that do not match"):
                ops.linear_bitmap_int8(x, values.to(torch.int8), bitmap, offsets, torch.ones(ROWS))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("start", [0, 1, 8])
def test_masks_at_any_address(start, isa, use_isa):
    """Words are only taken where they lie if they lie on a multiple of eight bytes."""
    use_isa(isa)
    values, bitmap, offsets = _packed(torch.bfloat16)
    moved = torch.empty(bitmap.numel() + 8, dtype=torch.uint8)[start : start + bitmap.numel()]
    moved = moved.view(bitmap.shape).copy_(bitmap)
    for m in TOKENS:
        x = torch.randn(m, COLS)
        want = ops.linear_bitmap(x, values, bitmap, offsets)
        assert torch.equal(ops.linear_bitmap(x, values, moved, offsets), want)
