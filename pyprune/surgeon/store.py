"""Where factors, or what is made of them, wait until the threshold across matrices is known."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyprune.calibration.gradient_stats import KroneckerFactors
from pyprune.checkpoint import writing
from pyprune.surgeon.matrix import Matrix

GIB = 1 << 30
Store = TypeVar("Store", bound="TensorStore")


def factor_bytes(matrix: Matrix) -> int:
    """What the factors of a matrix take. A that is shared by readers of one tensor counts for
    each."""
    rows, columns = matrix.shape
    width = 8 if matrix.ref.weight().dtype == torch.float64 else 4
    return width * (rows**2 + (columns + 1) ** 2)


def grouped(blocks: Iterable[list[Matrix]], limit: float, copies: int = 1) -> list[list[Matrix]]:
    """Runs of whole blocks of which so many times the factors fit into `limit` bytes together; a
    block that does not is a group of its own."""
    groups: list[list[Matrix]] = []
    free = 0.0
    for block in blocks:
        size = copies * sum(factor_bytes(matrix) for matrix in block)
        if groups and size <= free:
            groups[-1] += block
            free -= size
        elif block:
            groups.append(list(block))
            free = limit - size
    return groups


class TensorStore:
    """Sets of tensors by the matrix's name: as they are, or on disk. A context manager that removes
    its files."""

    def __init__(self, on_disk: bool, device: torch.device | str) -> None:
        self._device = device
        self._held: dict[str, Mapping[str, Tensor]] = {}
        self._files: dict[str, dict[str, Path]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="pyprune-factors-")) if on_disk else None

    def __enter__(self: Store) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def put(self, sets: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes the tensors of a group of matrices; what is shared among them is stored once."""
        if self._folder is None:
            self._held.update(sets)
            return
        written: dict[int, Path] = {}
        for name, tensors in sets.items():
            for key, tensor in tensors.items():
                if id(tensor) not in written:
                    path = self._folder / f"{len(self._files)}-{key}.safetensors"
                    with writing("factors", self._folder):
                        save_file({"value": tensor.cpu().contiguous()}, path)
                    written[id(tensor)] = path
                self._files.setdefault(name, {})[key] = written[id(tensor)]

    def take(self, name: str) -> dict[str, Tensor]:
        """The tensors of one matrix, on the device; not to be asked for again."""
        if self._folder is None:
            return {key: tensor.to(self._device) for key, tensor in self._held.pop(name).items()}
        files = self._files.pop(name)
        return {key: load_file(path)["value"].to(self._device) for key, path in files.items()}


class FactorStore(TensorStore):
    """The same of Kronecker factors."""

    def __init__(self, on_disk: bool, device: torch.device) -> None:
        super().__init__(on_disk, device)
        self._factors: dict[str, KroneckerFactors] = {}

    def put_factors(self, group: Mapping[str, KroneckerFactors]) -> None:
        """Takes the factors of a group."""
        self.put({name: {"a": factors.a, "g": factors.g} for name, factors in group.items()})
        for name, factors in group.items():
            self._factors[name] = factors
            # The store has them: on disk they are not to be in memory too.
            factors.a = factors.g = factors.g.new_empty(0, 0)

    def take_factors(self, name: str) -> KroneckerFactors:
        """The factors of one matrix, on the device; not to be asked for again."""
        factors, tensors = self._factors.pop(name), self.take(name)
        factors.a, factors.g = tensors["a"], tensors["g"]
        return factors
