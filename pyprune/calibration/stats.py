"""What is accumulated about the inputs of a linear map: sums over tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pyprune import ops


class Statistic(Protocol):
    """Sums over tokens of something about the columns of `x [T, C]`. `tokens`: seen so far."""

    tokens: float

    def update(self, x: Tensor) -> None:
        """Adds the tokens `x [T, C]` (bf16, fp16, fp32 or fp64)."""

    def finite(self) -> bool:
        """Whether no NaN and no infinity has entered."""


class NormStatistic:
    """Squared L2 norm of every column: `sum_squares[j] = sum_t x[t, j]**2`, fp32.

    Wanda's statistic (Sun et al. 2023, eq. 1) before the square root.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.sum_squares = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = 0.0

    def update(self, x: Tensor) -> None:
        ops.column_norms(_at_most_single(x), out=self.sum_squares)
        self.tokens += len(x)

    def column_norms(self) -> Tensor:
        """Squared column norms `[C]`, as GramStatistic has them too."""
        return self.sum_squares

    def finite(self) -> bool:
        return bool(self.sum_squares.isfinite().all())


class MomentStatistic:
    """Mean and variance of every column, kept in fp64 (a part's own sums are in fp32 unless it is
    fp64).

    `mean[j] = sum_t x_tj / tokens`, `squares[j] = sum_t (x_tj - mean[j])**2`, put together part by
    part (Chan, Golub and LeVeque 1983, eq. 2.1), so that a mean far from zero costs no precision.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.mean = torch.zeros(columns, dtype=torch.float64, device=device)
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.tokens = 0.0

    def update(self, x: Tensor) -> None:
        if not len(x):
            return
        x = x if x.dtype == torch.float64 else x.float()
        tokens, ones = len(x), x.new_ones(len(x))
        near = ones @ x / tokens
        x = x - near
        rest = (ones @ x).double() / tokens  # what rounding left of the mean
        squares = (ones @ x.square_()).double() - tokens * rest.square()
        total = self.tokens + tokens
        shift = near.double() + rest - self.mean
        self.squares += squares + shift.square() * (self.tokens * tokens / total)
        self.mean += shift * (tokens / total)
        self.tokens = total

    def variance(self) -> Tensor:
        """`squares / tokens` `[C]`; zeros if nothing was seen."""
        return self.squares / max(self.tokens, 1.0)

    def finite(self) -> bool:
        return bool(self.squares.isfinite().all())


class GramStatistic:
    """Gram matrix of the inputs: `gram = sum_t x[t] x[t]^T`, `[C, C]` fp32, symmetric.

    A raw sum, not divided by the token count: half of SparseGPT's Hessian (Frantar and Alistarh
    2023, section 3.1) for one output row.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0.0

    def update(self, x: Tensor) -> None:
        ops.gram(_at_most_single(x), out=self.gram)
        self.tokens += len(x)

    def column_norms(self) -> Tensor:
        """Squared column norms `[C]`: the diagonal."""
        return self.gram.diagonal()

    def finite(self) -> bool:
        # |g_ij| <= (g_ii + g_jj) / 2, and a NaN or infinite input reaches its diagonal entry.
        return bool(self.gram.diagonal().isfinite().all())


def _at_most_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x
