"""`FactoredLinear`: an `nn.Linear` whose weight is a product of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactoredLinear(nn.Module):
    """`y = (x @ down^T) @ up^T + bias` with `down [k, C]` and `up [R, k]`: `k (R + C)` weights
    instead of `R C`.

    Args:
        in_features, out_features, rank: C, R and k.
        bias, dtype, device: as for `nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        # Linear layers of their own, so that kernels for those are used.
        self.down = nn.Linear(in_features, rank, bias=False, dtype=dtype, device=device)
        self.up = nn.Linear(rank, out_features, bias=False, dtype=dtype, device=device)
        made = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if made is None else nn.Parameter(made, requires_grad=False)
        self.requires_grad_(False)

    @classmethod
    def of(cls, up: Tensor, down: Tensor, linear: nn.Linear) -> FactoredLinear:
        """`up [R, k]` and `down [k, C]` in the place of the weight of `linear`, in its dtype."""
        (rows, rank), columns = up.shape, down.shape[1]
        new = cls(columns, rows, rank, bias=False, device="meta")
        for part, weight in ((new.up, up), (new.down, down)):
            weight = weight.to(linear.weight.device, linear.weight.dtype).contiguous()
            part.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return new.train(linear.training)

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.up.in_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` this stands for."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(product(self.up.weight, self.down.weight), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, bias={self.bias is not None}"


def product(up: Tensor, down: Tensor) -> Tensor:
    """`up @ down`, summed in fp32 at least, in their dtype."""
    wide = torch.promote_types(up.dtype, torch.float32)
    return (up.detach().to(wide) @ down.detach().to(wide)).to(up.dtype)
