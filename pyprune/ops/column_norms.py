"""Squared column norms of activations: Wanda's statistic and the diagonal of the Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import (
    accumulation_dtype,
    check_accumulator,
    check_matrices,
    check_same_device,
    check_token_weight,
    drop_unweighted,
)
from pyprune.ops.storage import unit_columns


def _check_column_norms(acc: Tensor, x: Tensor, weight: Tensor | None) -> None:
    check_matrices("x", x)
    check_accumulator("out", acc, (*x.shape[:-2], x.shape[-1]), x)
    check_token_weight(weight, x)
    check_same_device(x, acc, weight)


Matrix = tuple[Tensor, Tensor, Tensor | None]


def matrices(acc: Tensor, x: Tensor, weight: Tensor | None) -> Iterator[Matrix]:
    """The arguments of every matrix of a stack, or those of the one that there is."""
    if x.dim() == 2:
        yield acc, x, weight
        return
    for b in range(len(x)):
        yield acc[b], x[b], None if weight is None else weight[b]


def column_norms_reference(acc: Tensor, x: Tensor, weight: Tensor | None) -> None:
    squares = x.to(acc.dtype).square()
    if weight is not None:
        squares = drop_unweighted(squares, weight) * weight.to(acc.dtype)[..., None]
    acc += squares.sum(dim=-2)


def _column_norms_native(acc: Tensor, x: Tensor, weight: Tensor | None) -> None:
    rows, target = unit_columns(x), acc.contiguous()
    token_weight = None if weight is None else weight.float().contiguous()
    for sums, tokens, scales in matrices(target, rows, token_weight):
        _native.call("column_norms", sums, tokens, _native.optional_capsule(scales))
    if target is not acc:
        acc.copy_(target)


registry.register(
    "column_norms(Tensor(a!) acc, Tensor x, Tensor? weight) -> ()",
    fake=_check_column_norms,
    impls={
        "reference": registry.Impl(column_norms_reference),
        "native": registry.Impl(_column_norms_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl(
            "pyprune.kernels.column_norms:column_norms_triton", registry.HALF_OR_SINGLE
        ),
    },
    dtype_arg=1,
)


def column_norms(x: Tensor, *, weight: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Squared L2 norm of every column, accumulated: `out[j] += sum_t weight[t] * x[t, j]**2`.

    Args:
        x: activations `[T, C]` (rows are tokens), or a stack `[B, T, C]`; bf16, fp16, fp32 or fp64;
            any strides.
        weight: token weights `[T]` or `[B, T]`, non-negative. A token of weight 0 contributes
            nothing, whatever it holds (infinities and NaN in padding included). None means ones.
        out: accumulator `[C]` or `[B, C]`, fp32 (fp64 when `x` is fp64). None starts from zeros.

    Returns:
        `out`. Not divided by the token count and not square-rooted, so that partial results of
        several batches or processes add up. Wanda's column norm is `out.sqrt()` (Sun et al. 2023,
        eq. 1). NaN and infinite inputs propagate to their column.

    Raises:
        ValueError: `x` has another number of dimensions, or a shape, dtype or device does not
            match.
    """
    check_matrices("x", x)
    if out is None:
        shape = (*x.shape[:-2], x.shape[-1])
        out = torch.zeros(shape, dtype=accumulation_dtype(x), device=x.device)
    _check_column_norms(out, x, weight)
    if x.numel():
        torch.ops.pyprune.column_norms(out, x, weight)
    return out
