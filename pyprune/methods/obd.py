"""Optimal brain damage: the loss a weight costs by the diagonal of a curvature, and no update.

Three curvatures: that of the layer's output error (L-OBD), the empirical Fisher information of the
language-model loss (OBD), and the diagonal of its Kronecker factorisation (K-OBD).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pyprune.calibration.gradient_stats import DiagonalFactors, GradientFactory, MagnitudeStatistic
from pyprune.methods.base import LayerInputs, Method, MethodOptions, given, given_gradient
from pyprune.methods.update import ScoreMethod

Curvature = Callable[[LayerInputs], Tensor]


def layer_curvature(inputs: LayerInputs) -> Tensor:
    """`[C]`: sum over tokens of x_j^2, the diagonal of the Hessian of half the squared output error
    on the whole text. Not a mean over the layer's own tokens: an expert that few of them reach
    would count, among all layers, as much as a busy one."""
    return inputs.squared_norms


def fisher_diagonal(inputs: LayerInputs) -> Tensor:
    """`[R, C]`: empirical Fisher information per predicted token, the sum over sequences of the
    squared gradient of their summed loss, over the number of targets."""
    statistic = given_gradient("obd", inputs, MagnitudeStatistic)
    return statistic.total / statistic.targets


def kronecker_diagonal(inputs: LayerInputs) -> Tensor:
    """`[R, C]`: diag(G) diag(A)^T with A and G the second moments over the tokens of the inputs and
    of the outputs' gradients: inputs and gradients, and tokens, taken as independent."""
    statistic = given_gradient("k-obd", inputs, DiagonalFactors)
    g, a = statistic.g / statistic.targets, statistic.a / max(statistic.tokens, 1)
    return g[:, None] * a


def column_scale(
    name: str, curvature: Curvature, inputs: LayerInputs | None, options: MethodOptions
) -> Tensor:
    """`[C]` or `[R, C]`: sqrt(F). |w| times it orders the weights as w^2 F / 2 does."""
    inputs = given(name, inputs)
    return curvature(inputs).sqrt().to(inputs.squared_norms.device)


def fisher_gradient(options: MethodOptions) -> GradientFactory:
    return partial(MagnitudeStatistic, power=2, per_token=False)


def factor_gradient(options: MethodOptions) -> GradientFactory:
    return DiagonalFactors


def _row(
    name: str,
    title: str,
    paper: str,
    curvature: Curvature,
    gradient: Callable[[MethodOptions], GradientFactory] | None,
) -> Method:
    scale = partial(column_scale, name, curvature)
    return Method(
        name=name,
        title=title,
        paper=paper,
        statistic="norms",
        scopes=("layer", "row", "global"),
        updates_weights=False,
        solve=ScoreMethod(scale, "layer").solve,
        column_scale=scale,
        updates=("none", "sequential"),
        gradient=gradient,
    )


LAYER_OBD = _row(
    "l-obd",
    "smallest w^2 diag(H) of the layer's output error",
    "LeCun et al. 1990; van der Ouderaa et al. 2023, arXiv 2312.17244",
    layer_curvature,
    None,
)
METHOD = _row(
    "obd",
    "smallest w^2 times diagonal Fisher information",
    "LeCun et al. 1990",
    fisher_diagonal,
    fisher_gradient,
)
KRONECKER_OBD = _row(
    "k-obd",
    "smallest w^2 diag(G) diag(A)",
    "Wang et al. 2019, arXiv 1905.05934",
    kronecker_diagonal,
    factor_gradient,
)
