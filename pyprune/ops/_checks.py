"""Argument rules that several ops share. Each names the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pyprune.ops.registry import ANY_FLOAT

T = TypeVar("T")


def check_tensor(name: str, t: object) -> None:
    """`t` is a tensor whose elements lie in memory at strides."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got one of layout {t.layout}")


def check_float(name: str, t: Tensor) -> None:
    check_tensor(name, t)
    if t.dtype not in ANY_FLOAT:
        raise ValueError(f"{name}: expected bf16, fp16, fp32 or fp64, got {t.dtype}")


def check_rows(name: str, t: Tensor) -> None:
    """`t` is a floating point matrix."""
    check_tensor(name, t)
    if t.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(t.shape)}")
    check_float(name, t)


def check_matrices(name: str, t: Tensor) -> None:
    """`t` is a floating point matrix or a stack of them."""
    check_tensor(name, t)
    if t.dim() not in (2, 3):
        raise ValueError(f"{name}: expected 2 or 3 dimensions, got shape {tuple(t.shape)}")
    check_float(name, t)


def over_stack(
    function: Callable[..., T], arguments: dict[str, Tensor], single: Sequence[int]
) -> list[T]:
    """`function` of every matrix of a stack: of slice b of the arguments that have one dimension
    more than a single matrix's call takes (`single`, in their order), of the others as they are.
    At least one has."""
    sizes = {
        name: len(t)
        for (name, t), dims in zip(arguments.items(), single, strict=True)
        if t.dim() == dims + 1
    }
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"expected stacks of one size, got {found}")
    return [
        function(*(t[b] if name in sizes else t for name, t in arguments.items()))
        for b in range(next(iter(sizes.values())))
    ]


def check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, t)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")


def check_array(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_shape(name, t, shape)
    if t.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {t.dtype}")


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_accumulator(name: str, acc: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """`acc` has `shape` and the accumulation dtype for `x`: fp64 for fp64, else fp32."""
    check_shape(name, acc, shape)
    want = accumulation_dtype(x)
    if acc.dtype != want:
        raise ValueError(f"{name}: expected {want} to accumulate {x.dtype}, got {acc.dtype}")


def check_token_weight(weight: Tensor | None, x: Tensor) -> None:
    """`weight` is one floating point number per token of `x` (`[..., T, C]`)."""
    if weight is None:
        return
    check_float("weight", weight)
    check_shape("weight", weight, tuple(x.shape[:-1]))


def check_same_device(*tensors: Tensor | None) -> None:
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {sorted(map(str, devices))}")


def drop_unweighted(x: Tensor, weight: Tensor) -> Tensor:
    """`x` `[..., T, C]` with the tokens of weight 0 set to zero: multiplying by their weight would
    turn an infinity or NaN in padding into NaN."""
    return torch.where((weight == 0)[..., None], 0.0, x)
