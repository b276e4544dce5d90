"""A prunable matrix together with its bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.errors import LayerError
from pyprune.layer_pruner import write_weight
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef


@dataclass(frozen=True, eq=False)
class Matrix:
    """`[R, C']`: the weights `[R, C]` of `ref` and, if it has one, its bias as a last column.

    The bias is corrected with the weights; it goes with its row and never alone.
    """

    ref: LinearRef

    @classmethod
    def all(cls, adapter: Adapter) -> list[Matrix]:
        """In the order of the blocks."""
        blocks = range(len(adapter.blocks))
        return [cls(ref) for i in blocks for ref in adapter.linears(i)]

    @property
    def name(self) -> str:
        return self.ref.name

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        rows, columns = self.ref.weight().shape
        return rows, columns

    @property
    def biased(self) -> bool:
        return self.ref.bias() is not None

    def zeros(self) -> int:
        """How many of the weights are zero."""
        return int((self.ref.weight() == 0).sum())

    def read(self, device: torch.device | str) -> Tensor:
        """A copy in fp32 (fp64 for fp64 models). LayerError unless it is finite."""
        weight, bias = self.ref.weight(), self.ref.bias()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        w = weight.to(device, dtype, copy=True).contiguous()
        if bias is not None:
            w = torch.cat([w, bias.to(device, dtype)[:, None]], dim=1)
        if not bool(w.isfinite().all()):
            raise LayerError(self.name, "expected finite weights, got NaN or infinity")
        return w

    def write(self, w: Tensor) -> None:
        """The inverse of `read`; LayerError if the parameters' dtype cannot hold `w`."""
        columns, bias = self.shape[1], self.ref.bias()
        write_weight(self.ref, w[:, :columns])
        if bias is not None:
            if not bool(w[:, columns].to(bias.dtype).isfinite().all()):
                raise LayerError(self.name, f"its new bias does not fit into {bias.dtype}")
            bias.copy_(w[:, columns])

    def parameters(self) -> dict[str, Tensor]:
        """What `write` changes, by the model's names. Fused experts share one parameter."""
        ref = self.ref
        names = [ref.parameter_name, *([ref.bias_name] if self.biased else [])]
        owners = {name: getattr(ref.module, name.rpartition(".")[2]) for name in names}
        return {name: owner.detach() for name, owner in owners.items()}
