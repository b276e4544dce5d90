"""ECoFLaP's coarse step: what the loss is sensitive to loses less.

Sung, Yoon and Bansal 2024, arXiv 2310.02998. The importance of a group of matrices comes from the
gradient of the loss of the dense model, either exact ("first" order) or seen in forwards alone
("zeroth" order: `calibration.zeroth`); its fine step is any method of the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pyprune.allocation.base import MAX_SPARSITY, spread
from pyprune.errors import UserError
from pyprune.methods.options import Count, Natural, Positive, at_least, within

# How far above the target a group may get unless the options say so: 60 % comes with 70 % and
# 50 % with 60 % in the released scripts.
HEADROOM = 0.1
# Share of the largest importance per weight that every group has at least: those that no token
# reached still take what is left to keep once all others keep everything.
FLOOR = 1e-9


@dataclass(frozen=True)
class EcoflapOptions:
    """order: `zeroth` (differences of losses along random directions) or `first` (gradients).
    granularity: what gets a sparsity of its own, a `block` or a `layer` (one matrix); in the zeroth
    order a block's matrices move together, where the released code moves one tensor at a time and
    adds up what it finds, for as many times the forwards. score: of a
    group, with g the gradient of a sequence's mean loss, averaged over sequences: `gradient`, the
    sum of |g| (zeroth: sqrt(2 / pi) times the norm of g); `weight-gradient`, the sum of |w g|;
    `squared`, of their squares (zeroth: the scalar, or its square, times the sum of |w| or w^2).
    max_sparsity: of any group; none: the target and 0.1. samples: calibration sequences that are
    used; none: all. noises: of the zeroth order, directions per batch of sequences. epsilon: of the
    zeroth order, length of the step in units of a standard normal direction. seed: of the zeroth
    order's directions."""

    order: Literal["zeroth", "first"] = "zeroth"
    granularity: Literal["block", "layer"] = "block"
    score: Literal["gradient", "weight-gradient", "squared"] = "gradient"
    max_sparsity: Annotated[float | None, within(0, MAX_SPARSITY)] = None
    samples: Annotated[int | None, at_least(1)] = 32
    noises: Count = 1
    epsilon: Positive = 1e-3
    seed: Natural = 0

    def cap(self, target: float) -> float:
        """The most that a group may lose; UserError if that is less than the target."""
        cap = self.max_sparsity
        if cap is None:
            cap = max(min(target + HEADROOM, MAX_SPARSITY), target)
        if target > cap:
            raise UserError(
                "allocation_options: ecoflap max_sparsity: expected at least the sparsity "
                f"{target}, got {cap}"
            )
        return cap


def sparsities_by_importance(
    scores: Sequence[float], sizes: Sequence[int], target: float, maximum: float
) -> list[float]:
    """One sparsity a group; their mean weighted by `sizes` is `target`.

    Every group keeps 1 - maximum of its weights. What is left to keep is shared out in proportion
    to `scores`, and what a group cannot take because it keeps everything goes to the others alike:
    `keep_g = min(n_g, (1 - maximum) n_g + k score_g)` with the k that meets the target. The
    released code gets there in rounds of rounded counts, whose repair of the last few weights has
    the wrong sign; the result differs by rounding.

    Raises:
        UserError: all scores are zero, one is not finite, or `target` exceeds `maximum`.
    """
    if target > maximum:
        raise UserError(f"sparsity: expected at most {maximum}, got {target}")
    if not all(math.isfinite(score) and score >= 0 for score in scores):
        raise UserError("ecoflap: expected finite importances, got NaN, infinity or less than 0")
    densities = [score / size for score, size in zip(scores, sizes, strict=True)]
    most = max(densities)
    if most == 0:
        raise UserError("ecoflap: expected gradients, got zero for every group of matrices")
    floored = [max(density / most, FLOOR) for density in densities]
    spared = spread(floored, sizes, maximum - target, "scale", maximum)
    return [maximum - share for share in spared]
