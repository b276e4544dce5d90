"""Conjugate gradients on many masked rows that share one matrix: one dense product an iteration
serves all rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyprune.ops.split_matrix import SplitMatrix

# Iterations between two looks at which rows are done: each look waits for a GPU.
LOOK = 4

# Rows that are done leave the products once they are this share of those that take part.
COMPACT = 0.25


# Rank of the preconditioner (a multiple of 8, as the native kernel wants it) and the least share of
# its diagonal that it leaves unexplained: fp32 loses log10 of the one over the other in digits.
RANK = 32
LEAST_LEFT = 0.03


class NearHessian(NamedTuple):
    """diag(`diagonal` `[C]`) + `low`^T `low`, `low` `[K, C]`: about H, and cheap to invert on any
    set of columns. `least`: no eigenvalue of H over it, on any set, is smaller."""

    low: Tensor
    diagonal: Tensor
    least: float


def near_hessian(h: Tensor, inverse: Tensor) -> NearHessian:
    """`largest_directions` of H `[C, C]` and the diagonal they leave.

    It is at most H, so for x with unit diagonal scaling x H x / x (D + A A^T) x is at least
    h / (1 + h) with h the least eigenvalue of the scaled H, which the inverse bounds from below.
    """
    size = h.diagonal().sqrt()
    row_sums = (inverse.abs() @ size) * size
    # A tenth off for the rounding of the inverse.
    lowest = 0.9 / max(float(row_sums.max()), 1e-30) if len(h) else 1.0
    least = min(lowest, 1.0) / (1 + min(lowest, 1.0))
    low, left = largest_directions(h)
    return NearHessian((low * size).contiguous(), left * size.square(), least)


def largest_directions(h: Tensor) -> tuple[Tensor, Tensor]:
    """`low [K, C]` and `left [C]`, so that H is about low^T low + diag(left): for H `[C, C]` scaled
    to a unit diagonal, which `h` itself need not have. K is `RANK`, or less where C is small.

    The Nystroem approximation in the directions of the largest eigenvalues, from one power step
    from a fixed random start: at most H before what it leaves of the diagonal is added.
    """
    columns = len(h)
    rank = min(RANK, columns // 4 // 8 * 8)
    if not rank:
        return h.new_zeros(0, columns), h.new_ones(columns)
    generator = torch.Generator(device=h.device).manual_seed(0)
    start = torch.randn(columns, rank, generator=generator, device=h.device, dtype=h.dtype)
    inner = h.diagonal().sqrt()[:, None]
    basis = torch.linalg.qr((h @ (start / inner)) / inner).Q
    image = (h @ (basis / inner)) / inner
    core = basis.mT @ image
    # What rounding takes from the smallest eigenvalues is put back: the core may only be too large.
    rounding = 4 * math.sqrt(columns) * torch.finfo(h.dtype).eps
    core.diagonal().add_(core.diagonal().sum() * rounding)
    low = torch.linalg.solve_triangular(torch.linalg.cholesky(core), image.mT, upper=False)
    return low, (1 - low.square().sum(0)).clamp_min(LEAST_LEFT)


class Problem(NamedTuple):
    """Minimise (x - w) H (x - w)^T per row over x that is zero outside the mask.

    x `[R, C]`; residual `[R, C]`, ((w - x) H) on the mask; mask `[R, C]` bool; h `[C, C]`; near:
    what preconditions; loss, noise `[R]` fp64: see `ops.obs_reconstruct`.
    """

    x: Tensor
    residual: Tensor
    mask: Tensor
    h: Tensor
    near: NearHessian
    loss: Tensor
    noise: Tensor


class Steps(Protocol):
    """What happens between the products, for one set of rows; everything is updated in place.

    `active` `[R]` bool: rows that still move; `rz` `[R]` fp64: r M r, M the preconditioner; `radau`
    `[R]` fp64: times `rz` it bounds what there is to gain, the Gauss-Radau coefficient for
    eigenvalues from `near.least` up (`next_radau`).
    """

    active: Tensor
    rz: Tensor
    radau: Tensor

    def __init__(self, problem: Problem, tolerance: float) -> None: ...

    def turn(self, p: Tensor, z: Tensor, first: bool) -> None:
        """`z` = r M: masks it, sets `rz`, settles `active` and makes the next direction `p`."""

    def advance(self, p: Tensor, hp: Tensor) -> None:
        """`hp` = p H: moves x along p as far as the loss falls, in the active rows."""


def next_radau(radau: Tensor, step: Tensor, ratio: Tensor, least: float) -> Tensor:
    """Meurant & Tichy 2013 (Numer. Algorithms 62): `step` is alpha of the last iteration, `ratio`
    rz after it over rz before, `least` a bound on the least eigenvalue. Rounding can take the
    difference below zero; the first bound, 1 / least, always holds."""
    left = radau - step
    return torch.where(left > 0, left / (least * left + ratio), 1 / least)


class TorchSteps:
    """`Steps` in plain PyTorch."""

    def __init__(self, problem: Problem, tolerance: float) -> None:
        self.problem, self.tolerance = problem, tolerance
        self.rz, self.step = torch.zeros_like(problem.loss), torch.zeros_like(problem.loss)
        self.radau = torch.full_like(problem.loss, 1 / problem.near.least)
        self.active = torch.ones_like(problem.loss, dtype=torch.bool)

    def turn(self, p: Tensor, z: Tensor, first: bool) -> None:
        z.masked_fill_(~self.problem.mask, 0)
        next_rz = (z * self.problem.residual).sum(1, dtype=torch.float64)
        ratio = torch.zeros_like(next_rz) if first else next_rz / self.rz
        if not first:
            radau = next_radau(self.radau, self.step, ratio, self.problem.near.least)
            self.radau = torch.where(self.active, radau, self.radau)
        ratio = torch.where(self.active, ratio, 0).to(p.dtype)
        self.rz = torch.where(self.active, next_rz, self.rz)
        bound = self.tolerance * (self.problem.loss.clamp_min(0) + self.problem.noise)
        self.active &= ~(self.radau * self.rz <= bound)
        p.mul_(ratio[:, None]).add_(z)

    def advance(self, p: Tensor, hp: Tensor) -> None:
        x, residual, mask, _, _, loss, _ = self.problem
        hp.masked_fill_(~mask, 0)
        curvature = (p * hp).sum(1, dtype=torch.float64)
        self.active &= curvature > 0
        self.step = torch.where(self.active, self.rz / curvature, 0)
        loss -= self.step * self.rz
        along = self.step.to(p.dtype)[:, None]
        x.addcmul_(along, p)
        residual.addcmul_(along, hp, value=-1)


class Preconditioner:
    """(D + A A^T)^-1 on the kept columns of each row, by Woodbury: D^-1 - F G^-1 F^T with
    F = D^-1 A and G = I + A^T F over them, `[R, K, K]`."""

    def __init__(self, near: NearHessian, mask: Tensor) -> None:
        low, rank = near.low, len(near.low)
        self.diagonal, self.f = near.diagonal, low / near.diagonal
        products = (low[:, None] * self.f).flatten(0, 1)
        g = (mask.to(low.dtype) @ products.mT).view(len(mask), rank, rank)
        g.diagonal(dim1=1, dim2=2).add_(1)
        eye = torch.eye(rank, dtype=low.dtype, device=low.device)
        # Not cholesky_solve, which on a GPU solves one matrix of the stack after the other.
        lower = torch.linalg.cholesky(g)
        root = torch.linalg.solve_triangular(lower, eye.expand_as(g), upper=False)
        self.inverse = root.mT @ root

    def apply(self, residual: Tensor, out: Tensor | None = None) -> Tensor:
        """Of residuals that are zero outside the mask; the result is not masked."""
        inner = torch.bmm(self.inverse, (residual @ self.f.mT)[..., None])[..., 0]
        return torch.addmm(residual / self.diagonal, inner, self.f, alpha=-1, out=out)

    def keep(self, rows: Tensor) -> None:
        self.inverse = self.inverse[rows]


def product_with(h: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`(p, out)` to `out = p @ h`. On a GPU all of h but only 16 bits of p: the steps are a little
    off the conjugate directions, and the residual that they leave is that of weights as much off
    the ones returned, which costs less by a square."""
    if h.device.type == "cuda" and h.dtype == torch.float32:
        return SplitMatrix(h).times
    return lambda p, out: torch.mm(p, h, out=out)


