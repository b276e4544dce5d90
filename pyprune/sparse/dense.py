"""`DenseLinear`: an `nn.Linear` that uses our own kernel where that is the faster one."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from pyprune import _native
from pyprune.sparse.weight import autocast

# Up to so many rows of x our bf16 kernel reads weights at the memory's pace, which PyTorch's does
# not; with more of them PyTorch multiplies faster (benchmarks/bench_sparse_linear.py).
OWN_ROWS = 16


class DenseLinear(nn.Linear):
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
        input = autocast(input)
        if not self._own(input):
            return F.linear(input, self.weight, self.bias)
        flat = input.reshape(-1, self.in_features)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        y = torch.empty((flat.shape[0], self.out_features), dtype=input.dtype)
        bias = None if self.bias is None else _native.capsule(self.bias.float())
        _native.call("linear_dense", y, flat, self.weight, bias)
        return y.view(*input.shape[:-1], self.out_features)

    def _own(self, x: Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()
            and type(x) is Tensor
            and x.dtype is torch.bfloat16
            and x.device.type == "cpu"
            and x.shape[-1] == self.in_features
            and 0 < x.numel() <= OWN_ROWS * self.in_features
            and self.weight.dtype is torch.bfloat16
            and self.weight.device.type == "cpu"
            and self.weight.is_contiguous()
            and not (torch.is_grad_enabled() and self._trains(x))
            and _native.MODULE is not None
            and "PYPRUNE_BACKEND" not in os.environ
            and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
            and forward_ad._current_level < 0
        )

    def _trains(self, x: Tensor) -> bool:
        bias = self.bias is not None and self.bias.requires_grad
        return x.requires_grad or self.weight.requires_grad or bias


def use_own_kernels(model: nn.Module) -> None:
    """Replaces every plain `nn.Linear` of `model` by a `DenseLinear`, in place; parameters stay."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name:
            model.set_submodule(name, DenseLinear.of(module))
