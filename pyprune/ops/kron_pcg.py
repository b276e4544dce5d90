"""The joint update of a layer's kept weights under a curvature G (x) A, by conjugate gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyprune.ops import registry
from pyprune.ops._checks import check_array, check_rows, check_same_device, over_stack
from pyprune.ops._precision import full_precision
from pyprune.ops.kron import FACTOR_DTYPES, check_factors, widened
from pyprune.ops.kron_multipliers import LEAST_TOLERANCE, Found, by_multipliers
from pyprune.ops.kron_scaled import Scaled, dot, left_to_gain

# Up to this share pruned the multipliers of what is pruned are tried first, and for so many
# iterations. On SmolLM2-135M (fp32, products in bf16) one of them took 0.4 of the time of one on
# the kept; 4 to 17 were enough up to 60 % pruned but for one matrix, and 17 to 43 above.
MULTIPLIERS_SHARE, MULTIPLIERS_ITERATIONS = 0.6, 32

PcgTensors = tuple[Tensor, Tensor, Tensor, Tensor]


class KronPcg(NamedTuple):
    """`weight` `[..., R, C]`; for every matrix, `[...]`: `loss`, `gap` fp64, `iterations` int32."""

    weight: Tensor
    loss: Tensor
    gap: Tensor
    iterations: Tensor

    def converged(self, tolerance: float) -> bool:
        """Whether the loss is, by the estimate, within `1 + tolerance` of the least, in every
        matrix."""
        return bool((self.gap <= tolerance).all())


class _Pcg(NamedTuple):
    """The op's arguments, in the order of its schema."""

    w: Tensor
    mask: Tensor
    a: Tensor
    g: Tensor
    iterations: int
    tolerance: float

    def check(self) -> None:
        w, mask = self.w, self.mask
        check_rows("w", w)
        rows, cols = w.shape
        check_array("mask", mask, torch.bool, (rows, cols))
        check_factors(w, {"a": (self.a, cols), "g": (self.g, rows)})
        if self.iterations < 0:
            raise ValueError(f"iterations: expected 0 or more, got {self.iterations}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: expected a number in [0, 1), got {self.tolerance}")
        check_same_device(w, mask)


class _Lines:
    """(low^T low + I) cut to what each of n lines keeps: `gram [n, K, K]`, low low^T there, serves
    to invert it (Woodbury). `kept [n, C]`, `low [K, C]`."""

    def __init__(self, low: Tensor, kept: Tensor) -> None:
        rank = len(low)
        i, j = torch.triu_indices(rank, rank, device=low.device)
        place = torch.empty(rank, rank, dtype=torch.int64, device=low.device)
        place[i, j] = place[j, i] = torch.arange(len(i), device=low.device)
        gram = (kept @ (low[i] * low[j]).mT)[:, place]
        self.eye = torch.eye(rank, dtype=low.dtype, device=low.device)
        self.low, self.lower = low, torch.linalg.cholesky(gram + self.eye)
        self.lower_inverse = torch.linalg.solve_triangular(
            self.lower, self.eye.expand_as(gram), upper=False
        )

    def inverse(self) -> Tensor:
        """B of (low^T low + I)^-1 = I - low^T B low, `[n, K, K]`."""
        return torch.matmul(self.lower_inverse.mT, self.lower_inverse)

    def root(self) -> Tensor:
        """B of W = I - low^T B low with W^T W that inverse. With C C^T = I + low low^T it is
        ((C + I)^T)^-1 C^-1: I + low^T (C + I)^-1 low is the inverse of W, and times its transpose
        the matrix itself. As `low`'s rows are about orthogonal, W is about symmetric."""
        upper = self.lower.mT + self.eye
        root: Tensor = torch.linalg.solve_triangular(upper, self.lower_inverse, upper=True)
        return root


class _Preconditioner:
    """L (I (x) B) L^T: L L^T inverts, row by row, (low_a^T low_a + I) on what the row keeps; B
    inverts, column by column, (low_g^T low_g + I) on what the column keeps.

    Without a mask that is the inverse of the product of both. With one, each factor alone is
    inverted exactly where the other is the identity, and their common directions are off by the
    share that is kept, not by their eigenvalue.
    """

    def __init__(self, problem: Scaled) -> None:
        self.kept, self.low_a, self.low_g = problem.kept, problem.low_a, problem.low_g
        self.root = _Lines(self.low_a, self.kept).root()
        self.inverse = _Lines(self.low_g, self.kept.mT).inverse()

    def apply(self, r: Tensor) -> Tensor:
        """Of `r [R, C]`, which is zero where nothing is kept."""
        low_a, low_g, kept = self.low_a, self.low_g, self.kept
        y = torch.addmm(r, _times(self.root, r @ low_a.mT), low_a, alpha=-1).mul_(kept)
        inner = _times(self.inverse, (low_g @ y).mT)
        y.addmm_(low_g.mT, inner.mT, alpha=-1).mul_(kept)
        return y.addmm_(_times(self.root.mT, y @ low_a.mT), low_a, alpha=-1).mul_(kept)


