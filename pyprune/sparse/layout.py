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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyprune.checkpoint import TensorEntry

INT8 = "int8"  # of values
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


@dataclass(frozen=True)
class LayerFormat:
    """How one weight is stored. shape: `(R, C)`, outputs by inputs. int8: values are int8 with a
    scale a row. transposed: the dense tensor is `[C, R]` (Conv1D). rank: of factors, else 0.
    stacked: the dense tensor is one of those that lie one behind the other in a mixture's tensor
    `[E, ...]`."""

    format: str
    shape: tuple[int, int]
    int8: bool = False
    transposed: bool = False
    rank: int = 0
    stacked: bool = False

    @property
    def label(self) -> str:
        return f"{self.format} {INT8}" if self.int8 else self.format

    @property
    def version(self) -> int:
        if self.stacked:
            return 6
        if self.format == CODED:
            return 5
        if self.format == FACTORED:
            return 4
        if self.format == DENSE_INT8:
            return 3
        return 2 if self.int8 or self.transposed else 1

    @property
    def dense_shape(self) -> tuple[int, int]:
        """The shape of the dense tensor."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def parts(self) -> tuple[str, ...]:
        return (*PARTS[self.format], "scales") if self.int8 else PARTS[self.format]

    @property
    def main(self) -> str:
        """The part that has the dtype of the values, where one has it."""
        return self.parts[0]

    def dense_dtype(self, found: Mapping[str, TensorEntry]) -> torch.dtype:
        """The dtype of the dense tensor, by its parts."""
        if self.format == CODED:
            return torch.bfloat16
        return found["scales" if self.int8 else self.main].dtype

    def count(self, found: Mapping[str, TensorEntry]) -> int:
        """The elements of the part in COUNTED; -1 if it has not one dimension, or there is none."""
        part = COUNTED.get(self.format)
        shape = found[part].shape if part else ()
        return shape[0] if len(shape) == 1 else -1

    def part_shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the weight. count: of the part in `COUNTED`, where the
        format has one: a bitmap's values, a coded weight's escapes."""
        rows, cols = self.shape
        shapes: dict[str, tuple[int, ...]]
        if self.format == "sparse24":
            shapes = {"values": (rows, cols // 2), "metadata": (rows, cols // 8)}
        elif self.format == "bitmap":
            shapes = {"values": (count,), "bitmap": (rows, -(-cols // 8))}
            shapes |= {"row_offsets": (rows + 1,)}
        elif self.format == DENSE_INT8:
            shapes = {"values": (rows, cols)}
        elif self.format == FACTORED:
            shapes = {"up.weight": (rows, self.rank), "down.weight": (self.rank, cols)}
        else:
            shapes = {"low": (rows, cols), "codes": (rows, 3 * -(-cols // 8)), "bases": (rows,)}
            shapes |= {"escapes": (count,), "row_offsets": (rows + 1,)}
        return {**shapes, "scales": (rows,)} if self.int8 else shapes

    def part_dtype(self, part: str, dense: torch.dtype) -> torch.dtype:
        """The dtype of a tensor of the weight, whose dense dtype is `dense`."""
        if part == "values":
            return torch.int8 if self.int8 else dense
        return _DTYPES.get(part, dense)

    def nbytes(self, count: int, dense: torch.dtype) -> int:
        """Bytes of all tensors of the weight. Arguments as for `part_shapes` and `part_dtype`."""
        shapes = self.part_shapes(count).items()
        return sum(math.prod(shape) * self.part_dtype(p, dense).itemsize for p, shape in shapes)

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"format": self.format, "shape": list(self.shape)}
        if self.int8:
            fields["values"] = INT8
        if self.transposed:
            fields["transposed"] = True
        if self.rank:
            fields["rank"] = self.rank
        if self.stacked:
            fields["stacked"] = True
        return fields


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
    shape = (kept.shape[0], kept.shape[1])
    return {f: LayerFormat(f, shape).nbytes(count, dense) for f in fitting}, count


def worthwhile(sizes: Mapping[str, int], dense_bytes: int) -> dict[str, int]:
    """The formats of `sizes` (bytes by format) that save enough (`WORTHWHILE`) of `dense_bytes`,
    smallest first (2:4 where equal)."""
    ordered = sorted(sizes, key=lambda f: (sizes[f], f != "sparse24"))
    return {f: sizes[f] for f in ordered if sizes[f] <= (1 - WORTHWHILE) * dense_bytes}
