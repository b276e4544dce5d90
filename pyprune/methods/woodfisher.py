"""WoodFisher: optimal brain surgeon by a block-diagonal empirical Fisher matrix.

A block holds consecutive weights of one row. Within a block nothing is approximated: weights go
one at a time, each choice from the inverse of what is left, and the kept ones end at the joint
optimum. The paper takes scores once and adds up the updates of single weights, which is an option.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution, given
from pyprune.methods.fisher import (
    LowRankFisher,
    SampleOptions,
    live_weight,
    sampled_gradients,
    with_dead,
)
from pyprune.methods.greedy import GreedyPlan
from pyprune.methods.options import Count
from pyprune.methods.selection import select_mask
from pyprune.patterns import NM, Pattern, scope_of

# Bytes of block matrices that exist at a time; with their inverses and factors a few times that.
BLOCKS_BYTES = 64 << 20


@dataclass(frozen=True)
class WoodFisherOptions(SampleOptions):
    """samples, shrinkage: of the Fisher matrix, see `SampleOptions`. block_size: weights of a row
    that it couples (whole N:M groups). joint: greedy choice and joint update within a block;
    false: scores taken once and updates of single weights added up, as the paper does."""

    block_size: Count = 32
    joint: bool = True


class Blocks:
    """The rows of a layer cut into blocks of B weights, the last one of a row padded:
    `[R, C]` <-> `[P, B]`, P = R ceil(C / B)."""

    def __init__(self, fisher: LowRankFisher, size: int) -> None:
        self.rows, self.cols = fisher.d.shape
        self.size = min(size, self.cols)
        self._s, self._d = self.cut(fisher.s), self.cut(fisher.d, 1.0)
        self.absent: Tensor | None = None
        if self.cols % self.size:
            self.absent = ~self.cut(torch.ones_like(fisher.d, dtype=torch.bool), False)

    def cut(self, t: Tensor, fill: float | bool = 0.0) -> Tensor:
        """`[..., R, C]` as `[..., P, B]`."""
        padded = F.pad(t, (0, -self.cols % self.size), value=fill)
        return padded.reshape(*t.shape[:-2], -1, self.size)

    def join(self, t: Tensor) -> Tensor:
        """`[P, B]` as `[R, C]`."""
        return t.reshape(self.rows, -1)[:, : self.cols].contiguous()

    def inverses(self) -> Iterator[tuple[slice, Tensor]]:
        """`F^-1 [p, B, B]` of some blocks after the other, with which they are."""
        at_once = max(1, BLOCKS_BYTES // (8 * self.size**2))
        for a in range(0, len(self._d), at_once):
            part = slice(a, a + at_once)
            s = self._s[:, part].permute(1, 2, 0)
            f = torch.diag_embed(self._d[part]).baddbmm_(s, s.mT)
            yield part, torch.cholesky_inverse(torch.linalg.cholesky(f))

    def inverse_diagonal(self) -> Tensor:
        """`[F^-1]_jj`, `[R, C]`."""
        diagonals = [inverse.diagonal(dim1=1, dim2=2) for _, inverse in self.inverses()]
        return self.join(torch.cat(diagonals))


def joint_update(x: Tensor, inverse: Tensor, mask: Tensor) -> Tensor:
    """The minimiser of `1/2 (y - x) F (y - x)^T` with `y = 0` off the mask:
    `x - F^-1[:, Q] (F^-1[Q, Q])^-1 x_Q`, for `x [p, B]` each."""
    gone = ~mask
    pair = gone[:, :, None] & gone[:, None, :]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    pivot = torch.where(pair, inverse, eye)
    lower = torch.linalg.cholesky(pivot)
    multiplier = torch.cholesky_solve(torch.where(gone, x, 0)[:, :, None], lower)
    return torch.where(mask, x - (inverse @ multiplier)[:, :, 0], 0)


def summed_update(x: Tensor, inverse: Tensor, mask: Tensor) -> Tensor:
    """The updates of single weights, `-x_q / [F^-1]_qq F^-1 e_q`, added up (Singh & Alistarh 2020,
    section 3.3)."""
    multiplier = torch.where(mask, 0, x / inverse.diagonal(dim1=1, dim2=2))
    return torch.where(mask, x - (inverse @ multiplier[:, :, None])[:, :, 0], 0)


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
    """`[R, C]`: 1 / sqrt(diag(F^-1)) of the dense layer; 0 for inputs that were always zero."""
    inputs, own = given("woodfisher", inputs), options.own_as(WoodFisherOptions)
    fisher = LowRankFisher.of("woodfisher", inputs, options)
    diagonal = Blocks(fisher, own.block_size).inverse_diagonal()
    return torch.where(inputs.dead, 0.0, diagonal.rsqrt())


def woodfisher(
    w: Tensor,
    inputs: LayerInputs | None,
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
    mask: Tensor | None,
) -> Solution:
    """Least loss first within the layer unless the pattern says otherwise, with the update of the
    weights that share a block with what went (Singh & Alistarh 2020). See `Solver`."""
    inputs, own = given("woodfisher", inputs), options.own_as(WoodFisherOptions)
    fisher = LowRankFisher.of("woodfisher", inputs, options)
    size = own.block_size
    if isinstance(pattern, NM):
        size = max(size - size % pattern.m, pattern.m)
    blocks, x = Blocks(fisher, size), live_weight(w, inputs)
    if mask is None and own.joint:
        mask = _greedy(x, blocks, pattern, preserve, w.dtype)
    elif mask is None:
        scores = x.square() / (2 * blocks.inverse_diagonal())
        mask = select_mask(
            scores, pattern, scope=scope_of(pattern, METHOD.default_scope), preserve=preserve
        )
    update = joint_update if own.joint else summed_update
    cut, kept = blocks.cut(x), blocks.cut(mask, True)
    solved = [update(cut[part], inverse, kept[part]) for part, inverse in blocks.inverses()]
    weight = with_dead(w, blocks.join(torch.cat(solved)), mask, inputs)
    return Solution(weight=weight, mask=mask, damping=fisher.damping)


def _greedy(
    x: Tensor, blocks: Blocks, pattern: Pattern, preserve: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Traced in `dtype`: blocks are small and damped, and fp32 has a kernel."""
    scope = scope_of(pattern, METHOD.default_scope)
    if scope not in ("", "row", "layer"):
        raise ValueError(f"woodfisher: scope {scope} expects the mask that was selected, got none")
    cut = blocks.cut(x).to(dtype)
    kept = None if preserve is None else blocks.cut(preserve, True)
    groups = blocks.rows if scope == "row" else 1
    plan = GreedyPlan(len(cut), blocks.size, pattern, groups, kept, blocks.absent)
    inverses = ((part, inverse.to(dtype)) for part, inverse in blocks.inverses())
    traces = [plan.trace(cut[part], inverse, part) for part, inverse in inverses]
    order, loss = (torch.cat(parts) for parts in zip(*traces, strict=True))
    return blocks.join(plan.mask(order, loss))


METHOD = Method(
    name="woodfisher",
    title="OBS by a block-diagonal empirical Fisher matrix",
    paper="Singh & Alistarh 2020, arXiv 2004.14340",
    statistic="norms",
    scopes=("layer", "row", "global"),
    updates_weights=True,
    solve=woodfisher,
    column_scale=column_scale,
    gradient=sampled_gradients,
    options_type=WoodFisherOptions,
)
