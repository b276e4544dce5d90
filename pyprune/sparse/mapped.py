"""Model weights that lie in a mapped safetensors file instead of in memory of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyprune.checkpoint import TensorEntry

_MAPS = Path("/proc/self/maps")
# A file that is used in place for less than this share of its tensors is left altogether. Some of
# the rest may never have been read (a vision tower, a head stored twice), and costs nothing.
MOSTLY = 1 / 2


def leave_files(model: nn.Module, sizes: dict[Path, int]) -> None:
    """Copies what still lies in files of which the model does not use the most any more.

    A tensor that needs no cast stays where safetensors mapped it, and keeps the whole mapping: of a
    file whose values were cast, masks and metadata alone would hold all that was read of it in the
    process's resident set, three times the model's size from fp32 to bf16.

    sizes: the bytes of every file's tensors. Where /proc cannot be read nothing is done.
    """
    if not os.access(_MAPS, os.R_OK):
        return
    spans = _spans({file.resolve(): file for file in sizes})

    def file_of(tensor: Tensor) -> Path | None:
        return next((f for start, end, f in spans if start <= tensor.data_ptr() < end), None)

    places: dict[Path, dict[int, int]] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if (file := file_of(tensor)) is not None:
            places.setdefault(file, {})[tensor.data_ptr()] = tensor.nbytes
    left = {f for f, found in places.items() if sum(found.values()) < MOSTLY * sizes[f]}
    # With what was there: a file must not go, and its place be taken, while others are in it.
    moved: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def move(tensor: Tensor) -> Tensor:
        if file_of(tensor) not in left:
            return tensor
        # The same matrix under two names, as of tied embeddings, stays one.
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in moved:
            moved[place] = (tensor.detach(), tensor.detach().clone())
        return moved[place][1]

    if left:
        model._apply(move)  # type: ignore[no-untyped-call]


def tensor_bytes(entries: Mapping[str, TensorEntry]) -> dict[Path, int]:
    """Of every file, the bytes of its tensors."""
    sizes: dict[Path, int] = {}
    for entry in entries.values():
        sizes[entry.file] = sizes.get(entry.file, 0) + entry.nbytes
    return sizes


def _spans(files: dict[Path, Path]) -> list[tuple[int, int, Path]]:
    """The addresses at which parts of the files, by where they really are, are mapped."""
    found = []
    for line in _MAPS.read_bytes().split(b"\n"):
        span, *_, path = line.split(maxsplit=5) if line else (b"", b"")
        if path.startswith(b"/") and Path(os.fsdecode(path)) in files:
            start, end = (int(address, 16) for address in span.split(b"-"))
            found.append((start, end, files[Path(os.fsdecode(path))]))
    return found
