"""What can be cut out of a decoder's layers, unit by unit.

A unit is one channel of an MLP (a row of gate and up, a column of down) or one KV group of an
attention (a key-value head with all query heads that read it). A unit owns entries of several
parameters; whether those are rows or columns, of a fused matrix, of a Conv1D or of one expert in a
3-D parameter is said once, by `Slice`. Zeroing and cutting then need to know nothing of families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef

GroupKind = Literal["heads", "mlp"]
# Group name -> ascending indices of the units that stay; groups that are not named stay whole.
Kept = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Slice:
    """The entries of one parameter that belong to the units of a group.

    module, parameter: the owner and the attribute's name (looked up at every use). axis: of the
    parameter as it is stored, or of one expert's matrix where `expert` says which. index: int64
    [units, k], the k entries along the axis that are each unit's.

    Raises ValueError unless every entry along the axis belongs to exactly one unit.
    """

    module: nn.Module
    parameter: str
    axis: int
    index: Tensor
    expert: int | None = None

    def __post_init__(self) -> None:
        size = self.tensor().shape[self.axis]
        if not torch.equal(self.index.flatten().sort().values, torch.arange(size)):
            raise ValueError(
                f"{self.parameter} of {type(self.module).__name__}: expected units that share its "
                f"{size} entries along axis {self.axis}, got {tuple(self.index.shape)}"
            )

    def owner(self) -> Tensor:
        """The live parameter, of all experts."""
        owner: Tensor = getattr(self.module, self.parameter)
        return owner

    def tensor(self) -> Tensor:
        """The live parameter (of the expert), detached; writing to it changes the model."""
        owner = self.owner().detach()
        return owner if self.expert is None else owner[self.expert]

    def zero(self, units: Tensor) -> None:
        """Sets all that belongs to `units` to zero, in place."""
        t = self.tensor()
        t.index_fill_(self.axis, self.index[units].flatten().to(t.device), 0)

    def entries(self, units: Tensor) -> Tensor:
        """Ascending indices along the axis of what belongs to `units`."""
        return self.index[units].flatten().sort().values

    @property
    def unit_numel(self) -> int:
        """Parameters that each unit owns here."""
        t = self.tensor()
        return t.numel() // t.shape[self.axis] * self.index.shape[1]


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one module that are alike: any subset of them may stay.

    name: of the matrix through which the units write into the residual stream (o_proj, down_proj).
    kind, layer, units: what they are, where, how many.
    slices: all that they own, the writer's columns last.
    writer: the matrix just named, [d, C]; columns: int64 [units, k], its inputs that are each
        unit's.
    gates: modules whose outputs multiply what a unit writes: it writes nothing if one of them gives
        it zeros.
    fields: fields of the configuration that count the units, and how many of each one unit is;
        empty where there are none. fixed: fields that have to be written out once the others are
        changed, because they would be derived from them.
    step: what the number of units in a stock model has to be a multiple of.
    """

    name: str
    kind: GroupKind
    layer: int
    units: int
    slices: tuple[Slice, ...]
    writer: LinearRef
    columns: Tensor
    gates: tuple[nn.Module, ...]
    fields: Mapping[str, int]
    fixed: Mapping[str, int]
    step: int = 1

    @property
    def unit_parameters(self) -> int:
        """Parameters that go with one unit."""
        return sum(s.unit_numel for s in self.slices)

    def per_unit(self, values: Tensor) -> Tensor:
        """`[C]`, one value a column of the writer, as `[units, k]`."""
        return values[self.columns.to(values.device)]


class Widths:
    """The groups of a model in the order of its forward.

    Attributes:
        model, adapter.
        groups: what can be pruned.
        refused: name of a module -> why none of its units can be.
    """

    def __init__(
        self, model: Any, adapter: Adapter, groups: list[Group], refused: dict[str, str]
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.groups = groups
        self.refused = refused
        self._by_name = {group.name: group for group in groups}

    @classmethod
    def of(cls, model: Any, adapter: Adapter | None = None) -> Widths:
        """Finds the units of a transformers decoder.

        Raises:
            UserError: the residual structure is unknown, or nothing at all can be cut.
        """
        from pyprune.width.families import find_groups

        adapter = Adapter.of(model) if adapter is None else adapter
        groups, refused = find_groups(model, adapter)
        if not groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise UserError(f"{type(model).__name__}: no channels or heads can be cut ({why})")
        return cls(model, adapter, groups, refused)

    def __getitem__(self, name: str) -> Group:
        if name not in self._by_name:
            raise UserError(f"width: expected the name of a group, got {name!r}")
        return self._by_name[name]

    def of_kind(self, kind: GroupKind) -> list[Group]:
        return [group for group in self.groups if group.kind == kind]

    def classes(self) -> dict[tuple[str, ...], list[Group]]:
        """Groups that one and the same configuration fields count: their sizes have to be equal in
        a stock model. Those that no field counts are under ()."""
        found: dict[tuple[str, ...], list[Group]] = {}
        for group in self.groups:
            found.setdefault(tuple(group.fields), []).append(group)
        return found

    def kept(self, kept: Kept) -> dict[str, Tensor]:
        """For every group the units that stay, on the CPU.

        Raises UserError: unknown group, or indices that are not ascending or out of range.
        """
        whole = {group.name: torch.arange(group.units) for group in self.groups}
        return whole | {name: self._checked(name, units) for name, units in kept.items()}

    def _checked(self, name: str, units: Tensor) -> Tensor:
        units, size = units.cpu(), self[name].units
        fits = units.dim() == 1 and units.dtype == torch.int64
        if fits and len(units):
            ascending = bool((units[1:] > units[:-1]).all())
            fits = ascending and int(units[0]) >= 0 and int(units[-1]) < size
        if not fits:
            raise UserError(
                f"{name}: expected ascending indices of kept units, each of 0 to {size - 1}, "
                f"got {units.tolist()}"
            )
        return units

    def removed(self, kept: Kept) -> Iterator[tuple[Group, Tensor]]:
        """Each group that is named, in order, with the ascending indices of the units that do not
        stay."""
        checked = {name: self._checked(name, units) for name, units in kept.items()}
        for group in self.groups:
            if group.name in checked:
                gone = torch.ones(group.units, dtype=torch.bool)
                gone[checked[group.name]] = False
                yield group, gone.nonzero()[:, 0]

    def removed_parameters(self, kept: Kept) -> int:
        """Parameters that belong to units that do not stay."""
        return sum(group.unit_parameters * len(units) for group, units in self.removed(kept))

    def mask(self, kept: Kept) -> None:
        """Sets all that belongs to the other units to zero, in place: the model then computes what
        it would without them."""
        for group, units in self.removed(kept):
            for part in group.slices:
                part.zero(units)

    def live(self) -> dict[str, Tensor]:
        """Units that can write something, judged by zeros in the weights: their columns of the
        writer are not all zero, nor what they own of one of the group's gates. What any other
        method has zeroed can be cut by this."""
        return {group.name: _live(group).nonzero()[:, 0] for group in self.groups}


def _live(group: Group) -> Tensor:
    """bool [units]."""
    live = ~_zeros(group.slices[-1])
    for gate in group.gates:
        owned = [_zeros(part) for part in group.slices[:-1] if part.module is gate]
        live &= ~torch.stack(owned).all(dim=0)
    return live


def _zeros(part: Slice) -> Tensor:
    """bool [units]: all that a unit owns is zero."""
    t = part.tensor().movedim(part.axis, 0)
    zero = (t == 0).flatten(1).all(dim=1) if t.dim() > 1 else t == 0
    return zero.cpu()[part.index].all(dim=1)
