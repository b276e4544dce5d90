"""Gradients of a mean loss through a model in fp16.

The smallest fp16 number is 6e-8. A mean over a few thousand tokens hands each of them less than
that, and all that is behind it would be zero; so the loss is multiplied by a power of two first,
which is divided out of the gradients in fp32. bf16 has the exponents of fp32 and needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# The largest is PyTorch's first one too (`torch.amp.GradScaler`).
LARGEST, STEP = 2.0**16, 2.0**4


class LossScale:
    """For gradients through `parameters`. value: what losses are multiplied with: 1 unless one of
    them is fp16. Lowered, for good, when gradients overflow, down to 1."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        half = any(p.dtype == torch.float16 for p in parameters)
        self.value = LARGEST if half else 1.0

    def lower(self) -> bool:
        """Takes the next smaller scale; False if there is none."""
        if self.value <= 1:
            return False
        self.value /= STEP
        return True

    def gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Of the scalar `loss` (fp32 or fp64), in fp32 (fp64 of fp64 inputs), None for an input
        that it does not depend on. Not finite only if they are not with the smallest scale. With a
        larger one the graph lives as long as `loss` does."""
        while True:
            with torch.enable_grad():
                scaled = loss * self.value
            found = torch.autograd.grad(
                scaled, inputs, retain_graph=self.value > 1, allow_unused=True
            )
            if self.value == 1 or all_finite(found) or not self.lower():
                return [None if g is None else _wide(g) / self.value for g in found]


def all_finite(tensors: Sequence[Tensor | None]) -> bool:
    """Whether none of them has a NaN or an infinity."""
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
