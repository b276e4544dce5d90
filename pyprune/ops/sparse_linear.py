"""Products with a compressed weight matrix, `y = x @ W^T + bias`: 2:4, bitmap; dense to compare.

`W [R, C]` comes as `pyprune.ops.pack` lays it out. At 50 % and 16-bit values both take 9 bits a
weight against 16, which bounds the gain where memory bandwidth decides (few rows of x) at 1.78.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import _transforms, linear_24_cuda, linear_bitmap_cuda, registry
from pyprune.ops._checks import (
    accumulation_dtype,
    check_array,
    check_float,
    check_rows,
    check_same_device,
    check_shape,
    check_tensor,
)
from pyprune.ops._precision import full_precision
from pyprune.ops.pack import unpack_24_reference, unpack_bitmap_reference
from pyprune.ops.storage import unit_columns

META_COLUMNS = 8  # columns a byte of 2:4 metadata or of a bitmap describes

# Rows of x that the Triton kernels take: they keep a sum per row of x in registers. For more of
# them their backend expands the weight.
TRITON_ROWS = 16


def check_activations(x: Tensor, bias: Tensor | None, rows: int) -> None:
    check_tensor("x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C] with C > 0, got shape {tuple(x.shape)}")
    check_float("x", x)
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (rows,))


def check_packed_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> None:
    """What a product with a 2:4 matrix asks of its arguments, whatever the values are."""
    if values.dim() != 2:
        raise ValueError(f"values: expected 2 dimensions, got shape {tuple(values.shape)}")
    rows = values.shape[0]
    check_activations(x, bias, rows)
    cols = x.shape[-1]
    if cols % META_COLUMNS:
        raise ValueError(f"x: 2:4 needs a multiple of {META_COLUMNS} columns, got {cols}")
    check_shape("values", values, (rows, cols // 2))
    check_array("meta", meta, torch.uint8, (rows, cols // META_COLUMNS))
    check_same_device(x, values, meta, bias)


def check_packed_bitmap(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> None:
    """What a product with a bitmap matrix asks of its arguments, whatever the values are."""
    if values.dim() != 1:
        raise ValueError(f"values: expected 1 dimension, got shape {tuple(values.shape)}")
    if bitmap.dim() != 2:
        raise ValueError(f"bitmap: expected 2 dimensions, got shape {tuple(bitmap.shape)}")
    rows = bitmap.shape[0]
    check_activations(x, bias, rows)
    check_array("bitmap", bitmap, torch.uint8, (rows, -(-x.shape[-1] // META_COLUMNS)))
    check_array("row_offsets", row_offsets, torch.int64, (rows + 1,))
    check_same_device(x, values, bitmap, row_offsets, bias)


def _check_linear_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> None:
    check_packed_24(x, values, meta, bias)
    check_float("values", values)


def _check_linear_bitmap(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> None:
    check_packed_bitmap(x, values, bitmap, row_offsets, bias)
    check_float("values", values)


def _check_linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_rows("weight", weight)
    check_activations(x, bias, weight.shape[0])
    check_shape("weight", weight, (weight.shape[0], x.shape[-1]))
    check_same_device(x, weight, bias)


def _output(x: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _linear_24_fake(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear_24(x, values, meta, bias)
    return _output(x, values.shape[0])


def _linear_bitmap_fake(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    _check_linear_bitmap(x, values, bitmap, row_offsets, bias)
    return _output(x, bitmap.shape[0])


def _linear_dense_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear_dense(x, weight, bias)
    return _output(x, weight.shape[0])


@full_precision()
def linear_dense_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = accumulation_dtype(x)
    y = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def linear_24_reference(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    return linear_dense_reference(x, unpack_24_reference(values, meta), bias)


def linear_bitmap_reference(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    weight = unpack_bitmap_reference(values, bitmap, row_offsets, x.shape[-1])
    return linear_dense_reference(x, weight, bias)


def native_linear(name: str, x: Tensor, rows: int, bias: Tensor | None, *weight: Tensor) -> Tensor:
    # The kernels multiply fp32 and bf16 activations; fp16 ones are widened on the way in. What a
    # decoding step does not need is not called: a view costs as much as a tenth of its products.
    source = x.float() if x.dtype is torch.float16 else x
    flat = unit_columns(source if source.dim() == 2 else source.reshape(-1, x.shape[-1]))
    y = source.new_empty((*x.shape[:-1], rows))
    if y.numel():
        b = None if bias is None else _native.capsule(bias.float().contiguous())
        out = y if y.dim() == 2 else y.view(-1, rows)
        _native.call(name, out, flat, *[t.contiguous() for t in weight], b)
    return y if source is x else y.to(x.dtype)


def _linear_24_native(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    return native_linear("linear_24", x, values.shape[0], bias, values, meta)


def _linear_bitmap_native(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    return native_linear("linear_bitmap", x, bitmap.shape[0], bias, values, bitmap, row_offsets)


def _linear_dense_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return native_linear("linear_dense", x, weight.shape[0], bias, weight)


def _native_limits(x: Tensor, values: Tensor, *rest: Tensor | None) -> str:
    ok = values.dtype in registry.HALF_OR_SINGLE
    return "" if ok else f"the native kernels do not take {values.dtype} values"


def has_many_rows(x: Tensor) -> bool:
    """Whether `x [..., C]` has more rows than the Triton kernels take."""
    return x.numel() > TRITON_ROWS * x.shape[-1]


registry.register(
    "linear_24(Tensor x, Tensor values, Tensor meta, Tensor? bias) -> Tensor",
    fake=_linear_24_fake,
    gradient=True,
    impls={
        "reference": registry.Impl(linear_24_reference),
        "native": registry.Impl(_linear_24_native, registry.HALF_OR_SINGLE, _native_limits),
        "triton": registry.Impl(
            "pyprune.kernels.sparse_linear:linear_24_triton",
            registry.HALF_OR_SINGLE,
        ),
        "cuda": registry.Impl(
            linear_24_cuda.linear_24_cuda,
            (torch.bfloat16, torch.float16),
            linear_24_cuda.limits,
        ),
    },
)
registry.register(
    "linear_bitmap(Tensor x, Tensor values, Tensor bitmap, Tensor row_offsets, Tensor? bias)"
    " -> Tensor",
    fake=_linear_bitmap_fake,
    gradient=True,
    impls={
        "reference": registry.Impl(linear_bitmap_reference),
        "native": registry.Impl(_linear_bitmap_native, registry.HALF_OR_SINGLE, _native_limits),
        "triton": registry.Impl(
            "pyprune.kernels.sparse_linear:linear_bitmap_triton",
            registry.HALF_OR_SINGLE,
        ),
        "cuda": registry.Impl(
            linear_bitmap_cuda.linear_bitmap_cuda,
            registry.HALF_OR_SINGLE,
            linear_bitmap_cuda.limits,
        ),
    },
)
registry.register(
    "linear_dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_linear_dense_fake,
    gradient=True,
    impls={
        "reference": registry.Impl(linear_dense_reference),
        "native": registry.Impl(_linear_dense_native, registry.HALF_OR_SINGLE, _native_limits),
    },
)


def linear_24(x: Tensor, values: Tensor, meta: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`y = x @ W^T + bias` for a 2:4 compressed `W [R, C]`.

    Args:
        x: activations `[..., C]`, bf16, fp16, fp32 or fp64; any strides. C is a multiple of 8.
        values: `[R, C/2]`, the two kept weights of every four, in column order; any float dtype.
        meta: uint8 `[R, C/8]`. Two bits cannot point outside their group; a group whose numbers do
            not ascend has no defined product (`SparseLinear` refuses it).
        bias: `[R]` or None.

    On CUDA devices bf16 and fp16 products whose C is a multiple of 64 go through sparse tensor
    cores; `pyprune.ops.linear_24_cuda` says which kernel serves how many rows.

    Returns:
        `[..., R]` in x's dtype, products summed in fp32 (fp64 for fp64 x). An infinite or NaN
        activation spreads to the outputs whose rows store its column; where a row does not store
        it, 0 * inf may or may not be counted. Processors that multiply bf16 natively take subnormal
        bf16 numbers (below 1.2e-38) for zero.

    Raises:
        ValueError: a shape, dtype or device does not match.
    """
    _check_linear_24(x, values, meta, bias)
    return _transforms.call("linear_24", x, values, meta, bias)


