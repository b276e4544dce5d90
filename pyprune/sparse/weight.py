"""Modules that hold a weight as `pyprune compress` stores it (formats: `pyprune.sparse.layout`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyprune.errors import UserError
from pyprune.ops.coded import pack_coded, unpack_coded, validate_coded
from pyprune.ops.pack import (
    pack_24,
    pack_bitmap,
    unpack_24,
    unpack_bitmap,
    validate_24,
    validate_bitmap,
)
from pyprune.ops.sparse_int8 import (
    quantize_rows,
    unpack_24_int8,
    unpack_bitmap_int8,
    unpack_int8,
    validate_24_int8,
    validate_bitmap_int8,
    validate_int8,
)
from pyprune.sparse.layout import CODED, COUNTED, DENSE_INT8, LayerFormat


class Kind(NamedTuple):
    """What a stored weight is multiplied by (an op), unpacked and checked with."""

    op: str
    unpack: Callable[..., Tensor]
    validate: Callable[..., None]


# By format, and whether values are int8.
KINDS = {
    ("sparse24", False): Kind("linear_24", unpack_24, validate_24),
    ("sparse24", True): Kind("linear_24_int8", unpack_24_int8, validate_24_int8),
    ("bitmap", False): Kind("linear_bitmap", unpack_bitmap, validate_bitmap),
    ("bitmap", True): Kind("linear_bitmap_int8", unpack_bitmap_int8, validate_bitmap_int8),
    (DENSE_INT8, True): Kind("linear_int8", unpack_int8, validate_int8),
    (CODED, False): Kind("linear_coded", unpack_coded, validate_coded),
}


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that `nn.Linear` computes in: within `torch.autocast` that one's (fp64 stays
    what it is), else its own. Stored values need no cast: products are summed in fp32 anyway."""
    kind = x.device.type
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace in torch 2.11.
    if not (kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)):
        return x
    eligible = x.is_floating_point() and x.dtype is not torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if eligible else x


class NoWeightError(UserError, AttributeError):
    """A compressed module was asked for its dense weight. Also an AttributeError: who asks whether
    there is one (`hasattr`) hears no."""


