"""`DenseLinear`: an `nn.Linear` that uses our own kernel where that is the faster one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyprune.sparse.direct import Prepared, PreparesWeight, can_prepare, is_plain

# Up to so many rows of x our bf16 kernel reads weights at the memory's pace, which PyTorch's does
# not; with more of them PyTorch multiplies faster (benchmarks/bench_sparse_linear.py).
OWN_ROWS = 16


class DenseLinear(PreparesWeight, nn.Linear):
    """`nn.Linear` for inference: bf16 weights on the CPU and at most OWN_ROWS rows of bf16
    activations go through `ops.linear_dense`'s native kernel, everything else through PyTorch.

    Parameters are those of `nn.Linear`, and may be shared with other modules.
    """

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
        # Of rows that lie apart PyTorch's bf16 product takes 150 times as long (a head that sees
        # the last of 16 positions of 16 sequences, 49152 x 576: 935 ms instead of 6).
        if input.dtype is torch.bfloat16 and input.is_cpu:
            input = input.contiguous()
        return F.linear(input, self.weight, self.bias)

    def _ready(self, x: Tensor) -> Prepared | None:
        """The weight and bias ready for our kernel; None where PyTorch's serves."""
        parameters, known = self._parameters, self._prepared
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if (
            weight is None
            or "bias" not in parameters  # one of them is computed (torch.nn.utils.parametrize)
            or not _is_plain_weight(weight)
            or (bias is not None and bias.dtype is not weight.dtype)
            or x.shape[-1:] != (self.in_features,)
            or not 0 < x.numel() <= OWN_ROWS * self.in_features
            or (torch.is_grad_enabled() and (weight.requires_grad or _trains(bias)))
        ):
            return None
        if known is None or not known.is_of((weight,), bias):
            known = None
            if can_prepare((weight,), bias, self.in_features):
                known = Prepared("linear_dense", (weight,), bias, *weight.shape)
            self._prepared = known
        return known


def _is_plain_weight(weight: Tensor) -> bool:
    """bf16 numbers in no subclass of Tensor: those (quantized, distributed) may show this dtype and
    store something else."""
    return weight.dtype is torch.bfloat16 and type(weight) in (nn.Parameter, Tensor)


def _trains(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def use_own_kernels(model: nn.Module) -> None:
    """Replaces every plain `nn.Linear` of `model` by a `DenseLinear`, in place; parameters stay."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name:
            model.set_submodule(name, DenseLinear.of(module))
