"""Optimal brain damage: the loss a weight costs by the diagonal of a curvature, and no update.

Three curvatures: that of the layer's output error (L-OBD), the empirical Fisher information of the
language-model loss (OBD), and the diagonal of its Kronecker factorisation (K-OBD).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pyprune.calibration.gradient_stats import DiagonalFactors, GradientFactory, MagnitudeStatistic
from pyprune.methods.base import (
    LayerInputs,
    Method,
    MethodOptions,
    Solution,
    given,
    given_gradient,
)
from pyprune.methods.selection import select_mask
from pyprune.methods.update import solve_by_score
from pyprune.patterns import Pattern, scope_of

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


@dataclass(frozen=True)
class Obd:
    """w_ij^2 F_ij / 2 with one of the curvatures F."""

    name: str
    curvature: Curvature
    default_scope: str

    def column_scale(self, inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
        """`[C]` or `[R, C]`: sqrt(F). |w| times it orders the weights as w^2 F / 2 does."""
        inputs = given(self.name, inputs)
        return self.curvature(inputs).sqrt().to(inputs.squared_norms.device)

    def solve(
        self,
        w: Tensor,
        inputs: LayerInputs | None,
        pattern: Pattern,
        options: MethodOptions,
        preserve: Tensor | None,
        mask: Tensor | None,
    ) -> Solution:
        """See `Solver`."""
        if mask is None:
            scores = w.abs() * self.column_scale(inputs, options).to(w.dtype)
            scope = scope_of(pattern, self.default_scope)
            mask = select_mask(scores, pattern, scope=scope, preserve=preserve)
        return solve_by_score(w, inputs, options, mask)


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
    obd = Obd(name, curvature, "layer")
    return Method(
        name=name,
        title=title,
        paper=paper,
        statistic="norms",
        scopes=(obd.default_scope, "row", "global"),
        updates_weights=False,
        solve=obd.solve,
        column_scale=obd.column_scale,
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
