"""AlphaPruning: blocks whose spectra have heavy tails are well trained and lose less.

Lu et al. 2024, arXiv 2410.10912. Needs no data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.allocation.base import normalised, spread

BINS = 100
# Candidates for the start of the tail, around the mode of the spectrum.
WINDOW = (0.95, 1.5)
# Eigenvalues below this share of the largest are rounding, or come from columns pruned earlier.
NEGLIGIBLE = 1e-10
# Mean ln(x / x_min) below which the values of a tail count as equal.
EQUAL = 1e-12


def eigenvalues(w: Tensor) -> Tensor:
    """Eigenvalues of W W^T, ascending, fp64, `[min(R, C)]` less the negligible ones."""
    wide = w.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram)
    floor = NEGLIGIBLE * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    kept: Tensor = values[values > floor]
    return kept


def power_law_exponent(values: Tensor) -> float:
    """Exponent of the power law that the upper tail of `values` follows.

    Args:
        values: `[N]` positive, ascending.

    Returns:
        The maximum likelihood estimate 1 + n / sum(ln(x_k / x_min)) over the n values from x_min
        on, with x_min the one around the mode of the histogram of log10(values) whose fit has the
        smallest Kolmogorov-Smirnov distance ("PL_Alpha_Hill" with the peak rule of section 3).
        Candidates are the values in (0.95, 1.5) times the mode; the published code compares them
        with the logarithm of the lower limit, which lets in many more. NaN if there are fewer than
        two different values.
    """
    n = len(values)
    if n < 2:
        return float("nan")
    logs = values.log()
    # sums[i] = sum over k >= i of ln x_k; the last index leaves a tail of one value: no exponent.
    sums = logs.flip(0).cumsum(0).flip(0)
    tail = torch.arange(n, 0, -1, dtype=values.dtype, device=values.device)
    spans = sums - tail * logs
    edge = 10 ** _mode(values.log10())
    inside = (values > WINDOW[0] * edge) & (values < WINDOW[1] * edge)
    # A tail of equal values has no exponent.
    usable = spans > EQUAL * tail
    candidates = (inside & usable).nonzero().flatten().tolist() or usable.nonzero().flatten()
    best, smallest = float("nan"), float("inf")
    for i in candidates:
        alpha = 1 + float(tail[i] / spans[i])
        distance = _distance(logs[i:] - logs[i], alpha)
        if distance < smallest:
            best, smallest = alpha, distance
    return best


def _mode(logs: Tensor) -> float:
    """Left edge of the fullest of 100 equal bins."""
    low, high = float(logs.min()), float(logs.max())
    if high == low:
        return low
    counts = torch.histc(logs, BINS, low, high)
    return low + int(counts.argmax()) * (high - low) / BINS


def _distance(logs: Tensor, alpha: float) -> float:
    """Kolmogorov-Smirnov distance of a tail, as logarithms over its start, to its power law."""
    if not alpha > 1:
        return 1.0
    empirical = torch.arange(len(logs), dtype=logs.dtype, device=logs.device) / len(logs)
    return float((1 - (logs * (1 - alpha)).exp() - empirical).abs().max())


class AlphaPruning:
    """`strength` is epsilon: a block gets between 1 - epsilon and 1 + epsilon times the target
    (before clipping), growing with the mean exponent of its matrices (section 3.2)."""

    needs_inputs = False
    STRENGTH = 0.3

    def __init__(self, strength: float | None = None) -> None:
        self.strength = self.STRENGTH if strength is None else strength
        self.exponents: list[float] = []

    def measure(self, weights: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        exponents = [power_law_exponent(eigenvalues(w)) for w, _ in weights]
        fitted = [alpha for alpha in exponents if alpha == alpha]
        # A block of matrices of rank one (or zero) has no spectrum to speak of: most prunable.
        self.exponents.append(sum(fitted) / len(fitted) if fitted else float("nan"))

    def sparsities(self, target: float, sizes: Sequence[int]) -> list[float]:
        known = [alpha for alpha in self.exponents if alpha == alpha]
        most = max(known, default=1.0)
        alphas = [alpha if alpha == alpha else most for alpha in self.exponents]
        ratios = [1 - self.strength + 2 * self.strength * x for x in normalised(alphas)]
        return spread(ratios, sizes, target, "scale")
