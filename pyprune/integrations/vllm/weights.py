"""From the tensors that vLLM's loader hands over to a layer's stored weights.

vLLM knows a module's parameters before it reads the files, and calls each one's `weight_loader`
with the tensors of the checkpoint that belong there: one, or one for each of the layers that it
makes one. How long a bitmap's values are only the tensor says. So parameters are empty at first,
and what arrives is kept until all has.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.errors import UserError
from pyprune.sparse.format import check_tensors
from pyprune.sparse.layout import COUNTED, LayerFormat
from pyprune.sparse.slices import take_columns, take_rows

Parts = dict[str, Tensor]
# A weight, or what a process has of it: its format, None if it is dense, and its tensors.
Piece = tuple[LayerFormat | None, Parts]
# The part that a dense weight consists of.
WEIGHT = "weight"
# In place of a key: a weight that this process does not have.
ELSEWHERE = object()


class Arrivals:
    """The tensors of a module's weights as they come, and the empty parameters that they come by.

    Args:
        module: gets the parameters, of each part that weights stored like `sources` (None: dense)
            have.
        prefix: of the parameters' names.
        dtype: what floating point numbers are wanted in: the model's.
        key: which of the weights a tensor belongs to, by what the loader is told beside it;
            ELSEWHERE for one to be dropped.
    """

    def __init__(
        self,
        module: nn.Module,
        sources: Iterable[LayerFormat | None],
        dtype: torch.dtype,
        key: Callable[..., Hashable],
        prefix: str = "",
    ) -> None:
        self._dtype, self._key = dtype, key
        self._weights: dict[Hashable, Parts] = {}
        self._names: dict[str, str] = {}
        for source in sources:
            for part in (WEIGHT,) if source is None else source.parts:
                if part not in self._names:
                    kind = dtype if source is None else source.part_dtype(part, dtype)
                    empty = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
                    empty.weight_loader = partial(self._take, part)  # type: ignore[attr-defined]
                    # Falcon's loader reorders the rows of what has one.
                    empty.output_dim = 0  # type: ignore[attr-defined]
                    module.register_parameter(prefix + part, empty)
                    self._names[part] = prefix + part

    def _take(
        self, part: str, param: nn.Parameter, loaded_weight: Tensor, *given: Any, **named: Any
    ) -> bool:
        key = self._key(*given, **named)
        if key is ELSEWHERE:
            return False
        self._weights.setdefault(key, {})[part] = loaded_weight
        return True

    def finish(self, module: nn.Module) -> tuple[dict[Hashable, Parts], torch.device]:
        """What came, by key, and where the weights are to be. The parameters are gone then, and
        nothing is held here."""
        device = module.get_parameter(next(iter(self._names.values()))).device
        for name in self._names.values():
            delattr(module, name)
        weights, self._weights = self._weights, {}
        return weights, device

    def placed(self, parts: Parts, device: torch.device) -> Parts:
        """Copies of `parts` on `device`, in the wanted dtype: what the loader gave may be the
        file's own pages."""
        return {
            part: t.to(device, self._dtype if t.is_floating_point() else t.dtype, copy=True)
            for part, t in parts.items()
        }


def check_parts(
    name: str, source: LayerFormat | None, parts: Mapping[str, Tensor], shape: tuple[int, int]
) -> None:
    """Raises UserError unless `parts` are those of a weight `shape` stored like `source` (None:
    dense), and describe one."""
    wanted = (WEIGHT,) if source is None else source.parts
    missing = next((part for part in wanted if part not in parts), None)
    if missing is not None:
        raise UserError(f"{name}.{missing}: is missing in the checkpoint")
    extra = next((part for part in parts if part not in wanted), None)
    if extra is not None:
        raise UserError(f"{name}.{extra}: expected {', '.join(wanted)} alone")
    found = tuple(parts[WEIGHT].shape) if source is None else source.shape
    if found != shape:
        raise UserError(f"{name}: expected a weight of shape {shape}, got {found}")
    if source is None:
        return
    counted = COUNTED.get(source.format)
    shapes = source.part_shapes(parts[counted].numel() if counted else 0)
    for part, tensor in parts.items():
        if tuple(tensor.shape) != shapes[part]:
            got = tuple(tensor.shape)
            raise UserError(f"{name}.{part}: expected shape {shapes[part]}, got {got}")
    check_tensors(name, source, parts, "checkpoint")


def empty_weight(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a layer has for a `weight`, without an element: vLLM asks it where LoRA's are to be, and
    where and in which dtype the identity that MLA multiplies with to have a dense copy."""
    return torch.empty(0, dtype=dtype, device=device)


def own_piece(
    name: str,
    source: LayerFormat | None,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> Piece:
    """Those rows and columns (from, to, exclusive) of a weight that this process has. Raises
    UserError unless `parts` are those of the weight `name` of that shape, or the columns cannot be
    taken."""
    check_parts(name, source, parts, shape)
    if source is None:
        return None, {WEIGHT: parts[WEIGHT][slice(*rows), slice(*columns)]}
    try:
        taken = take_columns(source, parts, *columns)
    except UserError as error:
        raise UserError(f"{name}: tensor parallelism: {error}") from error
    own = replace(source, shape=(rows[1] - rows[0], columns[1] - columns[0]))
    return own, take_rows(source, taken, *rows)
