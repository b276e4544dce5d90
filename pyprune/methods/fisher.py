"""The empirical Fisher information of one layer from gradient samples, as OBS and WoodFisher share
it: `F = (1 - shrinkage) S + shrinkage diag(S) + lambda I` with S the sum of outer products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from pyprune.calibration.gradient_stats import GradientFactory, GradientSamples
from pyprune.methods.base import LayerInputs, MethodOptions, given_gradient
from pyprune.methods.options import Count, within
from pyprune.ops.obs_factor import NotPositiveDefiniteError, damping_ladder


@dataclass(frozen=True)
class SampleOptions:
    """samples: gradients that the Fisher matrix S is made of; each takes 4 bytes a weight until
    its layer is pruned. More sequences than that are summed in turn. shrinkage: how far S moves to
    its diagonal; few samples say little of what is beside it. 0 leaves S as it is, 1 is OBD's
    curvature."""

    samples: Count = 16
    shrinkage: Annotated[float, within(0, 1)] = 0.5


def sampled_gradients(options: MethodOptions) -> GradientFactory:
    """What the backward pass accumulates for S."""
    return partial(GradientSamples, samples=options.own_as(SampleOptions).samples)


@dataclass(frozen=True, eq=False)
class LowRankFisher:
    """`F = diag(d) + s^T s` of a layer's weights, per predicted token, fp64.

    s: `[K, R, C]`. d: `[R, C]`, positive. damping: lambda over the mean of diag(S).
    """

    s: Tensor
    d: Tensor
    damping: float

    @classmethod
    def of(cls, name: str, inputs: LayerInputs, options: MethodOptions) -> LowRankFisher:
        """From what the backward pass accumulated for method `name`. S has no full rank: a damping
        of 0 becomes the next one of `damping_ladder`. Raises NotPositiveDefiniteError where that
        ends."""
        shrinkage = options.own_as(SampleOptions).shrinkage
        statistic = given_gradient(name, inputs, GradientSamples)
        s = statistic.per_token().to(inputs.squared_norms.device, torch.float64)
        diagonal = s.square().sum(0)
        ladder = damping_ladder(options.damping, options.max_damping)
        damping = next((d for d in ladder if d > 0), 0.0)
        shift = damping * float(diagonal.mean()) if diagonal.numel() else 0.0
        if not shift > 0:
            raise NotPositiveDefiniteError(
                f"{name}: expected gradients and a damping above 0, got {damping:g} times their "
                f"mean square {float(diagonal.sum()):g}"
            )
        return cls(s * (1 - shrinkage) ** 0.5, shrinkage * diagonal + shift, damping)


def live_weight(w: Tensor, inputs: LayerInputs) -> Tensor:
    """`w` in fp64, zero for inputs that were zero for every token: they lose nothing, go first."""
    return torch.where(inputs.dead, 0.0, w.double())


def with_dead(w: Tensor, solved: Tensor, mask: Tensor, inputs: LayerInputs) -> Tensor:
    """`solved` in the dtype of `w`, with the kept weights of dead inputs as they were."""
    return torch.where(inputs.dead & mask, w, solved.to(w.dtype))
