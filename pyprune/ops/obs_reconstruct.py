"""The best weights for a given mask: exact least squares of the kept ones, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import (
    accumulation_dtype,
    check_array,
    check_float,
    check_same_device,
    check_shape,
    check_tensor,
)
from pyprune.ops._precision import full_precision
from pyprune.ops.gram import gram
from pyprune.ops.masked_cg import (
    NearHessian,
    Problem,
    near_hessian,
    product_with,
    solve_by_products,
)
from pyprune.ops.obs_factor import ObsFactor, obs_factor

# Columns from which the native solver's packed triangles no longer stay in any cache and two dense
# products an iteration, shared by all rows, should be faster: from memory traffic, not measured.
NATIVE_COLUMNS = 2560

# Rows of U that are multiplied at a time when its product with itself is formed.
PANEL = 256

# Powers of two between which the mean diagonal of H and the largest weight of a row stay as they
# are: products of both, squared and summed over a row, are then far from where fp32 ends.
ORDINARY_H, ORDINARY_W = 40, 20

ReconstructTensors = tuple[Tensor, Tensor, Tensor, Tensor]


class ObsReconstruct(NamedTuple):
    """`weight` `[..., R, C]`; per row `[..., R]`: `loss` and `gap` fp64, `iterations` int32."""

    weight: Tensor
    loss: Tensor
    gap: Tensor
    iterations: Tensor

    def converged(self, tolerance: float) -> Tensor:
        """Rows whose squared output error is proven to be within `1 + tolerance` of the least."""
        return self.gap <= tolerance


class _Args(NamedTuple):
    """The op's arguments, in the order of its schema. Everything is batched: w, mask, start
    `[B, R, C]`, h and u `[1 or B, C, C]`, shift `[1 or B, C]`."""

    w: Tensor
    h: Tensor
    shift: Tensor
    u: Tensor
    mask: Tensor
    start: Tensor | None
    tolerance: float
    max_iterations: int

    def check(self) -> None:
        w, h = self.w, self.h
        if w.dim() != 3 or h.dim() != 3 or h.shape[0] not in (1, w.shape[0]):
            raise ValueError(
                f"w, h: expected [B, R, C] and [1 or B, C, C], got {tuple(w.shape)}, "
                f"{tuple(h.shape)}"
            )
        shared, cols = h.shape[0], w.shape[2]
        for name, t, shape in (
            ("h", h, (shared, cols, cols)),
            ("shift", self.shift, (shared, cols)),
            ("u", self.u, (shared, cols, cols)),
            ("start", self.start, tuple(w.shape)),
        ):
            if t is not None:
                check_shape(name, t, shape)
        if w.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"w: expected fp32 or fp64, got {w.dtype}")
        for name, t in (("h", h), ("shift", self.shift), ("u", self.u), ("start", self.start)):
            if t is not None and t.dtype != w.dtype:
                raise ValueError(f"{name}: expected {w.dtype} like w, got {t.dtype}")
        check_array("mask", self.mask, torch.bool, tuple(w.shape))
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"tolerance: expected a number above 0, got {self.tolerance}")
        if self.max_iterations < 0:
            raise ValueError(f"max_iterations: expected at least 0, got {self.max_iterations}")
        check_same_device(w, h, self.shift, self.u, self.mask, self.start)

    def scales(self) -> tuple[Tensor, Tensor]:
        """`root` `[1 or B, 1, 1]` and `size` `[B, R, 1]`, fp64 powers of two: H times root^2 and
        rows times size have numbers about one. Both are 1 where the scale is ordinary."""
        mean = (self.h.diagonal(dim1=1, dim2=2) + self.shift).double().mean(1)
        largest = self.w.abs().amax(2)
        if self.start is not None:
            kept = torch.where(self.mask, self.start, 0)
            largest = torch.maximum(largest, kept.abs().amax(2))
        root = _exponent(mean, ORDINARY_H, self.w.dtype) // 2
        size = _exponent(largest, ORDINARY_W, self.w.dtype)
        return _power_of_two(-root)[:, None, None], _power_of_two(-size)[..., None]

    def scaled(self, root: Tensor, size: Tensor) -> _Args:
        """H of an ordinary scale is not copied, nor are its weights."""
        args, dtype = self, self.w.dtype
        if bool((root != 1).any()):
            by = root.to(dtype)
            # Not by root^2, which fp32 may not hold.
            h, shift, u = args.h * by * by, args.shift * by[:, 0] * by[:, 0], args.u / by
            args = args._replace(h=h, shift=shift, u=u)
        if bool((size != 1).any()):
            by = size.to(dtype)
            start = None if args.start is None else args.start * by
            args = args._replace(w=args.w * by, start=start)
        return args

    def problems(self) -> list[Problem]:
        """One of each matrix, at its start. Those that share H share what is made of it."""
        w, mask, start = self.w, self.mask, self.start
        hessians = [_prepared(*each) for each in zip(self.h, self.shift, self.u, strict=True)]
        return [
            _problem(
                w[b], *hessians[b % len(hessians)], mask[b], None if start is None else start[b]
            )
            for b in range(len(w))
        ]


def _exponent(x: Tensor, ordinary: int, dtype: torch.dtype) -> Tensor:
    """x is about 2 to this; 0 where that is ordinary, or x is no number. Its power of two, and one
    over that, are numbers of `dtype`."""
    reach = math.frexp(torch.finfo(dtype).max)[1] - 8
    exponent = torch.frexp(x).exponent
    extreme = x.isfinite() & (exponent.abs() > ordinary)
    return torch.where(extreme, exponent.clamp(-reach, reach), 0)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp64, by its bits: `torch.ldexp` multiplies by `pow`, which is exact on the
    CPU and need not be on a GPU."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _inverse(u: Tensor) -> Tensor:
    """U^T U, a panel of rows at a time: a row has nothing to the left of its diagonal."""
    inverse = torch.zeros_like(u, memory_format=torch.contiguous_format)
    for first in range(0, len(u), PANEL):
        inverse[first:, first:] += gram(u[first : first + PANEL, first:])
    return inverse


def _prepared(h: Tensor, shift: Tensor, u: Tensor) -> tuple[Tensor, NearHessian]:
    """`h + diag(shift)` of one matrix, and what preconditions it."""
    damped = h.clone(memory_format=torch.contiguous_format)
    damped.diagonal().add_(shift)
    return damped, near_hessian(damped, _inverse(u))


def _problem(
    w: Tensor, damped: Tensor, near: NearHessian, mask: Tensor, start: Tensor | None
) -> Problem:
    """One matrix's problem at its start: the given weights, or the old ones, on the mask."""
    # Products with the mask take a fifth of the time of torch.where.
    x = w * mask if start is None else torch.where(mask, start, 0)
    untouched = mask.all(1)
    if bool(untouched.any()):  # nothing is lost in a row that loses nothing
        x[untouched] = w[untouched]
    change = w - x
    pull = product_with(damped)(change, change.new_empty(change.shape))
    loss = (pull * change).sum(1, dtype=torch.float64)
    eps = torch.finfo(w.dtype).eps
    noise = eps * (w.square() * damped.diagonal()).sum(1, dtype=torch.float64)
    return Problem(x.contiguous(), pull * mask, mask.contiguous(), damped, near, loss, noise)