class StoredWeight(nn.Module):
    """A module whose weight `[R, C]` is kept in one of the formats, in buffers, or in those of
    another module.

    Args:
        rows, cols: R and C.
        format: "sparse24" (C a multiple of 8), "bitmap", with int8 "dense", without it "coded".
        int8: whether values are int8 with a scale a row.
        nnz: stored values of a bitmap, escapes of a coded weight; `load_state_dict` adopts the
            number it finds.
        dtype, device: as for `nn.Linear`; dtype is that of the values (with int8 of the scales). A
            coded weight stays bf16: dtype, which `.to()` changes as it would a weight's, is what
            it is unpacked to.
        tied_to: the module that holds the weight, of the same shape and format: tied weights are
            one storage wherever they are moved or cast to. None: this one.

    Raises:
        UserError: unknown format, or a width that 2:4 cannot hold.
    """

    values: Tensor
    metadata: Tensor
    bitmap: Tensor
    row_offsets: Tensor
    scales: Tensor
    low: Tensor
    codes: Tensor
    bases: Tensor
    escapes: Tensor

    def __init__(
        self,
        rows: int,
        cols: int,
        format: str,
        *,
        int8: bool = False,
        nnz: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tied_to: StoredWeight | None = None,
    ) -> None:
        super().__init__()
        self.layer = LayerFormat(format, (rows, cols), int8)
        if (format, int8) not in KINDS:
            known = ", ".join(LayerFormat(kind, (rows, cols), of8).label for kind, of8 in KINDS)
            raise UserError(f"format: expected one of {known}, got {self.layer.label!r}")
        if format == "sparse24" and cols % 8:
            raise UserError(f"sparse24: expected a multiple of 8 inputs, got {cols}")
        self.rows, self.cols, self.format, self.int8 = rows, cols, format, int8
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        # In a tuple, a module is no submodule: its buffers are not this one's too.
        self._owner = () if tied_to is None else (tied_to,)
        empty: dict[str, Tensor] = {}
        if tied_to is not None:
            kind = (tied_to.rows, tied_to.cols, tied_to.format, tied_to.int8)
            if kind != (rows, cols, format, int8):
                raise UserError(f"tied_to: expected {(rows, cols, format, int8)}, got {kind}")
        else:
            for part, shape in self.layer.part_shapes(nnz).items():
                kind_of = self.layer.part_dtype(part, self._dtype)
                empty[part] = torch.empty(shape, dtype=kind_of, device=device)
        for name, t in empty.items():
            self.register_buffer(name, t)
        self.weight_buffers = tuple(empty)

    @property
    def tied_to(self) -> StoredWeight | None:
        """The module that holds the weight, if it is not this one."""
        return self._owner[0] if self._owner else None

    @property
    def _weight(self) -> tuple[Tensor, ...]:
        owner = self._owner[0] if self._owner else self
        return tuple([owner._buffers[name] for name in owner.weight_buffers])  # type: ignore[misc]

    @property
    def _values(self) -> Tensor:
        owner = self._owner[0] if self._owner else self
        return owner._buffers[owner.weight_buffers[0]]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """What the weight stands for: the dtype of the values, or scales."""
        owner = self._owner[0] if self._owner else self
        if owner.format == CODED:
            return owner._dtype
        return owner.scales.dtype if owner.int8 else owner.values.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeight:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Bytes are not cast: what a weight in their place would become says the dtype.
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def decompress(self) -> Tensor:
        """The dense weight `[R, C]` in `dtype`."""
        return unpack(self.layer, self._weight).to(self.dtype)

    def validate(self) -> None:
        """Raises ValueError unless the metadata describes a weight of this module's shape. Called
        once when weights arrive (`load_state_dict`), not per product."""
        validate(self.layer, self._weight)

    @property
    def qweight(self) -> Tensor:
        """The stored values: where libraries that know quantised layers look for the device."""
        return self._values

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # e.g. `model.resize_token_embeddings`
            raise NoWeightError(
                f"{type(self).__name__}: its weight is compressed, to be changed or trained it has "
                "to be dense: `pyprune decompress` makes it so (module.decompress() returns a copy)"
            )
        return super().__getattr__(name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        counted = COUNTED.get(self.format)
        stored = state_dict.get(f"{prefix}{counted}")
        if counted and not self._owner and isinstance(stored, Tensor) and stored.dim() == 1:
            held = self.get_buffer(counted)
            # One that fits stays: another thread's forward would meet memory not yet written to.
            if stored.shape != held.shape:
                self.register_buffer(counted, held.new_empty(stored.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if error_msgs or any(key.startswith(prefix) for key in missing_keys):
            return
        if self._owner or self._values.is_meta:
            return
        try:
            self.validate()
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")


def pack(weight: Tensor, layer: LayerFormat, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """The weight buffers of `weight [R, C]`, in the order of `layer.parts`, with the elements of
    `mask` (bool `[R, C]`; None: those whose bits are not all zero), or with int8 with those that do
    not round to zero. "dense" keeps zeros, "coded", for bf16 alone, every bit.

    Raises UserError for an infinity or a NaN with int8; the format is taken to fit.
    """
    if layer.format == CODED:
        return pack_coded(weight)
    make = pack_24 if layer.format == "sparse24" else pack_bitmap
    if not layer.int8:
        return make(weight, mask)
    try:
        q, scales = quantize_rows(weight)
    except ValueError as error:
        raise UserError(f"int8: {error}") from error
    if layer.format == DENSE_INT8:
        return q, scales
    values, *meta = make(q.bfloat16(), q != 0)
    return values.to(torch.int8), *meta, scales


def unpack(layer: LayerFormat, parts: Sequence[Tensor]) -> Tensor:
    """The dense `[R, C]` weight of weight buffers in the order of `layer.parts`. Raises ValueError
    as `validate` does."""
    width = layer.shape[1:] if layer.format == "bitmap" else ()
    return KINDS[layer.format, layer.int8].unpack(*parts, *width)


def validate(layer: LayerFormat, parts: Sequence[Tensor]) -> None:
    """Raises ValueError unless weight buffers in the order of `layer.parts` describe a matrix."""
    width = layer.shape[1:] if layer.format == "bitmap" else ()
    KINDS[layer.format, layer.int8].validate(*parts, *width)
