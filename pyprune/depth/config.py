"""One structural pruning run as a frozen value: validated when built, saved with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pyprune.config import CalibrationConfig, RunConfig, check_choice
from pyprune.depth.graph import Branch
from pyprune.depth.repack import Fill
from pyprune.errors import UserError
from pyprune.methods.options import Scalar, build_options
from pyprune.patterns import percent_hint

By = Literal["params", "count", "latency"]
FIRST_ATTENTION = Branch("attention", 0)


@dataclass(frozen=True)
class StructureConfig(RunConfig):
    """Everything that decides the outcome of a run.

    method: a name in `pyprune.depth.registry.DEPTH_METHODS`.
    ratio / count: exactly one. How much goes: a share, or a number of the method's units (branches,
        or layers for methods that remove whole ones).
    by: what `ratio` is a share of: "params" (all of the model's parameters), "count" (the method's
        units) or "latency" (measured on the calibration batches). Removal stops as soon as the
        share is reached.
    fill: what becomes of layers that keep one of their branches, see `pyprune.depth.repack`; "deci"
        writes a checkpoint that is not a stock one, see `pyprune.deci`.
    method_options: of the method, by name; see `pyprune methods`.
    device: "auto", "cpu", "cuda" or "cuda:N". dtype: of the model while it runs; "auto" is the
        checkpoint's own.
    """

    method: str = "blockpruner"
    ratio: float | None = None
    count: int | None = None
    by: By = "params"
    fill: Fill = "packed"
    method_options: Mapping[str, Scalar] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    # BlockPruner's paper: some 27k tokens, of which perplexity hardly needs all.
    calibration: CalibrationConfig = field(
        default_factory=lambda: CalibrationConfig(nsamples=32, seqlen=512)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.count is None):
            raise UserError(
                "expected exactly one of ratio and count, got "
                + ("neither" if self.ratio is None else f"{self.ratio} and {self.count}")
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(
                f"ratio: expected a number between 0 and 1, got {self.ratio!r}"
                + percent_hint(self.ratio)
            )
        if self.count is not None and self.count < 1:
            raise UserError(f"count: expected a whole number from 1, got {self.count!r}")
        check_choice("by", self.by, get_args(By))
        check_choice("fill", self.fill, get_args(Fill))
        self.own_options()  # a bad option is found before anything is loaded

    @property
    def counted(self) -> bool:
        """Whether the target is a number of units, all alike, rather than a share of what they
        differ in."""
        return self.count is not None or self.by == "count"

    def allows(self, branch: Branch) -> bool:
        """Whether `branch` may go without its layer: any, but for the first attention where the
        result is to be DeciLM, whose first layer does not run without one."""
        return self.fill != "deci" or branch != FIRST_ATTENTION

    def own_options(self) -> Any:
        """The method's options dataclass."""
        from pyprune.depth.registry import DEPTH_METHODS

        kind = DEPTH_METHODS.find(self.method).options
        return build_options(self.method, kind, self.method_options)
