"""What the solvers of `ops.kron_pcg` share: the problem in balanced coordinates, and what a series
of gains says of those to come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyprune.ops.masked_cg import largest_directions

# Iterations whose gains are compared with those of as many before them. Two follow what the first
# few iterations do; four are not misled by a pair that happens to gain little.
WINDOWS = (2, 4)


class Scaled(NamedTuple):
    """The problem in coordinates in which what `low` leaves of A's and G's diagonals is one.

    x `[R, C]` is `row_size [R, 1]` times w times `column_size [C]`; kept `[R, C]` is 1 or 0.
    a = low_a^T low_a + I and g = low_g^T low_g + I, about.
    """

    x: Tensor
    kept: Tensor
    a: Tensor
    g: Tensor
    low_a: Tensor
    low_g: Tensor
    row_size: Tensor
    column_size: Tensor

    @classmethod
    def of(cls, w: Tensor, mask: Tensor, a: Tensor, g: Tensor) -> Scaled:
        low_a, column_size = _unit_left(a)
        low_g, row_size = _unit_left(g)
        return cls(
            w * row_size[:, None] * column_size,
            mask.to(w.dtype),
            a / column_size[:, None] / column_size,
            g / row_size[:, None] / row_size,
            low_a,
            low_g,
            row_size[:, None],
            column_size,
        )

    def curvature(self, v: Tensor) -> Tensor:
        return self.g @ v @ self.a


def _unit_left(h: Tensor) -> tuple[Tensor, Tensor]:
    """`largest_directions` of H in the scale in which they leave a diagonal of ones, ordered from
    the largest on, and that scale `[C]`: h / size / size^T is about low^T low + I."""
    low, left = largest_directions(h)
    low = low / left.sqrt()
    turned = torch.linalg.eigh(low @ low.mT).eigenvectors.flip(1)
    return turned.mT @ low, (h.diagonal() * left).sqrt()


def dot(x: Tensor, y: Tensor) -> float:
    """Of `[R, C]`: over rows in their dtype, over all of them in fp64, or the step lengths lose the
    last digits of convergence."""
    return float((x * y).sum(1).sum(dtype=torch.float64))


def left_to_gain(gains: Sequence[float]) -> float:
    """What further iterations would gain, as far as those so far tell: the rest of a geometric
    series that falls as the last two windows of gains did, the larger of two window lengths.
    Infinite while gains do not fall, and before there are two windows."""
    return max(_rests(gains), default=math.inf)


def sure_to_gain(gains: Sequence[float]) -> float:
    """The smaller of the rests that `left_to_gain` takes the larger of; zero before there are any,
    and while gains do not fall."""
    least = min(_rests(gains), default=0.0)
    return least if math.isfinite(least) else 0.0


def _rests(gains: Sequence[float]) -> list[float]:
    return [_rest(gains, n) for n in WINDOWS if len(gains) >= 2 * n]


def _rest(gains: Sequence[float], n: int) -> float:
    recent, before = sum(gains[-n:]), sum(gains[-2 * n : -n])
    if not recent < before:
        return math.inf if recent > 0 else 0.0
    return recent * recent / (before - recent)
