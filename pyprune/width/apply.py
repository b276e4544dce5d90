"""From kept units to a narrower model and the record of how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyprune.calibration.tokens import TokenSet
from pyprune.depth.decision import calibration_facts
from pyprune.width.config import WidthConfig
from pyprune.width.cut import cut
from pyprune.width.decision import WidthDecision
from pyprune.width.structure import Widths


def remove(
    widths: Widths,
    kept: Mapping[str, Tensor],
    *,
    tokens: TokenSet,
    config: WidthConfig,
    dense_parameters: int,
    notes: Sequence[str] = (),
    transforms: Sequence[Mapping[str, Any]] = (),
    scores: Mapping[str, Tensor] | None = None,
    objective: str = "",
) -> WidthDecision:
    """Cuts the model of `widths` to the units `kept`, in place.

    dense_parameters: that the model had before the method added anything (biases). scores: group ->
    [units], by which the method ranked; objective: what they are.
    """
    units = {group.name: group.units for group in widths.groups}
    groups = {g.name: (g.kind, g.layer, g.unit_parameters) for g in widths.groups}
    removed = {group.name: gone.tolist() for group, gone in widths.removed(kept) if len(gone)}
    result = cut(widths, kept)
    return WidthDecision(
        method=config.method,
        units=units,
        removed=removed,
        sizes=result.sizes,
        parameters=(dense_parameters, result.parameters[1]),
        wanted=result.wanted,
        zeroed=result.zeroed,
        notes=(*notes, *result.reasons),
        calibration=calibration_facts(tokens),
        config=config.to_dict(),
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
