"""LLM Surgeon's arithmetic (van der Ouderaa et al. 2024, arXiv 2312.17244) on one layer's tensors:
OBS costs under a curvature G (x) A, and the exact joint update for removed rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import ops


def balanced(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The factors `[C, C]` and `[R, R]` scaled to one Frobenius norm; G (x) A is unchanged. Both
    become zero if one is."""
    norms = a.norm(), g.norm()
    if not bool(norms[0] * norms[1]):
        return torch.zeros_like(a), torch.zeros_like(g)
    ratio = (norms[1] / norms[0]).sqrt()
    return a * ratio, g / ratio


def damped_inverse(h: Tensor, damping: float) -> tuple[Tensor, float]:
    """`(H + damping * mean(diag H) * I)^-1` and the damping used; raises as `ops.obs_factor` does.

    Dead coordinates (zero on the diagonal) are to be cut out of `h` first: `obs_factor` would
    count their diagonal as 1.
    """
    if bool((h.diagonal() == 0).any()):
        raise ValueError("h: expected no zero on the diagonal")
    factor = ops.obs_factor(h, damping=damping)
    return factor.u.mT @ factor.u, float(factor.damping)


def element_costs(w: Tensor, a_inverse: Tensor, g_inverse: Tensor) -> Tensor:
    """`[R, C]`: `w_ij^2 / (2 [G^-1]_ii [A^-1]_jj)`, the loss of removing one weight and adapting
    all others (section 3.2)."""
    return 0.5 * w.square() / torch.outer(g_inverse.diagonal(), a_inverse.diagonal())


def row_costs(w: Tensor, a: Tensor, g_inverse: Tensor) -> Tensor:
    """`[R]`: `(W A W^T)_ii / (2 [G^-1]_ii)`. `a` undamped is the paper's, damped the loss that
    removing the row really costs in the damped problem."""
    return 0.5 * ops.kron_quadratic(w, a) / g_inverse.diagonal()


def column_costs(w: Tensor, g: Tensor, a_inverse: Tensor) -> Tensor:
    """`[C]`: `(W^T G W)_jj / (2 [A^-1]_jj)`, the column twin of `row_costs`."""
    return 0.5 * ops.kron_quadratic(w.T, g) / a_inverse.diagonal()


def remove_structures(
    w: Tensor, rows: Tensor, columns: Tensor, a_inverse: Tensor, g_inverse: Tensor
) -> Tensor:
    """The exact minimiser of `1/2 tr(D^T G D A)` with `rows` and `columns` zero: `(I-P) W (I-Q)`;
    see `ops.kron_remove`.

    Args:
        w: `[R, C]`. rows, columns: index vectors, either may be empty.
        a_inverse, g_inverse: `[C, C]` and `[R, R]`, of the damped factors.
    """
    return ops.kron_remove(w, rows, columns, a_inverse, g_inverse)
