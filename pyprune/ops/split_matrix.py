"""fp32 matrix products on a GPU's 16-bit matrix units: operands as sums of bf16 matrices."""

from __future__ import annotations

import torch
from torch import Tensor

# Parts of the left operand: 16 bits of 24. See `SplitMatrix`.
LEFT_PARTS = 2


def parts_of(t: Tensor, count: int) -> list[Tensor]:
    """`count` bf16 tensors that sum up to fp32 `t`, up to 2^-8 of it for each."""
    parts = []
    for _ in range(count):
        parts.append(t.bfloat16())
        t = t - parts[-1]
    return parts


class SplitMatrix:
    """`h` `[K, N]` fp32, ready for `p @ h` with many `p`.

    h = h_0 + h_1 + ... in bf16, 8 bits each, and p = p_0 + p_1. Products of two bf16 numbers are
    exact in fp32, and those of parts i and j with i + j < `parts` go into one fp32 sum, as one
    product whose inner dimension is that much longer. With three parts h is what it was to its last
    bit and five products are taken, at a rate of a fifth of bf16's: on Hopper chips twice that of
    fp32's own units and more. What is left out of p, 2^-16 of each element, is as if the caller had
    asked for another p. With two parts three products are taken, and elements of h are off by up to
    2^-16 too.

    On other devices the same sums are taken in fp32.
    """

    def __init__(self, h: Tensor, parts: int = 3) -> None:
        self._pairs = [(i, j) for i in range(LEFT_PARTS) for j in range(parts) if i + j < parts]
        split = parts_of(h, parts)
        self._right = torch.cat([split[j] for _, j in self._pairs])

    def times(self, p: Tensor, out: Tensor | None = None) -> Tensor:
        """`p @ h` for fp32 `p` `[R, K]`, into `out` `[R, N]` if given, which must not be `p`."""
        split = parts_of(p, LEFT_PARTS)
        left = torch.cat([split[i] for i, _ in self._pairs], dim=1)
        if out is None:
            out = p.new_empty(len(p), self._right.shape[1])
        if p.device.type == "cuda":
            return torch.mm(left, self._right, out_dtype=torch.float32, out=out)
        return torch.mm(left.float(), self._right.float(), out=out)
