"""Conjugate gradients on many masked rows that share one matrix: two dense products an iteration
serve all rows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Iterations between two looks at which rows are done: each look waits for a GPU.
LOOK = 4

# Rows that are done leave the products once they are this share of those that take part.
COMPACT = 0.25


class Problem(NamedTuple):
    """Minimise (x - w) H (x - w)^T per row over x that is zero outside the mask.

    x `[R, C]`; residual `[R, C]`, ((w - x) H) on the mask; mask `[R, C]` bool; h `[C, C]`;
    inverse `[C, C]`, about H^-1; loss, noise `[R]` fp64: see `ops.obs_reconstruct`.
    """

    x: Tensor
    residual: Tensor
    mask: Tensor
    h: Tensor
    inverse: Tensor
    loss: Tensor
    noise: Tensor


class Steps(Protocol):
    """What happens between the products, for one set of rows; everything is updated in place.

    `active` `[R]` bool: rows that still move; `rz` `[R]` fp64: r (H^-1)_SS r.
    """

    active: Tensor
    rz: Tensor

    def __init__(self, problem: Problem, tolerance: float) -> None: ...

    def turn(self, p: Tensor, z: Tensor, first: bool) -> None:
        """`z` = r H^-1: masks it, sets `rz`, settles `active` and makes the next direction `p`."""

    def advance(self, p: Tensor, hp: Tensor) -> None:
        """`hp` = p H: moves x along p as far as the loss falls, in the active rows."""


class TorchSteps:
    """`Steps` in plain PyTorch."""

    def __init__(self, problem: Problem, tolerance: float) -> None:
        self.problem, self.tolerance = problem, tolerance
        self.rz = torch.zeros_like(problem.loss)
        self.active = torch.ones_like(problem.loss, dtype=torch.bool)

    def turn(self, p: Tensor, z: Tensor, first: bool) -> None:
        z.masked_fill_(~self.problem.mask, 0)
        next_rz = (z * self.problem.residual).sum(1, dtype=torch.float64)
        ratio = torch.zeros_like(next_rz) if first else next_rz / self.rz
        ratio = torch.where(self.active, ratio, 0).to(p.dtype)
        self.rz = torch.where(self.active, next_rz, self.rz)
        bound = self.tolerance * (self.problem.loss.clamp_min(0) + self.problem.noise)
        self.active &= ~(self.rz <= bound)
        p.mul_(ratio[:, None]).add_(z)

    def advance(self, p: Tensor, hp: Tensor) -> None:
        x, residual, mask, _, _, loss, _ = self.problem
        hp.masked_fill_(~mask, 0)
        curvature = (p * hp).sum(1, dtype=torch.float64)
        self.active &= curvature > 0
        step = torch.where(self.active, self.rz / curvature, 0)
        loss -= step * self.rz
        along = step.to(p.dtype)[:, None]
        x.addcmul_(along, p)
        residual.addcmul_(along, hp, value=-1)


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
    part, state = problem, steps(problem, tolerance)
    p, z = torch.zeros_like(part.x), part.residual @ part.inverse
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
                rz, state = state.rz[keep], steps(part, tolerance)
                state.rz.copy_(rz)
        state.advance(p, torch.mm(p, part.h, out=z))
        count[rows] += state.active.to(torch.int32)
        state.turn(p, torch.mm(part.residual, part.inverse, out=z), first=False)
    _store(problem, part, gap, state, rows)
    problem.loss.clamp_min_(0)
    return problem, gap, count


def _rows_of(problem: Problem, rows: Tensor) -> Problem:
    x, residual, mask, h, inverse, loss, noise = problem
    return Problem(x[rows], residual[rows], mask[rows], h, inverse, loss[rows], noise[rows])


def _store(problem: Problem, part: Problem, gap: Tensor, state: Steps, rows: Tensor) -> None:
    """Writes what a part of the rows has come to into the whole."""
    gap[rows] = state.rz
    if part is not problem:
        problem.x[rows], problem.loss[rows] = part.x, part.loss
