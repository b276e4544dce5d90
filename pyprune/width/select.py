"""How many units stay, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyprune.errors import UserError
from pyprune.methods.options import Count
from pyprune.models.stock import parameter_count
from pyprune.width.cut import fitting_sizes
from pyprune.width.structure import Group, Widths

Units = Literal["stock", "all", "mlp", "heads"]


@dataclass(frozen=True)
class UnitOptions:
    """units: which may go: stock (channels and KV groups that a stock model can have fewer of), all
    (others too, as zeros), mlp or heads. multiple: that the channels left are a multiple of, where
    all layers keep equally many."""

    units: Units = "stock"
    multiple: Count = 8


def prunable(widths: Widths, units: Units) -> list[Group]:
    """The groups that may lose units.

    units: "stock": all whose class a stock model can have with fewer of them, so that what is
        removed really goes; "all": also those that are only zeroed; "mlp", "heads": one kind.

    Raises UserError if there are none.
    """
    if units in ("mlp", "heads"):
        found = widths.of_kind(units)
    elif units == "all":
        found = widths.groups
    else:
        possible = [
            groups
            for groups in widths.classes().values()
            if fitting_sizes(widths, groups, [_half(groups[0])])
        ]
        found = [group for group in widths.groups if any(group in groups for groups in possible)]
    if not found:
        name = type(widths.model).__name__
        why = "; ".join(sorted(set(widths.refused.values()))) or "none has a field for its size"
        raise UserError(f"{name}: expected channels or heads to prune with units={units}: {why}")
    return found


def _half(group: Group) -> int:
    """A size that is worth trying: half of the heads divides whatever all of them do."""
    return max(1, group.units // 2 // group.step) * group.step


def uniform_sizes(
    widths: Widths, groups: Sequence[Group], target: int, multiple: int = 1
) -> dict[str, int]:
    """How many units each group keeps if all of a class keep equally many.

    All classes lose about the same share p of their units: KV groups floor(p G), and no more than
    leaves a number that a stock model can have; channels what is then still needed, in steps of one
    channel everywhere (or down to a multiple).

    Args:
        groups: that may lose units. target: parameters that have to go at least.
        multiple: of which the numbers of channels left are (8 or more suits GPUs).

    Raises UserError: more is asked for than can go while one unit stays.
    """
    steps = max(group.units for group in groups)
    chosen = set(map(id, groups))
    classes = [
        [group for group in members if id(group) in chosen] for members in widths.classes().values()
    ]
    classes = [members for members in classes if members]
    fits = {id(members[0]): _sizes(widths, members, multiple) for members in classes}

    def sizes(heads: int, channels: int) -> dict[str, int]:
        """For shares heads / steps and channels / steps."""
        found: dict[str, int] = {}
        for members in classes:
            first = members[0]
            step = heads if first.kind == "heads" else channels
            wanted = first.units - step * first.units // steps
            left = fits[id(first)]
            # Heads: never more than the share. Channels: never less.
            if first.kind == "heads":
                size = min(s for s in left if s >= wanted)
            else:
                size = max((s for s in left if s <= wanted), default=left[0])
            found |= {group.name: size for group in members}
        return found

    def removed(kept: Mapping[str, int]) -> int:
        return sum(g.unit_parameters * (g.units - kept[g.name]) for g in groups)

    at = _first(steps, lambda step: removed(sizes(step, step)) >= target)
    if at is None:
        raise _too_much(widths, target, removed(sizes(steps, steps)))
    finer = _first(at, lambda step: removed(sizes(at, step)) >= target)
    assert finer is not None
    return sizes(at, finer)


def _sizes(widths: Widths, groups: Sequence[Group], multiple: int) -> list[int]:
    """Numbers of units that groups of one class may keep, ascending."""
    units = groups[0].units
    if groups[0].kind == "mlp":
        step = math.lcm(multiple, groups[0].step)
        return [*range(step, units, step), units]
    fitting = fitting_sizes(widths, groups, range(1, units))
    return [*(fitting or range(1, units)), units]


def _first(last: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest of 0..last for which a monotone condition holds."""
    if not holds(last):
        return None
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def best(scores: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The units of largest score, `sizes[group]` of each; ties: the lower index goes first. Raises
    UserError where a score is NaN."""
    found = {}
    for name, size in sizes.items():
        order = _numbers(name, scores[name]).sort(stable=True).indices
        found[name] = order[len(order) - size :].sort().values
    return found


def _numbers(name: str, scores: Tensor) -> Tensor:
    """Double, on the CPU."""
    if scores.isnan().any():
        raise UserError(
            f"{name}: expected scores that are numbers, got NaN: its weights or its inputs on this "
            "text are NaN or infinite"
        )
    return scores.double().cpu()


def globally(
    widths: Widths, groups: Sequence[Group], scores: Mapping[str, Tensor], target: int
) -> dict[str, Tensor]:
    """Units of least score first, of all groups together, until `target` parameters are gone; one
    unit of each group stays. Ties go by group, then by index.

    Raises UserError: more is asked for than can go, or a score is NaN.
    """
    flat = torch.cat([_numbers(group.name, scores[group.name]) for group in groups])
    owner = torch.cat([torch.full((g.units,), i) for i, g in enumerate(groups)])
    index = torch.cat([torch.arange(group.units) for group in groups])
    stays = [torch.ones(group.units, dtype=torch.bool) for group in groups]
    left = [group.units for group in groups]
    gone = 0
    for at in flat.sort(stable=True).indices.tolist():
        if gone >= target:
            break
        i = int(owner[at])
        if left[i] == 1:
            continue
        stays[i][index[at]] = False
        left[i] -= 1
        gone += groups[i].unit_parameters
    if gone < target:
        raise _too_much(widths, target, gone)
    return {g.name: s.nonzero()[:, 0] for g, s in zip(groups, stays, strict=True)}


def check_reachable(widths: Widths, groups: Sequence[Group], target: int) -> None:
    """Raises UserError unless `target` parameters can go while one unit of each group stays."""
    most = sum(group.unit_parameters * (group.units - 1) for group in groups)
    if most < target:
        raise _too_much(widths, target, most)


def _too_much(widths: Widths, target: int, most: int) -> UserError:
    total = parameter_count(widths.model)
    return UserError(
        f"ratio: expected at most {most / total:.3f} of the parameters (one unit of each module "
        f"has to stay), got {target / total:.3f}"
    )
