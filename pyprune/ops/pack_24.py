"""Matrices packed 2:4, and back: the layout is in `pyprune.ops.pack`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import check_array, check_rows, check_same_device
from pyprune.ops._packing import CHECKED_BYTES, check_mask, native_mask
from pyprune.ops.storage import aligned_rows, bit_pattern, row_blocks, unit_columns

# Order in which a group that keeps fewer than two is filled up: position 2, then 3. It is the
# choice that PyTorch's converter makes, so that both encode a matrix alike.
_PADDING_ORDER = (10, 11, 8, 9)


def _check_pack_24(w: Tensor, mask: Tensor | None) -> None:
    check_rows("w", w)
    if w.shape[1] % 8:
        raise ValueError(f"w: expected a multiple of 8 columns, got {w.shape[1]}")
    check_mask(w, mask)


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
    bits = bit_pattern(w) if mask is None else bit_pattern(w).masked_fill(~mask, 0)
    overfull = first_overfull(keep.reshape(-1, 4).sum(1) > 2)
    index = torch.arange(4, device=w.device)
    order = torch.tensor(_PADDING_ORDER, device=w.device).expand(rows, cols // 4, 4)
    order = torch.where(spare.reshape(order.shape), 4 + index, order)
    order = torch.where(keep.reshape(order.shape), index, order)
    stored = order.argsort(dim=2)[:, :, :2].sort(dim=2).values
    values = bits.reshape(order.shape).gather(2, stored).reshape(rows, cols // 2).view(w.dtype)
    nibbles = (stored[:, :, 0] | stored[:, :, 1] << 2).reshape(rows, cols // 8, 2)
    return values, (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).to(torch.uint8), overfull


def _room_24(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = w.shape
    meta = w.new_empty(rows, cols // 8, dtype=torch.uint8)
    return w.new_empty(rows, cols // 2), meta, w.new_empty(1, dtype=torch.int64)


def _pack_24_fake(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_pack_24(w, mask)
    return _room_24(w)


def _pack_24_native(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    values, meta, overfull = _room_24(w)
    overfull.fill_(_native.call("pack_24", values, meta, unit_columns(w), native_mask(mask)))
    return values, meta, overfull


def _pack_24_cuda(w: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    packed = _pack_24_fake(w, mask)
    kept = None if mask is None else _native.capsule(aligned_rows(mask.contiguous(), 8))
    _native.launch("pack_24_cuda", w.device, *packed, aligned_rows(w), kept)
    return packed


# The third result is the first group (flat index) that keeps more than two, [1]; -1 if none does.
# The op leaves it on the device, so that packing can be queued: `pack_24` below reads it.
registry.register(
    "pack_24(Tensor w, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    fake=_pack_24_fake,
    impls={
        "reference": registry.Impl(pack_24_reference),
        "native": registry.Impl(_pack_24_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl("pyprune.kernels.pack:pack_24_triton", registry.HALF_OR_SINGLE),
        "cuda": registry.Impl(_pack_24_cuda, registry.HALF_OR_SINGLE),
    },
)


def pack_24(w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A 2:4 sparse matrix as values and metadata.

    Each group of four columns stores two elements: those kept, then (only without a mask) negative
    zeros, lowest index first, then +0 at position 2 or 3, the lower first.

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
    if values.shape[1] % 4:
        raise ValueError(f"values: expected a multiple of 4 columns, got {values.shape[1]}")
    check_array("meta", meta, torch.uint8, (values.shape[0], values.shape[1] // 4))
    check_same_device(values, meta)


def validate_24(values: Tensor, meta: Tensor) -> None:
    """Raises ValueError unless `values` and `meta` are what `pack_24` may return: shapes and dtypes
    agree, and each group's two indices ascend."""
    _check_unpack_24(values, meta)
    for rows in row_blocks(meta.shape, CHECKED_BYTES):
        block = meta[rows]
        low = block & 0x33
        # Of each nibble 3 + the second index - the first: 4 or more where they ascend.
        ascend = ((block ^ low) >> 2).add_(0x33).sub_(low).bitwise_and_(0x44)
        if block.numel() and int(ascend.amin()) != 0x44:
            row, byte = (ascend != 0x44).nonzero()[0].tolist()
            raise ValueError(
                f"meta: expected two ascending indices in every nibble, got {int(block[row, byte])}"
                f" in row {rows.start + row}, byte {byte}"
            )


def unpack_24_reference(values: Tensor, meta: Tensor) -> Tensor:
    rows, cols = values.shape[0], 2 * values.shape[1]
    nibbles = torch.stack((meta & 15, meta >> 4), dim=2).reshape(rows, cols // 4)
    index = torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
    w = bit_pattern(values).new_zeros(rows, cols // 4, 4)
    return (
        w.scatter_(2, index, bit_pattern(values).reshape(index.shape))
        .view(rows, cols)
        .view(values.dtype)
    )


def _unpack_24_fake(values: Tensor, meta: Tensor) -> Tensor:
    _check_unpack_24(values, meta)
    return values.new_empty(values.shape[0], 2 * values.shape[1])


def _unpack_24_cuda(values: Tensor, meta: Tensor) -> Tensor:
    w = _unpack_24_fake(values, meta)
    arrays = (aligned_rows(values.contiguous(), 4 * values.element_size()), meta.contiguous())
    _native.launch("unpack_24_cuda", w.device, w, *arrays)
    return w


def _unpack_24_native(values: Tensor, meta: Tensor) -> Tensor:
    w = _native.empty((values.shape[0], 2 * values.shape[1]), values.dtype)
    _native.call("unpack_24", w, values.contiguous(), meta.contiguous())
    return w


registry.register(
    "unpack_24(Tensor values, Tensor meta) -> Tensor",
    fake=_unpack_24_fake,
    impls={
        "reference": registry.Impl(unpack_24_reference),
        "native": registry.Impl(_unpack_24_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl("pyprune.kernels.pack:unpack_24_triton", registry.HALF_OR_SINGLE),
        "cuda": registry.Impl(_unpack_24_cuda, registry.HALF_OR_SINGLE),
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
