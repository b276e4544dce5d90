"""Masks from greedy OBS traces: which steps of which problems are carried out."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops.obs_greedy import ObsGreedy
from pyprune.patterns import NM, Pattern, pruned_count


class GreedyPlan:
    """How many weights greedy OBS removes from P problems of C weights each, and from which.

    Problems compete within `groups` comparison groups, consecutive and of equal size: as many as
    there are problems, and each loses its own share; fewer, and at every step the problem of the
    group goes on whose next weight is the cheapest. Problems do not touch each other, so that the
    heap's order is the order of the running maxima of their losses: behind an expensive step the
    cheaper ones that it led to follow at once. (The OBC code sorts the losses themselves, which
    counts later, cheaper steps of a problem before the ones that make them possible.)

    Args:
        count, cols: P and C.
        pattern: N:M within each problem, or a sparsity of each comparison group.
        preserve: bool `[P, C]`, False = must go; counts among the removed.
        absent: bool `[P, C]`, True = no weight but padding, equally many in each group.
    """

    def __init__(
        self,
        count: int,
        cols: int,
        pattern: Pattern,
        groups: int,
        preserve: Tensor | None = None,
        absent: Tensor | None = None,
    ) -> None:
        self.cols, self.groups = cols, groups
        self.first = None if preserve is None else ~preserve
        padding = 0
        if absent is not None:
            self.first = absent if self.first is None else self.first | absent
            padding = int(absent.sum()) // max(groups, 1)
        self.share = pruned_count(count * cols // max(groups, 1) - padding, pattern.sparsity)
        self.share += padding
        self.nm = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
        self.steps = self._steps(count)

    def _steps(self, count: int) -> int:
        """The most weights that one problem can lose."""
        first = self.first
        if self.nm is not None:
            n, m = self.nm
            if first is None or not count:
                return self.cols // m * (m - n)
            forced = first.view(count, -1, m).sum(2)
            return int(forced.clamp_min(m - n).sum(1).max())
        if self.groups < count:
            return self.cols
        return max(self.share, 0 if first is None or not count else int(first.sum(1).max()))

    def trace(self, w: Tensor, inverse: Tensor, part: slice = slice(None)) -> ObsGreedy:
        """The traces of the problems `part`, with `w [p, C]`; see `ops.obs_greedy`."""
        first = None if self.first is None else self.first[part]
        return ops.obs_greedy(w, inverse, steps=self.steps, nm=self.nm, first=first)

    def mask(self, order: Tensor, loss: Tensor) -> Tensor:
        """The weights that stay, bool `[P, C]`, from the traces of all problems. Exact counts; more
        go only where `preserve` says so."""
        gone = order >= 0 if self.nm is not None else self._cheapest(loss)
        mask = torch.ones(len(order), self.cols + 1, dtype=torch.bool, device=order.device)
        mask.scatter_(1, torch.where(gone, order, self.cols), False)
        return mask[:, : self.cols].contiguous()

    def _cheapest(self, loss: Tensor) -> Tensor:
        """`[P, K]` bool: the first steps of each problem, `share` of each comparison group, those
        that were forced before all others."""
        early = torch.zeros_like(loss, dtype=torch.bool)
        if not loss.numel():
            return early
        key = torch.nextafter(loss.cummax(1).values, loss.new_tensor(float("inf")))
        if self.first is not None:
            steps = torch.arange(loss.shape[1], device=loss.device)
            early = steps < self.first.sum(1, keepdim=True)
            key = torch.where(early, 0.0, key)
        kept = ops.mask_topk(key.view(self.groups, -1), self.share).view_as(key)
        return ~kept | early