def _collect(solved: list[tuple[Problem, Tensor, Tensor]], w: Tensor) -> ReconstructTensors:
    """Stacks the answers; `gap` becomes relative to the row's loss."""
    if not solved:
        rows = w.new_zeros(w.shape[:2], dtype=torch.float64)
        return w.clone(), rows, rows.clone(), rows.to(torch.int32)
    problems = [problem for problem, _, _ in solved]
    loss = torch.stack([p.loss for p in problems])
    noise = torch.stack([p.noise for p in problems])
    bound = torch.stack([gap for _, gap, _ in solved])
    scale = (loss + noise).clamp_min(torch.finfo(torch.float64).tiny)
    iterations = torch.stack([count for _, _, count in solved])
    return torch.stack([p.x for p in problems]), loss, bound / scale, iterations


def _solve_rows(problem: Problem) -> tuple[Problem, Tensor, Tensor]:
    """Cholesky of every row's kept part; the gap is computed from what that leaves."""
    x, r, mask, h = problem[:4]
    solved, loss, gap = x.clone(), problem.loss.clone(), torch.zeros_like(problem.loss)
    for i in range(len(x)):
        kept = mask[i].nonzero()[:, 0]
        if not len(kept):
            continue
        part, before = h[kept][:, kept], r[i, kept]
        lower = torch.linalg.cholesky(part)
        change = torch.cholesky_solve(before[:, None], lower)[:, 0]
        left = before - part @ change
        solved[i, kept] += change
        loss[i] -= ((before + left) * change).sum(dtype=torch.float64)
        again = torch.cholesky_solve(left[:, None], lower)[:, 0]
        gap[i] = (again * left).sum(dtype=torch.float64)
    count = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    return problem._replace(x=solved, loss=loss.clamp_min_(0)), gap, count