def linear_bitmap(
    x: Tensor, values: Tensor, bitmap: Tensor, row_offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """`y = x @ W^T + bias` for a bitmap compressed `W [R, C]` of any sparsity.

    Args:
        x: activations `[..., C]`, bf16, fp16, fp32 or fp64; any strides.
        values: `[nnz]`, the stored weights row after row, in column order; any float dtype.
        bitmap: uint8 `[R, ceil(C/8)]`.
        row_offsets: int64 `[R + 1]`, first 0, last nnz, each step the row's number of set bits.
        bias: `[R]` or None.

    On CUDA devices `pyprune.ops.linear_bitmap_cuda` says which kernel serves which dtypes and how
    many rows.

    Returns:
        `[..., R]` in x's dtype, products summed in fp32 (fp64 for fp64 x); non-finite activations
        as in `linear_24`.

    Raises:
        ValueError: a shape, dtype or device does not match, or (on the CPU) a row's bits and
            offsets disagree. On a GPU nothing waits for such a check: `SparseLinear` makes it once,
            when a layer is loaded; `validate_bitmap` makes it for tensors from elsewhere.
    """
    _check_linear_bitmap(x, values, bitmap, row_offsets, bias)
    return _transforms.call("linear_bitmap", x, values, bitmap, row_offsets, bias)


def linear_dense(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`y = x @ weight^T + bias` with an uncompressed weight `[R, C]` of any float dtype.

    The yardstick for the compressed products: the same kernels without the decoding, so that a gain
    over it is owed to the format alone. Arguments, result and errors as in `linear_24`.
    """
    _check_linear_dense(x, weight, bias)
    return _transforms.call("linear_dense", x, weight, bias)
