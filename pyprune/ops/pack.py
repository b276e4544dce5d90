"""Packed layouts of pruned matrices: 2:4 and bitmap, and back, bit for bit.

2:4     values `[R, C/2]` in the weights' dtype; meta uint8 `[R, C/8]`: for each group of four
        columns the 2-bit indices of its two stored elements, ascending, the lower in the low bits;
        the even group of a pair in the low nibble. NVIDIA's sparse tensor cores read this encoding.
bitmap  values `[nnz]`, row after row; bitmap uint8 `[R, ceil(C/8)]`, column c in bit c % 8 of byte
        c // 8, unused bits zero; row_offsets int64 `[R + 1]`, where row i's values begin.

Elements move as bit patterns: negative zeros, infinities and NaN payloads survive. Rows know
nothing of one another: a stack of matrices `[B, R, C]` packs as `w.flatten(0, 1)`.
"""

from pyprune.ops.pack_24 import (
    first_overfull,
    pack_24,
    pack_24_reference,
    to_torch_sparse_24,
    unpack_24,
    unpack_24_reference,
    validate_24,
)
from pyprune.ops.pack_bitmap import (
    bits_of,
    pack_bitmap,
    pack_bitmap_reference,
    unpack_bitmap,
    unpack_bitmap_reference,
    validate_bitmap,
)

__all__ = [
    "bits_of",
    "first_overfull",
    "pack_24",
    "pack_24_reference",
    "pack_bitmap",
    "pack_bitmap_reference",
    "to_torch_sparse_24",
    "unpack_24",
    "unpack_24_reference",
    "unpack_bitmap",
    "unpack_bitmap_reference",
    "validate_24",
    "validate_bitmap",
]
