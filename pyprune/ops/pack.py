"""Packed layouts of pruned matrices: 2:4 and bitmap, and back, bit for bit.

2:4     values `[R, C/2]` in the weights' dtype; meta uint8 `[R, C/8]`: for each group of four
        columns the 2-bit indices of its two stored elements, ascending, the lower in the low bits;
        the even group of a pair in the low nibble. NVIDIA's sparse tensor cores read this encoding.
bitmap  values `[nnz]`, row after row; bitmap uint8 `[R, ceil(C/8)]`, column c in bit c % 8 of byte
        c // 8, unused bits zero; row_offsets int64 `[R + 1]`, where row i's values begin.

Elements move as bit patterns: negative zeros, infinities and NaN payloads survive. Rows know
nothing of one another: a stack of matrices `[B, R, C]` packs as `w.flatten(0, 1)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import _registry
from pyprune.ops._checks import check_float, check_rows, check_same_device, check_shape

_BLOCK_BYTES = 1 << 18
_PATTERN = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Order in which a group that keeps fewer than two is filled up. It is the choice that PyTorch's
# converter makes, so that both encode a matrix alike.
_PADDING_ORDER = (10, 11, 8, 9)


def _check_mask(w: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    check_shape("mask", mask, tuple(w.shape))
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
    check_same_device(w, mask)


def _bits(t: Tensor) -> Tensor:
    """The elements as integers: PyTorch's float operations may quieten NaNs on the way."""
    return t.view(_PATTERN[t.element_size()])


