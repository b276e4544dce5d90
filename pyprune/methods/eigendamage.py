"""EigenDamage's arithmetic (Wang et al. 2019, arXiv 1905.05934) on one layer's tensors.

In the basis of the eigenvectors of both Kronecker factors the Fisher matrix `G (x) A` is diagonal,
so optimal brain damage there is optimal brain surgeon: nothing that is left needs an update.
Removing whole directions leaves a product of thin matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EigenBasis(NamedTuple):
    """Eigenvectors as columns, `left` `[R, R]` of G and `right` `[C, C]` of A, and eigenvalues in
    ascending order, none below 0: `left_values` `[R]`, `right_values` `[C]`. fp64.

    Eigenvectors of equal eigenvalues are any basis of their space.
    """

    left: Tensor
    right: Tensor
    left_values: Tensor
    right_values: Tensor

    def curvature(self) -> Tensor:
        """`[R, C]`: the diagonal of `G (x) A` in this basis."""
        return torch.outer(self.left_values, self.right_values)

    def rotate(self, w: Tensor) -> Tensor:
        """`w [R, C]` in this basis: `Q_G^T W Q_A`."""
        return self.left.T @ w.to(self.left.dtype) @ self.right

    def restore(self, rotated: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        return self.left @ rotated @ self.right.T


def eigenvectors(h: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[n]` of one factor, symmetric positive semidefinite, and its eigenvectors as
    columns `[n, n]`. What rounding leaves below zero of an eigenvalue is zero."""
    values, vectors = torch.linalg.eigh(h.double())
    # Row by row, as a file gives them back: products of them round the same then.
    return values.clamp_min(0), vectors.contiguous()


def element_costs(rotated: Tensor, curvature: Tensor) -> Tensor:
    """`[R, C]`: `W*_ij^2 F_ij / 2`, what removing one entry of the rotated weight adds to the loss.
    Their sum is `1/2 tr(G W A W^T)` under the factors' own curvature."""
    return 0.5 * rotated.square() * curvature


class Factors(NamedTuple):
    """`W = up @ down`: `up` `[R, k]`, `down` `[k, C]`."""

    up: Tensor
    down: Tensor

    @property
    def parameters(self) -> int:
        return self.up.numel() + self.down.numel()


def thin_factors(basis: EigenBasis, rotated: Tensor, rows: Tensor, columns: Tensor) -> Factors:
    """The weight whose output directions `rows` and input directions `columns` (index vectors) are
    all that is left, as two factors with `k = min(r, c)`.

    The paper keeps three, `Q_G[:, rows]`, the core `[r, c]` and `Q_A[:, columns]^T`. Merging the
    core into the rotation on its longer side never has more parameters: `k (R + C)` against
    `r R + r c + c C`.
    """
    core = rotated[rows][:, columns]
    left, right = basis.left[:, rows], basis.right[:, columns].T
    if len(rows) <= len(columns):
        return Factors(left, core @ right)
    return Factors(left @ core, right)
