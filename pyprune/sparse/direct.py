"""A layer's CPU kernel, called without PyTorch's dispatch.

A decoding step of a small model is hundreds of products of some ten microseconds each: an
operator's dispatch (schema, fake mode, Python key) costs as much as the product, and so would
describing its tensors to the kernel anew every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyprune import _native
from pyprune.ops import _registry

VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def is_plain(x: Tensor) -> bool:
    """Whether `x` is fp32 or bf16 numbers on the CPU and nothing more: no compiler, tracer,
    transformation of torch.func, gradient, autocast or forced backend has a say in what a layer
    does with it."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and (x.dtype is torch.bfloat16 or x.dtype is torch.float32)
        and x.is_cpu
        and not x.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and not _registry.any_backend_forced()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        # What torch.func and forward-mode gradients wrap.
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and forward_ad._current_level < 0
    )


class Prepared:
    """A weight and a bias as the kernel takes them. Holds on to the memory that they are in.

    Args:
        op: the product's name. parts: W's tensors in the order of the op. bias: or None.
        rows, cols: of W.
    """

    __slots__ = ("_cols", "_ids", "_multiply", "_rows", "bias", "op", "parts", "written")

    def __init__(
        self, op: str, parts: Sequence[Tensor], bias: Tensor | None, rows: int, cols: int
    ) -> None:
        self.op, self.parts = op, tuple(parts)
        self.bias, self.written = bias, _written(bias)
        self._ids = tuple(map(id, self.parts))  # whose objects are kept: nothing else gets them
        self._rows, self._cols = rows, cols
        module = _native.MODULE
        if module is None:
            raise RuntimeError(_native.MISSING)
        taken = [t.contiguous() for t in parts]
        if taken[0].dtype is torch.int8:
            taken[-1] = taken[-1].float()
        wide = None if bias is None else _native.capsule(bias.float().contiguous())
        ready = module.PreparedLinear(op, [_native.capsule(t) for t in taken], wide, rows, cols)
        self._multiply = ready.multiply

    def is_of(self, parts: Sequence[Tensor], bias: Tensor | None) -> bool:
        """Whether it was made of these, the bias not written to since."""
        if bias is not self.bias or (bias is not None and _written(bias) != self.written):
            return False
        return tuple(map(id, parts)) == self._ids

    def product(self, x: Tensor) -> Tensor:
        """`[..., rows]` of `x [..., cols]`, for which `is_plain` holds."""
        if not x.is_contiguous():
            x = x.contiguous()
        dtype, count = x.dtype, x.numel() // self._cols
        y = torch.empty((*x.shape[:-1], self._rows), dtype=dtype)
        wide = dtype is torch.bfloat16
        self._multiply(y.data_ptr(), x.data_ptr(), count, wide, torch.get_num_threads())
        return y


def _written(bias: Tensor | None) -> tuple[int, int]:
    """Where the bias is and how often it was written to; inference tensors do not count that."""
    if bias is None:
        return 0, 0
    return bias.data_ptr(), 0 if bias.is_inference() else bias._version


def can_prepare(parts: Sequence[Tensor], cols: int) -> bool:
    """Whether there is a kernel for W's tensors here."""
    return (
        _native.MODULE is not None
        and cols > 0
        and parts[0].dtype in VALUES
        and all(t.device.type == "cpu" for t in parts)
    )
