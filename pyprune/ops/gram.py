"""Gram matrices of activations: the Hessian of a layer's output error, Kronecker factors."""

from __future__ import annotations

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
from pyprune.ops._precision import full_precision
from pyprune.ops.storage import unit_columns


def _check_gram(out: Tensor, x: Tensor, weight: Tensor | None) -> None:
    check_matrices("x", x)
    batch, columns = tuple(x.shape[:-2]), x.shape[-1]
    side = columns + 1 if out.dim() == x.dim() and out.shape[-1] == columns + 1 else columns
    check_accumulator("out", out, (*batch, side, side), x)
    check_token_weight(weight, x)
    check_same_device(x, out, weight)


@full_precision()
def gram_reference(out: Tensor, x: Tensor, weight: Tensor | None) -> None:
    rows = x.to(out.dtype)
    if out.shape[-1] > x.shape[-1]:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
    weighted = rows
    if weight is not None:
        rows = drop_unweighted(rows, weight)
        weighted = rows * weight.to(out.dtype)[..., None]
    upper = (weighted.mT @ rows).triu()
    out += upper + upper.triu(1).mT


def _gram_native(out: Tensor, x: Tensor, weight: Tensor | None) -> None:
    rows, target = unit_columns(x), out.contiguous()
    token_weight = None if weight is None else weight.float().contiguous()
    if x.dim() == 2:
        token_weight = None if token_weight is None else token_weight[None]
        _native.call("gram", target[None], rows[None], _native.optional_capsule(token_weight))
    else:
        _native.call("gram", target, rows, _native.optional_capsule(token_weight))
    if target is not out:
        out.copy_(target)


registry.register(
    "gram(Tensor(a!) out, Tensor x, Tensor? weight) -> ()",
    fake=_check_gram,
    impls={
        "reference": registry.Impl(gram_reference),
        "native": registry.Impl(_gram_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl("pyprune.kernels.gram:gram_triton", registry.HALF_OR_SINGLE),
    },
    dtype_arg=1,
)


def gram(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    out: Tensor | None = None,
    ones_column: bool = False,
) -> Tensor:
    """Gram matrix of the columns, accumulated: `out += X^T diag(weight) X`.

    Only one triangle is computed, half the work of a matrix product; both are stored. Products of
    16-bit inputs are exact and sums are fp32. Where the processor multiplies bf16 natively it does
    (without weights, or with ones and zeros) and takes subnormal numbers, below 1.2e-38, for zero.
    The result is exactly symmetric, and the same for any number of threads.

    Args:
        x: activations `[T, C]` (rows are tokens) or a stack `[B, T, C]`; bf16, fp16, fp32 or
            fp64; any strides.
        weight: token weights `[T]` or `[B, T]`, non-negative. A token of weight 0 contributes
            nothing, whatever it holds (infinities and NaN in padding included). None means ones.
        out: accumulator `[C, C]` or `[B, C, C]`, fp32 (fp64 when `x` is fp64). It must be
            symmetric, as an earlier call left it: only one of its triangles is read. None starts
            from zeros.
        ones_column: act as if `x` had one more column, of ones, after its last, as a layer with a
            bias sees it; `out` is then `[C + 1, C + 1]`, its last row the weighted column sums and
            its corner the sum of the weights.

    Returns:
        `out`: raw sums, so that partial results of several batches or processes add up. The
        Hessian of SparseGPT (Frantar and Alistarh 2023, section 3.2) is `2 / T * out`, and
        Wanda's column norms are the root of its diagonal. NaN and infinite inputs propagate to
        their row and column.

    Raises:
        ValueError: `x` has another number of dimensions, or a shape, dtype or device does not
            match.
    """
    check_matrices("x", x)
    if out is None:
        side = x.shape[-1] + int(ones_column)
        shape = (*x.shape[:-2], side, side)
        out = torch.zeros(shape, dtype=accumulation_dtype(x), device=x.device)
    elif ones_column and out.shape[-1] != x.shape[-1] + 1:
        side = x.shape[-1] + 1
        raise ValueError(
            f"out: expected shape {(*x.shape[:-2], side, side)} with ones_column, "
            f"got {tuple(out.shape)}"
        )
    elif not ones_column and out.shape[-1] != x.shape[-1]:
        side = x.shape[-1]
        raise ValueError(
            f"out: expected shape {(*x.shape[:-2], side, side)}, got {tuple(out.shape)}"
        )
    _check_gram(out, x, weight)
    if out.numel() and x.shape[-2]:
        torch.ops.pyprune.gram(out, x, weight)
    return out
