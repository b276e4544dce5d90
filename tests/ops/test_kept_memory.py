"""Large masks and unpacked weights reuse memory: a fresh page for every 4 KiB costs more than
making them."""

import gc
import resource

import pytest
import torch

from pyprune import _native, ops

ROWS, COLS = 64, (_native.KEPT_BYTES >> 6) + 64  # a mask just above the limit


@pytest.fixture
def w():
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)).bfloat16()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_the_next_mask_lies_where_the_last_one_was(w):
    first = ops.mask_nm(w, 2, 4)
    want, place = first[:2].clone(), first.data_ptr()
    del first
    gc.collect()
    before = faults()
    again = ops.mask_nm(w, 2, 4)
    assert again.data_ptr() == place and faults() - before < 256  # 4 KiB pages: 8192
    assert torch.equal(again[:2], want) and torch.equal(again[:2], ops.mask_nm(w[:2], 2, 4))


@pytest.mark.parametrize("format", ["24", "bitmap"])
def test_the_next_weight_lies_where_the_last_one_was(w, format):
    pruned = w[:, : COLS // 8 * 4].contiguous()  # 16-bit numbers, just above the limit
    pruned.view(-1, 4)[:, 1:3] = 0
    packed = ops.pack_24(pruned) if format == "24" else (*ops.pack_bitmap(pruned), pruned.shape[1])
    unpack = ops.unpack_24 if format == "24" else ops.unpack_bitmap
    first = unpack(*packed)
    assert torch.equal(first, pruned)
    place = first.data_ptr()
    first.fill_(7)  # what was there does not show
    del first
    gc.collect()
    before = faults()
    again = unpack(*packed)
    assert again.data_ptr() == place and faults() - before < 2048  # 4 KiB pages: 8192
    assert torch.equal(again, pruned) and again.is_contiguous()
    assert not again.untyped_storage().resizable()  # none of PyTorch's


def test_memory_that_a_view_holds_is_not_given_to_another(w):
    first = ops.mask_topk(w, COLS // 2)
    view, want = first[3], first[3].clone()
    del first
    gc.collect()
    second = ops.mask_topk(-w, COLS // 4)
    assert torch.equal(view, want)
    assert not torch.equal(second[3], want)
    assert second.is_contiguous() and second.dtype == torch.bool


def test_small_masks_come_from_pytorch():
    small = _native.empty((3, 5), torch.bool)
    assert small.shape == (3, 5) and small.dtype == torch.bool
    assert small.untyped_storage().resizable()
    large = _native.empty((ROWS, COLS), torch.bool)
    assert large.shape == (ROWS, COLS) and large.data_ptr() % (2 << 20) == 0
    large.fill_(True)
    assert bool(large[-1, -1])
    # The C library gives a block of exactly the limit back, too.
    limit = _native.empty((_native.KEPT_BYTES // 2,), torch.float16)
    assert limit.dtype == torch.float16 and not limit.untyped_storage().resizable()
    assert _native.empty((0, 5), torch.bool).numel() == 0


def test_native_entry_is_guarded():
    with pytest.raises(ValueError, match="bytes: expected at least 1"):
        _native.call("kept_bytes", 0)
    with pytest.raises(MemoryError):
        _native.call("kept_bytes", 1 << 60)