def _solve(
    values: tuple[Any, ...], solver: Callable[[_Args, Problem], tuple[Problem, Tensor, Tensor]]
) -> ReconstructTensors:
    """All backends come through here: their arithmetic sees numbers about one."""
    given = _Args(*values)
    root, size = given.scales()
    args = given.scaled(root, size)
    solved = [solver(args, problem) for problem in args.problems()]
    weight, loss, gap, iterations = _collect(solved, args.w)
    if args is not given:
        weight = weight / size.to(weight.dtype)
        # Scaling down may have taken the last bits of a row's smallest weights.
        weight = torch.where(given.mask.all(2, keepdim=True), given.w, weight)
        by = (root * size)[..., 0]
        loss = loss / by / by
    return weight, loss, gap, iterations


@full_precision()
def obs_reconstruct_reference(*values: Any) -> ReconstructTensors:
    return _solve(values, lambda _, problem: _solve_rows(problem))


def _solve_native(
    problem: Problem, tolerance: float, max_iterations: int
) -> tuple[Problem, Tensor, Tensor]:
    x, residual, mask, h, near, loss, noise = problem
    gap = torch.zeros_like(loss)
    count = torch.zeros_like(loss, dtype=torch.int32)
    tensors = (x, residual, mask, h, near.low, near.diagonal, loss, noise, gap, count)
    _native.call("obs_reconstruct", *tensors, near.least, tolerance, max_iterations)
    return problem, gap, count


@full_precision()
def _obs_reconstruct_native(*values: Any) -> ReconstructTensors:
    def solver(args: _Args, problem: Problem) -> tuple[Problem, Tensor, Tensor]:
        solve = _solve_native if args.w.shape[2] < NATIVE_COLUMNS else solve_by_products
        return solve(problem, args.tolerance, args.max_iterations)

    return _solve(values, solver)


@full_precision()
def _obs_reconstruct_triton(*values: Any) -> ReconstructTensors:
    from pyprune.kernels.obs_reconstruct import TritonSteps

    return _solve(
        values,
        lambda args, problem: solve_by_products(
            problem, args.tolerance, args.max_iterations, TritonSteps
        ),
    )


def _obs_reconstruct_fake(*values: Any) -> ReconstructTensors:
    args = _Args(*values)
    args.check()
    w = args.w
    rows = w.new_empty(w.shape[:2], dtype=torch.float64)
    return w.new_empty(w.shape), rows, torch.empty_like(rows), rows.to(torch.int32)


registry.register(
    "obs_reconstruct(Tensor w, Tensor h, Tensor shift, Tensor u, Tensor mask, Tensor? start, "
    "float tolerance, int max_iterations) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_obs_reconstruct_fake,
    impls={
        "reference": registry.Impl(obs_reconstruct_reference, (torch.float32, torch.float64)),
        "native": registry.Impl(_obs_reconstruct_native, (torch.float32,)),
        "triton": registry.Impl(_obs_reconstruct_triton, (torch.float32,)),
    },
)


