"""Which weights, groups, rows and columns of all matrices go: one threshold for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pyprune import ops
from pyprune.patterns import NM


@dataclass
class Weights:
    """The matrices that compete, each `w [R, C]` on one device and in one dtype.

    row_scales, column_scales: `[R]` and `[C]`; |w| times both orders the weights by cost.
    keep_zeros: weights that are zero stay so.
    """

    keep_zeros: bool
    ws: list[Tensor] = field(default_factory=list)
    row_scales: list[Tensor] = field(default_factory=list)
    column_scales: list[Tensor] = field(default_factory=list)

    def add(self, w: Tensor, row_scale: Tensor, column_scale: Tensor) -> None:
        self.ws.append(w)
        self.row_scales.append(row_scale.to(w.device))
        self.column_scales.append(column_scale.to(w.device))

    def masks(self, pruned: int, cap: float) -> list[Tensor]:
        """Bool `[R, C]` each, True = kept: without the `pruned` cheapest of all; at most the share
        `cap` of one matrix goes, as far as zeros that stay allow."""
        zeros = sum(int((w == 0).sum()) for w in self.ws)
        # What is zero goes before what is dead and costs as little.
        first = self.keep_zeros or zeros <= pruned
        preserves = [w != 0 for w in self.ws] if first else None
        return lowest(self.ws, pruned, cap, self.row_scales, self.column_scales, preserves)

    def group_masks(self, pruned: int, cap: float, pattern: NM) -> list[Tensor]:
        """Likewise, with the `pruned` cheapest groups turned into N:M. The cost of a group is the
        sum of the costs of its M - N cheapest weights."""
        scaled = zip(self.ws, self.row_scales, self.column_scales, strict=True)
        costs = [group_costs(w, rows, columns, pattern) for w, rows, columns in scaled]
        zeros = [(w == 0).reshape(len(w), -1, pattern.m).sum(-1) for w in self.ws]
        others = [count < pattern.m - pattern.n for count in zeros]
        first = sum(int((~other).sum()) for other in others) <= pruned
        untouched = lowest(costs, pruned, cap, preserves=others if first else None)
        masks = []
        for k, w in enumerate(self.ws):
            more = (zeros[k] > pattern.m - pattern.n).repeat_interleave(pattern.m, 1)
            mask = ops.mask_nm(
                w,
                pattern.n,
                pattern.m,
                row_scale=self.row_scales[k],
                column_scale=self.column_scales[k],
                preserve=(w != 0) | more,
            )
            mask |= untouched[k].repeat_interleave(pattern.m, 1)
            masks.append(mask & (w != 0) if self.keep_zeros else mask)
        return masks


def group_costs(w: Tensor, row_scale: Tensor, column_scale: Tensor, pattern: NM) -> Tensor:
    """`[R, C / M]` in fp32: twice the sum of the M - N cheapest weights of every group."""
    score = w.float().abs() * row_scale.float()[:, None] * column_scale.float()
    groups = score.square().reshape(len(w), -1, pattern.m).sort(dim=-1).values
    return groups[..., : pattern.m - pattern.n].sum(-1)


def lowest(
    ws: Sequence[Tensor],
    pruned: int,
    cap: float,
    row_scales: Sequence[Tensor] | None = None,
    column_scales: Sequence[Tensor] | None = None,
    preserves: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`ops.mask_global` with at most the share `cap` of each tensor: a tensor that would lose more
    loses so many, and the others make up for it as far as they can."""
    terms = (column_scales, row_scales, preserves)
    masks: list[Tensor | None] = [None] * len(ws)
    open_, left = list(range(len(ws))), pruned

    def of(which: list[int], count: int) -> list[Tensor]:
        some = [ws[i] for i in which]
        picked = [None if t is None else [t[i] for i in which] for t in terms]
        count = max(0, min(count, sum(w.numel() for w in some)))
        return ops.mask_global(
            some, count, column_scales=picked[0], row_scales=picked[1], preserves=picked[2]
        )

    while open_:
        found = dict(zip(open_, of(open_, left), strict=True))
        limits = {i: int(cap * ws[i].numel() + 1e-9) for i in open_}
        over = [i for i in open_ if int((~found[i]).sum()) > limits[i]] if cap < 1 else []
        for i in over:
            (found[i],) = of([i], limits[i])
        for i in over or open_:
            masks[i] = found[i]
            left -= int((~found[i]).sum())
        open_ = [i for i in open_ if over and i not in over]
    return [mask for mask in masks if mask is not None]
