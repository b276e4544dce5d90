"""A checkpoint seen as its dense tensors, however they are stored: dense, compressed by pyprune, or
in one of compressed-tensors' old sparse layouts. Tensors are read one at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.checkpoint import Checkpoint, TensorEntry, read_tensor
from pyprune.checkpoint.names import has_place_for
from pyprune.checkpoint.source import (
    INDEX,
    WEIGHTS,
    locate,
    main_dtype,
    read_config,
    read_json,
    read_tensors,
)
from pyprune.errors import UserError
from pyprune.sparse import format as formats
from pyprune.sparse import legacy
from pyprune.sparse.layout import LayerFormat, dtype_name

CONFIG = "config.json"
DENSE = "dense"
# Fields of config.json that say how weights are stored.
STORAGE_FIELDS = ("quantization_config", "compression_config", "transformers_weights")


def rounded_within(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """`tensor` in another dtype. Raises UserError, `where` first, if that makes infinities."""
    rounded = tensor.to(dtype)
    if rounded is tensor or not bool(tensor.isfinite().all()) or bool(rounded.isfinite().all()):
        return rounded
    raise UserError(
        f"{where}: expected numbers within {dtype}, got up to {float(tensor.abs().max()):g}"
    )


@dataclass(frozen=True, eq=False)
class StoredCheckpoint:
    """path, raw (config.json as it is), dense_raw (without what says how weights are stored).

    kind: "dense", "pyprune", or a legacy layout. stored: the tensors in the files. entries: the
    dense tensors by name; offset and nbytes of a compressed one mean nothing, its file is where its
    values are. layers: what "pyprune" compresses, by name without ".weight". parts: the stored
    tensors of a compressed weight, by the weight's name. stacks: dense tensors `[E, ...]` whose
    matrices are stored one by one, with the names of those weights in their order: X.0.weight, ...
    """

    path: Path
    raw: dict[str, Any]
    kind: str
    stored: dict[str, TensorEntry]
    entries: dict[str, TensorEntry]
    layers: dict[str, LayerFormat]
    parts: dict[str, dict[str, TensorEntry]]
    stacks: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, source: str | Path, *, trust_remote_code: bool = False) -> StoredCheckpoint:
        """Opens a directory or hub id and checks every header, shape and dtype.

        trust_remote_code: fetch the model code of a hub repository too, for `checkpoint`. Raises
        UserError that names file and tensor.
        """
        path = locate(source, code=trust_remote_code)
        raw = read_json(path / CONFIG)
        stored = read_tensors(path)
        quantization = raw.get("quantization_config")
        if isinstance(quantization, Mapping) and quantization.get("quant_method") == formats.METHOD:
            return cls._of_pyprune(path, raw, stored, trust_remote_code)
        if raw.get("transformers_weights") == formats.HOW_TO_LOAD:
            raise UserError(
                f"{path / CONFIG}: expected a quantization_config with quant_method "
                f"{formats.METHOD!r}, as in every checkpoint that pyprune has compressed"
            )
        kind = legacy.legacy_format(raw, str(path / CONFIG))
        if kind in legacy.FORMATS:
            return cls._of_legacy(path, raw, stored, kind)
        if quantization and kind is None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise UserError(
                f"{path}: expected floating point weights or a sparse layout, got a checkpoint "
                f"quantized by {method or 'an unknown method'}"
            )
        return cls.of_dense(path, raw, stored)

    @classmethod
    def of_dense(
        cls, path: Path, raw: dict[str, Any], stored: dict[str, TensorEntry]
    ) -> StoredCheckpoint:
        return cls(path, raw, DENSE, stored, dict(stored), {}, {})

    @classmethod
    def _of_pyprune(
        cls, path: Path, raw: dict[str, Any], stored: dict[str, TensorEntry], code: bool
    ) -> StoredCheckpoint:
        where = str(path / CONFIG)
        read_json(path / CONFIG, once=True)  # a layer may be there twice
        layers = formats.parse_quantization_config(raw["quantization_config"], where)
        parts, dense = {}, dict(stored)
        for name, layer in layers.items():
            found = formats.check_entries(name, layer, stored, path)
            parts[name + formats.WEIGHT] = found
            for part in found:
                del dense[f"{name}.{part}"]
            first = replace(found[layer.main], dtype=layer.dense_dtype(found))
            dense[name + formats.WEIGHT] = _dense_entry(first, layer.dense_shape)
        stacks = {
            tensor: [name + formats.WEIGHT for name in names]
            for tensor, names in formats.stacks_of(layers, where).items()
        }
        for tensor, weights in stacks.items():
            if tensor in stored:
                raise UserError(f"{stored[tensor].file}: tensor {tensor} is there twice")
            entries = [dense.pop(weight) for weight in weights]
            odd = next((e for e in entries if e.dtype != entries[0].dtype), None)
            if odd is not None:
                raise UserError(
                    f"{odd.file}: layers {tensor}.*: expected one dtype, they are stacked, got "
                    f"{entries[0].dtype} and {odd.dtype}"
                )
            dense[tensor] = _dense_entry(entries[0], (len(entries), *entries[0].shape))
        opened = cls(path, raw, formats.METHOD, stored, dense, layers, parts, stacks)
        empty = cache(lambda: opened.checkpoint(code).build_model())  # seldom needed, takes a while
        formats.refuse_unlisted(dense, where, lambda weight: has_place_for(empty(), weight))
        return opened

    @classmethod
    def _of_legacy(
        cls, path: Path, raw: dict[str, Any], stored: dict[str, TensorEntry], kind: str
    ) -> StoredCheckpoint:
        parts, dense = {}, dict(stored)
        for stem in legacy.stems_of(stored):
            found = legacy.parts_of(stem, kind, stored)
            name, first = legacy.dense_name(stem), found["compressed"]
            if name in dense:
                raise UserError(f"{first.file}: tensor {name} is there twice: beside {stem}.*")
            parts[name] = found
            for part in found:
                del dense[f"{stem}.{part}"]
            shape = legacy.shape_of(stem, found, read_tensor)
            dense[name] = _dense_entry(first, shape)
        return cls(path, raw, kind, stored, dense, {}, parts)

    def rounded(self, dtype: torch.dtype) -> StoredCheckpoint:
        """The same, dense, checkpoint with the tensors of its main dtype in another: `read` rounds
        them, and config.json says so. Raises UserError for a compressed one."""
        if self.kind != DENSE:
            raise UserError(
                f"{self.path}: expected a dense checkpoint to be rounded to "
                f"{dtype_name(dtype)}, it is stored as {self.kind}"
            )
        main, entries = main_dtype(self.path, self.entries), dict(self.entries)
        for name, entry in self.entries.items():
            if entry.dtype == main:
                nbytes = entry.nbytes // main.itemsize * dtype.itemsize
                entries[name] = replace(entry, dtype=dtype, nbytes=nbytes)
        raw = deepcopy(self.raw)
        for fields in (raw, *(f for f in raw.values() if isinstance(f, dict))):
            for key in {"dtype", "torch_dtype"} & fields.keys():
                fields[key] = dtype_name(dtype)
        return replace(self, raw=raw, entries=entries)

    def split(self, tensors: Iterable[str]) -> StoredCheckpoint:
        """The same checkpoint with the matrices of some of its tensors `[E, ...]`, which are dense
        or among `stacks`, as tensors of their own, X.0.weight and so on, in their places."""
        wanted, stored = set(tensors), dict(self.stored)
        entries: dict[str, TensorEntry] = {}
        for name, entry in self.entries.items():
            if name not in wanted:
                entries[name] = entry
                continue
            for e in range(entry.shape[0]):
                weight = f"{name}.{e}{formats.WEIGHT}"
                entries[weight] = _matrix(entry, e)
                if name not in self.stacks:
                    stored[weight] = _matrix(self.stored[name], e)
        stacks = {name: weights for name, weights in self.stacks.items() if name not in wanted}
        return replace(self, stored=stored, entries=entries, stacks=stacks)

    @property
    def compressed(self) -> list[str]:
        """The names of the dense tensors that are stored in another way."""
        stacked = {weight for weights in self.stacks.values() for weight in weights}
        return [*(name for name in self.parts if name not in stacked), *self.stacks]

    @property
    def dense_raw(self) -> dict[str, Any]:
        raw = deepcopy(self.raw)
        for field in STORAGE_FIELDS:
            raw.pop(field, None)
        return raw

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(entry.nbytes for entry in self.stored.values())

    @property
    def dense_nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def format_of(self, name: str) -> str:
        """How the dense tensor `name` is stored: "dense", a compressed format, or a legacy layout.

        Of an int8 format the name ends in " int8"."""
        if name in self.stacks:
            return " and ".join(sorted({self.format_of(weight) for weight in self.stacks[name]}))
        if name not in self.parts:
            return DENSE
        return self.layers[name.removesuffix(formats.WEIGHT)].label if self.layers else self.kind

    def stored_nbytes(self, name: str) -> int:
        """Bytes of the tensors that hold the dense tensor `name`."""
        if name in self.stacks:
            return sum(self.stored_nbytes(weight) for weight in self.stacks[name])
        parts = self.parts.get(name)
        found = [self.stored[name]] if parts is None else parts.values()
        return sum(entry.nbytes for entry in found)

    def checkpoint(self, trust_remote_code: bool = False) -> Checkpoint:
        """The dense checkpoint that this stands for, for building an empty model and mapping names;
        tensors are read by `read`, not through it."""
        config = read_config(self.path, self.dense_raw, trust_remote_code)
        for field in STORAGE_FIELDS:
            if hasattr(config, field):
                delattr(config, field)
        dtype = main_dtype(self.path, self.entries)
        return Checkpoint(self.path, config, dtype, self.entries, trust_remote_code)

    @property
    def weights_file(self) -> Path:
        """The file that says where tensors are: the index, or the only one of weights."""
        index = self.path / INDEX
        return index if index.is_file() else self.path / WEIGHTS

    def require_complete(self, checkpoint: Checkpoint) -> None:
        """Raises UserError, naming file and tensor, unless the dense tensors make up the model, and
        each compressed one is part of it.

        checkpoint: of this. Where tensors are left over, one of them may be what seems to be
        missing, by a name that transformers alone knows: loading such a checkpoint tells.
        """
        names = checkpoint.names
        for tensor in names.unused:
            if self.kind == formats.METHOD and (tensor in self.parts or tensor in self.stacks):
                file = self.entries[tensor].file
                raise UserError(f"{file}: tensor {tensor}: the model has no place for it")
        if names.problem and not names.unexplained:
            raise UserError(f"{self.weights_file}: {names.problem}")

    def read(self, name: str) -> Tensor:
        """The dense tensor `name`, in a tensor of its own. Raises UserError, naming file and
        tensor, if its metadata does not describe a weight of its shape, or if it is `rounded` and
        has a number that the dtype cannot hold."""
        if name in self.stacks:
            return torch.stack([self.read(weight) for weight in self.stacks[name]])
        parts = self.parts.get(name)
        if parts is None:
            return self._read_rounded(name)
        if self.kind != formats.METHOD:
            stem = legacy.stem_of(name, self.stored)
            return legacy.unpack_legacy(stem, parts, read_tensor)
        layer = name.removesuffix(formats.WEIGHT)
        return formats.unpack(self.layers[layer], self.read_parts(layer))

    def _read_rounded(self, name: str) -> Tensor:
        where = f"{self.stored[name].file}: {name}"
        return rounded_within(read_tensor(self.stored[name]), self.entries[name].dtype, where)

    def read_parts(self, layer: str) -> dict[str, Tensor]:
        """The tensors that a layer of pyprune's is stored in, checked. Raises as `read`."""
        parts = self.parts[layer + formats.WEIGHT]
        tensors = {part: read_tensor(entry) for part, entry in parts.items()}
        form = self.layers[layer]
        formats.check_tensors(layer, form, tensors, str(parts[form.main].file))
        return tensors


def _dense_entry(typed: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    """The entry of a dense tensor of the dtype and in the file of `typed`."""
    nbytes = math.prod(shape) * typed.dtype.itemsize
    return replace(typed, offset=0, nbytes=nbytes, shape=shape)


def _matrix(entry: TensorEntry, e: int) -> TensorEntry:
    """The entry of a tensor's e-th matrix."""
    nbytes = entry.nbytes // entry.shape[0]
    return replace(entry, offset=entry.offset + e * nbytes, nbytes=nbytes, shape=entry.shape[1:])