def obs_reconstruct(
    w: Tensor,
    h: Tensor,
    mask: Tensor,
    *,
    start: Tensor | None = None,
    factor: ObsFactor | None = None,
    damping: float = 0.01,
    max_damping: float = 1.0,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> ObsReconstruct:
    """The kept weights that change the layer's output least, for a mask that is given.

    With H damped as in `obs_factor`, S the kept columns of a row and x zero elsewhere,

        minimise (x - w) H (x - w)^T,    that is    x_S = H_SS^-1 (H w)_S

    (OBC, Frantar & Alistarh 2022, section 4, for all pruned weights together). SparseGPT's sweep
    only moves weights to the right of a pruned one; its layer error is about 20 % above this one
    (Frantar & Alistarh 2023).

    Cholesky of every row's H_SS costs R k^3 / 3 for k kept columns; that is the reference. The
    others run conjugate gradients preconditioned by the inverse of a diagonal plus 32 directions,
    those in which H is largest (`masked_cg.near_hessian`): made once, cut to a row's columns by
    Woodbury. From SparseGPT's weights at 50 % a row took 10 to 19 iterations to the default
    tolerance, means of twelve matrices of SmolLM2-135M, and was then within 2e-5 of the least loss
    and 8e-4 of the weights; 14 to 27 at 3e-6, within 4e-5 of the weights. The native backend
    gathers H_SS of a row as a packed triangle that stays in cache (k^2 multiply-adds an iteration,
    where a product shared by all rows takes C^2); above `NATIVE_COLUMNS` and on a GPU one dense
    product an iteration serves all rows at once.

    Args:
        w: `[R, C]` or `[B, R, C]`, the weights before pruning, fp32 or fp64 (16 bits are widened).
        h: Gram matrix `[C, C]` (shared by the batch) or `[B, C, C]`, undamped. Where its mean
            diagonal is far from one (2^40), or a row's largest weight (2^20), they are scaled by
            powers of two on the way in and the results on the way out: H times a power of four, or
            w and `start` times a power of two, gives the same bits wherever the inputs and results
            are normal numbers and no input is dead (a dead one's diagonal counts as 1, also in the
            mean). Tried in fp32 with mean diagonals from 1e-36 to 1e38.
        mask: bool like `w`, True = kept.
        start: like `w`: weights to start from, e.g. those of `obs_sweep`; what the mask prunes is
            ignored. None starts from `w`. The result does not depend on it beyond `tolerance`.
        factor: `obs_factor(h)`, if at hand; its damping is used then, not `damping`.
        damping, max_damping: see `obs_factor`.
        tolerance: a row is done when its `gap` is at most this.
        max_iterations: where a row stops in any case.

    Returns:
        `weight`, exactly 0 where pruned, and `w` itself in rows that keep everything.
        `loss`: `(x - w) H (x - w)^T`, the damped squared error; on a GPU in fp32 within 1e-5 of it.
        `gap`: an upper bound on how far the loss is above the least possible one, relative to the
            loss (plus 1e-7 of the row's output, below which fp32 resolves nothing; 2e-16 for
            fp64): the Gauss-Radau bound of conjugate gradients (Meurant & Tichy 2013, Numer.
            Algorithms 62) with a proven bound on the least eigenvalue of their operator. A row that
            ran into `max_iterations` has `gap > tolerance`: see `ObsReconstruct.converged`.
        `iterations`: per row; 0 from the reference, which solves directly.

    Inputs that were always zero (`diag(H) == 0`) are uncoupled: their kept weights stay.

    Raises:
        NotPositiveDefiniteError, ValueError: see `obs_factor`; a shape, dtype or device mismatch.
    """
    check_float("w", w)
    check_tensor("h", h)
    if w.dim() not in (2, 3):
        raise ValueError(f"w: expected [R, C] or [B, R, C], got shape {tuple(w.shape)}")
    batched = w.dim() == 3
    tensors = [w, mask, start]
    if not batched:
        tensors = [None if t is None else t[None] for t in tensors]
    dtype = accumulation_dtype(w)
    weights, kept, first = tensors
    assert weights is not None and kept is not None
    if factor is None:
        factor = obs_factor(h.to(dtype), damping=damping, max_damping=max_damping)
    stack, u, dead = (t if t.dim() == d else t[None] for t, d in
                      ((h, 3), (factor.u, 3), (factor.dead, 2)))  # fmt: skip
    mean = stack.diagonal(dim1=1, dim2=2).double().masked_fill(dead, 1).mean(1, keepdim=True)
    shift = dead + factor.damping.reshape(-1, 1) * mean
    args = _Args(
        weights.to(dtype),
        stack.to(dtype),
        shift.to(dtype),
        u.to(dtype),
        kept,
        None if first is None else first.to(dtype),
        float(tolerance),
        max_iterations,
    )
    args.check()
    if weights.numel():
        result = ObsReconstruct(*torch.ops.pyprune.obs_reconstruct(*args))
    else:
        result = ObsReconstruct(*_collect([], args.w))
    return result if batched else ObsReconstruct(*(t[0] for t in result))
