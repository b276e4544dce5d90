"""Least squares for a square matrix that is drawn to the identity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.errors import UserError

# Ridges that are tried, in mean squared outputs; the largest first, which wins ties.
LADDER = tuple(10.0**k for k in range(3, -5, -1))


def check_ridge(ridge: float | None) -> None:
    if ridge is not None and not 0 < ridge < math.inf:
        raise UserError(f"ridge: expected a positive number or none, got {ridge}")


@dataclass(frozen=True)
class Moments:
    """What |M (I + W) - Y|^2 depends on, float64, with E = Y - M what is missing: gram M'M [d, d],
    cross M'E [d, d], error |E|^2."""

    gram: Tensor
    cross: Tensor
    error: Tensor

    @classmethod
    def of(cls, m: Tensor, missing: Tensor) -> Moments:
        """From rows m [n, d] and missing [n, d]."""
        m, missing = m.double(), missing.double()
        return cls(m.T @ m, m.T @ missing, missing.square().sum())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.error + other.error)

    @property
    def unit(self) -> Tensor:
        """The mean diagonal of the Gram matrix: what a ridge is a multiple of."""
        return self.gram.diagonal().mean()

    def error_of(self, change: Tensor) -> float:
        """|M (I + change) - Y|^2; no less than 0 (up to rounding)."""
        linear, square = (change * self.cross).sum(), (change * (self.gram @ change)).sum()
        return float(self.error - 2 * linear + square)

    def solve(self, ridge: float) -> Tensor:
        """W [d, d] that minimises |M (I + W) - Y|^2 + ridge x unit x |W|^2; 0 if M is 0."""
        if not self.unit > 0:
            return torch.zeros_like(self.gram)
        eye = torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        solution: Tensor = torch.linalg.solve(self.gram + ridge * self.unit * eye, self.cross)
        return solution


class Solutions:
    """`Moments.solve` for many ridges by one eigendecomposition of the Gram matrix: with its
    eigenvectors Q, W = Q S C with C = Q'M'E and S = 1 / (eigenvalues + ridge x unit) diagonal. The
    Gram matrix must not be 0."""

    def __init__(self, fitted: Moments) -> None:
        values, self._vectors = torch.linalg.eigh(fitted.gram)
        self._values, self._unit = values.clamp(min=0), fitted.unit
        self._c = self._vectors.T @ fitted.cross

    def _scales(self, ridge: float) -> Tensor:
        scales: Tensor = 1 / (self._values + ridge * self._unit)
        return scales

    def change_of(self, rows: Tensor, ridge: float) -> Tensor:
        """rows @ W, float64 [n, d], without W."""
        change: Tensor = (rows @ self._vectors * self._scales(ridge)) @ self._c
        return change
