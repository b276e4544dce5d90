"""The damped inverse factor of a layer Hessian: what the OBS sweep divides and updates by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import check_tensor
from pyprune.ops._precision import full_precision
from pyprune.ops.storage import unit_columns

# Below this size the blocked recursion hands over to LAPACK. Tried from 64 to 384 on a CPU: flat
# from 96 on. Launch latency asks for larger leaves on a GPU.
LEAF = {"cpu": 128, "cuda": 512}

FACTOR_DTYPES = (torch.float32, torch.float64)

# Of h `[B, C, C]` and shift `[B, C]`: U with `(h + diag(shift))^-1 = U^T U`, and bool `[B]`, False
# where that matrix is not positive definite (its U is then unspecified).
Factorise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

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
    check_tensor("h", h)
    if h.dim() not in (2, 3) or h.shape[-1] != h.shape[-2]:
        raise ValueError(f"h: expected shape [C, C] or [B, C, C], got {tuple(h.shape)}")
    if h.dtype not in FACTOR_DTYPES:
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
        a.baddbmm_(p, p.mT, alpha=-1)
        return
    half = _split(n)
    _subtract_lower_product(a[:, :half, :half], p[:, :half], leaf)
    a[:, half:, :half].baddbmm_(p[:, half:], p[:, :half].mT, alpha=-1)
    _subtract_lower_product(a[:, half:, half:], p[:, half:], leaf)


def _invert_cholesky(a: Tensor, out: Tensor, leaf: int) -> None:
    """`out = L^-1` for `a = L L^T`, both `[B, n, n]`; reads the lower triangles of `a`, overwrites
    them.

    Cholesky and triangular inverse in one recursion: with

        L^-1 = [[Y1, 0], [-Y2 P Y1, Y2]],  P = A21 Y1^T,  Y2 from A22 - P P^T

    all arithmetic outside the leaves is matrix products, whose rate LAPACK's potrf and trtri do not
    reach: about half the time of those two at n = 2048 on two cores. Where `a` is not positive
    definite the diagonal of `out` gets a NaN.
    """
    n = a.shape[-1]
    if n <= leaf:
        out.copy_(_by_lapack(a))
        return
    half = _split(n)
    first, second = out[:, :half, :half], out[:, half:, half:]
    _invert_cholesky(a[:, :half, :half], first, leaf)
    panel = a[:, half:, :half] @ first.mT
    _subtract_lower_product(a[:, half:, half:], panel, leaf)
    _invert_cholesky(a[:, half:, half:], second, leaf)
    out[:, half:, :half] = second @ (panel @ first).neg_()


def _by_products(a: Tensor) -> Tensor:
    out = torch.zeros_like(a)
    _invert_cholesky(a, out, LEAF.get(a.device.type, LEAF["cpu"]))
    return out


def _by_lapack(a: Tensor) -> Tensor:
    lower, info = torch.linalg.cholesky_ex(a)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    out: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return out.masked_fill((info != 0)[:, None, None], math.nan)


def _reversed_factor(
    h: Tensor, shift: Tensor, inverse: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """With J the reversal, `J (h + diag(shift)) J = L L^T` gives `U = J L^-1 J`. `inverse` makes
    `L^-1` from the reversed matrices, with a NaN on its diagonal where one is not definite."""
    flipped = h.flip(1, 2)
    flipped.diagonal(dim1=1, dim2=2).add_(shift.flip(1))
    lower = inverse(flipped)
    diagonal = lower.diagonal(dim1=1, dim2=2)
    return lower.flip(1, 2), (diagonal.isfinite() & (diagonal > 0)).all(1)


def _factor_reference(h: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return _reversed_factor(h, shift, _by_lapack)


def _factor_blocked(h: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return _reversed_factor(h, shift, _by_products)


def _finite(h: Tensor) -> Tensor:
    """Bool `[B]`. The sum finds nearly all matrices that are not finite in one pass without a
    temporary."""
    finite = h.sum((1, 2)).isfinite()
    return finite if bool(finite.all()) else h.isfinite().flatten(1).all(1)


def _pivots_are_accurate(u: Tensor, h: Tensor, shift: Tensor) -> Tensor:
    """Bool `[B]`: whether every pivot `1 / U_jj^2` stands clear of the rounding error of the
    subtractions it is left over from, about sqrt(n) eps H_jj. One that does not has its sign by
    luck."""
    eps = math.sqrt(h.shape[-1]) * torch.finfo(u.dtype).eps
    noise = eps * (h.diagonal(dim1=1, dim2=2) + shift)
    return (u.diagonal(dim1=1, dim2=2).square() * noise < 1).all(1)


class _Stack:
    """The matrices of one call: what is found out about each. `damping` is NaN until `u` is
    there."""

    def __init__(self, h: Tensor) -> None:
        self.h = h
        self.dead = h.diagonal(dim1=1, dim2=2) == 0
        self.mean = h.diagonal(dim1=1, dim2=2).double().masked_fill(self.dead, 1).mean(1)
        self.damping = torch.full_like(self.mean, math.nan)
        self.u = h.new_empty(0)
        finite = _finite(h)
        self.waiting: Tensor | None = None if bool(finite.all()) else finite.nonzero()[:, 0]

    def climb(self, ladder: list[float], factorise: Factorise) -> None:
        """Factors each matrix with the first damping of the ladder that will do."""
        if self.waiting is not None and not len(self.waiting):
            return
        for damping in ladder:
            # A rank-deficient H with next to no damping can be definite in fp64 though not in fp32:
            # that is tried before the problem is changed by more damping.
            for dtype in dict.fromkeys((self.h.dtype, torch.float64)):
                if self._try(damping, dtype, factorise):
                    return

    def _try(self, damping: float, dtype: torch.dtype, factorise: Factorise) -> bool:
        """Factors those that wait for it; whether none waits any more."""
        at = self.waiting
        h, dead, mean = (t if at is None else t[at] for t in (self.h, self.dead, self.mean))
        shift = (dead + damping * mean[:, None]).to(dtype)
        u, good = factorise(h.to(dtype), shift)
        if dtype != torch.float64:
            good &= _pivots_are_accurate(u, h, shift)
        if at is None and bool(good.all()):
            self.u, self.damping[:] = u.to(self.h.dtype), damping
            return True
        if at is None:
            at = torch.arange(len(self.h), device=self.h.device)
        if not self.u.numel():
            self.u = torch.full(self.h.shape, math.nan, dtype=self.h.dtype, device=self.h.device)
        self.u[at[good]], self.damping[at[good]] = u[good].to(self.h.dtype), damping
        self.waiting = at[~good]
        return not len(self.waiting)


@full_precision()
def _obs_factor(
    h: Tensor, damping: float, max_damping: float, factorise: Factorise
) -> tuple[Tensor, Tensor, Tensor]:
    stack = _Stack(h if h.dim() == 3 else h[None])
    stack.climb(damping_ladder(damping, max_damping), factorise)
    u = stack.u if stack.u.numel() else torch.full_like(stack.h, math.nan)
    result = (u, stack.dead, stack.damping)
    return result if h.dim() == 3 else (u[0], stack.dead[0], stack.damping[0])


def obs_factor_reference(
    h: Tensor, damping: float, max_damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _obs_factor(h, damping, max_damping, _factor_reference)


def obs_factor_blocked(
    h: Tensor, damping: float, max_damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _obs_factor(h, damping, max_damping, _factor_blocked)


def _obs_factor_native(
    h: Tensor, damping: float, max_damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel makes one attempt, in fp32 with the first damping: dead inputs, damping and the
    judgement of H and the pivots included. What it gives up is the rare case."""
    if h.dtype != torch.float32:
        return obs_factor_blocked(h, damping, max_damping)
    rows = unit_columns(h)
    u, dead = h.new_empty(h.shape), h.new_empty(h.shape[:-1], dtype=torch.bool)
    if h.dim() == 2:
        if not _native.call("obs_factor", u, dead, rows, damping):
            return obs_factor_blocked(h, damping, max_damping)
        return u, dead, h.new_tensor(damping, dtype=torch.float64)
    used = h.new_full(h.shape[:1], damping, dtype=torch.float64)
    good = [_native.call("obs_factor", u[b], dead[b], rows[b], damping) for b in range(len(u))]
    if not all(good):
        bad = [b for b, fine in enumerate(good) if not fine]
        u[bad], dead[bad], used[bad] = obs_factor_blocked(h[bad], damping, max_damping)
    return u, dead, used