def _times(cores: Tensor, lines: Tensor) -> Tensor:
    """Each of the cores `[n, K, K]` times its line `[n, K]`."""
    return torch.bmm(cores, lines[..., None])[..., 0]


@full_precision()
def kron_pcg_reference(*values: Any) -> PcgTensors:
    """On library products: two of them an iteration are most of its cost."""
    args = _Pcg(*values)
    if args.w.shape[0] > args.w.shape[1]:  # the root is applied twice: on the side of fewer lines
        w, mask, a, g = args[:4]
        turned = args._replace(w=w.mT.contiguous(), mask=mask.mT.contiguous(), a=g, g=a)
        weight, loss, gap, count = _solve(turned)
        return weight.mT.contiguous(), loss, gap, count
    return _solve(args)


def _solve(args: _Pcg) -> PcgTensors:
    problem = Scaled.of(*args[:4])
    found = None
    pruned = 1 - float(problem.kept.mean())
    if 0 < pruned <= MULTIPLIERS_SHARE and args.tolerance >= LEAST_TOLERANCE:
        most = min(args.iterations, MULTIPLIERS_ITERATIONS)
        found = by_multipliers(problem, most, args.tolerance)
    if found is None or not found.gap <= args.tolerance:
        found = _by_kept(problem, found, args.iterations, args.tolerance)
    change = found.d / problem.row_size / problem.column_size
    numbers = args.w.new_tensor([found.loss, found.gap], dtype=torch.float64)
    count = args.w.new_tensor(found.iterations, dtype=torch.int32)
    weight = torch.where(args.mask, args.w + change, 0.0)
    return weight, numbers[0].clone(), numbers[1].clone(), count


def _by_kept(problem: Scaled, found: Found | None, iterations: int, tolerance: float) -> Found:
    """Conjugate gradients on the kept, from what was found if it is better than plain zeroing, with
    the iterations that were made for it among `iterations`."""
    kept = problem.kept
    d = problem.x * (kept - 1)
    image = problem.curvature(d)
    loss = 0.5 * dot(image, d)
    noise = torch.finfo(d.dtype).eps * loss
    made = 0 if found is None else found.iterations
    if found is not None and found.loss < loss:
        d, loss = found.d, found.loss
        image = problem.curvature(d)
    gains = list[float]()

    def left() -> float:
        """Above the least loss, by the gains, within what multipliers know of it."""
        by_gains = left_to_gain(gains)
        if found is None:
            return by_gains
        over = loss - found.least
        return min(max(by_gains, over - found.unproven), over)

    residual = image.mul_(kept).neg_()
    preconditioner = _Preconditioner(problem)
    direction = preconditioner.apply(residual)
    rho = dot(residual, direction)
    # NaN ends it too: it is in the result by then.
    while rho > 0 and made + len(gains) < iterations:
        if left() <= tolerance * (loss + noise):
            break
        image = problem.curvature(direction).mul_(kept)
        bend = dot(direction, image)
        if not bend > 0:  # the direction is rounding noise
            break
        step = rho / bend
        gains.append(0.5 * step * rho)
        loss = max(loss - gains[-1], 0.0)
        d.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        z = preconditioner.apply(residual)
        previous, rho = rho, dot(residual, z)
        direction.mul_(rho / previous).add_(z)
    above = left() if rho > 0 else 0.0 * rho
    gap = above / max(loss + noise, torch.finfo(torch.float64).tiny)
    return Found(d, loss, gap, made + len(gains))


def _kron_pcg_fake(*values: Any) -> PcgTensors:
    args = _Pcg(*values)
    args.check()
    number = args.w.new_empty((), dtype=torch.float64)
    return (
        args.w.new_empty(args.w.shape),
        number,
        torch.empty_like(number),
        torch.empty_like(number, dtype=torch.int32),
    )


