"""Matrices packed as a bitmap, and back: the layout is in `pyprune.ops.pack`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import check_array, check_float, check_rows, check_same_device, check_shape
from pyprune.ops._packing import CHECKED_BYTES, check_mask, native_mask
from pyprune.ops.storage import aligned_rows, bit_pattern, row_blocks, unit_columns


def _check_pack_bitmap(w: Tensor, mask: Tensor | None) -> None:
    check_rows("w", w)
    check_mask(w, mask)


def _kept(w: Tensor, mask: Tensor | None) -> Tensor:
    return bit_pattern(w) != 0 if mask is None else mask


def _row_offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def bits_of(mask: Tensor) -> Tensor:
    """A bool mask `[..., C]` as uint8 `[..., ceil(C/8)]`, laid out as `pack_bitmap`'s bitmap."""
    *rows, cols = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -cols % 8)).reshape(*rows, (cols + 7) // 8, 8)
    # Bit by bit: a product with all weights at once would take eight bytes for each of the mask's.
    bits = torch.zeros(padded.shape[:-1], dtype=torch.uint8, device=mask.device)
    for place in range(8):
        bits = bits | padded[..., place].to(torch.uint8) << place
    return bits


def pack_bitmap_reference(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    keep = _kept(w, mask)
    bitmap = bits_of(keep)
    return bit_pattern(w)[keep].view(w.dtype), bitmap, _row_offsets(keep.sum(1))


def _pack_bitmap_fake(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_pack_bitmap(w, mask)
    rows, cols = w.shape
    kept = torch.library.get_ctx().new_dynamic_size()
    bitmap = w.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    return w.new_empty(kept), bitmap, w.new_empty(rows + 1, dtype=torch.int64)


def _pack_bitmap_native(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = w.shape
    w = unit_columns(w)
    bitmap = w.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    row_offsets = w.new_zeros(rows + 1, dtype=torch.int64)
    counts = row_offsets[1:]
    _native.call("pack_bitmap_rows", bitmap, counts, w, native_mask(mask))
    counts.cumsum_(0)
    values = w.new_empty(int(row_offsets[-1]))
    _native.call("move_bitmap_values", w, values, bitmap, row_offsets, True)
    return values, bitmap, row_offsets


def _pack_bitmap_cuda(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = w.shape
    w = unit_columns(w)
    bitmap = w.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    row_offsets = w.new_empty(rows + 1, dtype=torch.int64)
    state = w.new_zeros(1, dtype=torch.int64)
    kept = None if mask is None else _native.capsule(mask.contiguous())
    _native.launch("pack_bitmap_rows_cuda", w.device, bitmap, row_offsets, w, kept, state)
    values = w.new_empty(int(row_offsets[-1]))
    arrays = (w, values, bitmap, row_offsets)
    _native.launch("move_bitmap_values_cuda", w.device, *arrays, True)
    return values, bitmap, row_offsets


registry.register(
    "pack_bitmap(Tensor w, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    fake=_pack_bitmap_fake,
    impls={
        "reference": registry.Impl(pack_bitmap_reference),
        "native": registry.Impl(_pack_bitmap_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl("pyprune.kernels.pack:pack_bitmap_triton", registry.HALF_OR_SINGLE),
        "cuda": registry.Impl(_pack_bitmap_cuda, registry.HALF_OR_SINGLE),
    },
)


def pack_bitmap(w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A sparse matrix as its kept values, one bit an element, and where each row begins.

    On a GPU it waits for the number of values, which says how many to make room for.

    Args:
        w: weights `[R, C]`, bf16, fp16, fp32 or fp64; any strides.
        mask: bool `[R, C]`, True = kept. None keeps every element whose bit pattern is not zero, so
            that `unpack_bitmap` restores `w` to the bit. Weights pruned by multiplying with a mask
            hold negative zeros, which then count as kept: pass the mask, or `w != 0`.

    Returns:
        values `[nnz]` in w's dtype, bitmap uint8 `[R, ceil(C/8)]`, row_offsets int64 `[R + 1]` (see
        the module's docstring).

    Raises:
        ValueError: a shape, dtype or device does not match.
    """
    _check_pack_bitmap(w, mask)
    if w.numel() == 0:
        return pack_bitmap_reference(w, mask)
    values, bitmap, row_offsets = torch.ops.pyprune.pack_bitmap(w, mask)
    return values, bitmap, row_offsets


def _check_unpack_bitmap(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> None:
    check_float("values", values)
    if values.dim() != 1:
        raise ValueError(f"values: expected 1 dimension, got shape {tuple(values.shape)}")
    if bitmap.dtype != torch.uint8 or bitmap.dim() != 2:
        raise ValueError(f"bitmap: expected a uint8 matrix, got {bitmap.dim()}-d {bitmap.dtype}")
    check_shape("bitmap", bitmap, (bitmap.shape[0], (cols + 7) // 8))
    check_array("row_offsets", row_offsets, torch.int64, (bitmap.shape[0] + 1,))
    check_same_device(values, bitmap, row_offsets)


def _popcount(bytes_: Tensor) -> Tensor:
    pairs = bytes_ - ((bytes_ >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


def _check_ends(values: Tensor, row_offsets: Tensor) -> None:
    step = max(1, len(row_offsets) - 1)
    first, *last = row_offsets[::step].tolist()
    ends = [first, last[0] if last else first]
    if ends != [0, values.numel()]:
        raise ValueError(f"row_offsets: expected to run from 0 to {values.numel()}, got {ends}")


def _has_unused_bits(bitmap: Tensor, cols: int) -> bool:
    return cols % 8 > 0 and bool((bitmap[:, -1] >> (cols % 8)).any())


def validate_bitmap(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> None:
    """Raises ValueError unless these are what `pack_bitmap` may return for `cols` columns: shapes
    and dtypes agree, offsets rise from 0 to the number of values, each row has as many bits as
    values, and no bit lies past the last column."""
    _check_unpack_bitmap(values, bitmap, row_offsets, cols)
    _check_contents(values, bitmap, row_offsets, cols)


def _check_contents(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> None:
    _check_ends(values, row_offsets)
    counts = row_offsets.diff()
    if (counts < 0).any():
        row = int((counts < 0).nonzero()[0])
        raise ValueError(f"row_offsets: expected to be monotone, fall after row {row}")
    parts = row_blocks(bitmap.shape, CHECKED_BYTES)
    blocks = [_popcount(bitmap[rows]).sum(1, dtype=torch.int64) for rows in parts]
    bits = torch.cat(blocks) if blocks else torch.zeros_like(counts)
    if not torch.equal(bits, counts):
        row = int((bits != counts).nonzero()[0])
        raise ValueError(
            f"bitmap: expected as many bits as values in each row, got {int(bits[row])} bits and "
            f"{int(counts[row])} values in row {row}"
        )
    if _has_unused_bits(bitmap, cols):
        raise ValueError(f"bitmap: expected no bits past column {cols - 1}")


def unpack_bitmap_reference(
    values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int
) -> Tensor:
    if values.device.type == "cpu":  # on a GPU to look would be to wait
        _check_contents(values, bitmap, row_offsets, cols)
    bits = (bitmap[:, :, None] >> torch.arange(8, device=bitmap.device)) & 1
    keep = bits.reshape(len(bitmap), 8 * bitmap.shape[1])[:, :cols].bool()
    w = bit_pattern(values).new_zeros(keep.shape)
    w[keep] = bit_pattern(values)
    return w.view(values.dtype)


def _unpack_bitmap_fake(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    _check_unpack_bitmap(values, bitmap, row_offsets, cols)
    return values.new_empty(bitmap.shape[0], cols)


def _unpack_bitmap_native(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    w = _native.empty((bitmap.shape[0], cols), values.dtype)
    arrays = (values.contiguous(), bitmap.contiguous(), row_offsets.contiguous())
    broken = _native.call("move_bitmap_values", w, *arrays, False)
    if broken >= 0:
        raise ValueError(f"row_offsets: disagree with the bitmap in row {broken}")
    return w


def _unpack_bitmap_cuda(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    w = values.new_empty(bitmap.shape[0], cols)
    arrays = (aligned_rows(values), bitmap.contiguous(), row_offsets.contiguous())
    _native.launch("move_bitmap_values_cuda", w.device, w, *arrays, False)
    return w


registry.register(
    "unpack_bitmap(Tensor values, Tensor bitmap, Tensor row_offsets, int cols) -> Tensor",
    fake=_unpack_bitmap_fake,
    impls={
        "reference": registry.Impl(unpack_bitmap_reference),
        "native": registry.Impl(_unpack_bitmap_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl(
            "pyprune.kernels.pack:unpack_bitmap_triton", registry.HALF_OR_SINGLE
        ),
        "cuda": registry.Impl(_unpack_bitmap_cuda, registry.HALF_OR_SINGLE),
    },
)


_Packed = tuple[Tensor, Tensor, Tensor, int]


def _native_unpacks(packed: _Packed) -> bool:
    return (
        packed[0].device.type == "cpu"
        and not torch.compiler.is_compiling()
        and registry.select("unpack_bitmap", packed) == "native"
    )


def _unpack_checked_by_kernel(packed: _Packed) -> Tensor:
    """Of what the native kernel takes, which compares each row's bits with its offsets: doing so
    beforehand takes several times as long as unpacking a small matrix."""
    values, bitmap, row_offsets, cols = packed
    _check_ends(values, row_offsets)
    if _has_unused_bits(bitmap, cols):  # the kernel passes over them
        validate_bitmap(*packed)
    try:
        w: Tensor = torch.ops.pyprune.unpack_bitmap(*packed)
    except ValueError:
        validate_bitmap(*packed)  # says what is wrong with the row
        raise
    return w


def unpack_bitmap(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    """The dense matrix `[R, cols]` of a bitmap packed one; +0 where nothing is stored.

    Args:
        values: `[nnz]`, bf16, fp16, fp32 or fp64.
        bitmap: uint8 `[R, ceil(cols/8)]`.
        row_offsets: int64 `[R + 1]`. All three are validated before use.
        cols: number of columns (the bitmap only gives it up to a multiple of 8).

    Raises:
        ValueError: `validate_bitmap` refuses them.
    """
    packed = (values, bitmap, row_offsets, cols)
    _check_unpack_bitmap(*packed)
    if values.numel() and _native_unpacks(packed):
        return _unpack_checked_by_kernel(packed)
    validate_bitmap(*packed)
    if values.numel() == 0:
        return values.new_zeros(bitmap.shape[0], cols)
    w: Tensor = torch.ops.pyprune.unpack_bitmap(*packed)
    return w
