"""Gradients of the products with compressed weights, with respect to x and the bias, and `vmap`.

The weights are storage, not parameters: whoever asks for their gradient is told so. Everything
around a compressed layer (embeddings, norms, adapters, prompts) can then be trained through it:

    dL/dx = dL/dy W        dL/dbias = dL/dy summed over all rows of x

W is expanded for one product, in the wider of its dtype and x's. `linear_dense` has a gradient for
its weight too. Like the products forward, those backward round no fp32 number to TF32 or bf16,
whatever the process allows PyTorch (`ops._precision`), and autocast does not reach them. They are
an operator of their own, which keeps it so in a graph that `torch.compile` runs later.

Forward-mode tangents go through the product itself, which is linear in x. `torch.vmap` over x adds
a leading dimension, which the products take as it is; over anything else it is refused. All of them
nest, as `torch.func` has them (`ops._transforms`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyprune.ops import _transforms, registry
from pyprune.ops._precision import full_precision
from pyprune.ops.coded import unpack_coded
from pyprune.ops.sparse_int8 import dequantize_rows

Multiply = Callable[..., Tensor]


@full_precision()
def _full_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of matrices `[..., n, k]` and `[..., k, m]` of one dtype; also what is known of the
    result without numbers."""
    return a @ b


def _register_product() -> None:
    library = registry.LIBRARY
    library.define("full_product(Tensor a, Tensor b) -> Tensor")
    library.impl("full_product", _full_product, "CompositeExplicitAutograd")
    name = "pyprune::full_product"
    torch.library.register_fake(name, _full_product, lib=library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return (
            _product(grad, b.mT) if needs_a else None,
            _product(a.mT, grad) if needs_b else None,
        )

    def jvp(ctx: Any, along_a: Tensor | None, along_b: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        return _sum(
            None if along_a is None else _product(along_a, b),
            None if along_b is None else _product(a, along_b),
        )

    def vmap(
        multiply: Multiply, info: Any, in_dims: tuple[int | None, ...], *ab: Tensor
    ) -> tuple[Tensor, int]:
        moved = [
            t if dim is None else t.movedim(dim, 0) for t, dim in zip(ab, in_dims, strict=True)
        ]
        return multiply(*moved), 0

    _transforms.register(
        "full_product", setup_context=setup_context, backward=backward, jvp=jvp, vmap=vmap
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _transforms.call("full_product", a, b)


def _sum(*parts: Tensor | None) -> Tensor:
    """Of those that are there, one at least."""
    first, *others = [part for part in parts if part is not None]
    for other in others:
        first = first + other
    return first


def _expand_24(cols: int, values: Tensor, meta: Tensor) -> Tensor:
    w: Tensor = torch.ops.pyprune.unpack_24(values, meta)
    return w


def _expand_bitmap(cols: int, values: Tensor, bitmap: Tensor, row_offsets: Tensor) -> Tensor:
    w: Tensor = torch.ops.pyprune.unpack_bitmap(values, bitmap, row_offsets, cols)
    return w


def _int8(expand: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def expand_int8(cols: int, values: Tensor, *rest: Tensor) -> Tensor:
        # An int8 number is a bf16 number; the packed layouts are those of floats. The product with
        # a 16-bit scale is not a 16-bit number.
        scales = rest[-1].to(torch.promote_types(rest[-1].dtype, torch.float32))
        return dequantize_rows(expand(cols, values.bfloat16(), *rest[:-1]), scales)

    return expand_int8


def _expand_coded(cols: int, *weight: Tensor) -> Tensor:
    return unpack_coded(*weight)


def _expand_dense(cols: int, weight: Tensor) -> Tensor:
    return weight


# How the tensors between x and the bias become `[R, C]`.
_EXPAND: dict[str, Callable[..., Tensor]] = {
    "linear_24": _expand_24,
    "linear_bitmap": _expand_bitmap,
    "linear_24_int8": _int8(_expand_24),
    "linear_bitmap_int8": _int8(_expand_bitmap),
    "linear_int8": _int8(_expand_dense),
    "linear_coded": _expand_coded,
    "linear_dense": _expand_dense,
}


def _register(name: str, expand: Callable[..., Tensor]) -> None:
    dense = expand is _expand_dense

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *weight, bias = inputs
        if not dense and any(ctx.needs_input_grad[1 : 1 + len(weight)]):
            raise ValueError(
                f"values: {name} has gradients for x and bias alone, got a weight that requires one"
            )
        ctx.save_for_backward(x if dense else None, *weight)
        ctx.cols, ctx.shape, ctx.dtype = x.shape[-1], output.shape, output.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weight = ctx.saved_tensors
        needs_x, *needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if needs_x:
            w = expand(ctx.cols, *weight)
            wide = torch.promote_types(grad.dtype, w.dtype)
            made = _product(flat.to(wide), w.to(wide)).to(grad.dtype)
            found[0] = made.reshape(*grad.shape[:-1], ctx.cols)
        if dense and needs_weight[0]:
            found[1] = _product(flat.T, x.reshape(-1, ctx.cols)).to(weight[0].dtype)
        if needs_bias:
            wide = torch.promote_types(grad.dtype, torch.float32)
            found[-1] = flat.sum(0, dtype=wide).to(ctx.bias_dtype)
        return tuple(found)

    def jvp(ctx: Any, *along: Tensor | None) -> Tensor:
        x, *weight = ctx.saved_tensors
        along_x, *along_weight, along_bias = along
        if not dense and any(tangent is not None for tangent in along_weight):
            raise ValueError(
                f"values: {name} has tangents for x and bias alone, got a weight that has one"
            )
        w = along_weight[0]
        return _sum(
            None if along_x is None else _transforms.call(name, along_x, *weight, None),
            None if w is None else _transforms.call(name, x, w, None),
            None if along_bias is None else along_bias.to(ctx.dtype).expand(ctx.shape).clone(),
        )

    def vmap(
        multiply: Multiply,
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        *rest: Tensor | None,
    ) -> tuple[Tensor, int]:
        over, *others = in_dims
        if over is None or any(dim is not None for dim in others):
            raise ValueError(f"in_dims: {name} is mapped over x alone, got {in_dims}")
        return multiply(x.movedim(over, 0), *rest), 0

    _transforms.register(name, setup_context=setup_context, backward=backward, jvp=jvp, vmap=vmap)


_register_product()
for _name, _expand in _EXPAND.items():
    _register(_name, _expand)
