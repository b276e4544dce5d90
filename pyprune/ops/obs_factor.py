"""The damped inverse factor of a layer Hessian: what the OBS sweep divides and updates by."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyprune.ops import _registry

# Below this size the blocked recursion hands over to LAPACK. Tried from 64 to 384 on a CPU: flat
# from 96 on. Launch latency asks for larger leaves on a GPU.
LEAF = {"cpu": 128, "cuda": 512}

# A damping is multiplied by this until the Cholesky factorisation succeeds.
DAMPING_STEP = 10.0


class NotPositiveDefiniteError(ValueError):
    """No damping up to the largest one allowed made the Hessian positive definite."""


class ObsFactor(NamedTuple):
    """`u`: `[..., C, C]` upper triangular; `dead`: bool `[..., C]`; `damping`: fp64 `[...]`."""

    u: Tensor
    dead: Tensor
    damping: Tensor


def _check_obs_factor(h: Tensor, damping: float, max_damping: float) -> None:
    if h.dim() not in (2, 3) or h.shape[-1] != h.shape[-2]:
        raise ValueError(f"h: expected shape [C, C] or [B, C, C], got {tuple(h.shape)}")
    if h.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"h: expected fp32 or fp64, got {h.dtype}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: expected a finite fraction >= 0, got {damping}")
    if not damping <= max_damping < math.inf:
        raise ValueError(f"max_damping: expected a finite value >= damping, got {max_damping}")


def damping_ladder(damping: float, max_damping: float) -> list[float]:
    """The dampings tried in turn: `damping`, then tenfold up to `max_damping`.

    From 0 the ladder continues at 1e-6, about the rounding error of fp32.
    """
    ladder = [damping]
    step = damping * DAMPING_STEP if damping else 1e-6
    while step <= max_damping * (1 + 1e-9):
        ladder.append(step)
        step *= DAMPING_STEP
    return ladder


def _split(n: int) -> int:
    """Where the recursion halves n: a multiple of 32, so that the products stay aligned."""
    return min(n - 1, (n // 2 + 31) // 32 * 32)


def _subtract_lower_product(a: Tensor, p: Tensor, leaf: int) -> None:
    """`a -= p @ p^T` on the lower triangle (blocks of `leaf` on the diagonal whole), in place."""
    n = a.shape[-1]
    if n <= 4 * leaf:
        a -= p @ p.mT
        return
    half = _split(n)
    top, bottom = p[..., :half, :], p[..., half:, :]
    _subtract_lower_product(a[..., :half, :half], top, leaf)
    a[..., half:, :half] -= bottom @ top.mT
    _subtract_lower_product(a[..., half:, half:], bottom, leaf)


def _invert_cholesky(a: Tensor, out: Tensor, leaf: int) -> Tensor:
    """`out = L^-1` for `a = L L^T` (`[B, n, n]`; `a` is overwritten). Returns failures `[B]`.

    Cholesky and triangular inverse in one recursion: with

        L^-1 = [[Y1, 0], [-Y2 P Y1, Y2]],  P = A21 Y1^T,  Y2 from A22 - P P^T

    all arithmetic outside the leaves is matrix products, which LAPACK's potrf and trtri on two
    cores do not reach the rate of: about half the time of the two calls at n = 2048.
    """
    n = a.shape[-1]
    if n <= leaf:
        lower, info = torch.linalg.cholesky_ex(a)
        eye = torch.eye(n, dtype=a.dtype, device=a.device)
        out.copy_(torch.linalg.solve_triangular(lower, eye.expand_as(a), upper=False))
        return info != 0
    half = _split(n)
    first, second = out[..., :half, :half], out[..., half:, half:]
    failed = _invert_cholesky(a[..., :half, :half], first, leaf)
    panel = a[..., half:, :half] @ first.mT
    _subtract_lower_product(a[..., half:, half:], panel, leaf)
    failed = failed | _invert_cholesky(a[..., half:, half:], second, leaf)
    out[..., half:, :half] = (second @ (panel @ first)).neg_()
    return failed


def _reversed_factor(h: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """U with `(h + diag(shift))^-1 = U^T U`, and which matrices worked; `[B, C, C]`, `[B, C]`.

    With J the reversal, `J (h + diag(shift)) J = L L^T` gives `U = J L^-1 J`.
    """
    flipped = h.flip(-2, -1)
    flipped.diagonal(dim1=-2, dim2=-1).add_(shift.flip(-1))
    out = torch.zeros_like(flipped)
    failed = _invert_cholesky(flipped, out, LEAF.get(h.device.type, LEAF["cpu"]))
    diagonal = out.diagonal(dim1=-2, dim2=-1)
    # Rounding can carry an indefinite matrix past the leaves with a NaN instead of a failure.
    worked = ~failed & (diagonal.isfinite() & (diagonal > 0)).all(dim=-1)
    return out.flip(-2, -1), worked


def _finite(h: Tensor) -> Tensor:
    """Which matrices of `[B, C, C]` are finite. The sum finds nearly all of those that are not in
    one pass without a temporary; only when it overflows is every element looked at."""
    finite = h.sum(dim=(-2, -1)).isfinite()
    return finite if bool(finite.all()) else h.isfinite().flatten(1).all(dim=1)


def obs_factor_reference(
    h: Tensor, damping: float, max_damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    stack = h if h.dim() == 3 else h[None]
    diagonal = stack.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    mean = diagonal.masked_fill(dead, 1).mean(dim=-1, keepdim=True)
    u = torch.full_like(stack, math.nan, memory_format=torch.contiguous_format)
    used = torch.full(stack.shape[:1], math.nan, dtype=torch.float64, device=h.device)
    pending = _finite(stack).nonzero().flatten() if h.shape[-1] else used.new_empty(0).long()
    for step in damping_ladder(damping, max_damping):
        # A rank-deficient H with next to no damping can be definite in fp64 though not in fp32:
        # that is tried before the problem is changed by more damping.
        for dtype in dict.fromkeys((h.dtype, torch.float64)):
            if not len(pending):
                break
            shift = (dead + step * mean.to(torch.float64))[pending].to(dtype)
            factor, worked = _reversed_factor(stack[pending].to(dtype), shift)
            u[pending[worked]] = factor[worked].to(h.dtype)
            used[pending[worked]] = step
            pending = pending[~worked]
    shape = h.shape[:-2]
    return u.view_as(h), dead.view(*shape, -1), used.view(shape)


def _obs_factor_fake(
    h: Tensor, damping: float, max_damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_obs_factor(h, damping, max_damping)
    u = torch.empty_like(h, memory_format=torch.contiguous_format)
    dead = h.new_empty(h.shape[:-1], dtype=torch.bool)
    return u, dead, h.new_empty(h.shape[:-2], dtype=torch.float64)


_registry.register(
    "obs_factor(Tensor h, float damping, float max_damping) -> (Tensor, Tensor, Tensor)",
    fake=_obs_factor_fake,
    impls={
        "reference": _registry.Impl(obs_factor_reference, (torch.float32, torch.float64)),
    },
)


def obs_factor(h: Tensor, *, damping: float = 0.01, max_damping: float = 1.0) -> ObsFactor:
    """Upper triangular factor of the inverse of a damped layer Hessian.

        U^T U = (H + damping * mean(diag H) * I)^-1

    from one Cholesky factorisation of the reversed matrix and one triangular inverse, where the
    SparseGPT code takes three factorisations (Frantar & Alistarh 2023, section 3.3 and algorithm 1;
    the factor is the same). `U_jj^2` is the first diagonal entry of the inverse of
    `(H + ...)[j:, j:]`, and `U_jj U[j, j:]` its first row: all that `obs_sweep` needs.

    Args:
        h: symmetric positive semidefinite `[C, C]` or `[B, C, C]`, fp32 or fp64, any strides, any
            positive scale (raw sums `X^T X` will do). Not modified.
        damping: first damping tried, as a fraction of the mean diagonal.
        max_damping: while the factorisation fails the damping is multiplied by 10, up to this.

    Returns:
        `u`, in the dtype of `h`. Its relative error in fp32 is that of a backward stable solve: H
            perturbed by about C * 6e-8 of its mean diagonal, small beside the damping. A matrix
            whose factorisation fails in fp32 is tried in fp64 before its damping is raised.
        `dead`: inputs that were always zero, `diag(H) == 0`. Their diagonal counts as 1, also in
            the mean. Their weights do not matter: set `w[:, dead] = 0` before `obs_sweep`.
        `damping`: what was used, per matrix.

    Raises:
        NotPositiveDefiniteError: every damping up to `max_damping` failed.
        ValueError: H has NaN or infinite entries, or a wrong shape or dtype.
    """
    _check_obs_factor(h, damping, max_damping)
    factor = ObsFactor(*torch.ops.pyprune.obs_factor(h, damping, max_damping))
    failed = factor.damping.isnan()
    if bool(failed.any()):
        which = f" (matrices {failed.nonzero().flatten().tolist()})" if h.dim() == 3 else ""
        if not bool(h.isfinite().all()):
            raise ValueError(f"h: expected finite values, got NaN or infinity{which}")
        tried = ", ".join(f"{d:g}" for d in damping_ladder(damping, max_damping))
        raise NotPositiveDefiniteError(
            f"h: not positive definite with any damping of {tried} times its mean diagonal{which}"
        )
    return factor


def inverse_diagonal(u: Tensor) -> Tensor:
    """`diag((H + damping)^-1)` from its factor: the squared column norms of `u` `[..., C, C]`.

    This is the denominator of the OBS score of a weight that is removed alone, `w_j^2 / d_j`
    (weights elsewhere free to adapt), not `U_jj^2`, which holds the columns before j fixed.
    """
    return torch.linalg.vector_norm(u, dim=-2).square()
