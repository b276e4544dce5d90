"""What a compressed weight `[R, C]` consists of: the tensors with their shapes, dtypes and bytes.

format   | tensors (layouts in `pyprune.ops.pack` and `pyprune.ops.coded`)
---------|-----------------------------------------------------------------------
sparse24 | values `[R, C/2]`, metadata uint8 `[R, C/8]`
bitmap   | values `[nnz]`, bitmap uint8 `[R, ceil(C/8)]`, row_offsets int64 `[R + 1]`
dense    | values `[R, C]`; int8 only: for what has no zeros to leave out, embeddings and heads
coded    | uint8 low `[R, C]`, codes `[R, 3 ceil(C/8)]`, bases `[R]` and escapes `[n]`, row_offsets
         | int64 `[R + 1]`; bf16 without loss, for the same matrices
factored | up.weight `[R, rank]`, down.weight `[rank, C]`

Values are floating point numbers, or int8 with one more tensor, scales `[R]`, that each row's
values are multiplied with (`pyprune.ops.sparse_int8`). The modules that hold weights, the
checkpoint, the choice between formats and `pyprune inspect` all ask here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DENSE_INT8 = "dense"
CODED = "coded"
FACTORED = "factored"
# Those that leave zeros out, which a layer may get by its zeros alone.
FORMATS = ("sparse24", "bitmap")
PARTS = {
    "sparse24": ("values", "metadata"),
    "bitmap": ("values", "bitmap", "row_offsets"),
    DENSE_INT8: ("values",),
    FACTORED: ("up.weight", "down.weight"),
    CODED: ("low", "codes", "bases", "escapes", "row_offsets"),
}
ALL_PARTS = {"scales"}.union(*PARTS.values())
# The part whose length is known from the data alone.
COUNTED = {"bitmap": "values", CODED: "escapes"}
_DTYPES = {
    **dict.fromkeys(("metadata", "bitmap", "low", "codes", "bases", "escapes"), torch.uint8),
    "row_offsets": torch.int64,
}
# Compressing a weight must save at least this share of its bytes to be worth a format of its own.
WORTHWHILE = 0.1


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations and reports write it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def part_shapes(
    format: str, shape: Sequence[int], int8: bool, count: int, rank: int = 0
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a weight of `shape` `(R, C)`, by part. count: of the part in
    `COUNTED`, where the format has one; rank: of factors."""
    rows, cols = shape
    shapes: dict[str, tuple[int, ...]]
    if format == "sparse24":
        shapes = {"values": (rows, cols // 2), "metadata": (rows, cols // 8)}
    elif format == "bitmap":
        shapes = {"values": (count,), "bitmap": (rows, -(-cols // 8)), "row_offsets": (rows + 1,)}
    elif format == DENSE_INT8:
        shapes = {"values": (rows, cols)}
    elif format == FACTORED:
        shapes = {"up.weight": (rows, rank), "down.weight": (rank, cols)}
    else:
        shapes = {"low": (rows, cols), "codes": (rows, 3 * -(-cols // 8)), "bases": (rows,)}
        shapes |= {"escapes": (count,), "row_offsets": (rows + 1,)}
    return {**shapes, "scales": (rows,)} if int8 else shapes


def part_dtype(part: str, int8: bool, dense: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of a weight, whose dense dtype is `dense`."""
    if part == "values":
        return torch.int8 if int8 else dense
    return _DTYPES.get(part, dense)


def stored_bytes(
    format: str, shape: Sequence[int], int8: bool, count: int, dense: torch.dtype, rank: int = 0
) -> int:
    """Bytes of all tensors of a weight. Arguments as for `part_shapes` and `part_dtype`."""
    shapes = part_shapes(format, shape, int8, count, rank)
    return sum(math.prod(s) * part_dtype(p, int8, dense).itemsize for p, s in shapes.items())


def is_24(kept: Tensor) -> bool:
    """Whether "sparse24" can hold the elements that are marked in `kept` bool `[R, C]`."""
    if not kept.numel():
        return not kept.shape[1] % 8
    return not kept.shape[1] % 8 and int(kept.view(-1, 4).sum(1, dtype=torch.uint8).max()) <= 2


def sparse_bytes(
    kept: Tensor, dense: torch.dtype, allowed: Sequence[str] = FORMATS
) -> tuple[dict[str, int], int]:
    """Bytes, by format, of a weight of dtype `dense` of which the elements marked in the contiguous
    `kept` bool `[R, C]` are stored, in those of the `allowed` `FORMATS` that can hold them; and how
    many elements these are."""
    count = int(kept.sum())
    fitting = [f for f in allowed if f != "sparse24" or is_24(kept)]
    return {f: stored_bytes(f, kept.shape, False, count, dense) for f in fitting}, count


def worthwhile(sizes: Mapping[str, int], dense_bytes: int) -> dict[str, int]:
    """The formats of `sizes` (bytes by format) that save enough (`WORTHWHILE`) of `dense_bytes`,
    smallest first (2:4 where equal)."""
    ordered = sorted(sizes, key=lambda f: (sizes[f], f != "sparse24"))
    return {f: sizes[f] for f in ordered if sizes[f] <= (1 - WORTHWHILE) * dense_bytes}
