"""Weights with int8 values and one scale a row, and products with them.

`W[r, c] = scales[r] * q[r, c]`, q from -127 to 127, stored as 2:4 or bitmap like any other matrix
(see `pyprune.ops.pack`) with q as the values, or with every q. At 50 % the first two take
5 bits a weight. An int8 number is a bf16 number exactly, so products lose nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyprune.ops import _transforms, registry
from pyprune.ops._checks import (
    accumulation_dtype,
    check_float,
    check_rows,
    check_same_device,
    check_shape,
    check_tensor,
)
from pyprune.ops.pack import (
    unpack_24,
    unpack_24_reference,
    unpack_bitmap,
    unpack_bitmap_reference,
    validate_24,
    validate_bitmap,
)
from pyprune.ops.sparse_linear import (
    check_activations,
    check_packed_24,
    check_packed_bitmap,
    linear_dense_reference,
    native_linear,
)
from pyprune.ops.storage import bit_pattern, row_blocks

LARGEST = 127
# Elements that are widened at a time: an embedding is by far the largest matrix of a small model.
_BLOCK_ELEMENTS = 1 << 22


@torch.no_grad()
def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers and scales with `w ~ scales[:, None] * q`, symmetric, each row by itself.

        scales[r] = max_c |w[r, c]| / 127, rounded up to w's dtype (down, where 127 of them would
                    be infinite in it)
        q[r, c]   = w[r, c] / scales[r], rounded to nearest, ties to even

    No element is off by more than half of its row's scale. The scales have the precision of the
    weights, so that both can be cast alike.

    Args:
        w: `[R, C]`, bf16, fp16, fp32 or fp64; finite.

    Returns:
        q int8 `[R, C]`, and scales `[R]` in w's dtype; a row of zeros has the scale 0.

    Raises:
        ValueError: w is no floating point matrix, or has an infinity or a NaN (the row is named).
    """
    check_rows("w", w)
    if w.numel() == 0:
        return torch.zeros_like(w, dtype=torch.int8), w.new_zeros(w.shape[0])
    q, scales = torch.empty_like(w, dtype=torch.int8), w.new_empty(w.shape[0])
    for rows in row_blocks(w.shape, _BLOCK_ELEMENTS):
        q[rows], scales[rows] = _quantize(w[rows], rows.start)
    return q, scales


def _quantize(w: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """first: what the first row is called in an error."""
    wide = w.double() if w.dtype == torch.float64 else w.float()
    largest = wide.abs().amax(1)
    bad = (~largest.isfinite()).nonzero()
    if len(bad):
        row = first + int(bad[0])
        raise ValueError(f"w: expected finite weights to quantize, got others in row {row}")
    scales = (largest / LARGEST).to(w.dtype)
    # The next larger number of the dtype: positive floats are ordered like their bit patterns.
    bits = bit_pattern(scales)
    bits += scales.double() * LARGEST < largest.double()
    bits -= (scales * LARGEST).isinf().to(bits.dtype)
    q = (wide / scales.to(wide.dtype)[:, None]).round_()
    return q.nan_to_num_(0.0).clamp_(-LARGEST, LARGEST).to(torch.int8), scales


def dequantize_rows(q: Tensor, scales: Tensor) -> Tensor:
    """`scales[:, None] * q` in the dtype of the scales: `[R, C]` of any dtype that holds int8.
    Raises ValueError unless `scales` is one floating point number a row."""
    check_tensor("q", q)
    if q.dim() != 2:
        raise ValueError(f"q: expected 2 dimensions, got shape {tuple(q.shape)}")
    check_float("scales", scales)
    check_shape("scales", scales, (q.shape[0],))
    check_same_device(q, scales)
    wide = accumulation_dtype(scales)
    if torch.compiler.is_compiling():
        # Fused, without the memory that blocks save; they would fix the number of rows.
        return (q.to(wide) * scales.to(wide)[:, None]).to(scales.dtype)
    w = torch.empty_like(q, dtype=scales.dtype)
    for rows in row_blocks(q.shape, _BLOCK_ELEMENTS):
        w[rows] = q[rows].to(wide) * scales[rows].to(wide)[:, None]
    return w


def _check_values(values: Tensor, scales: Tensor, rows: int) -> None:
    if values.dtype != torch.int8:
        raise ValueError(f"values: expected torch.int8, got {values.dtype}")
    check_float("scales", scales)
    check_shape("scales", scales, (rows,))
    check_same_device(values, scales)


def _as_float(values: Tensor) -> Tensor:
    """A float tensor of the same shape, with no memory of its own: its elements mean nothing."""
    return values.new_empty((1,) * values.dim(), dtype=torch.bfloat16).expand(values.shape)


def _check_numbers(values: Tensor, scales: Tensor) -> None:
    if values.numel() and int(values.amin()) < -LARGEST:
        raise ValueError(f"values: expected numbers from -{LARGEST} to {LARGEST}, got -128")
    bad = (~((scales >= 0) & scales.isfinite())).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"scales: expected finite numbers of at least 0, got {float(scales[row])} in row {row}"
        )


