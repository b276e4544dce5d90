"""The joint update of `ops.kron_pcg` from the side of what is pruned: conjugate gradients on the
multipliers M of the constraints D_ij = -W_ij, of which there is one for each pruned weight.

The least loss is the largest of `<M, W> - 1/2 <M, K M>` with K = P (G^-1 . A^-1) P, P cutting to
what is pruned, and then D = -G^-1 M A^-1. K is well conditioned where F = G (x) A is not: the few
large eigenvalues of a factor are its inverse's few small ones, which hardly show on a part of the
entries. So K needs no preconditioner beyond its diagonal, and bears products of 16-bit numbers.

Short of the solution D misses its constraints by e = K M - W. What it then takes to meet them is
weighed by F, with the large eigenvalues: D is lifted, changed by E with E_P = e and an E_S on what
is kept that hides e from the largest directions of A and G, which costs thin products only. The
loss of D + E is what M proves to be unavoidable, plus `1/2 <E, F E>` exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops.kron_scaled import Scaled, dot, left_to_gain, sure_to_gain

# Instruction sets of processors that multiply bf16 natively, and so does PyTorch there.
BFLOAT16_ISAS = ("avx512_bf16", "avx512_amx")
# Sweeps of a lift over A's and G's directions. A third changed little.
SWEEPS = 2
# The iteration after which the gap is looked at first, for each share that is pruned; and by what
# share it is expected to fall in one, which says when to look again, as lifting costs half an
# iteration. Later looks go by how it fell between those before, within bounds.
FIRST_LOOK, FALL, FALLS = (3, 10), 0.7, (0.3, 0.85)
# Below the first the kept weights come to it faster. Products of bf16 numbers proved up to 0.03 %
# more than there is on SmolLM2-135M, 0.3 % on small ill-conditioned factors.
LEAST_TOLERANCE, LEAST_BFLOAT16 = 1e-3, 5e-3
# Loss of a lift over what the model that it uses makes of it: 0.76 to 1.0 on SmolLM2-135M.
TRUST = 0.85


class Found(NamedTuple):
    """d `[R, C]`, scaled as the problem is: feasible. loss: `1/2 <d, F d>`. gap: how far that is
    above the least loss, relative to it, by estimate. least: what the least loss is at least.
    unproven: by how much it is larger, by estimate; infinite if unknown."""

    d: Tensor
    loss: float
    gap: float
    iterations: int
    least: float = 0.0
    unproven: float = math.inf


def by_multipliers(problem: Scaled, iterations: int, tolerance: float) -> Found | None:
    """Until the gap is at most `tolerance`, or `iterations` are made. None where a factor is not
    positive definite in its dtype."""
    inverses = [_unit_inverse(h) for h in (problem.a, problem.g)]
    if any(inverse is None for inverse in inverses):
        return None
    (a, a_size), (g, g_size) = (inverse for inverse in inverses if inverse is not None)
    fast = tolerance >= LEAST_BFLOAT16 and has_fast_bfloat16(a)
    search = _Search(problem, a, g, g_size[:, None] * a_size, fast)
    while True:
        search.advance(iterations, tolerance)
        found = search.found()
        if found.gap <= tolerance or not search.moving or found.iterations >= iterations:
            return found


def _unit_inverse(h: Tensor) -> tuple[Tensor, Tensor] | None:
    """H^-1 in the scale in which its diagonal is one, and the root of its diagonal."""
    lower, failed = torch.linalg.cholesky_ex(h)
    if bool(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    size = inverse.diagonal().sqrt()
    return inverse.div_(size).div_(size[:, None]), size


def has_fast_bfloat16(t: Tensor) -> bool:
    """Whether products of bf16 numbers are faster than those of t's dtype, fp32, where t is."""
    if t.dtype != torch.float32:
        return False
    if t.is_cuda:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _native.MODULE is not None and _native.MODULE.isa() in BFLOAT16_ISAS


