"""`DenseLinear`: an `nn.Linear` that uses our own kernel where that is the faster one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyprune.sparse.direct import Prepared, can_prepare, is_plain

# Up to so many rows of x our bf16 kernel reads weights at the memory's pace, which PyTorch's does
# not; with more of them PyTorch multiplies faster (benchmarks/bench_sparse_linear.py).
OWN_ROWS = 16


class DenseLinear(nn.Linear):
    """`nn.Linear` for inference: bf16 weights on the CPU and at most OWN_ROWS rows of bf16
    activations go through `ops.linear_dense`'s native kernel, everything else through PyTorch.

    Parameters are those of `nn.Linear`, and may be shared with other modules.
    """

    _prepared: Prepared | None = None
    _address: int = 0

    @classmethod
    def of(cls, linear: nn.Linear) -> DenseLinear:
        """`linear` with the same parameter objects."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    def plain(self) -> nn.Linear:
        """The `nn.Linear` with the same parameter objects."""
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        new.weight, new.bias = self.weight, self.bias
        return new.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        if is_plain(input) and input.dtype is torch.bfloat16:
            ready = self._ready(input)
            if ready is not None:
                return ready.product(input)
        return F.linear(input, self.weight, self.bias)

    def _ready(self, x: Tensor) -> Prepared | None:
        """The weight and bias ready for our kernel; None where PyTorch's serves."""
        parameters = self._parameters
        weight, bias, known = parameters["weight"], parameters["bias"], self._prepared
        assert weight is not None
        if (
            weight.dtype is not torch.bfloat16
            or x.shape[-1] != self.in_features
            or not 0 < x.numel() <= OWN_ROWS * self.in_features
            or (torch.is_grad_enabled() and (weight.requires_grad or _trains(bias)))
        ):
            return None
        # Parameters are given other memory in place, as by `module.to`.
        if known is None or weight.data_ptr() != self._address or not known.is_of((weight,), bias):
            known = None
            if weight.is_contiguous() and can_prepare((weight,), self.in_features):
                known = Prepared("linear_dense", (weight,), bias, *weight.shape)
            self._prepared, self._address = known, weight.data_ptr()
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # it can be neither copied nor pickled


def _trains(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def use_own_kernels(model: nn.Module) -> None:
    """Replaces every plain `nn.Linear` of `model` by a `DenseLinear`, in place; parameters stay."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name:
            model.set_submodule(name, DenseLinear.of(module))