def _obs_factor_fake(
    h: Tensor, damping: float, max_damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_obs_factor(h, damping, max_damping)
    u = torch.empty_like(h, memory_format=torch.contiguous_format)
    dead = h.new_empty(h.shape[:-1], dtype=torch.bool)
    return u, dead, h.new_empty(h.shape[:-2], dtype=torch.float64)


registry.register(
    "obs_factor(Tensor h, float damping, float max_damping) -> (Tensor, Tensor, Tensor)",
    fake=_obs_factor_fake,
    impls={
        "reference": registry.Impl(obs_factor_reference, FACTOR_DTYPES),
        "native": registry.Impl(_obs_factor_native, FACTOR_DTYPES),
        # Nearly all of it is matrix products, which cuBLAS does best.
        "triton": registry.Impl(obs_factor_blocked, FACTOR_DTYPES),
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
            positive scale (raw sums `X^T X` will do; of dead inputs see below). Not modified.
        damping: first damping tried, as a fraction of the mean diagonal.
        max_damping: while the factorisation fails the damping is multiplied by 10, up to this.

    Returns:
        `u`, in the dtype of `h`. Its relative error in fp32 is that of a backward stable solve: H
            perturbed by about C * 6e-8 of its mean diagonal, small beside the damping. A matrix
            whose factorisation fails in fp32 is tried in fp64 before its damping is raised.
        `dead`: inputs that were always zero, `diag(H) == 0`. As in the SparseGPT code, their
            diagonal is set to 1 before the mean is taken over all C entries. With dead inputs, and
            only then, the damping's share of the others therefore depends on the scale of `h`:
            where that is far below 1 the ones make most of the mean. The SparseGPT code has
            `H = 2/N X^T X`; in sums over tokens, which `pyprune prune` gives, the ones are next to
            nothing. Their weights do not matter: set `w[:, dead] = 0` before `obs_sweep`.
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

    Returns `[..., C]`. Raises ValueError unless `u` is square, in fp32 or fp64.
    """
    check_tensor("u", u)
    if u.dim() < 2 or u.shape[-1] != u.shape[-2]:
        raise ValueError(f"u: expected shape [..., C, C], got {tuple(u.shape)}")
    if u.dtype not in FACTOR_DTYPES:
        raise ValueError(f"u: expected fp32 or fp64, got {u.dtype}")
    return u.square().sum(dim=-2)
