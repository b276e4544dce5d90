"""Products with int8 compressed weights for few rows of x: the kernels of `sparse_linear` on int8
values, and the scales afterwards.

tensor      | dtype            | shape
------------|------------------|----------------------------------------------
x           | fp32, bf16, fp16 | [M, C], M <= 16; widened to fp32
values      | int8             | [R, C/2] | [nnz]
scales      | any float        | [R]
bias        | any float        | [R], optional
y           | x's              | [M, R]

meta, bitmap and row_offsets as there. Sums are formed in fp32, scaled and only then rounded.
"""

from pyprune.kernels import sparse_linear


def _scaled(y, x, scales, bias):
    y = y * scales.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def linear_24_int8_triton(x, values, meta, scales, bias):
    y = sparse_linear.linear_24_triton(x.float(), values, meta, None)
    return _scaled(y, x, scales, bias)


def linear_bitmap_int8_triton(x, values, bitmap, row_offsets, scales, bias):
    y = sparse_linear.linear_bitmap_triton(x.float(), values, bitmap, row_offsets, None)
    return _scaled(y, x, scales, bias)


def _aot(entry):
    values = {"x_ptr": "*fp32", "values_ptr": "*i8", "y_ptr": "*fp32"}
    label = entry["label"].replace("bf16", "int8")
    return {**entry, "signature": {**entry["signature"], **values}, "label": label}


AOT = [_aot(entry) for entry in sparse_linear.AOT]
