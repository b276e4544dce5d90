"""What a width method decided, and what became of it in the saved model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

ADD_ONS = "add-ons"  # a point of `WidthDecision.curve`


@dataclass(frozen=True)
class WidthDecision:
    """Which units went, and what that made of the model.

    method. units: group (see `pyprune.width.structure.Group`) -> how many it had; groups: its kind
        ("heads" or "mlp"), its layer in the dense model, and the parameters that a unit owns.
    removed: group -> ascending indices of the units that went; not of `branches` ("A3", "M3"),
        which went as a whole.
    importance: group -> deciles (0, 10, ... 100 %) of its units' scores as the method ranked them
        first, larger = stays, in terms of `objective`; empty for methods without.
    sizes: field of the configuration -> (before, after), where it changed.
    parameters: of the model before and after (tied ones once); wanted: what would be left if every
        group had been cut to exactly its own units. More than that is left where a stock model
        cannot say it; zeroed: group -> units that are zeros but still there; notes say why.
    calibration: source, sha256, tokens, seqlen, sequences. config: `WidthConfig.to_dict`.
    transforms: what else the method did to the kept weights.
    curve: (what went, parameters left without zeros, perplexity on the calibration text): the dense
        model, then every step of a method that goes by perplexity (and "add-ons" where some were
        applied to the result), or "pruned" where both ends were measured; empty where nothing was.
    """

    method: str
    units: Mapping[str, int]
    removed: Mapping[str, list[int]]
    sizes: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    wanted: int
    zeroed: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[Mapping[str, Any], ...] = ()
    groups: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    branches: tuple[str, ...] = ()
    importance: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    objective: str = ""
    curve: tuple[tuple[str, int, float], ...] = ()

    def kept(self) -> dict[str, Tensor]:
        """What `Widths.mask` and `cut` take: repeats the removal on a dense model."""
        found = {}
        for name, size in self.units.items():
            stays = torch.ones(size, dtype=torch.bool)
            stays[self.removed.get(name, [])] = False
            found[name] = stays.nonzero()[:, 0]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, tuples, strings and numbers."""
        return asdict(self)

    def summary(self) -> str:
        """A paragraph for the model card."""
        before, after = self.parameters
        sizes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.sizes.items())
        lines = [f"{after:,} of {before:,} parameters ({sizes or 'all shapes as before'})."]
        if self.zeroed:
            lines.append(
                f"{sum(self.zeroed.values())} removed units in {len(self.zeroed)} modules are "
                f"still there as zeros; without them {self.wanted:,} parameters would be left."
            )
        return " ".join(lines)
