"""Operators under PyTorch's transformations: gradients, forward-mode tangents, `vmap`, nested.

`torch.library` wraps an operator's gradient in an autograd function that `torch.func.grad` refuses,
and loses forward-mode tangents without a word. Where a transformation or a tangent may be at work,
`call` therefore gives the same rules to an autograd function of ours, which takes part in all of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import _profiler_enabled, forward_ad  # type: ignore[attr-defined]

from pyprune.ops import registry

_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def is_untransformed() -> bool:
    """Whether no compiler, tracer, dispatch mode, transformation or tangent is at work."""
    return (
        not torch.compiler.is_compiling()
        and not _len_torch_dispatch_stack()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


def is_as_stored(t: Tensor) -> bool:
    """Whether a tensor's numbers are those in its memory: no subclass, and none of PyTorch's own
    tensors that have no memory, or whose numbers have the other sign there."""
    return (
        type(t) is Tensor
        and not t.is_neg()
        and not t._is_zerotensor()
        and not torch._is_functional_tensor(t)
    )


def _is_plain(t: Any) -> bool:
    return t is None or (
        is_as_stored(t) and t.is_cpu and not (t.requires_grad and torch.is_grad_enabled())
    )


def _is_direct(args: tuple[Any, ...]) -> bool:
    """Whether all that PyTorch's dispatch would do is to find the kernel, which takes it longer
    than a small product does."""
    return (
        is_untransformed()
        and not _len_torch_function_stack()
        and not _profiler_enabled()
        and all(map(_is_plain, args))
    )


def call(name: str, *args: Any) -> Tensor:
    """The operator `name` of the library, whose result is one tensor, for arguments of any kind."""
    y: Tensor
    if torch.compiler.is_compiling():
        # A graph has to have the operator itself, with which torch.library's rules come.
        if _is_differentiated():
            raise ValueError(
                f"{name}: expected torch.func's gradients and tangents around what torch.compile "
                "makes, not within"
            )
    elif name in registry.IMPLS and _is_direct(args):
        y = registry.call(name, *args)
        return y
    elif _is_transformed():
        y = _FUNCTIONS[name].apply(*args)  # type: ignore[no-untyped-call]
        return y
    y = getattr(torch.ops.pyprune, name)(*args)
    return y


def _is_differentiated() -> bool:
    """As `torch.compile` can trace it."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    innermost: Any = peek_interpreter_stack()
    return innermost.key() in (TransformType.Grad, TransformType.Jvp)


def _is_transformed() -> bool:
    innermost = peek_interpreter_stack()
    if innermost is None:
        return bool(forward_ad._current_level >= 0)
    return bool(innermost.key() != TransformType.Functionalize)  # it has no rule for functions


def register(
    name: str,
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Tensor], None],
    backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
    jvp: Callable[..., Tensor],
    vmap: Callable[..., tuple[Tensor, int]],
) -> None:
    """Registers what the operator `name` does under transformations.

    setup_context: saves tensors with `save_for_backward`, the same for both directions.
    backward: of the result's gradient. jvp: of the tangents of all arguments, None where one has
    none. Both multiply by `call`. vmap: as for `torch.library.register_vmap`, after what it is to
    multiply by.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)
        ctx.set_materialize_grads(False)

    def back(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, grad)

    operator = getattr(torch.ops.pyprune, name)
    rules: dict[str, Callable[..., Any]] = {
        "forward": operator,
        "setup_context": setup,
        "backward": back,
        "jvp": jvp,
        "vmap": partial(vmap, partial(call, name)),
    }
    _FUNCTIONS[name] = type(
        f"{name}_function",
        (torch.autograd.Function,),
        {rule: staticmethod(function) for rule, function in rules.items()},
    )
    qualified = f"pyprune::{name}"
    torch.library.register_autograd(
        qualified, backward, setup_context=setup_context, lib=registry.LIBRARY
    )
    torch.library.register_vmap(qualified, partial(vmap, operator), lib=registry.LIBRARY)