def solve_by_products(
    problem: Problem,
    tolerance: float,
    max_iterations: int,
    steps: type[Steps] = TorchSteps,
) -> tuple[Problem, Tensor, Tensor]:
    """Solves in place; returns the problem, the bound on the loss still to gain and the iterations,
    `[R]` fp64 and int32. A row is done when that bound is at most tolerance * (loss + noise)."""
    gap = torch.zeros_like(problem.loss)
    count = torch.zeros(len(problem.x), dtype=torch.int32, device=problem.x.device)
    rows = torch.arange(len(problem.x), device=problem.x.device)
    part, state, times_h = problem, steps(problem, tolerance), product_with(problem.h)
    preconditioner = Preconditioner(problem.near, problem.mask)
    p, z = torch.zeros_like(part.x), preconditioner.apply(part.residual)
    state.turn(p, z, first=True)
    for done in range(max_iterations):
        if done % LOOK == 0:
            left = int(state.active.sum())
            if left == 0:
                break
            if left <= COMPACT * len(rows):
                _store(problem, part, gap, state, rows)
                keep = state.active
                part, p, z, rows = _rows_of(part, keep), p[keep], z[keep], rows[keep]
                preconditioner.keep(keep)
                rz, radau, state = state.rz[keep], state.radau[keep], steps(part, tolerance)
                state.rz.copy_(rz)
                state.radau.copy_(radau)
        state.advance(p, times_h(p, z))
        count[rows] += state.active.to(torch.int32)
        state.turn(p, preconditioner.apply(part.residual, out=z), first=False)
    _store(problem, part, gap, state, rows)
    problem.loss.clamp_min_(0)
    return problem, gap, count


def _rows_of(problem: Problem, rows: Tensor) -> Problem:
    x, residual, mask, h, near, loss, noise = problem
    return Problem(x[rows], residual[rows], mask[rows], h, near, loss[rows], noise[rows])


def _store(problem: Problem, part: Problem, gap: Tensor, state: Steps, rows: Tensor) -> None:
    """Writes what a part of the rows has come to into the whole."""
    gap[rows] = state.radau * state.rz
    if part is not problem:
        problem.x[rows], problem.loss[rows] = part.x, part.loss
