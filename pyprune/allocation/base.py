"""From one number per block to one sparsity per block, with the exact mean that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from pyprune.errors import UserError

# No block loses more than this: past it the sweep has nothing left to compensate with.
MAX_SPARSITY = 0.99
_HALVINGS = 200


class Allocation(Protocol):
    """Measures blocks one by one, then says how much each of them loses.

    needs_inputs: whether `measure` is to be given the inputs' norms of a dense model.
    """

    needs_inputs: bool

    def measure(self, weights: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """The next block: its matrices `[R, C]`, each with its inputs' L2 norms `[C]` or None."""

    def sparsities(self, target: float, sizes: Sequence[int]) -> list[float]:
        """One sparsity per measured block; their mean weighted by `sizes` is `target`."""


def normalised(values: Sequence[float]) -> list[float]:
    """`values` mapped linearly onto [0, 1]; all equal: 0.5 each, which allocates uniformly."""
    low, high = min(values), max(values)
    if high == low:
        return [0.5] * len(values)
    return [(value - low) / (high - low) for value in values]


def spread(
    ratios: Sequence[float],
    sizes: Sequence[int],
    target: float,
    mode: Literal["scale", "shift"],
    maximum: float = MAX_SPARSITY,
) -> list[float]:
    """Sparsities that follow `ratios`, within [0, maximum], with weighted mean `target`.

    scale: clip(t * ratio); shift: clip(ratio + t). The mean grows with t, so t is found by
    bisection. The published codes do not clip (AlphaPruning asks for more than 100 % of some
    blocks of Llama-7B at 80 %) or clip afterwards and miss the target.

    Raises:
        UserError: `target` exceeds `maximum`.
    """
    if target > maximum:
        raise UserError(f"sparsity: expected at most {maximum} with an allocation, got {target}")
    total = sum(sizes)

    def at(t: float) -> list[float]:
        raw = [t * r if mode == "scale" else t + r for r in ratios]
        return [min(max(value, 0.0), maximum) for value in raw]

    def mean(values: Sequence[float]) -> float:
        return sum(v * n for v, n in zip(values, sizes, strict=True)) / total

    if mode == "scale":
        smallest = min(r for r in ratios if r > 0)
        low, high = 0.0, maximum / smallest
    else:
        low, high = -max(ratios), maximum - min(ratios)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if mean(at(middle)) < target else (low, middle)
    return at(high)