def validate_24_int8(values: Tensor, meta: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless these describe a matrix; see `validate_24`."""
    _check_values(values, scales, values.shape[0] if values.dim() else 0)
    validate_24(_as_float(values), meta)
    _check_numbers(values, scales)


def validate_bitmap_int8(
    values: Tensor, bitmap: Tensor, row_offsets: Tensor, scales: Tensor, cols: int
) -> None:
    """Raises ValueError unless these describe a matrix; see `validate_bitmap`."""
    _check_values(values, scales, bitmap.shape[0] if bitmap.dim() else 0)
    validate_bitmap(_as_float(values), bitmap, row_offsets, cols)
    _check_numbers(values, scales)


def validate_int8(values: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless these describe a matrix `[R, C]`: int8 and `[R]`."""
    if values.dim() != 2:
        raise ValueError(f"values: expected 2 dimensions, got shape {tuple(values.shape)}")
    _check_values(values, scales, values.shape[0])
    _check_numbers(values, scales)


def unpack_int8(values: Tensor, scales: Tensor) -> Tensor:
    """The matrix `[R, C]` in the dtype of the scales. Raises as `validate_int8`."""
    validate_int8(values, scales)
    return dequantize_rows(values, scales)


def unpack_24_int8(values: Tensor, meta: Tensor, scales: Tensor) -> Tensor:
    """The dense matrix `[R, C]` in the dtype of the scales. Raises as `validate_24_int8`."""
    _check_values(values, scales, values.shape[0] if values.dim() else 0)
    q = unpack_24(values.bfloat16(), meta)
    _check_numbers(values, scales)
    return dequantize_rows(q, scales)


def unpack_bitmap_int8(
    values: Tensor, bitmap: Tensor, row_offsets: Tensor, scales: Tensor, cols: int
) -> Tensor:
    """The dense matrix `[R, C]` in the dtype of the scales. Raises as `validate_bitmap_int8`."""
    _check_values(values, scales, bitmap.shape[0] if bitmap.dim() else 0)
    q = unpack_bitmap(values.bfloat16(), bitmap, row_offsets, cols)
    _check_numbers(values, scales)
    return dequantize_rows(q, scales)


def _check_linear_24_int8(
    x: Tensor, values: Tensor, meta: Tensor, scales: Tensor, bias: Tensor | None
) -> None:
    check_packed_24(x, values, meta, bias)
    _check_values(values, scales, values.shape[0])


def _check_linear_bitmap_int8(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_offsets: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> None:
    check_packed_bitmap(x, values, bitmap, row_offsets, bias)
    _check_values(values, scales, bitmap.shape[0])


def _check_linear_int8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    if values.dim() != 2:
        raise ValueError(f"values: expected 2 dimensions, got shape {tuple(values.shape)}")
    rows = values.shape[0]
    check_activations(x, bias, rows)
    _check_values(values, scales, rows)
    check_shape("values", values, (rows, x.shape[-1]))
    check_same_device(x, values, bias)


def _define(op: str, weight: str, check: Callable[..., None], dense: Callable[..., Tensor]) -> None:
    """Registers `op(x, *weight, scales, bias)`.

    weight: the tensors' names. check: refuses arguments. dense: q `[R, C]` from x and the weight.
    """

    def reference(x: Tensor, *rest: Tensor) -> Tensor:
        *tensors, scales, bias = rest
        wide = accumulation_dtype(x)
        scaled = dense(x, *tensors).to(wide) * scales.to(wide)[:, None]
        return linear_dense_reference(x, scaled, bias)

    def fake(x: Tensor, *rest: Tensor) -> Tensor:
        check(x, *rest)
        return x.new_empty((*x.shape[:-1], rest[-2].shape[0]))

    def native(x: Tensor, *rest: Tensor) -> Tensor:
        *tensors, scales, bias = rest
        return native_linear(op, x, scales.shape[0], bias, *tensors, scales.float())

    names = "".join(f"Tensor {name}, " for name in weight.split())
    triton = f"pyprune.kernels.sparse_int8:{op}_triton"
    registry.register(
        f"{op}(Tensor x, {names}Tensor scales, Tensor? bias) -> Tensor",
        fake=fake,
        gradient=True,
        impls={
            "reference": registry.Impl(reference),
            "native": registry.Impl(native, registry.HALF_OR_SINGLE),
            "triton": registry.Impl(triton, registry.HALF_OR_SINGLE),
        },
    )


_define("linear_int8", "values", _check_linear_int8, lambda x, q: q)
_define(
    "linear_24_int8", "values meta", _check_linear_24_int8,
    lambda x, q, meta: unpack_24_reference(q, meta),
)  # fmt: skip
_define(
    "linear_bitmap_int8", "values bitmap row_offsets", _check_linear_bitmap_int8,
    lambda x, q, bitmap, rows: unpack_bitmap_reference(q, bitmap, rows, x.shape[-1]),
)  # fmt: skip


def linear_int8(x: Tensor, values: Tensor, scales: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`y = x @ W^T + bias` for an uncompressed `W = scales[:, None] * q` `[R, C]`.

    Args:
        x: activations `[..., C]`, bf16, fp16, fp32 or fp64; any strides.
        values: int8 `[R, C]`, q, -127 to 127; what -128 counts for is not defined.
        scales: `[R]`, any float dtype.
        bias: `[R]` or None.

    Returns:
        `[..., R]` in x's dtype. Products x * q are summed in fp32, scaled once and rounded once
        (fp64 x: computed in fp64); sums beyond 3.4e38 overflow even where the scale would bring
        them back. Processors that multiply bf16 natively take subnormal bf16 numbers for zero.

    Raises:
        ValueError: a shape, dtype or device does not match.
    """
    _check_linear_int8(x, values, scales, bias)
    return _transforms.call("linear_int8", x, values, scales, bias)


def linear_24_int8(
    x: Tensor, values: Tensor, meta: Tensor, scales: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """`y = x @ W^T + bias` for a 2:4 compressed `W = scales[:, None] * q` `[R, C]`.

    Args:
        x: activations `[..., C]`, bf16, fp16, fp32 or fp64; any strides. C is a multiple of 8.
        values: int8 `[R, C/2]`, the two kept q of every four, in column order, -127 to 127; what
            -128 counts for is not defined (`SparseLinear` refuses it).
        meta: uint8 `[R, C/8]`, as in `linear_24`.
        scales: `[R]`, any float dtype.
        bias: `[R]` or None.

    Returns:
        `[..., R]` in x's dtype. Products x * q are summed in fp32 and scaled once, so sums beyond
        3.4e38 (2.0e31 with AVX2 alone) overflow even where the scale would bring them back (fp64 x:
        computed in fp64), and rounded once.

    Raises:
        ValueError: a shape, dtype or device does not match.
    """
    _check_linear_24_int8(x, values, meta, scales, bias)
    return _transforms.call("linear_24_int8", x, values, meta, scales, bias)


def linear_bitmap_int8(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_offsets: Tensor,
    scales: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """`y = x @ W^T + bias` for a bitmap compressed `W = scales[:, None] * q` `[R, C]`.

    Args:
        x: activations `[..., C]`, bf16, fp16, fp32 or fp64; any strides.
        values: int8 `[nnz]`, the stored q row after row, in column order; as in `linear_24_int8`.
        bitmap, row_offsets: as in `linear_bitmap`.
        scales: `[R]`, any float dtype.
        bias: `[R]` or None.

    Returns:
        `[..., R]` in x's dtype, computed as in `linear_24_int8`.

    Raises:
        ValueError: a shape, dtype or device does not match, or a row's bits and offsets disagree.
    """
    _check_linear_bitmap_int8(x, values, bitmap, row_offsets, scales, bias)
    return _transforms.call("linear_bitmap_int8", x, values, bitmap, row_offsets, scales, bias)
