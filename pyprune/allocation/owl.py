"""OWL: blocks with more outliers among their Wanda scores lose less.

Yin et al. 2023, arXiv 2310.05175, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.allocation.base import normalised, spread


class Owl:
    """`strength` is lambda: sparsities differ by at most 2 lambda. An outlier is a score above
    `outlier` (M) times the mean of all scores of its block."""

    needs_inputs = True
    STRENGTH = 0.08
    OUTLIER = 5.0

    def __init__(self, strength: float | None = None, outlier: float = OUTLIER) -> None:
        self.strength = self.STRENGTH if strength is None else strength
        self.outlier = outlier
        self.shares: list[float] = []

    def measure(self, weights: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Two reductions over the block; its scores are never held together."""
        total = elements = 0.0
        for w, norms in weights:
            magnitudes = w.double().abs().sum(dim=0)
            total += float(magnitudes.sum() if norms is None else magnitudes @ norms.double())
            elements += w.numel()
        limit = self.outlier * total / elements
        outliers = sum(
            int(torch.count_nonzero((w.abs() if norms is None else w.abs() * norms) > limit))
            for w, norms in weights
        )
        self.shares.append(outliers / elements)

    def sparsities(self, target: float, sizes: Sequence[int]) -> list[float]:
        ratios = [-2 * self.strength * x for x in normalised(self.shares)]
        return spread(ratios, sizes, target, "shift")
