"""The compressed checkpoint format, version 1; `docs/format.md` describes it.

Here are the rules: what config.json says of a compressed checkpoint, which tensors a compressed
weight consists of, and what must hold of them before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.checkpoint.shards import TensorEntry
from pyprune.errors import UserError
from pyprune.ops.pack import (
    pack_24,
    pack_bitmap,
    unpack_24,
    unpack_bitmap,
    validate_24,
    validate_bitmap,
)
from pyprune.sparse.linear import FORMATS, WORTHWHILE

METHOD = "pyprune"
VERSION = 1
WEIGHT = ".weight"
PARTS = {"sparse24": ("values", "metadata"), "bitmap": ("values", "bitmap", "row_offsets")}
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HOW_TO_LOAD = (
    "this checkpoint is compressed by pyprune: `import pyprune` before loading it, or turn it into "
    "a dense one with `pyprune decompress DIR --out DENSE`"
)
_PATTERN = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LayerFormat:
    """How one weight is stored. shape: `(R, C)`, outputs by inputs, of the dense weight."""

    format: str
    shape: tuple[int, int]

    def part_shapes(self, nnz: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the weight; `nnz` counts for a bitmap only."""
        rows, cols = self.shape
        if self.format == "sparse24":
            return {"values": (rows, cols // 2), "metadata": (rows, cols // 8)}
        bitmap = (rows, -(-cols // 8))
        return {"values": (nnz,), "bitmap": bitmap, "row_offsets": (rows + 1,)}


PART_DTYPES = {"metadata": torch.uint8, "bitmap": torch.uint8, "row_offsets": torch.int64}


def quantization_config(layers: Mapping[str, LayerFormat]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    return {
        "quant_method": METHOD,
        "format_version": VERSION,
        "how_to_load": HOW_TO_LOAD,
        "layers": {
            name: {"format": layer.format, "shape": list(layer.shape)}
            for name, layer in layers.items()
        },
    }


def parse_quantization_config(value: Any, where: str) -> dict[str, LayerFormat]:
    """The layers of a `quantization_config`. Raises UserError, starting with `where`, for another
    method or version, or a layer that is not described completely."""
    if not isinstance(value, Mapping) or value.get("quant_method") != METHOD:
        raise UserError(f"{where}: expected a quantization_config with quant_method {METHOD!r}")
    version = value.get("format_version")
    if type(version) is not int or version != VERSION:
        raise UserError(
            f"{where}: expected format_version {VERSION}, got {version!r}; "
            "a newer pyprune may read it"
        )
    layers = value.get("layers")
    if not isinstance(layers, Mapping):
        raise UserError(f"{where}: quantization_config: expected an object named layers")
    return {str(name): _layer(layer, f"{where}: layer {name}") for name, layer in layers.items()}


def _layer(value: Any, where: str) -> LayerFormat:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected an object, got {type(value).__name__}")
    kind, shape = value.get("format"), value.get("shape")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise UserError(f"{where}: format: expected one of {', '.join(FORMATS)}, got {kind!r}")
    whole = isinstance(shape, (list, tuple)) and all(type(n) is int and n > 0 for n in shape)
    if not whole or len(shape) != 2:  # type: ignore[arg-type]
        raise UserError(f"{where}: shape: expected two positive integers, got {shape!r}")
    rows, cols = shape  # type: ignore[misc]
    if kind == "sparse24" and cols % 8:
        raise UserError(f"{where}: sparse24: expected a multiple of 8 columns, got {cols}")
    return LayerFormat(kind, (rows, cols))


def check_entries(
    name: str, layer: LayerFormat, entries: Mapping[str, TensorEntry], where: str | Path
) -> dict[str, TensorEntry]:
    """The layer's tensors by part, their dtypes and shapes checked against `layer`.

    Raises UserError that names the file (or `where`) and the tensor.
    """
    parts: dict[str, TensorEntry] = {}
    for part in PARTS[layer.format]:
        tensor = f"{name}.{part}"
        if tensor not in entries:
            raise UserError(f"{where}: tensor {tensor} is missing ({layer.format})")
        parts[part] = entries[tensor]
    if name + WEIGHT in entries:
        raise UserError(f"{entries[name + WEIGHT].file}: tensor {name}{WEIGHT} is there twice")
    values = parts["values"]
    shapes = layer.part_shapes(values.shape[0] if len(values.shape) == 1 else -1)
    for part, entry in parts.items():
        wanted = VALUE_DTYPES if part == "values" else (PART_DTYPES[part],)
        if entry.dtype not in wanted:
            expected = " or ".join(str(dtype) for dtype in wanted)
            raise UserError(
                f"{entry.file}: tensor {name}.{part}: expected {expected}, got {entry.dtype}"
            )
        if entry.shape != shapes[part] and not (part == "values" and shapes[part] == (-1,)):
            raise UserError(
                f"{entry.file}: tensor {name}.{part}: expected shape {list(shapes[part])}, "
                f"got {list(entry.shape)}"
            )
        if part == "values" and shapes[part] == (-1,):
            raise UserError(
                f"{entry.file}: tensor {name}.{part}: expected one dimension, "
                f"got shape {list(entry.shape)}"
            )
    return parts


def check_tensors(name: str, layer: LayerFormat, parts: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError, naming `where` and the tensor, unless the metadata describes a weight."""
    try:
        if layer.format == "sparse24":
            validate_24(parts["values"], parts["metadata"])
        else:
            arrays = (parts["values"], parts["bitmap"], parts["row_offsets"])
            validate_bitmap(*arrays, layer.shape[1])
    except ValueError as error:
        part, _, what = str(error).partition(": ")
        part = {"meta": "metadata"}.get(part, part)
        raise UserError(f"{where}: tensor {name}.{part}: {what}") from error


def unpack(layer: LayerFormat, parts: Mapping[str, Tensor]) -> Tensor:
    """The dense weight `[R, C]` of tensors that `check_tensors` let pass, bit for bit."""
    if layer.format == "sparse24":
        return unpack_24(parts["values"], parts["metadata"])
    return unpack_bitmap(parts["values"], parts["bitmap"], parts["row_offsets"], layer.shape[1])


def pack(weight: Tensor, format: str) -> dict[str, Tensor]:
    """The tensors of `weight [R, C]` by part. Every element whose bits are not all zero is kept
    (negative zeros too), so that `unpack` restores the weight bit for bit.

    Raises UserError if more than two of four are to be kept in "sparse24".
    """
    if format == "sparse24":
        if stored_bytes(weight, format) is None:
            raise UserError("sparse24: expected 8n columns and at most 2 non-zero of every 4")
        packed: tuple[Tensor, ...] = pack_24(weight)
    else:
        packed = pack_bitmap(weight)
    return dict(zip(PARTS[format], packed, strict=True))


def _count(weight: Tensor) -> tuple[int, bool]:
    """Elements whose bits are not all zero, and whether they are 2:4."""
    kept = weight.contiguous().view(_PATTERN[weight.itemsize]) != 0
    fits = not weight.shape[1] % 8 and int(kept.view(-1, 4).sum(1, dtype=torch.uint8).max()) <= 2
    return int(kept.sum()), fits


def stored_bytes(weight: Tensor, format: str) -> int | None:
    """Bytes of `weight [R, C]` in `format`, without packing it; None if it does not fit."""
    nnz, fits = _count(weight)
    return _bytes(weight, format, nnz) if fits or format == "bitmap" else None


def _bytes(weight: Tensor, format: str, nnz: int) -> int:
    rows, cols = weight.shape
    if format == "sparse24":
        return weight.nbytes // 2 + rows * cols // 8
    return nnz * weight.itemsize + rows * -(-cols // 8) + 8 * (rows + 1)


def choose(weight: Tensor, allowed: tuple[str, ...] = FORMATS) -> tuple[str, int]:
    """The smallest of the allowed formats (2:4 where equal), or "dense" where none saves a tenth of
    the bytes, and how many elements a bitmap would keep."""
    if not weight.numel():
        return "dense", 0
    nnz, fits = _count(weight)
    sizes = {f: _bytes(weight, f, nnz) for f in allowed if f == "bitmap" or fits}
    best = min(sizes, key=lambda f: (sizes[f], f != "sparse24"), default="dense")
    worthwhile = best in sizes and sizes[best] <= (1 - WORTHWHILE) * weight.nbytes
    return (best if worthwhile else "dense"), nnz
