"""The sparse layouts of compressed-tensors before 0.15, which its later releases no longer read.

Of a weight:

sparse-24-bitmask  stem.compressed `[R, C/2]`, stem.bitmask uint8 `[R, ceil(C/8)]`, stem.shape
sparse-bitmask     stem.compressed `[nnz]`, the same bitmask, stem.row_offsets int64, stem.shape

The stem of a weight `X.weight` is `X`; in early releases (0.6) it was `X.weight`.

Bit `c % 8` of byte `c // 8` stands for column c. row_offsets holds where each row begins, `[R]`,
or `[R + 1]` with the end. The first layout stores two of every four even where both are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyprune.checkpoint.shards import TensorEntry
from pyprune.errors import UserError
from pyprune.ops.pack import unpack_bitmap
from pyprune.sparse.format import VALUE_DTYPES, WEIGHT

FORMATS = ("sparse-24-bitmask", "sparse-bitmask")
END = ".compressed"
# What is left of a configuration when nothing but sparsity is described.
UNQUANTIZED = (None, "dense", *FORMATS)


def legacy_format(raw: Mapping[str, Any], where: str) -> str | None:
    """The layout that config.json names; None if it names none.

    Raises UserError for one that combines sparsity with quantization, or another sparse layout.
    """
    config = raw.get("quantization_config", raw.get("compression_config"))
    if not isinstance(config, Mapping):
        return None
    sparsity = config.get("sparsity_config")
    if not isinstance(sparsity, Mapping) or not sparsity.get("format"):
        return None
    if config.get("config_groups") or config.get("format") not in UNQUANTIZED:
        raise UserError(f"{where}: expected sparsity alone, got it combined with quantization")
    kind = sparsity["format"]
    if kind == "dense":
        return "dense"
    if kind not in FORMATS:
        raise UserError(f"{where}: sparse layout: expected one of {', '.join(FORMATS)}, got {kind}")
    return str(kind)


def stems_of(entries: Mapping[str, TensorEntry]) -> list[str]:
    """Of the weights that are stored compressed."""
    return [name.removesuffix(END) for name in entries if name.endswith(END)]


def dense_name(stem: str) -> str:
    return stem if stem.endswith(WEIGHT) else stem + WEIGHT


def stem_of(name: str, entries: Mapping[str, TensorEntry]) -> str:
    """The stem of the dense tensor `name`, one of `stems_of(entries)`."""
    return name if name + END in entries else name.removesuffix(WEIGHT)


def parts_of(stem: str, kind: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a weight by part. Raises UserError naming file and tensor."""
    first = entries[stem + END]
    wanted = ["compressed", "bitmask", "shape"]
    wanted += ["row_offsets"] if kind == "sparse-bitmask" else []
    for part in wanted:
        if f"{stem}.{part}" not in entries:
            raise UserError(f"{first.file}: tensor {stem}.{part} is missing ({kind})")
    parts = {part: entries[f"{stem}.{part}"] for part in wanted}
    dtypes = {"bitmask": (torch.uint8,), "shape": (torch.int64,), "row_offsets": (torch.int64,)}
    for part, entry in parts.items():
        allowed = dtypes.get(part, VALUE_DTYPES)
        if entry.dtype not in allowed:
            raise UserError(
                f"{entry.file}: tensor {stem}.{part}: expected {allowed[0]}, got {entry.dtype}"
            )
    if len(parts["bitmask"].shape) != 2:
        raise UserError(f"{parts['bitmask'].file}: tensor {stem}.bitmask: expected 2 dimensions")
    return parts


def shape_of(
    stem: str, parts: Mapping[str, TensorEntry], read: Callable[[TensorEntry], Tensor]
) -> tuple[int, int]:
    """(R, C), from the stored shape, checked against the bitmask's and the values' sizes."""
    entry = parts["shape"]
    if entry.shape not in ((2,), (2, 1), (1, 2)):
        raise UserError(
            f"{entry.file}: tensor {stem}.shape: expected two numbers, got {list(entry.shape)}"
        )
    rows, cols = read(entry).reshape(-1).tolist()
    bitmask = parts["bitmask"]
    if rows < 1 or cols < 1 or bitmask.shape != (rows, -(-cols // 8)):
        raise UserError(
            f"{bitmask.file}: tensor {stem}.bitmask: expected shape [R, ceil(C/8)] for R, C = "
            f"{rows}, {cols}, got {list(bitmask.shape)}"
        )
    return rows, cols


def unpack_legacy(
    stem: str, parts: Mapping[str, TensorEntry], read: Callable[[TensorEntry], Tensor]
) -> Tensor:
    """The dense weight. Raises UserError, naming file and tensor, where the parts disagree."""
    _, cols = shape_of(stem, parts, read)
    values, bitmask = read(parts["compressed"]), read(parts["bitmask"])
    counts = _bits_by_row(bitmask)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if "row_offsets" in parts:
        stored = read(parts["row_offsets"]).reshape(-1)
        if not torch.equal(stored, offsets) and not torch.equal(stored, offsets[:-1]):
            file = parts["row_offsets"].file
            raise UserError(f"{file}: tensor {stem}.row_offsets: disagrees with the bitmask")
    try:
        return unpack_bitmap(values.reshape(-1), bitmask, offsets, cols)
    except ValueError as error:
        raise UserError(f"{parts['compressed'].file}: tensor {stem}.compressed: {error}") from error


def _bits_by_row(bitmask: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((bitmask[:, :, None] >> shifts) & 1).sum((1, 2), dtype=torch.int64)
