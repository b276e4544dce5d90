"""Products with a weight that is expanded first: many rows of x, where arithmetic decides, and what
no kernel multiplies on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyprune.ops._precision import full_precision
from pyprune.ops.storage import row_blocks

HALF = (torch.bfloat16, torch.float16)
# Elements of a weight that are expanded at a time where it comes in parts: on a GPU fewer are not
# worth their launches, and more would count beside what the format saves.
BLOCK_ELEMENTS = 1 << 26


def number_dtype(x: Tensor) -> torch.dtype:
    """A 16-bit dtype for int8 numbers, all of which it has: that of `x`, whose products with them
    matrix units make, else bf16."""
    return x.dtype if x.dtype in HALF else torch.bfloat16


def sums_of_products(x: Tensor, weight: Tensor) -> Tensor:
    """`x [M, C] @ weight [R, C]^T` in fp32, of any two dtypes of at most that; to be called within
    `full_precision`."""
    if x.device.type == "cuda" and x.dtype == weight.dtype and x.dtype in HALF:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


@full_precision()
def multiply_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., C] @ weight [R, C]^T + bias`, summed in fp32, in x's dtype: the library's product
    where both have one dtype."""
    flat = x.reshape(-1, x.shape[-1])
    if weight.dtype == x.dtype:
        shift = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(flat, weight, shift)
    else:
        y = sums_of_products(flat, weight)
        if bias is not None:
            y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], len(weight))


@full_precision()
def multiply_in_parts(
    x: Tensor,
    shape: tuple[int, int],
    expand: Callable[[slice], Tensor],
    scales: Tensor | None,
    bias: Tensor | None,
    elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """`x [..., C] @ W^T`, times `scales [R]`, plus `bias [R]`, summed in fp32 and rounded once to
    x's dtype.

    shape: R and C of W. expand: those rows of it, in a dtype that holds them exactly; asked for
    about `elements` at a time.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = flat.new_empty(len(flat), shape[0], dtype=torch.float32)
    for rows in row_blocks(shape, elements):
        y[:, rows] = sums_of_products(flat, expand(rows))
    if scales is not None:
        y *= scales.float()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], shape[0])
