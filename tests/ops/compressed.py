"""Plain packers of the compressed layouts, written independently of the library's."""

import torch
from torch import Tensor


def random_24_mask(rows: int, cols: int, gen: torch.Generator) -> Tensor:
    """bool `[rows, cols]` with two kept of every four."""
    scores = torch.rand(rows, cols // 4, 4, generator=gen)
    kept = scores.argsort(-1)[..., :2]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
    return mask.reshape(rows, cols)


def pack_24(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = w.shape
    columns = mask.nonzero()[:, 1].reshape(rows, cols // 4, 2) % 4
    nibbles = (columns[..., 0] | columns[..., 1] << 2).reshape(rows, cols // 8, 2)
    meta = nibbles[..., 0] | nibbles[..., 1] << 4
    return w[mask].reshape(rows, cols // 2), meta.to(torch.uint8)


def pack_bitmap(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = w.shape
    bits = torch.zeros(rows, -(-cols // 8) * 8, dtype=torch.int64)
    bits[:, :cols] = mask
    bitmap = (bits.reshape(rows, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[1:] = mask.sum(1).cumsum(0)
    return w[mask], bitmap, offsets
