"""Where the factors of all matrices wait until the threshold across them is known."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pyprune.calibration.gradient_stats import KroneckerFactors
from pyprune.surgeon.matrix import Matrix

GIB = 1 << 30


def factor_bytes(matrix: Matrix, refined: bool) -> int:
    """Most that the factors of a matrix take while they are made. A that is shared by readers of
    one tensor counts for each."""
    rows, columns = matrix.shape
    size = rows**2 + (columns + 1) ** 2
    width = 8 if matrix.ref.weight().dtype == torch.float64 else 4
    return width * size * (2 if refined else 1)


def grouped(blocks: Iterable[list[Matrix]], limit: float, refined: bool) -> list[list[Matrix]]:
    """Runs of whole blocks whose factors fit into `limit` bytes together; a block that does not is
    a group of its own."""
    groups: list[list[Matrix]] = []
    free = 0.0
    for block in blocks:
        size = sum(factor_bytes(matrix, refined) for matrix in block)
        if groups and size <= free:
            groups[-1] += block
            free -= size
        elif block:
            groups.append(list(block))
            free = limit - size
    return groups


class FactorStore:
    """Factors by the matrix's name: as they are, or on disk. A context manager that removes its
    files."""

    def __init__(self, on_disk: bool, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, KroneckerFactors] = {}
        self._files: dict[str, tuple[Path, Path]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="pyprune-factors-")) if on_disk else None

    def __enter__(self) -> FactorStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def put(self, group: Mapping[str, KroneckerFactors]) -> None:
        """Takes the factors of a group; what is shared among them is stored once."""
        written: dict[int, Path] = {}
        for name, factors in group.items():
            self._held[name] = factors
            if self._folder is None:
                continue
            paths: list[Path] = []
            for tensor in (factors.a, factors.g):
                if id(tensor) not in written:
                    path = self._folder / f"{len(self._files)}-{len(paths)}.safetensors"
                    save_file({"sum": tensor.cpu().contiguous()}, path)
                    written[id(tensor)] = path
                paths.append(written[id(tensor)])
            self._files[name] = (paths[0], paths[1])
        if self._folder is not None:
            # Only now: identities of tensors that are gone may come again.
            for name in group:
                empty = self._held[name].g.new_empty(0, 0)
                self._held[name].a = self._held[name].g = empty

    def take(self, name: str) -> KroneckerFactors:
        """The factors of one matrix, on the device; not to be asked for again."""
        factors = self._held.pop(name)
        if self._folder is not None:
            a, g = self._files.pop(name)
            factors.a = load_file(a)["sum"].to(self._device)
            factors.g = load_file(g)["sum"].to(self._device)
        return factors
