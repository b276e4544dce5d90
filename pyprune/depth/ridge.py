"""Least squares for a square matrix that is drawn to the identity, and how strongly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.errors import UserError

# Ridges that are tried, in mean squared outputs: half decades.
LADDER = tuple(10.0 ** (k / 2) for k in range(-8, 7))
HELD_OUT = 4  # every so many-th sequence is held out


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


def held_out_errors(fitted: Moments, held: Moments, ridges: tuple[float, ...]) -> list[float]:
    """Errors on `held` of the solutions of `fitted`, one per ridge; none is negative.

    With the eigenvectors Q of the Gram matrix, W = Q S C with C = Q'M'E and S = 1 / (eigenvalues +
    ridge) diagonal; so the error is a quadratic form in S, and each ridge takes d^2 operations.
    """
    values, vectors = torch.linalg.eigh(fitted.gram)
    c = vectors.T @ fitted.cross
    linear = (c * (vectors.T @ held.cross)).sum(1)
    square = (vectors.T @ held.gram @ vectors) * (c @ c.T)
    errors = []
    for ridge in ridges:
        s = 1 / (values.clamp(min=0) + ridge * fitted.unit)
        error = float(held.error - 2 * (s * linear).sum() + s @ (square @ s))
        errors.append(max(error, 0.0))  # what rounding leaves of a perfect fit
    return errors


def choose_ridge(
    fitted: Moments, held: Moments, ridges: tuple[float, ...] = LADDER
) -> tuple[float | None, float]:
    """The ridge of those whose solution on `fitted` has the least error on `held`, and that error
    over the error without a change. None (and 1) where no change is best, which wins ties; of
    equals the larger ridge."""
    best: tuple[float | None, float] = (None, float(held.error))
    if fitted.unit > 0:
        for ridge, error in zip(ridges, held_out_errors(fitted, held, ridges), strict=True):
            if error < best[1] or (error == best[1] and best[0] is not None):
                best = ridge, error
    return best[0], best[1] / float(held.error) if best[0] is not None else 1.0
