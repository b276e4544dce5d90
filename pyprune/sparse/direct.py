"""A layer's CPU kernel, called without PyTorch's dispatch.

A decoding step of a small model is hundreds of products of some ten microseconds each: an
operator's dispatch (schema, fake mode, Python key) costs as much as the product, and so would
describing its tensors to the kernel anew every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._transforms import is_as_stored, is_untransformed

VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
# What x may be, and a bias and scales.
WIDENED = (torch.float32, torch.bfloat16, torch.float16)


def is_alone(x: Tensor) -> bool:
    """Whether a layer alone has a say in what it does with `x`: no compiler, tracer, mode,
    transformation of torch.func (of the weights neither), gradient or forced backend."""
    return (
        not x.requires_grad
        and is_untransformed()  # before what a compiler cannot trace
        and is_as_stored(x)
        and not registry.any_backend_forced()
    )


def is_plain(x: Tensor) -> bool:
    """Whether `x` is fp32, bf16 or fp16 numbers on the CPU, for a layer alone, without autocast."""
    return is_alone(x) and x.dtype in WIDENED and x.is_cpu and not torch.is_autocast_enabled("cpu")


class Prepared:
    """A weight and a bias as the kernel takes them: the memory that they are in, which it holds.
    Nothing is copied: version counters do not tell of all that is written to the original (`.data`
    has its own, inference tensors have none).

    Args:
        op: the product's name. parts: W's tensors in the order of the op. bias: or None; for which
            `can_prepare` holds. rows, cols: of W.
    """

    __slots__ = ("_cols", "_layouts", "_multiply", "_rows", "op")

    def __init__(
        self, op: str, parts: Sequence[Tensor], bias: Tensor | None, rows: int, cols: int
    ) -> None:
        self.op = op
        self._rows, self._cols = rows, cols
        module = _native.MODULE
        if module is None:
            raise RuntimeError(_native.MISSING)
        # Detached: another thread may replace what the originals hold while they are taken.
        held = [t.detach() for t in (parts if bias is None else (*parts, bias))]
        self._layouts = _layouts(held)
        capsules = [_native.capsule(t) for t in held]
        shift = None if bias is None else capsules.pop()
        self._multiply = module.PreparedLinear(op, capsules, shift, rows, cols).multiply

    def is_of(self, parts: Sequence[Tensor], bias: Tensor | None) -> bool:
        """Whether it was made of the memory that these are in now, laid out alike. While it is held
        no other tensor has these addresses."""
        given = parts if bias is None else (*parts, bias)
        return _layouts(given) == self._layouts

    def product(self, x: Tensor) -> Tensor:
        """`[..., rows]` of `x [..., cols]`, for which `is_plain` holds."""
        half = x.dtype is torch.float16  # the kernels multiply fp32 and bf16
        if half:
            x = x.float()
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._rows))
        count, short = x.numel() // self._cols, x.dtype is torch.bfloat16
        self._multiply(y.data_ptr(), x.data_ptr(), count, short, torch.get_num_threads())
        return y.half() if half else y


def _layouts(
    tensors: Sequence[Tensor],
) -> list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]:
    """Where each one's numbers are. Addresses alone do not say: a slice, a transpose or a view as
    another dtype may begin where the whole does."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def can_prepare(parts: Sequence[Tensor], bias: Tensor | None, cols: int) -> bool:
    """Whether there is a kernel for W's tensors and a bias here, as they are in memory."""
    floats = [] if bias is None else [bias]
    if parts[0].dtype is torch.int8:
        floats.append(parts[-1])  # scales
    given = parts if bias is None else (*parts, bias)
    return (
        _native.MODULE is not None
        and cols > 0
        and parts[0].dtype in VALUES
        and all(t.dtype in WIDENED for t in floats)
        and all(t.device.type == "cpu" and t.is_contiguous() for t in given)
        and all(is_as_stored(t.data) for t in given)
    )


class PreparesWeight(nn.Module):
    """A layer with a `Prepared`: its copies get none, and it is let go when the layer moves or
    loads."""

    _prepared: Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # it can be neither copied nor pickled

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._prepared = None  # a model that moves leaves no memory behind
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepared = None  # nor does one that loads, which may be into new memory
        super()._load_from_state_dict(*args)