registry.register(
    "kron_pcg(Tensor w, Tensor mask, Tensor a, Tensor g, int iterations, float tolerance) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_kron_pcg_fake,
    # Two matrix products an iteration are most of it: the library's do it best.
    impls={"reference": registry.Impl(kron_pcg_reference, FACTOR_DTYPES)},
)


def kron_pcg(
    w: Tensor,
    mask: Tensor,
    a: Tensor,
    g: Tensor,
    *,
    iterations: int = 80,
    tolerance: float = 1e-2,
) -> KronPcg:
    """Joint exact correction of all kept weights for a set of removed ones.

    Minimises `1/2 tr(D^T G D A)` over D with `D_ij = -W_ij` where pruned, and answers with a
    feasible D whose loss is never above that of plain zeroing. Converged it equals the closed form
    `-G^-1 M A^-1` of LLM Surgeon (arXiv 2312.17244, eq. 8) for the whole set, which the paper
    solves in groups that disturb one another. Two kinds of conjugate gradients, in which an
    iteration is two matrix products, 2 R C (R + C) flops, however many weights are pruned:

    - Up to 60 % pruned and from a tolerance of 1e-3 on, on the multipliers of what is pruned
      (`kron_multipliers`), for which A and G are inverted. With few pruned these are few
      iterations. From 5e-3 on fp32 problems take their products in bf16 where the device has
      instructions for it; the loss is that of the fp32 factors.
    - Otherwise, and from there where 32 iterations did not do, on the kept weights. The
      preconditioner takes either factor as a diagonal plus up to 32 directions, those in which it
      is largest, and inverts each on what a row or a column keeps: 12 R C K flops an iteration for
      K directions.

    Args:
        w: weights `[R, C]`, or a stack `[B, R, C]`; fp32 or fp64 (bf16 and fp16 are widened to
            fp32).
        mask: bool like w, True = kept. Weights that are zero already and shall stay so are False.
        a, g: damped positive definite factors `[C, C]` and `[R, R]`, of that dtype; with a stack
            one for all, or `[B, ...]`. Its matrices are solved one after the other: each stops
            where it has converged.
        iterations: most of them.
        tolerance: stop when `gap` is at most this; 0 runs all iterations.

    Returns:
        `weight`: the new weights, shaped like w, exactly zero where pruned. The others are scalars,
        or `[B]`.
        `loss`: `1/2 tr(D^T G D A)`.
        `gap`: an estimate of how far the loss is above the least possible one, relative to it. From
            multipliers: the loss over what they prove to be unavoidable, less what further
            iterations were going to prove by how their gains fall, but at most half of it: so the
            truth is at most twice as much; it was 0.3 to 1.2 times. On the kept weights: what
            further iterations were going to gain, relative to the loss (plus 1e-7 of that of plain
            zeroing, below which fp32 resolves nothing; 2e-16 for fp64), from how the gains of the
            last two iterations compare with those of the two before, and of four with the four
            before; infinite with fewer than four iterations. The truth was up to 1.5 times as much
            on matrices with a fifth or more of their weights pruned, and 7 times in the worst of
            7,000 random ones of steeply falling spectra at a tolerance of 0.02.
        `iterations`: how many were made.

    Where `iterations` came before the tolerance, `gap` is larger: see `KronPcg.converged`. NaN and
    infinities in w make `loss` and `gap` NaN.

    Raises:
        ValueError: a shape, dtype, device or range rule is broken.
        torch.linalg.LinAlgError: a or g, of 32 rows or more, is not finite, or not positive
            definite among its largest directions. Smaller ones are not looked at. One that is
            not positive definite elsewhere has no multipliers.
    """
    w = widened(w)
    if w.dim() == 3:
        solve = partial(kron_pcg, iterations=iterations, tolerance=tolerance)
        each = over_stack(solve, {"w": w, "mask": mask, "a": a, "g": g}, (2, 2, 2, 2))
        if each:
            return KronPcg(*map(torch.stack, zip(*each, strict=True)))
        none = w.new_zeros(0, dtype=torch.float64)
        return KronPcg(torch.empty_like(w), none, none.clone(), none.to(torch.int32))
    args = _Pcg(w, mask, a, g, iterations, float(tolerance))
    args.check()
    if w.numel() == 0:
        none = w.new_zeros((), dtype=torch.float64)
        return KronPcg(torch.zeros_like(w), none, none.clone(), none.to(torch.int32))
    return KronPcg(*torch.ops.pyprune.kron_pcg(*args))
