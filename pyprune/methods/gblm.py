"""GBLM-Pruner: Wanda's score and the gradient's, added."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from pyprune.calibration.gradient_stats import GradientFactory, MagnitudeStatistic
from pyprune.methods.base import LayerInputs, Method, MethodOptions, given, given_gradient
from pyprune.methods.options import NotNegative
from pyprune.methods.update import ScoreMethod

REFERENCE_SEQUENCES = 128  # of the paper's calibration, at which its alpha was chosen


@dataclass(frozen=True)
class GblmOptions:
    """alpha: weight of the gradient term. norm: over the sequences' gradients, l1 or l2.
    gradient_only: leave the activation term out. reference_normalisation: sum over sequences as
    GBLM-Pruner's code does, so that the gradient term grows with their number; else the result
    does not depend on it and equals the reference's at 128 sequences."""

    alpha: NotNegative = 100.0
    norm: Literal["l1", "l2"] = "l1"
    gradient_only: bool = False
    reference_normalisation: bool = False


def gradient(options: MethodOptions) -> GradientFactory:
    power = 1 if options.own_as(GblmOptions).norm == "l1" else 2
    return partial(MagnitudeStatistic, power=power, per_token=True)


def gradient_norm(statistic: MagnitudeStatistic, options: GblmOptions) -> Tensor:
    """gamma `[R, C]`: norm over N sequences of the gradients of their mean losses, each counted
    128 / N times (once with `reference_normalisation`)."""
    total = statistic.total
    if not options.reference_normalisation:
        total = total * (REFERENCE_SEQUENCES / statistic.sequences)
    return total if statistic.power == 1 else total.sqrt()


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
    """`[R, C]`: `s_j + alpha * gamma_ij` with s_j = ||x_j||_2 / sqrt(N), the factor of |w_ij| in
    its score (Das et al. 2023, eq. 6)."""
    inputs, own = given("gblm", inputs), options.own_as(GblmOptions)
    statistic = given_gradient("gblm", inputs, MagnitudeStatistic)
    gamma = gradient_norm(statistic, own).to(inputs.squared_norms.device)
    if own.gradient_only:
        return gamma
    activations = (inputs.squared_norms.to(gamma.dtype) / statistic.sequences).sqrt()
    return activations + own.alpha * gamma


METHOD = Method(
    name="gblm",
    title="smallest |w| times input norm plus gradient norm",
    paper="Das et al. 2023, arXiv 2311.04902",
    statistic="norms",
    scopes=("row", "layer", "global"),
    updates_weights=False,
    solve=ScoreMethod(column_scale, "row").solve,
    column_scale=column_scale,
    updates=("none", "sequential"),
    gradient=gradient,
    options_type=GblmOptions,
)
