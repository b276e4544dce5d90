"""Reads GGUF files: metadata and tensors, dequantised to float32 with numpy.

Layout (ggml, docs/gguf.md, version 3): magic, version, tensor count, key count, key-value pairs,
tensor descriptions, padding to `general.alignment` (32), tensor data. Little endian throughout.
Dimensions are stored innermost first, so a numpy shape is their reverse.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyprune.errors import UserError

FloatArray = npt.NDArray[np.float32]

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
BLOCK = 32  # values per quantised block of every block type read here

SCALAR_FORMATS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9


def _f32(raw: npt.NDArray[np.uint8]) -> FloatArray:
    return raw.view("<f4").astype(np.float32)


def _f16(raw: npt.NDArray[np.uint8]) -> FloatArray:
    return raw.view("<f2").astype(np.float32)


def _q4_1(raw: npt.NDArray[np.uint8]) -> FloatArray:
    """w = d * q + m; 16 bytes hold 32 nibbles, the low ones are the first 16 values."""
    blocks = raw.reshape(-1, 20)
    scale, minimum = _f16(blocks[:, 0:2].copy()), _f16(blocks[:, 2:4].copy())
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * nibbles.astype(np.float32) + minimum


def _q8_0(raw: npt.NDArray[np.uint8]) -> FloatArray:
    """w = d * q with signed bytes q."""
    blocks = raw.reshape(-1, 34)
    scale = _f16(blocks[:, 0:2].copy())
    return scale * blocks[:, 2:].copy().view(np.int8).astype(np.float32)


@dataclass(frozen=True)
class TensorType:
    """A ggml storage type: `block_bytes` bytes hold `block_values` values."""

    name: str
    block_values: int
    block_bytes: int
    decode: Callable[[npt.NDArray[np.uint8]], FloatArray]


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4, _f32),
    1: TensorType("F16", 1, 2, _f16),
    3: TensorType("Q4_1", BLOCK, 20, _q4_1),
    8: TensorType("Q8_0", BLOCK, 34, _q8_0),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `offset` in bytes from the start of the file."""

    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


class _Cursor:
    """A position in the file's bytes that refuses to run past their end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.position = 0

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise UserError(
                f"GGUF: expected {count} bytes at offset {self.position}, "
                f"the file ends at {len(self.data)}"
            )
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def scalar(self, code: int) -> Any:
        layout = SCALAR_FORMATS.get(code)
        if layout is None:
            raise UserError(f"GGUF: value type {code} at offset {self.position} is not known")
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def u32(self) -> int:
        return int(self.scalar(4))

    def u64(self) -> int:
        return int(self.scalar(10))

    def string(self) -> str:
        return bytes(self.take(self.u64())).decode("utf-8")

    def value(self, code: int) -> Any:
        if code == STRING:
            return self.string()
        if code == ARRAY:
            item, count = self.u32(), self.u64()
            return [self.value(item) for _ in range(count)]
        return self.scalar(code)


class GgufFile:
    """A parsed GGUF file held in memory.

    metadata: the key-value pairs. tensors: name -> `GgufTensor`.
    Raises `UserError` for anything that is not a complete version-3 file of known types.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        cursor = _Cursor(data)
        magic = bytes(cursor.take(4))
        if magic != MAGIC:
            raise UserError(f"GGUF: expected a file that begins with {MAGIC!r}, got {magic!r}")
        version = cursor.u32()
        if version != VERSION:
            raise UserError(f"GGUF: expected version {VERSION}, got {version}")
        tensor_count, key_count = cursor.u64(), cursor.u64()
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.u32())
        described = [self._description(cursor) for _ in range(tensor_count)]
        alignment = int(self.metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        start = -(-cursor.position // alignment) * alignment
        self._data = cursor.data
        self.tensors = {
            name: self._place(name, shape, code, start + offset)
            for name, shape, code, offset in described
        }

    @staticmethod
    def _description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        dimensions = [cursor.u64() for _ in range(cursor.u32())]
        return name, tuple(reversed(dimensions)), cursor.u32(), cursor.u64()

    def _place(self, name: str, shape: tuple[int, ...], code: int, offset: int) -> GgufTensor:
        kind = TENSOR_TYPES.get(code)
        if kind is None:
            known = ", ".join(t.name for t in TENSOR_TYPES.values())
            raise UserError(
                f"GGUF: tensor {name}: expected a type of {known}, got ggml type {code}"
            )
        values = int(np.prod(shape, dtype=np.int64))
        if values % kind.block_values:
            raise UserError(f"GGUF: tensor {name}: {kind.name} blocks do not divide shape {shape}")
        nbytes = values // kind.block_values * kind.block_bytes
        if offset + nbytes > len(self._data):
            raise UserError(
                f"GGUF: tensor {name}: expected {nbytes} bytes at offset {offset}, "
                f"the file ends at {len(self._data)}"
            )
        return GgufTensor(shape, kind, offset, nbytes)

    def read(self, name: str) -> FloatArray:
        """The tensor `name` as a new float32 array."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        return np.ascontiguousarray(tensor.type.decode(raw).reshape(tensor.shape))
