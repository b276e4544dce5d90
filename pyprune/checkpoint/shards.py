"""safetensors files, read and written at byte offsets.

A file is: 8 bytes little-endian header length, that many bytes of JSON (tensor name -> dtype,
shape, [begin, end) offsets into what follows; "__metadata__" -> strings), then the tensors' bytes.
Reading by offset with plain reads, instead of mapping the file, keeps the pages out of this
process's resident memory; writing by offset leaves every other byte of the file as it was.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pyprune.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
# The format's own limit; a longer length field means that the file is no safetensors file.
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
POINTER = b"version "  # what a clone without Git LFS has instead of a large file begins with


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes from `offset` (from the start of `file`), row-major."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name, in file order of their bytes.

    Raises UserError that names the file (and the tensor) if the file is truncated, its header does
    not parse, an offset is out of range, a tensor's bytes do not fit its shape and dtype, or the
    tensors do not add up to the file's size.
    """
    size = file.stat().st_size
    header, start = _parse_header(file, size)
    entries: dict[str, TensorEntry] = {}
    for name, value in header.items():
        if name != "__metadata__":
            entries[name] = _entry(file, name, value, start)
    end = start
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for name, entry in ordered:
        if entry.offset != end:
            raise _corrupt(file, f"tensor {name} starts at byte {entry.offset}, expected {end}")
        end = entry.offset + entry.nbytes
        if end > size:
            raise UserError(
                f"{file}: truncated: tensor {name} ends at byte {end}, the file has {size}"
            )
    if end != size:
        raise _corrupt(file, f"its tensors end at byte {end}, the file has {size}")
    return dict(ordered)


def read_headers(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """The tensors of several files. Raises UserError as `read_header`, and for a tensor that two of
    them have: which one counts would be up to the order in which somebody reads them."""
    entries: dict[str, TensorEntry] = {}
    for file in files:
        found = read_header(file)
        for name in found:
            if name in entries:
                raise UserError(f"{file}: tensor {name} is in {entries[name].file.name} too")
        entries |= found
    return entries


def _corrupt(file: Path, what: str) -> UserError:
    return UserError(f"{file}: corrupt safetensors file: {what}")


def _parse_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and the offset of the first tensor byte."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        start = LENGTH_BYTES + length
        if length.to_bytes(LENGTH_BYTES, "little") == POINTER:
            raise UserError(
                f"{file}: expected weights, got a Git LFS pointer to them: git lfs pull"
            )
        if size < LENGTH_BYTES or length > MAX_HEADER_BYTES or start > size:
            raise _corrupt(file, f"header of {length} bytes in a file of {size}")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is not a JSON object")
    return header, start


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` that lets no name be there twice: it is up to a reader which counts.
    Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return found


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether these are numbers that a tensor's sizes and a file's offsets can be."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _entry(file: Path, name: str, value: Any, start: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _corrupt(file, f"tensor {name} is described by {value!r}")
    dtype, shape, offsets = (value.get(key, "") for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets):
        raise _corrupt(file, f"tensor {name} lacks a valid dtype, shape or data_offsets")
    if len(offsets) != 2:
        raise _corrupt(file, f"tensor {name} has {len(offsets)} data_offsets, expected 2")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"{file}: tensor {name}: expected a dtype among {known}, got {dtype}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _corrupt(
            file,
            f"tensor {name} holds {offsets[1] - offsets[0]} bytes, "
            f"{dtype} {list(shape)} takes {nbytes}",
        )
    return TensorEntry(file, start + offsets[0], nbytes, DTYPES[dtype], tuple(shape))


def read_tensor(entry: TensorEntry, file: Path | None = None) -> Tensor:
    """The tensor's values, in a CPU tensor of its own. `file`: another file of the same layout."""
    path = file or entry.file
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    buffer = raw.numpy().data
    with path.open("rb", buffering=0) as stream:
        stream.seek(entry.offset)
        done = 0
        while done < entry.nbytes:
            count = stream.readinto(buffer[done:])
            if not count:
                raise UserError(f"{path}: truncated at byte {entry.offset + done}")
            done += count
    return raw.view(entry.dtype).reshape(entry.shape)


def write_tensor(entry: TensorEntry, value: Tensor, file: Path) -> None:
    """Overwrites the tensor's bytes in `file`, a copy of `entry.file`.

    `value`: the entry's shape, any device; it is cast to the entry's dtype.
    """
    if tuple(value.shape) != entry.shape:
        raise ValueError(f"value: expected shape {entry.shape}, got {tuple(value.shape)}")
    raw = value.detach().to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8)
    buffer = raw.numpy().data
    descriptor = os.open(file, os.O_WRONLY)
    try:
        done = 0
        while done < entry.nbytes:
            done += os.pwrite(descriptor, buffer[done:], entry.offset + done)
    finally:
        os.close(descriptor)
