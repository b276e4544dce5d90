"""LLM Surgeon's arithmetic (van der Ouderaa et al. 2024, arXiv 2312.17244) on one layer's tensors:
OBS costs under a curvature G (x) A, and the joint updates for removed rows, columns and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops.obs_factor import ObsFactor, inverse_diagonal

Update = Literal["joint", "grouped", "none"]
# Pruned weights that the paper's code solves for at once.
GROUP = 2000
# The conjugate gradients that solve for them end at a residual of so many times the rounding unit,
# relative to the right-hand side. In fp32 the weights are then as near to those in fp64 as the
# dense systems' are.
RESIDUAL = 8
# The joint update of elements stops where it is by `ops.kron_pcg`'s estimate this far above the
# least loss. On matrices of SmolLM2-135M with 3 to 60 % of their weights pruned it was then 0.2 to
# 1.4 % above it, after 3 to 17 iterations (2.4 % on one, after 36), and 1.7 to 2.6 % with more of
# them pruned, after 8 to 13. Zeroing has 3 to 60 times the least loss.
TOLERANCE = 2e-2
ITERATIONS = 80


def row_costs(w: Tensor, a: Tensor, g_inverse_diagonal: Tensor) -> Tensor:
    """`[R]`: `(W A W^T)_ii / (2 [G^-1]_ii)`. `a` undamped is the paper's, damped the loss that
    removing the row really costs in the damped problem."""
    return 0.5 * ops.kron_quadratic(w, a) / g_inverse_diagonal


def column_costs(w: Tensor, g: Tensor, a_inverse_diagonal: Tensor) -> Tensor:
    """`[C]`: `(W^T G W)_jj / (2 [A^-1]_jj)`, the column twin of `row_costs`."""
    return 0.5 * ops.kron_quadratic(w.T, g) / a_inverse_diagonal


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


def sum_of_removals(
    w: Tensor, rows: Tensor, columns: Tensor, a_inverse: Tensor, g_inverse: Tensor
) -> Tensor:
    """The paper's update: the corrections for `rows` and for `columns`, each made on the original
    W, added up and cut. Arguments as in `remove_structures`, which it is compared with."""
    none = rows[:0]
    out = remove_structures(w, rows, none, a_inverse, g_inverse)
    out += remove_structures(w, none, columns, a_inverse, g_inverse) - w
    out[rows] = 0
    out[:, columns] = 0
    return out


def remove_in_groups(
    w: Tensor, mask: Tensor, a_inverse: Tensor, g_inverse: Tensor, size: int = GROUP
) -> Tensor:
    """The paper's update for elements (its appendix, with accumulated updates): groups of whole
    consecutive rows with up to `size` pruned weights (a row with more is a group of its own) are
    solved one after the other, `-G^-1 M A^-1` with M from the group's dense system.

    Later groups disturb the zeros of earlier ones, which are cut at the end: unlike
    `ops.kron_pcg` this minimises nothing. `mask [R, C]` bool, True = kept.

    The paper's code makes and factors the systems, P size^2 / 3 flops and more for P pruned weights
    (7e13 for the block matrices of SmolLM2-135M at 50 %). Here conjugate gradients solve them as
    exactly: an iteration is a product of a group's rows with A^-1, and 30 to 70 of them do.
    """
    a_size, g_size = a_inverse.diagonal().sqrt(), g_inverse.diagonal().sqrt()[:, None]
    # With unit diagonals the iteration needs no preconditioner: it would be the diagonal.
    a, g = a_inverse / a_size / a_size[:, None], g_inverse / g_size / g_size.mT
    new, gone = w / g_size / a_size, (~mask).to(w.dtype)
    for rows in _row_groups((~mask).sum(1).tolist(), size):
        m = _multipliers(new[rows], gone[rows], a, g[rows, rows])
        new -= g[:, rows] @ (m @ a)
    return torch.where(mask, new.mul_(g_size).mul_(a_size), 0)


def _multipliers(w: Tensor, gone: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """M `[r, C]`, zero but where `gone` is 1, for which `g M a` is `w` there.

    By conjugate gradients until the residual is rounding; where as many iterations as there are
    unknowns do not do, by the dense system.
    """
    residual = w * gone
    found, direction = torch.zeros_like(residual), residual.clone()
    rho = _square(residual)
    least = rho * (RESIDUAL * torch.finfo(w.dtype).eps) ** 2
    for _ in range(int(gone.sum())):
        if rho <= least:
            break
        image = (g @ (direction @ a)).mul_(gone)
        step = rho / float(torch.dot(image.flatten(), direction.flatten()))
        found.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        previous, rho = rho, _square(residual)
        direction.mul_(rho / previous).add_(residual)
    if rho <= least:
        return found
    i, j = gone.nonzero().unbind(1)
    found.zero_()[i, j] = _solved(g[i][:, i] * a[j][:, j], w[i, j])
    return found


def _square(t: Tensor) -> float:
    return float(torch.dot(t.flatten(), t.flatten()))


def _solved(h: Tensor, b: Tensor) -> Tensor:
    """H^-1 b for H `[n, n]`, positive definite but perhaps for rounding."""
    lower, failed = torch.linalg.cholesky_ex(h)
    solved: Tensor = (
        torch.linalg.solve(h, b[:, None])
        if bool(failed)
        else torch.cholesky_solve(b[:, None], lower)
    )
    return solved[:, 0]


def _row_groups(counts: list[int], size: int) -> Iterator[slice]:
    start = total = 0
    for row, count in enumerate(counts):
        if total and total + count > size:
            yield slice(start, row)
            start, total = row, 0
        total += count
    if total:
        yield slice(start, len(counts))


@dataclass(frozen=True, eq=False)
class Corrected:
    """A matrix without some of its weights.

    weight: `[R, C]`. loss: see `Curvature.loss`. iterations, gap: of `ops.kron_pcg`; None without.
    """

    weight: Tensor
    loss: float
    iterations: int | None = None
    gap: float | None = None


@dataclass(frozen=True, eq=False)
class Curvature:
    """G (x) A of a matrix `[R, C]` without what is dead in it.

    shape: (R, C). rows, columns: ascending indices of the r and c that are alive: neither all their
    weights nor their entry on the diagonal of G or A is zero. a, g: undamped, `[c, c]` and
    `[r, r]`. a_damping, g_damping: fractions of the mean diagonal to be added.

    Factors and inverses are made on first use, and raise NotPositiveDefiniteError as
    `ops.obs_factor` does. It may take more damping than asked for: `used` says how much.
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    a: Tensor
    g: Tensor
    a_damping: float
    g_damping: float

    @classmethod
    def of(
        cls,
        w: Tensor,
        a: Tensor,
        g: Tensor,
        *,
        a_damping: float = 0.01,
        g_damping: float = 0.01,
        bias: bool = False,
    ) -> Curvature:
        """Of the weights `w [R, C]` and the factors `[C, C]` and `[R, R]`.

        bias: the last column is one, and alive even where all biases are zero.
        """
        used = w != 0
        in_use = used.any(0)
        if bias:
            in_use[-1] = True
        rows = (used.any(1) & (g.diagonal() > 0)).nonzero()[:, 0]
        columns = (in_use & (a.diagonal() > 0)).nonzero()[:, 0]
        a, g = a[columns][:, columns].to(w.dtype), g[rows][:, rows].to(w.dtype)
        return cls((w.shape[0], w.shape[1]), rows, columns, a, g, a_damping, g_damping)

    @cached_property
    def a_factor(self) -> ObsFactor:
        return _factor(self.a, self.a_damping)

    @cached_property
    def g_factor(self) -> ObsFactor:
        return _factor(self.g, self.g_damping)

    @property
    def used(self) -> tuple[float, float]:
        """The dampings of A and G that made them positive definite."""
        return float(self.a_factor.damping), float(self.g_factor.damping)

    def settled(self) -> Curvature:
        """The same with the dampings that are `used`."""
        a_used, g_used = self.used
        if (a_used, g_used) == (self.a_damping, self.g_damping):
            return self
        return replace(self, a_damping=a_used, g_damping=g_used)

    @cached_property
    def a_inverse(self) -> Tensor:
        return self.a_factor.u.mT @ self.a_factor.u

    @cached_property
    def g_inverse(self) -> Tensor:
        return self.g_factor.u.mT @ self.g_factor.u

    def alive(self, w: Tensor) -> Tensor:
        """`[r, c]` of `w [R, C]`."""
        return w[self.rows][:, self.columns]

    def into(self, w: Tensor, part: Tensor) -> Tensor:
        """A copy of `w [R, C]` with `part [r, c]` where it is alive."""
        out = w.clone()
        out[self.rows[:, None], self.columns] = part
        return out

    def damped(self) -> tuple[Tensor, Tensor]:
        """A and G with the dampings asked for."""
        return damped(self.a, self.a_damping), damped(self.g, self.g_damping)

    def loss(self, d: Tensor) -> float:
        """`1/2 tr(D^T G D A)` with the `damped` factors for a change `d [R, C]`: the rise of the
        loss in nats per predicted token, as this model has it."""
        a, g = self.damped()
        d = self.alive(d)
        return 0.5 * float(((g @ d @ a) * d).sum(dtype=torch.float64))

    def element_scales(self) -> tuple[Tensor, Tensor]:
        """Row scale `[R]` and column scale `[C]`: |w_ij| times both is the root of twice the cost
        of removing w_ij, `w_ij^2 / (2 [G^-1]_ii [A^-1]_jj)` (section 3.2). Zero where dead."""
        rows, columns = self.g.new_zeros(self.shape[0]), self.a.new_zeros(self.shape[1])
        rows[self.rows] = inverse_diagonal(self.g_factor.u).rsqrt()
        columns[self.columns] = inverse_diagonal(self.a_factor.u).rsqrt()
        return rows, columns

    def structure_costs(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """`row_costs` `[R]` and `column_costs` `[C]` with the paper's undamped numerators; zero
        where dead."""
        part = self.alive(w)
        rows, columns = self.g.new_zeros(self.shape[0]), self.a.new_zeros(self.shape[1])
        rows[self.rows] = row_costs(part, self.a, inverse_diagonal(self.g_factor.u))
        columns[self.columns] = column_costs(part, self.g, inverse_diagonal(self.a_factor.u))
        return rows, columns

    def unit_costs(self, w: Tensor, columns: Tensor) -> Tensor:
        """`[units]`: the cost of removing the k columns of each unit together, `columns
        [units, k]`: `1/2 tr((A^-1_qq)^-1 W_q^T G W_q)`, of which `column_costs` is the case k = 1.
        Zero where dead."""
        if columns.shape[1] == 1:
            return self.structure_costs(w)[1][columns[:, 0]]
        place = torch.full((self.shape[1],), -1, device=w.device)
        place[self.columns] = torch.arange(len(self.columns), device=w.device)
        part, costs = self.alive(w), self.g.new_zeros(len(columns))
        for unit, places in enumerate(place[columns.to(w.device)]):
            q = places[places >= 0]
            energy = part[:, q].T @ self.g @ part[:, q]
            solved = torch.linalg.solve(self.a_inverse[q][:, q], energy)
            costs[unit] = 0.5 * solved.diagonal().sum()
        return costs

    def without_elements(
        self,
        w: Tensor,
        mask: Tensor,
        update: Update = "joint",
        *,
        iterations: int = ITERATIONS,
        tolerance: float = TOLERANCE,
    ) -> Corrected:
        """`w [R, C]` without the weights that `mask` (bool, True = kept) prunes, the others
        corrected: `joint` by `ops.kron_pcg` with these limits, `grouped` as the paper does, or not
        at all."""
        zeroed = torch.where(mask, w, 0)
        part, kept = self.alive(w), self.alive(mask)
        if bool(kept.all()):
            return Corrected(zeroed, 0.0)
        if update == "joint":
            a, g = self.damped()
            solved = ops.kron_pcg(part, kept, a, g, iterations=iterations, tolerance=tolerance)
            new = self.into(zeroed, solved.weight)
            return Corrected(new, float(solved.loss), int(solved.iterations), float(solved.gap))
        if update == "grouped":
            part = remove_in_groups(part, kept, self.a_inverse, self.g_inverse)
            zeroed = self.into(zeroed, part)
        return Corrected(zeroed, self.loss(zeroed - w))

    def without_structures(
        self, w: Tensor, rows: Tensor, columns: Tensor, update: Update = "joint"
    ) -> Tensor:
        """`w [R, C]` without `rows` and `columns` (indices), the others corrected: `joint` by
        `remove_structures`, `grouped` by `sum_of_removals`, or not at all."""
        zeroed = w.clone()
        zeroed[rows] = 0
        zeroed[:, columns] = 0
        if update == "none":
            return zeroed
        remove = remove_structures if update == "joint" else sum_of_removals
        p = torch.isin(self.rows, rows).nonzero()[:, 0]
        q = torch.isin(self.columns, columns).nonzero()[:, 0]
        if not len(p) + len(q):
            return zeroed
        solved = remove(self.alive(w), p, q, self.a_inverse, self.g_inverse)
        return self.into(zeroed, solved)


def _factor(h: Tensor, damping: float) -> ObsFactor:
    if not len(h):  # all of it is dead
        made = torch.tensor(damping, dtype=torch.float64)
        return ObsFactor(h, h.new_zeros(0, dtype=torch.bool), made)
    return ops.obs_factor(h, damping=damping)


def damped(h: Tensor, damping: float) -> Tensor:
    """`H + damping * mean(diag H) * I`."""
    out = h.clone()
    out.diagonal().add_(damping * h.diagonal().double().mean().to(h.dtype))
    return out