def _unit_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _aligned(t: Tensor, bytes_: int = 16) -> Tensor:
    """`t` with unit stride along columns and rows that start at multiples of `bytes_`, as the CUDA
    kernels' vector loads need them: a slice may begin anywhere."""
    t = t.contiguous() if t.dim() == 1 else _unit_columns(t)
    rows = t.dim() == 2 and t.shape[0] > 1
    starts = (t.data_ptr(), t.stride(0) * t.element_size() if rows else 0)
    if all(start % bytes_ == 0 for start in starts):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _row_blocks(t: Tensor) -> Iterator[slice]:
    """Rows of a matrix of bytes, few enough at a time that temporaries of their size do not count:
    it may be checked while a model is loaded that barely fits."""
    step = max(1, _BLOCK_BYTES // max(1, t.shape[1]))
    for start in range(0, t.shape[0], step):
        yield slice(start, start + step)


def _native_mask(mask: Tensor | None) -> object:
    return None if mask is None else _native.capsule(_unit_columns(mask))


# --- 2:4 -----------------------------------------------------------------------------------------


def _check_pack_24(w: Tensor, mask: Tensor | None) -> None:
    check_rows("w", w)
    if w.shape[1] % 8:
        raise ValueError(f"w: expected a multiple of 8 columns, got {w.shape[1]}")
    _check_mask(w, mask)


def _refuse_overfull(group: int, cols: int) -> None:
    """Raises for the `group`-th group of four (flat index) of a matrix with `cols` columns; -1 is
    none."""
    if group < 0:
        return
    row, start = divmod(4 * group, cols)
    raise ValueError(
        f"w: expected at most 2 kept of every 4, got more in row {row}, columns {start} to "
        f"{start + 3}; prune it 2:4 first"
    )


def first_overfull(crowded: Tensor) -> Tensor:
    """The lowest index `[1]` at which `crowded` (bool, flat) is True; -1 where it nowhere is. On a
    GPU nothing waits for it."""
    first = crowded.int().argmax(0, keepdim=True)
    return torch.where(crowded[first], first, -1)


def pack_24_reference(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = w.shape
    keep = w != 0 if mask is None else mask
    spare = torch.signbit(w) & ~keep if mask is None else torch.zeros_like(keep)
    bits = _bits(w) if mask is None else _bits(w).masked_fill(~mask, 0)
    overfull = first_overfull(keep.reshape(-1, 4).sum(1) > 2)
    index = torch.arange(4, device=w.device)
    order = torch.tensor(_PADDING_ORDER, device=w.device).expand(rows, cols // 4, 4)
    order = torch.where(spare.reshape(order.shape), 4 + index, order)
    order = torch.where(keep.reshape(order.shape), index, order)
    stored = order.argsort(dim=2)[:, :, :2].sort(dim=2).values
    values = bits.reshape(order.shape).gather(2, stored).reshape(rows, cols // 2).view(w.dtype)
    nibbles = (stored[:, :, 0] | stored[:, :, 1] << 2).reshape(rows, cols // 8, 2)
    return values, (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).to(torch.uint8), overfull


def _pack_24_fake(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_pack_24(w, mask)
    rows, cols = w.shape
    meta = w.new_empty(rows, cols // 8, dtype=torch.uint8)
    return w.new_empty(rows, cols // 2), meta, w.new_empty(1, dtype=torch.int64)


def _pack_24_native(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    values, meta, overfull = _pack_24_fake(w, mask)
    overfull[0] = _native.call("pack_24", values, meta, _unit_columns(w), _native_mask(mask))
    return values, meta, overfull


def _pack_24_cuda(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    packed = _pack_24_fake(w, mask)
    kept = None if mask is None else _native.capsule(_aligned(mask.contiguous(), 8))
    _native.launch("pack_24_cuda", w.device, *packed, _aligned(w), kept)
    return packed


# The third result is the first group (flat index) that keeps more than two, [1]; -1 if none does.
# The op leaves it on the device, so that packing can be queued: `pack_24` below reads it.
_registry.register(
    "pack_24(Tensor w, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    fake=_pack_24_fake,
    impls={
        "reference": _registry.Impl(pack_24_reference),
        "native": _registry.Impl(_pack_24_native, _registry.HALF_OR_SINGLE),
        "triton": _registry.Impl("pyprune.kernels.pack:pack_24_triton", _registry.HALF_OR_SINGLE),
        "cuda": _registry.Impl(_pack_24_cuda, _registry.HALF_OR_SINGLE),
    },
)


def pack_24(w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A 2:4 sparse matrix as values and metadata.

    Each group of four columns stores two elements: those kept, then (only without a mask) negative
    zeros, lowest index first, then +0 at positions 2, 3, 1, 0 in this order of preference.

    Args:
        w: weights `[R, C]`, bf16, fp16, fp32 or fp64; any strides; C a multiple of 8.
        mask: bool `[R, C]`, True = kept, at most two of every four. None keeps what compares
            unequal to zero (NaN does). Without a mask `unpack_24` restores `w` to the bit, except
            that negative zeros beyond a group's two places become +0. With one it restores
            `where(mask, w, +0)` to the bit.

    Returns:
        values `[R, C/2]` in w's dtype, and meta uint8 `[R, C/8]` (see the module's docstring).
        Packing what was unpacked gives the same values and meta again.

    Raises:
        ValueError: a group keeps more than two (the first is named), or a shape or dtype is wrong.
    """
    _check_pack_24(w, mask)
    if w.numel() == 0:
        return _pack_24_fake(w, mask)[:2]
    values, meta, overfull = torch.ops.pyprune.pack_24(w, mask)
    _refuse_overfull(int(overfull), w.shape[1])
    return values, meta


def _check_unpack_24(values: Tensor, meta: Tensor) -> None:
    check_rows("values", values)
    if meta.dtype != torch.uint8:
        raise ValueError(f"meta: expected torch.uint8, got {meta.dtype}")
    if values.shape[1] % 4:
        raise ValueError(f"values: expected a multiple of 4 columns, got {values.shape[1]}")
    check_shape("meta", meta, (values.shape[0], values.shape[1] // 4))
    check_same_device(values, meta)


def validate_24(values: Tensor, meta: Tensor) -> None:
    """Raises ValueError unless `values` and `meta` are what `pack_24` may return: shapes and dtypes
    agree, and each group's two indices ascend."""
    _check_unpack_24(values, meta)
    for rows in _row_blocks(meta):
        block = meta[rows]
        low, high = block & 0b0011_0011, (block >> 2) & 0b0011_0011
        ascending = ((low & 15) < (high & 15)) & ((low >> 4) < (high >> 4))
        broken = (~ascending).nonzero()
        if len(broken):
            row, byte = broken[0].tolist()
            raise ValueError(
                f"meta: expected two ascending indices in every nibble, got {int(block[row, byte])}"
                f" in row {rows.start + row}, byte {byte}"
            )


def unpack_24_reference(values: Tensor, meta: Tensor) -> Tensor:
    rows, cols = values.shape[0], 2 * values.shape[1]
    nibbles = torch.stack((meta & 15, meta >> 4), dim=2).reshape(rows, cols // 4)
    index = torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
    w = _bits(values).new_zeros(rows, cols // 4, 4)
    return (
        w.scatter_(2, index, _bits(values).reshape(index.shape)).view(rows, cols).view(values.dtype)
    )


def _unpack_24_fake(values: Tensor, meta: Tensor) -> Tensor:
    _check_unpack_24(values, meta)
    return values.new_empty(values.shape[0], 2 * values.shape[1])


def _unpack_24_cuda(values: Tensor, meta: Tensor) -> Tensor:
    w = _unpack_24_fake(values, meta)
    arrays = (_aligned(values.contiguous()), meta.contiguous())
    _native.launch("unpack_24_cuda", w.device, w, *arrays)
    return w


def _unpack_24_native(values: Tensor, meta: Tensor) -> Tensor:
    w = _unpack_24_fake(values, meta)
    _native.call("unpack_24", w, values.contiguous(), meta.contiguous())
    return w


_registry.register(
    "unpack_24(Tensor values, Tensor meta) -> Tensor",
    fake=_unpack_24_fake,
    impls={
        "reference": _registry.Impl(unpack_24_reference),
        "native": _registry.Impl(_unpack_24_native, _registry.HALF_OR_SINGLE),
        "triton": _registry.Impl("pyprune.kernels.pack:unpack_24_triton", _registry.HALF_OR_SINGLE),
        "cuda": _registry.Impl(_unpack_24_cuda, _registry.HALF_OR_SINGLE),
    },
)


def unpack_24(values: Tensor, meta: Tensor) -> Tensor:
    """The dense matrix `[R, C]` of a 2:4 packed one; +0 where nothing is stored.

    Args:
        values: `[R, C/2]`, bf16, fp16, fp32 or fp64.
        meta: uint8 `[R, C/8]`, validated before use.

    Raises:
        ValueError: `validate_24` refuses them.
    """
    validate_24(values, meta)
    if values.numel() == 0:
        return _unpack_24_fake(values, meta)
    w: Tensor = torch.ops.pyprune.unpack_24(values, meta)
    return w


def to_torch_sparse_24(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata as PyTorch's CUTLASS back end for semi-structured sparsity holds them:

        packed, reordered = to_torch_sparse_24(values, meta)
        SparseSemiStructuredTensorCUTLASS(
            (R, C), packed=packed, meta=reordered, packed_t=None, meta_t=None,
            compressed_swizzled_bitmask=None)

    The tensor cores' metadata layout interleaves the four 8-row parts of every 32 rows, swaps
    within 2x2 blocks, and stores pairs of columns together. The cuSPARSELt back end keeps its own
    opaque layout, which only the library writes: give it `unpack_24(values, meta)`.

    Args:
        values: `[R, C/2]`, bf16 or fp16; R a multiple of 32 and C of 64.
        meta: uint8 `[R, C/8]`, validated before use.

    Returns:
        `values` (contiguous) and int16 `[R, C/16]`.

    Raises:
        ValueError: `validate_24` refuses them, or the dtype or a size has no such layout.
    """
    validate_24(values, meta)
    rows, cols = values.shape[0], 2 * values.shape[1]
    if values.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"values: expected bf16 or fp16 (fp32 is 1:2 there), got {values.dtype}")
    if rows % 32 or cols % 64:
        raise ValueError(f"values: expected 32n rows and 64n columns, got {rows} x {cols}")
    words = meta.contiguous().view(torch.int16)
    # rows = (block of 32, b1, b0, 8), columns = (pair, k); the 2x2 swap exchanges b0 and k.
    parts = words.view(rows // 32, 2, 2, 8, cols // 32, 2)
    return values.contiguous(), parts.permute(4, 0, 3, 1, 5, 2).reshape(rows, cols // 16)


# --- bitmap --------------------------------------------------------------------------------------


def _check_pack_bitmap(w: Tensor, mask: Tensor | None) -> None:
    check_rows("w", w)
    _check_mask(w, mask)


def _kept(w: Tensor, mask: Tensor | None) -> Tensor:
    return _bits(w) != 0 if mask is None else mask


def _row_offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def bits_of(mask: Tensor) -> Tensor:
    """A bool mask `[..., C]` as uint8 `[..., ceil(C/8)]`, laid out as `pack_bitmap`'s bitmap."""
    *rows, cols = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -cols % 8)).reshape(*rows, (cols + 7) // 8, 8)
    weight = 1 << torch.arange(8, device=mask.device)
    return (padded * weight).sum(-1).to(torch.uint8)


def pack_bitmap_reference(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    keep = _kept(w, mask)
    bitmap = bits_of(keep)
    return _bits(w)[keep].view(w.dtype), bitmap, _row_offsets(keep.sum(1))


def _pack_bitmap_fake(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_pack_bitmap(w, mask)
    rows, cols = w.shape
    kept = torch.library.get_ctx().new_dynamic_size()
    bitmap = w.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    return w.new_empty(kept), bitmap, w.new_empty(rows + 1, dtype=torch.int64)


def _pack_bitmap_native(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = w.shape
    w = _unit_columns(w)
    bitmap = w.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    counts = w.new_empty(rows, dtype=torch.int64)
    _native.call("pack_bitmap_rows", bitmap, counts, w, _native_mask(mask))
    row_offsets = _row_offsets(counts)
    values = w.new_empty(int(row_offsets[-1]))
    _native.call("move_bitmap_values", w, values, bitmap, row_offsets, True)
    return values, bitmap, row_offsets


def _pack_bitmap_cuda(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = w.shape
    w = _unit_columns(w)
    bitmap = w.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    row_offsets = w.new_empty(rows + 1, dtype=torch.int64)
    state = w.new_zeros(1, dtype=torch.int64)
    kept = None if mask is None else _native.capsule(mask.contiguous())
    _native.launch("pack_bitmap_rows_cuda", w.device, bitmap, row_offsets, w, kept, state)
    values = w.new_empty(int(row_offsets[-1]))
    arrays = (w, values, bitmap, row_offsets)
    _native.launch("move_bitmap_values_cuda", w.device, *arrays, True)
    return values, bitmap, row_offsets


_registry.register(
    "pack_bitmap(Tensor w, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    fake=_pack_bitmap_fake,
    impls={
        "reference": _registry.Impl(pack_bitmap_reference),
        "native": _registry.Impl(_pack_bitmap_native, _registry.HALF_OR_SINGLE),
        "triton": _registry.Impl(
            "pyprune.kernels.pack:pack_bitmap_triton", _registry.HALF_OR_SINGLE
        ),
        "cuda": _registry.Impl(_pack_bitmap_cuda, _registry.HALF_OR_SINGLE),
    },
)


def pack_bitmap(w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A sparse matrix as its kept values, one bit an element, and where each row begins.

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
    if row_offsets.dtype != torch.int64:
        raise ValueError(f"row_offsets: expected torch.int64, got {row_offsets.dtype}")
    check_shape("row_offsets", row_offsets, (bitmap.shape[0] + 1,))
    check_same_device(values, bitmap, row_offsets)


def _popcount(bytes_: Tensor) -> Tensor:
    pairs = bytes_ - ((bytes_ >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


def validate_bitmap(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> None:
    """Raises ValueError unless these are what `pack_bitmap` may return for `cols` columns: shapes
    and dtypes agree, offsets rise from 0 to the number of values, each row has as many bits as
    values, and no bit lies past the last column."""
    _check_unpack_bitmap(values, bitmap, row_offsets, cols)
    ends = row_offsets[[0, -1]].tolist()
    if ends != [0, values.numel()]:
        raise ValueError(f"row_offsets: expected to run from 0 to {values.numel()}, got {ends}")
    counts = row_offsets.diff()
    if (counts < 0).any():
        row = int((counts < 0).nonzero()[0])
        raise ValueError(f"row_offsets: expected to be monotone, fall after row {row}")
    blocks = [_popcount(bitmap[rows]).sum(1, dtype=torch.int64) for rows in _row_blocks(bitmap)]
    bits = torch.cat(blocks) if blocks else torch.zeros_like(counts)
    if not torch.equal(bits, counts):
        row = int((bits != counts).nonzero()[0])
        raise ValueError(
            f"bitmap: expected as many bits as values in each row, got {int(bits[row])} bits and "
            f"{int(counts[row])} values in row {row}"
        )
    if cols % 8 and (bitmap[:, -1] >> (cols % 8)).any():
        raise ValueError(f"bitmap: expected no bits past column {cols - 1}")


def unpack_bitmap_reference(
    values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int
) -> Tensor:
    bits = (bitmap[:, :, None] >> torch.arange(8, device=bitmap.device)) & 1
    keep = bits.reshape(len(bitmap), 8 * bitmap.shape[1])[:, :cols].bool()
    w = _bits(values).new_zeros(keep.shape)
    w[keep] = _bits(values)
    return w.view(values.dtype)


def _unpack_bitmap_fake(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    _check_unpack_bitmap(values, bitmap, row_offsets, cols)
    return values.new_empty(bitmap.shape[0], cols)


def _unpack_bitmap_native(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    w = values.new_empty(bitmap.shape[0], cols)
    arrays = (values.contiguous(), bitmap.contiguous(), row_offsets.contiguous())
    broken = _native.call("move_bitmap_values", w, *arrays, False)
    if broken >= 0:
        raise ValueError(f"row_offsets: disagree with the bitmap in row {broken}")
    return w


def _unpack_bitmap_cuda(values: Tensor, bitmap: Tensor, row_offsets: Tensor, cols: int) -> Tensor:
    w = values.new_empty(bitmap.shape[0], cols)
    arrays = (_aligned(values), bitmap.contiguous(), row_offsets.contiguous())
    _native.launch("move_bitmap_values_cuda", w.device, w, *arrays, False)
    return w


_registry.register(
    "unpack_bitmap(Tensor values, Tensor bitmap, Tensor row_offsets, int cols) -> Tensor",
    fake=_unpack_bitmap_fake,
    impls={
        "reference": _registry.Impl(unpack_bitmap_reference),
        "native": _registry.Impl(_unpack_bitmap_native, _registry.HALF_OR_SINGLE),
        "triton": _registry.Impl(
            "pyprune.kernels.pack:unpack_bitmap_triton", _registry.HALF_OR_SINGLE
        ),
        "cuda": _registry.Impl(_unpack_bitmap_cuda, _registry.HALF_OR_SINGLE),
    },
)


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
    validate_bitmap(values, bitmap, row_offsets, cols)
    if values.numel() == 0:
        return values.new_zeros(bitmap.shape[0], cols)
    w: Tensor = torch.ops.pyprune.unpack_bitmap(values, bitmap, row_offsets, cols)
    return w
