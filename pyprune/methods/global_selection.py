"""One comparison over every layer of a model that is never in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.patterns import pruned_count

_HALF = 16
_BINS = 1 << _HALF


class GlobalSelection:
    """The lowest scores |w| * scale of all layers together, found in two passes over the weights.

    A score is compared as the bit pattern of its fp32 value, which orders as the value does and has
    two halves: `count` (first pass) makes a histogram of the upper ones, `refine` (second pass) one
    of the lower ones within the decisive bin. That gives the exact order statistic without keeping
    any score; `mask` then answers for each layer. Equal scores go by layer in the order of `count`,
    then by lower flat index. Exactly `pruned_count(all weights, sparsity)` weights are removed,
    more only if `preserve` (bool, False = must stay pruned) forces more; NaN scores rank highest.

    All methods take `w [R, C]` as it was in the first pass; `scale [C]` and `preserve [R, C]` may
    be None. It holds `scale` for each layer, in fp32 on the CPU, and the two histograms.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self._scales: dict[str, Tensor | None] = {}
        self._elements = 0
        self._forced = 0
        self._upper = torch.zeros(_BINS, dtype=torch.int64)
        self._lower = torch.zeros(_BINS, dtype=torch.int64)
        self._ties: dict[str, tuple[Tensor, Tensor]] = {}
        self._decisive: tuple[int, int] | None = None
        self._threshold: tuple[int, dict[str, int]] | None = None

    def count(self, layer: str, w: Tensor, scale: Tensor | None, preserve: Tensor | None) -> None:
        """First pass."""
        # Those of gradient methods are as large as the layers: not to gather where these are.
        self._scales[layer] = None if scale is None else scale.float().cpu()
        keys = self._keys(layer, w, preserve)
        self._elements += w.numel()
        self._forced += w.numel() - keys.numel()
        self._upper += torch.bincount(keys >> _HALF, minlength=_BINS).cpu()

    def __contains__(self, layer: str) -> bool:
        return layer in self._scales

    def refine(self, layer: str, w: Tensor, preserve: Tensor | None) -> None:
        """Second pass, after `count` has seen every layer."""
        if self._decisive is None:
            wanted = pruned_count(self._elements, self.sparsity) - self._forced
            self._decisive = _find_bin(self._upper, max(wanted, 0))
        keys = self._keys(layer, w, preserve)
        inside = keys[keys >> _HALF == self._decisive[0]] & (_BINS - 1)
        self._lower += torch.bincount(inside, minlength=_BINS).cpu()
        values, counts = torch.unique(inside, return_counts=True)
        self._ties[layer] = (values.cpu(), counts.cpu())

    def mask(self, layer: str, w: Tensor, preserve: Tensor | None) -> Tensor:
        """The layer's kept weights, `[R, C]` bool, after `refine` has seen every layer."""
        if self._threshold is None:
            self._threshold = self._find_threshold()
        key, quota = self._threshold
        keys = self._keys(layer, w, None)
        ties = keys == key
        if preserve is not None:
            ties &= preserve.flatten()
        pruned = (keys < key) | (ties & (ties.cumsum(0) <= quota[layer]))
        mask = ~pruned.view_as(w)
        return mask if preserve is None else mask & preserve

    def _keys(self, layer: str, w: Tensor, preserve: Tensor | None) -> Tensor:
        """`[n]` int32 keys of the weights that are free to stay."""
        scale = self._scales[layer]
        scores = w.float().abs() if scale is None else w.float().abs() * scale.to(w.device)
        keys = scores.contiguous().view(torch.int32).flatten()
        return keys if preserve is None else keys[preserve.flatten()]

    def _find_threshold(self) -> tuple[int, dict[str, int]]:
        """The key below which everything goes, and how many of the equal ones in each layer do."""
        if self._decisive is None:
            raise RuntimeError("mask: expected refine to have seen every layer")
        upper, wanted = self._decisive
        lower, left = _find_bin(self._lower, wanted)
        quota = {}
        for layer in self._scales:
            values, counts = self._ties[layer]
            ties = int(counts[values == lower].sum())
            quota[layer] = min(ties, left)
            left -= quota[layer]
        return (upper << _HALF) | lower, quota


def _find_bin(histogram: Tensor, wanted: int) -> tuple[int, int]:
    """The first bin with which the running total reaches `wanted`, and how many of its entries
    that takes."""
    totals = histogram.cumsum(0)
    found = min(int(torch.searchsorted(totals, wanted)), _BINS - 1)
    return found, wanted - int(totals[found] - histogram[found])
