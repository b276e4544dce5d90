"""Greedy optimal brain surgeon: one weight after the other, every choice from the exact inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import check_array, check_same_device, check_shape, check_tensor
from pyprune.ops._precision import full_precision

GREEDY_DTYPES = (torch.float32, torch.float64)
# Bytes of removed columns that the reference holds at a time; problems are split accordingly.
HELD_BYTES = 64 << 20


class ObsGreedy(NamedTuple):
    """`order` `[P, K]` int64, the index that went in each step (-1: none was left to go); `loss`
    `[P, K]`, what that step added, in the dtype of the weights."""

    order: Tensor
    loss: Tensor


def _check_obs_greedy(
    w: Tensor, inverse: Tensor, first: Tensor | None, steps: int, n: int, m: int
) -> None:
    check_tensor("w", w)
    check_tensor("inverse", inverse)
    if w.dim() != 2 or w.dtype not in GREEDY_DTYPES:
        raise ValueError(f"w: expected [P, C] in fp32 or fp64, got {tuple(w.shape)} {w.dtype}")
    count, cols = w.shape
    own = inverse.dim() == 3
    check_shape("inverse", inverse, (count, cols, cols) if own else (cols, cols))
    if inverse.dtype != w.dtype:
        raise ValueError(f"inverse: expected {w.dtype} like w, got {inverse.dtype}")
    if first is not None:
        check_array("first", first, torch.bool, (count, cols))
    if not 0 <= steps <= cols:
        raise ValueError(f"steps: expected a number from 0 to C = {cols}, got {steps}")
    if m and not (0 <= n <= m and cols % m == 0):
        raise ValueError(f"nm: expected 0 <= n <= m and m to divide C = {cols}, got {n}:{m}")
    check_same_device(w, inverse, first)


class _Greedy:
    """Some problems side by side. v: `[P, K, C]`, of each step the removed coordinate's column of
    the inverse as it was then, over the root of its pivot: the inverse now is `inverse - v^T v`."""

    def __init__(
        self, w: Tensor, inverse: Tensor, first: Tensor | None, steps: int, n: int, m: int
    ) -> None:
        count, cols = w.shape
        self.inverse = inverse
        self.x = w.clone()
        self.d = inverse.diagonal(dim1=-2, dim2=-1).expand(count, cols).clone()
        # Rounding may not turn a pivot that all but vanished into a negative one.
        self.floor = self.d * torch.finfo(w.dtype).eps
        self.open = torch.ones_like(w, dtype=torch.bool)
        self.first = torch.zeros_like(self.open) if first is None else first.clone()
        self.v = w.new_zeros(count, steps, cols)
        self.order = w.new_full((count, steps), -1, dtype=torch.int64)
        self.loss = w.new_zeros(count, steps)
        self.m = m
        # How many of each group of m may still go.
        self.left = w.new_full((count, cols // m), m - n, dtype=torch.int64) if m else None
        self.rows = torch.arange(count, device=w.device)

    def step(self, t: int) -> bool:
        """Removes one weight of each problem; False if none was left in any."""
        allowed = self.open
        if self.left is not None:
            room = (self.left > 0).repeat_interleave(self.m, dim=1)
            allowed = allowed & (room | self.first)
        score = torch.where(allowed, self.x.square() / self.d, float("inf"))
        score = torch.where(self.open & self.first, -1.0, score)
        j = score.argmin(1)  # the first of equal ones
        taken = allowed[self.rows, j]
        if not bool(taken.any()):
            return False
        column = self.inverse[j] if self.inverse.dim() == 2 else self.inverse[self.rows, j]
        if t:
            past = self.v[:, :t]
            at = past.gather(2, j[:, None, None].expand(-1, t, 1))
            column = column - torch.bmm(at.mT, past)[:, 0]
        scale = torch.where(taken, self.d[self.rows, j].rsqrt(), 0.0)
        v = torch.where(self.open, column, 0.0) * scale[:, None]
        change = self.x[self.rows, j] * scale
        self.x -= v * change[:, None]
        self.d = torch.maximum(self.d - v.square(), self.floor)
        self.v[:, t] = v
        self.loss[:, t] = change.square() / 2
        self.order[:, t] = torch.where(taken, j, -1)
        self.open[self.rows, j] &= ~taken
        if self.left is not None:
            self.left[self.rows, j // self.m] -= taken.long()
        return True


@full_precision()
def obs_greedy_reference(
    w: Tensor, inverse: Tensor, first: Tensor | None, steps: int, n: int, m: int
) -> tuple[Tensor, Tensor]:
    order = w.new_full((len(w), steps), -1, dtype=torch.int64)
    loss = w.new_zeros(len(w), steps)
    at_once = max(1, HELD_BYTES // max(1, steps * w.shape[1] * w.element_size()))
    for a in range(0, len(w), at_once):
        part = slice(a, a + at_once)
        own = inverse if inverse.dim() == 2 else inverse[part]
        greedy = _Greedy(w[part], own, None if first is None else first[part], steps, n, m)
        for t in range(steps):
            if not greedy.step(t):
                break
        order[part], loss[part] = greedy.order, greedy.loss
    return order, loss


def _obs_greedy_native(
    w: Tensor, inverse: Tensor, first: Tensor | None, steps: int, n: int, m: int
) -> tuple[Tensor, Tensor]:
    order, loss = w.new_empty(len(w), steps, dtype=torch.int64), w.new_empty(len(w), steps)
    stack = (inverse if inverse.dim() == 3 else inverse[None]).contiguous()
    flags = _native.optional_capsule(None if first is None else first.contiguous())
    _native.call("obs_greedy", order, loss, w.contiguous(), stack, flags, n, m)
    return order, loss


def _obs_greedy_fake(
    w: Tensor, inverse: Tensor, first: Tensor | None, steps: int, n: int, m: int
) -> tuple[Tensor, Tensor]:
    _check_obs_greedy(w, inverse, first, steps, n, m)
    return w.new_empty(len(w), steps, dtype=torch.int64), w.new_empty(len(w), steps)


registry.register(
    "obs_greedy(Tensor w, Tensor inverse, Tensor? first, int steps, int n, int m) "
    "-> (Tensor, Tensor)",
    fake=_obs_greedy_fake,
    impls={
        "reference": registry.Impl(obs_greedy_reference, GREEDY_DTYPES),
        "native": registry.Impl(_obs_greedy_native, (torch.float32,)),
    },
)


def obs_greedy(
    w: Tensor,
    inverse: Tensor,
    *,
    steps: int | None = None,
    nm: tuple[int, int] | None = None,
    first: Tensor | None = None,
) -> ObsGreedy:
    """Traces of exact greedy OBS: problems of C weights each, independent of one another.

    In each step the weight with the least `x_j^2 / (2 [F^-1]_jj)` goes, the others take the values
    that are best without it, and F^-1 becomes that of the weights still there (Hassibi & Stork
    1992, eq. 5; Frantar & Alistarh 2022, algorithm 1, "ExactOBS"). The losses of a problem's first
    k steps add up to `1/2 dx F dx^T` of the best weights without those k, whatever their order.

    The inverse is not downdated, which would read and write C^2 numbers a step. All that a step
    needs of it is one column, `F^-1 e_j` less the outer products of the columns that went before:
    the pivoted Cholesky factorisation of F^-1, K C numbers read once a step and C written. It takes
    C K^2 / 2 multiply-adds a problem, a quarter of the downdates' K C^2 at K = C / 2.

    Args:
        w: `[P, C]`, fp32 or fp64.
        inverse: F^-1, symmetric positive definite, in the dtype of `w`: `[C, C]`, one for all
            problems (the rows of a layer), or `[P, C, C]`.
        steps: K, how many weights go; None: C, or under `nm` as many as that removes.
        nm: (n, m): of every m consecutive weights n stay; a group that lost m - n is closed.
        first: bool `[P, C]`: go before all others, in the order of their index, whatever they cost
            and whatever `nm` says.

    Returns:
        The traces. Of equal scores the lower index goes first.

    Raises:
        ValueError: a shape, dtype or device mismatch, `steps` above C, a group that does not fit.
    """
    n, m = nm or (0, 0)
    if steps is None:
        steps = w.shape[-1] if not m else w.shape[-1] // max(m, 1) * (m - n)
    _check_obs_greedy(w, inverse, first, steps, n, m)
    return ObsGreedy(*torch.ops.pyprune.obs_greedy(w, inverse, first, steps, n, m))
