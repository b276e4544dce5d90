"""Rows and columns of stored weights, and stored weights put one below the other: for runtimes that
spread a layer over devices, or multiply with several layers at once (q, k and v as one).

A weight `[R, C]` is here what it is in a file: its `LayerFormat` and its tensors by part
(`pyprune.sparse.layout`). Nothing is rounded: the elements of a slice are those of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyprune.errors import UserError
from pyprune.ops.pack import pack_bitmap, unpack_bitmap
from pyprune.sparse.layout import COUNTED, LayerFormat

Parts = Mapping[str, Tensor]
OFFSETS = "row_offsets"
# Columns that a byte of 2:4 metadata, or of a bitmap, speaks of.
_BYTE = 8


def take_rows(layer: LayerFormat, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
    """The parts of rows `start` to `stop` (exclusive), views but for a bitmap's offsets."""
    taken = {part: t[start:stop] for part, t in parts.items() if part != OFFSETS}
    counted = COUNTED.get(layer.format)
    if counted is not None:
        offsets = parts[OFFSETS][start : stop + 1]
        taken[counted] = parts[counted][int(offsets[0]) : int(offsets[-1])]
        taken[OFFSETS] = offsets - offsets[0]
    return {part: taken[part] for part in layer.parts}


def take_columns(layer: LayerFormat, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
    """The parts of columns `start` to `stop` (exclusive). Raises UserError for 2:4 where they do
    not begin and end with a byte of metadata, and for formats of which no columns can be taken."""
    if (start, stop) == (0, layer.shape[1]):
        return dict(parts)
    if layer.format == "bitmap":
        return _bitmap_columns(layer, parts, start, stop)
    taken = {part: parts[part] for part in layer.parts}
    if layer.format == "dense":
        taken["values"] = parts["values"][:, start:stop]
    elif layer.format == "sparse24":
        if start % _BYTE or stop % _BYTE:
            raise UserError(
                f"sparse24: expected columns from and to a multiple of {_BYTE}, got {start} to "
                f"{stop}"
            )
        taken["values"] = parts["values"][:, start // 2 : stop // 2]
        taken["metadata"] = parts["metadata"][:, start // _BYTE : stop // _BYTE]
    else:
        raise UserError(f"{layer.format}: expected all {layer.shape[1]} columns")
    return {part: t.contiguous() for part, t in taken.items()}


def _bitmap_columns(layer: LayerFormat, parts: Parts, start: int, stop: int) -> dict[str, Tensor]:
    values, bitmap, offsets = (parts[part] for part in ("values", "bitmap", OFFSETS))
    # Packing takes floating point numbers; every int8 is one in bf16.
    wide = values.bfloat16() if layer.int8 else values
    dense = unpack_bitmap(wide, bitmap, offsets, layer.shape[1])[:, start:stop].contiguous()
    bits = torch.arange(start, stop, device=bitmap.device)
    kept = (bitmap[:, bits // _BYTE] >> (bits % _BYTE)) & 1
    packed = pack_bitmap(dense, kept.bool())
    taken = dict(zip(("values", "bitmap", OFFSETS), packed, strict=True))
    if layer.int8:
        taken["values"] = taken["values"].to(torch.int8)
        taken["scales"] = parts["scales"]
    return taken


def stack_rows(
    weights: Sequence[tuple[LayerFormat, Parts]],
) -> tuple[LayerFormat, dict[str, Tensor]]:
    """One weight whose rows are those of `weights`, at least one, in their order. All have one
    format, values (int8 or not) and number of columns."""
    first = weights[0][0]
    rows = sum(layer.shape[0] for layer, _ in weights)
    whole = replace(first, shape=(rows, first.shape[1]))
    if len(weights) == 1:
        return whole, dict(weights[0][1])
    stacked = {
        part: torch.cat([parts[part] for _, parts in weights])
        for part in first.parts
        if part != OFFSETS
    }
    if OFFSETS in first.parts:
        ends, begun = [weights[0][1][OFFSETS][:1]], 0
        for _, parts in weights:
            ends.append(parts[OFFSETS][1:] + begun)
            begun += int(parts[OFFSETS][-1])
        stacked[OFFSETS] = torch.cat(ends)
    return whole, {part: stacked[part] for part in first.parts}


def alike(one: LayerFormat, other: LayerFormat) -> bool:
    """Whether `stack_rows` takes both."""
    return replace(one, shape=(0, 0)) == replace(other, shape=(0, 0)) and (
        one.shape[1] == other.shape[1]
    )
