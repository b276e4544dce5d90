"""Moving the memory of paused tensors out of the way and back, bit for bit.

While one batch runs, the others wait with their activations. Their storage is copied to host memory
or to a file and freed; every tensor that views it stays valid once it is restored.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from pyprune.checkpoint.files import writing
from pyprune.errors import UserError

_CHUNK = 1 << 24

SpillTo = Literal["none", "host", "disk"]


class Spill:
    """Where paused tensors go; a context manager that removes its files.

    Attributes:
        spilled_bytes: bytes written out so far.
    """

    def __init__(self, to: SpillTo, device: torch.device) -> None:
        if to not in get_args(SpillTo):
            raise UserError(f"spill: expected one of {', '.join(get_args(SpillTo))}, got {to!r}")
        if to == "host" and device.type == "cpu":
            raise UserError("spill: host needs a GPU (on the CPU tensors are there); use disk")
        self.to = to
        self.spilled_bytes = 0
        self._directory: Path | None = None

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    def put(self, key: str, tensors: list[Tensor]) -> Parked:
        """Takes the tensors' memory away until `Parked.restore()`. `key` names the file: one batch
        is parked at most once at a time."""
        parked = Parked()
        storages = list({t.untyped_storage().data_ptr(): t for t in tensors if t.numel()}.values())
        for i, t in enumerate(storages):
            if self.to == "none" or not t.untyped_storage().resizable():
                parked.held_bytes += t.untyped_storage().nbytes()
            else:
                self._move(parked, t, f"{key}-{i}")
        return parked

    def _move(self, parked: Parked, t: Tensor, key: str) -> None:
        storage = t.untyped_storage()
        content = _bytes(storage)
        place: Tensor | Path
        if self.to == "host":
            place = torch.empty(content.shape, dtype=torch.uint8, pin_memory=True)
            place.copy_(content)
        else:
            if self._directory is None:
                self._directory = Path(tempfile.mkdtemp(prefix="pyprune-spill-"))
            place = self._directory / key
            with writing("spill", self._directory):
                _write(place, content)
        self.spilled_bytes += len(content)
        storage.resize_(0)
        parked.moved.append((storage, len(content), place))


class Parked:
    """What became of one batch's paused tensors.

    Attributes:
        held_bytes: bytes that stayed in memory.
    """

    def __init__(self) -> None:
        self.held_bytes = 0
        self.moved: list[tuple[torch.UntypedStorage, int, Tensor | Path]] = []

    def restore(self) -> None:
        """Gives the tensors their memory and content back; files are removed."""
        while self.moved:
            storage, size, place = self.moved.pop()
            storage.resize_(size)
            content = _bytes(storage)
            if isinstance(place, Path):
                content.copy_(torch.from_file(str(place), size=size, dtype=torch.uint8))
                place.unlink()
            else:
                content.copy_(place)
        self.held_bytes = 0


def _write(path: Path, content: Tensor) -> None:
    # A tensor that was seen through numpy can no longer be resized, hence copies, a chunk a time.
    with path.open("wb") as file:
        for start in range(0, len(content), _CHUNK):
            file.write(content[start : start + _CHUNK].cpu().clone().numpy().tobytes())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """The storage as a flat byte tensor with a version counter of its own: writing to it does not
    count as a change of the tensors that live there."""
    return torch.tensor([], dtype=torch.uint8, device=storage.device).set_(storage)
