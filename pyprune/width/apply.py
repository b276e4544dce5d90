"""From kept units to a narrower model and the record of how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyprune.width.cut import cut
from pyprune.width.decision import WidthDecision
from pyprune.width.registry import WidthTask
from pyprune.width.structure import Widths


def remove(
    task: WidthTask,
    widths: Widths,
    kept: Mapping[str, Tensor],
    *,
    notes: Sequence[str] = (),
    transforms: Sequence[Mapping[str, Any]] = (),
    scores: Mapping[str, Tensor] | None = None,
    objective: str = "",
) -> WidthDecision:
    """Cuts the model of `widths` to the units `kept`, in place.

    scores: group -> [units], by which the method ranked; objective: what they are.
    """
    units = {group.name: group.units for group in widths.groups}
    groups = {g.name: (g.kind, g.layer, g.unit_parameters) for g in widths.groups}
    removed = {group.name: gone.tolist() for group, gone in widths.removed(kept) if len(gone)}
    result = cut(widths, kept)
    return task.decision(
        result.parameters[1],
        units=units,
        removed=removed,
        sizes=result.sizes,
        wanted=result.wanted,
        zeroed=result.zeroed,
        notes=(*notes, *result.reasons),
        transforms=tuple(transforms),
        groups=groups,
        importance={name: deciles(values) for name, values in (scores or {}).items()},
        objective=objective,
    )


def deciles(scores: Tensor) -> tuple[float, ...]:
    """The least, 10 %, 20 %, ... and the greatest of those that are finite; nothing of none."""
    finite = scores.detach().double().cpu()
    finite = finite[finite.isfinite()]
    if not len(finite):
        return ()
    found: list[float] = finite.quantile(torch.linspace(0, 1, 11, dtype=torch.float64)).tolist()
    return tuple(found)
