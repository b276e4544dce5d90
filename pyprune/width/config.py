"""One width pruning run as a frozen value: validated when built, saved with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyprune.config import CalibrationConfig, RunConfig
from pyprune.errors import UserError
from pyprune.methods.options import Scalar, build_options
from pyprune.patterns import percent_hint


@dataclass(frozen=True)
class WidthConfig(RunConfig):
    """Everything that decides the outcome of a run.

    method: a name in `pyprune.width.registry.WIDTH_METHODS`.
    ratio: the share of all parameters (embeddings included, tied ones once) that has to go.
    method_options: of the method, by name; see `pyprune methods`.
    device: "auto", "cpu", "cuda" or "cuda:N". dtype: of the model while it runs; "auto" is the
        checkpoint's own.
    """

    method: str = "flap"
    ratio: float = 0.2
    method_options: Mapping[str, Scalar] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    calibration: CalibrationConfig = field(
        default_factory=lambda: CalibrationConfig(nsamples=32, seqlen=512)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise UserError(
                f"ratio: expected a number between 0 and 1, got {self.ratio!r}"
                + percent_hint(self.ratio)
            )
        self.own_options()  # a bad option is found before anything is loaded

    def own_options(self) -> Any:
        """The method's options dataclass."""
        from pyprune.width.registry import WIDTH_METHODS

        kind = WIDTH_METHODS.find(self.method).options
        return build_options(self.method, kind, self.method_options)
