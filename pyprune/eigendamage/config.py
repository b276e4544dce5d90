"""One EigenDamage run as a frozen value: validated when built, saved with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pyprune.config import CalibrationConfig, RunConfig
from pyprune.errors import UserError
from pyprune.methods.options import Natural, OptionError, Positive, Scalar, build_options, within
from pyprune.registry import unknown_method

METHOD = "eigendamage"
Unit = Literal["directions", "elements"]


@dataclass(frozen=True)
class EigenDamageOptions:
    """unit: whole input and output directions (the paper's), or single entries of the rotated
        weights, which no storage of today can make use of: it says what the basis is worth.
    reestimate: take the curvature from a second backward pass in the basis (EK-FAC) instead of the
        factors' eigenvalues.
    factored: store two thin matrices in the place of a linear layer's where these have fewer
        parameters, which takes pyprune to load; else every matrix stays dense. With unit directions
        only.
    cap: the most of one layer's output, and of its input directions that may go.
    fisher_samples: 0: gradients of the text's own tokens. S > 0: of S tokens drawn from the model
        at each place, with a backward pass each; the paper draws one.
    factor_memory: GiB that factors and bases may take at once. If those of all layers need more,
        they are made in several passes over the text and wait on disk.
    """

    unit: Unit = "directions"
    reestimate: bool = False
    factored: bool = False
    cap: Annotated[float, within(0, 1, "()")] = 0.95
    fisher_samples: Natural = 0
    factor_memory: Positive = 8.0

    def __post_init__(self) -> None:
        if self.factored and self.unit != "directions":
            raise OptionError(f"factored: expected unit directions, got {self.unit}")


@dataclass(frozen=True)
class EigenDamageConfig(RunConfig):
    """Everything that decides the outcome of a run.

    method: "eigendamage". sparsity: share of the entries of all rotated weights that go.
    method_options: see `EigenDamageOptions`.
    include, exclude, gradient_checkpointing, device, dtype, calibration: see `PruneConfig`.
    """

    method: str = METHOD
    sparsity: float = 0.2
    method_options: Mapping[str, Scalar] = field(default_factory=dict)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    device: str = "auto"
    dtype: str = "auto"
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != METHOD:
            raise unknown_method(self.method, [METHOD])
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity: expected a fraction in [0, 1), got {self.sparsity}")
        self.own_options()  # a bad option is found before anything is loaded

    def idle(self) -> str:
        return "" if self.sparsity else "nothing is to be removed: the target is 0%"

    def own_options(self) -> EigenDamageOptions:
        built = build_options(self.method, EigenDamageOptions, self.method_options)
        assert isinstance(built, EigenDamageOptions)
        return built
