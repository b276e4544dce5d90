"""What is accumulated about the inputs of a linear map: sums over tokens, so that parts add up."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pyprune import ops


class Statistic(Protocol):
    """Sums over tokens of something about the columns of `x [T, C]`.

    `tokens` is the sum of the token weights seen so far.
    """

    tokens: float

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds the tokens `x [T, C]` (bf16, fp16, fp32 or fp64), `weight [T]` times each."""

    def merge(self, other: Any) -> None:
        """Adds what `other` has seen (another process, another part of the text); it is
        a statistic of the same kind and columns."""

    def finite(self) -> bool:
        """Whether no NaN and no infinity has entered."""


class NormStatistic:
    """Squared L2 norm of every column: `sum_squares[j] = sum_t weight[t] * x[t, j]**2`, fp32.

    Wanda's statistic (Sun et al. 2023, eq. 1) before the square root.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.sum_squares = torch.zeros(columns, dtype=torch.float32, device=device)
        self.tokens = 0.0

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        ops.column_norms(_at_most_single(x), weight=weight, out=self.sum_squares)
        self.tokens += _count(x, weight)

    def merge(self, other: NormStatistic) -> None:
        _check_columns(self.sum_squares, other.sum_squares)
        self.sum_squares += other.sum_squares.to(self.sum_squares.device)
        self.tokens += other.tokens

    def column_norms(self) -> Tensor:
        """Squared column norms `[C]`, as GramStatistic has them too."""
        return self.sum_squares

    def finite(self) -> bool:
        return bool(self.sum_squares.isfinite().all())


class MomentStatistic:
    """Mean and variance of every column, in fp64.

    `mean[j] = sum_t w_t x_tj / sum_t w_t`, `squares[j] = sum_t w_t (x_tj - mean[j])**2`, put
    together part by part (Chan, Golub and LeVeque 1983, eq. 2.1), so that a mean far from zero
    costs no precision.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.mean = torch.zeros(columns, dtype=torch.float64, device=device)
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.tokens = 0.0

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        x = x.double()
        if weight is None:
            weight = torch.ones(len(x), dtype=torch.float64, device=x.device)
        # Rows without weight may hold anything, NaN included.
        x, weight = x[weight > 0], weight[weight > 0].double()
        tokens = float(weight.sum())
        if tokens == 0:
            return
        mean = weight @ x / tokens
        self._add(mean, weight @ (x - mean).square_(), tokens)

    def merge(self, other: MomentStatistic) -> None:
        _check_columns(self.mean, other.mean)
        if other.tokens:
            device = self.mean.device
            self._add(other.mean.to(device), other.squares.to(device), other.tokens)

    def _add(self, mean: Tensor, squares: Tensor, tokens: float) -> None:
        total = self.tokens + tokens
        shift = mean - self.mean
        self.squares += squares + shift.square() * (self.tokens * tokens / total)
        self.mean += shift * (tokens / total)
        self.tokens = total

    def variance(self) -> Tensor:
        """`squares / tokens` `[C]`; zeros if nothing was seen."""
        return self.squares / max(self.tokens, 1.0)

    def finite(self) -> bool:
        return bool(self.squares.isfinite().all())


class GramStatistic:
    """Gram matrix of the inputs: `gram = sum_t weight[t] * x[t] x[t]^T`, `[C, C]` fp32, symmetric.

    A raw sum, not divided by the token count: half of SparseGPT's Hessian (Frantar and Alistarh
    2023, section 3.1) for one output row.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0.0

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        ops.gram(_at_most_single(x), weight=weight, out=self.gram)
        self.tokens += _count(x, weight)

    def merge(self, other: GramStatistic) -> None:
        _check_columns(self.gram, other.gram)
        self.gram += other.gram.to(self.gram.device)
        self.tokens += other.tokens

    def column_norms(self) -> Tensor:
        """Squared column norms `[C]`: the diagonal."""
        return self.gram.diagonal()

    def finite(self) -> bool:
        # |g_ij| <= (g_ii + g_jj) / 2, and a NaN or infinite input reaches its diagonal entry.
        return bool(self.gram.diagonal().isfinite().all())


def _at_most_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def _count(x: Tensor, weight: Tensor | None) -> float:
    return float(len(x)) if weight is None else float(weight.sum())


def _check_columns(mine: Tensor, other: Tensor) -> None:
    if mine.shape != other.shape:
        raise ValueError(f"expected a statistic of {len(mine)} columns, got {len(other)}")
