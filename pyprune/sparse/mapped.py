"""Model weights that lie in a mapped safetensors file instead of in memory of their own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from pyprune.checkpoint import TensorEntry

_MAPS = Path("/proc/self/maps")
# A file that is used in place for less than this share of its tensors is left altogether.
MOSTLY = 7 / 8


def leave_files(model: nn.Module, sizes: dict[Path, int]) -> None:
    """Copies what still lies in files that the model hardly uses any more.

    A tensor that needs no cast stays where safetensors mapped it, and keeps the whole mapping: of a
    file whose values were cast, masks and metadata alone would hold all that was read of it in the
    process's resident set, three times the model's size from fp32 to bf16.

    sizes: the bytes of every file's tensors. Without /proc nothing is done.
    """
    if not _MAPS.exists():
        return
    spans = _spans({file.resolve(): file for file in sizes})

    def file_of(tensor: Tensor) -> Path | None:
        return next((f for start, end, f in spans if start <= tensor.data_ptr() < end), None)

    places: dict[Path, dict[int, int]] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if (file := file_of(tensor)) is not None:
            places.setdefault(file, {})[tensor.data_ptr()] = tensor.nbytes
    left = {f for f, found in places.items() if sum(found.values()) < MOSTLY * sizes[f]}
    moved: dict[tuple[int, int], Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if file_of(tensor) not in left:
            return tensor
        # Tensors that share memory go on doing so.
        place = (tensor.data_ptr(), tensor.nbytes)
        if place not in moved:
            moved[place] = tensor.detach().clone()
        return moved[place].view(tensor.dtype).view(tensor.shape)

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
    for line in _MAPS.read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        if path.startswith("/") and Path(path) in files:
            start, end = (int(address, 16) for address in span.split("-"))
            found.append((start, end, files[Path(path)]))
    return found
