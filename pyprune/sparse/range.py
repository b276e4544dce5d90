"""Numbers of a checkpoint that the dtype it is loaded in cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyprune.checkpoint import TensorEntry, read_tensor
from pyprune.checkpoint.names import places_of
from pyprune.errors import UserError
from pyprune.ops.coded import unpack_coded
from pyprune.ops.sparse_int8 import LARGEST
from pyprune.sparse.layout import CODED
from pyprune.sparse.weight import StoredWeight

CODED_ROWS = 4096  # at a time


def check_range(model: Any, entries: Mapping[str, TensorEntry]) -> None:
    """UserError, naming file and tensor, if a number that is finite in the checkpoint is infinite
    in `model`: in float16 those beyond 65504; of int8 rows what scale times value is.

    transformers makes infinities of them without a word, and the model then answers NaN. What is
    infinite in the checkpoint stays so. Files are read again only where the model has an infinity.
    Coded weights are left to `check_coded_range`.

    Args:
        model: as transformers has loaded it. entries: the tensors in its files.
    """
    floats = [entry.dtype for entry in entries.values() if entry.dtype.is_floating_point]
    widest = max((torch.finfo(dtype).max for dtype in floats), default=0.0)
    factors = {
        f"{path}.scales": LARGEST
        for path, module in model.named_modules()
        if isinstance(module, StoredWeight) and module.int8
    }
    narrow = {
        name: t
        for name, t in model.state_dict().items()
        if t.is_floating_point() and torch.finfo(t.dtype).max < widest
    }
    if any(
        _peak(t) * factors.get(name, 1) > torch.finfo(t.dtype).max for name, t in narrow.items()
    ):
        for tensor, place in places_of(model, entries).items():
            entry = entries[tensor]
            if entry.dtype.is_floating_point and (place is None or place in narrow):
                dtype = model.dtype if place is None else narrow[place].dtype
                _check(tensor, entry, read_tensor(entry), dtype, factors.get(place or "", 1))


def check_coded_range(model: Any, entries: Mapping[str, TensorEntry]) -> None:
    """The same of coded weights, which stay bf16 until they are used and are known to be valid."""
    for path, module in model.named_modules():
        coded = isinstance(module, StoredWeight) and module.format == CODED
        if not coded or module.tied_to is not None:
            continue
        if torch.finfo(module.dtype).max >= torch.finfo(torch.bfloat16).max:
            continue
        places = places_of(model, entries)
        tensor = next(t for t, place in places.items() if place == f"{path}.low")
        for start in range(0, module.rows, CODED_ROWS):
            end = min(start + CODED_ROWS, module.rows)
            rows = torch.arange(start, end, device=module.low.device)
            _check(tensor, entries[tensor], unpack_coded(*module._weight, rows=rows), module.dtype)


def _peak(t: Tensor) -> float:
    """The largest magnitude; infinite if there is a NaN."""
    if not t.numel():
        return 0.0
    least, most = torch.aminmax(t)
    peak = max(-float(least), float(most))
    return torch.inf if peak != peak else peak


def _check(tensor: str, entry: TensorEntry, w: Tensor, dtype: torch.dtype, factor: int = 1) -> None:
    wide = w.to(torch.promote_types(w.dtype, torch.float32)) * factor
    there = wide[wide.isfinite()].abs()
    # Rounded as it was on loading: what is little above the largest number becomes that number.
    beyond = there[there.to(dtype).isinf()]
    if len(beyond):
        name = str(dtype).removeprefix("torch.")
        what = "weights, scale times value," if factor > 1 else "numbers"
        raise UserError(
            f"{entry.file}: tensor {tensor}: expected {what} within {name}, in which it is to be "
            f"loaded, got up to {float(beyond.max()):g} (bfloat16 and float32 hold them)"
        )