class _Search:
    """The iteration. a, g: inverses with unit diagonals; size `[R, C]`: D is as large as size times
    what they give. fast: take products in bf16."""

    def __init__(self, problem: Scaled, a: Tensor, g: Tensor, size: Tensor, fast: bool) -> None:
        self.problem, self.size = problem, size
        self.factors = (g.bfloat16(), a.bfloat16()) if fast else (g, a)
        self.gone = 1 - problem.kept
        self.wanted = (problem.x / size).mul_(self.gone)
        # What the multipliers come to, G^-1 M A^-1, and what that lacks where pruned.
        self.made, self.e = torch.zeros_like(self.wanted), self.wanted.clone()
        self.direction, self.rho = self.e.clone(), dot(self.e, self.e)
        self.gains: list[float] = []
        self.lift = _Lift(problem)
        self.trust, self.moving = TRUST, True

    def _product(self, v: Tensor) -> Tensor:
        g, a = self.factors
        return (g @ v.to(g.dtype) @ a).to(v.dtype)

    def advance(self, iterations: int, tolerance: float) -> None:
        """Until the gap seems to be small enough."""
        first, more = FIRST_LOOK
        look = len(self.gains) + first + int(more * float(self.gone.mean()))
        before = None
        while len(self.gains) < iterations:
            image = self._product(self.direction)
            bend = dot(self.direction, image) if self.rho > 0 else 0.0
            if not bend > 0:  # NaN, or all is met
                self.moving = False
                return
            step = self.rho / bend
            self.gains.append(0.5 * step * self.rho)
            self.made.add_(image, alpha=step)
            self.e.sub_(image.mul_(self.gone), alpha=step)
            previous, self.rho = self.rho, dot(self.e, self.e)
            self.direction.mul_(self.rho / previous).add_(self.e)
            if len(self.gains) < look:
                continue
            change = self.lift.lifted(self.e * -self.size)
            gap = self._gap(self.trust * self.lift.loss(change))
            if not math.isfinite(gap):  # an overflow
                self.moving = False
            if gap <= tolerance or not self.moving:
                return
            fall, count = FALL, len(self.gains)
            if before is not None:
                fall = (gap / before[0]) ** (1 / (count - before[1]))
                fall = min(max(fall, FALLS[0]), FALLS[1])
            before = (gap, count)
            wanted = math.log(max(tolerance, LEAST_TOLERANCE) / gap) / math.log(fall)
            look = count + max(1, int(wanted))

    def _gap(self, over: float) -> float:
        """Of a loss that is `over` what is proven. Of that a part is still to be proven: what the
        gains tell, but at most a half, as they may mislead. So the gap is at most twice this."""
        more = min(sure_to_gain(self.gains), 0.5 * over)
        return (over - more) / max(sum(self.gains) + more, torch.finfo(torch.float64).tiny)

    def found(self) -> Found:
        """What the multipliers come to; the search starts anew from the residual as it is."""
        problem, proven = self.problem, sum(self.gains)
        torch.addcmul(self.wanted, self.made, self.gone, value=-1, out=self.e)
        self.direction, self.rho = self.e.clone(), dot(self.e, self.e)
        change = self.lift.lifted(self.e * -self.size)
        guess = self.lift.loss(change)
        d = change.addcmul_(self.made, self.size, value=-1)
        # Where pruned it is -x but for rounding: exactly so now.
        d.mul_(problem.kept).addcmul_(problem.x, self.gone, value=-1)
        loss = 0.5 * dot(problem.curvature(d), d)
        over = max(loss - proven, 0.0)
        if guess > 0:
            self.trust = over / guess
        return Found(d, loss, self._gap(over), len(self.gains), proven, left_to_gain(self.gains))


class _Lift:
    """The change on what is kept that makes a change on what is pruned small for the model
    (low_g^T low_g + I) (x) (low_a^T low_a + I) of the curvature: direction by direction the least
    squares, alternately for each row over A's and for each column over G's."""

    def __init__(self, problem: Scaled) -> None:
        self.kept, self.low_a, self.low_g = problem.kept, problem.low_a, problem.low_g
        self.of_rows = self.kept @ self.low_a.square().mT + 1
        self.of_columns = self.low_g.square() @ self.kept + 1

    def lifted(self, change: Tensor) -> Tensor:
        """Of `change [R, C]`, zero where kept; it may be written to."""
        for _ in range(SWEEPS):
            change.sub_((((change @ self.low_a.mT) / self.of_rows) @ self.low_a).mul_(self.kept))
            inner = (self.low_g @ change) / self.of_columns
            change.sub_((self.low_g.mT @ inner).mul_(self.kept))
        return change

    def loss(self, change: Tensor) -> float:
        """`1/2 <change, F change>` for that model."""
        rows, columns = change @ self.low_a.mT, self.low_g @ change
        parts = (change, rows, columns, self.low_g @ rows)
        return 0.5 * sum(dot(p, p) for p in parts)
