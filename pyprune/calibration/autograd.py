"""How a model is made ready for activations' gradients, and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyprune.errors import UserError
from pyprune.models.running import replaced_forward


def asking_entry(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gradients flow from here on: the block's input asks for one."""
    if not torch.is_grad_enabled():
        return args, kwargs
    if args:
        return (_asking(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _asking(kwargs["hidden_states"])}


def _asking(hidden: Tensor) -> Tensor:
    # A copy that is no leaf: blocks may write to what they are given.
    return hidden.detach().requires_grad_().clone()


@contextmanager
def checkpointed(block: nn.Module) -> Iterator[None]:
    """Within the context the block keeps its inputs only and runs again for its gradient.

    Reentrant on purpose: its first forward records nothing, so hooks can tell it by
    `requires_grad`. Outputs of evaluation mode depend on no random numbers.
    """
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")

        def run(x: Tensor) -> Any:
            return plain(x, *args[1:], **kwargs)

        return checkpoint(run, hidden, use_reentrant=True, preserve_rng_state=False)

    with replaced_forward(block, forward):
        yield


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter asks for a gradient. UserError if one could not have any."""
    if any(p.is_inference() for p in model.parameters()):
        raise UserError(
            "model: expected ordinary parameters, got some that were made in torch.inference_mode: "
            "no gradient can be taken through them; load the model outside of it"
        )
    asking = [p for p in model.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The whole model on `device`; afterwards every tensor is back where it was."""
    homes = {t.device for t in (*model.parameters(), *model.buffers())}
    if homes == {device} or (len(homes) == 1 and next(iter(homes)).type == device.type == "cpu"):
        yield
        return
    if len(homes) != 1:
        names = ", ".join(sorted(map(str, homes)))
        raise UserError(f"expected the model on one device for a backward pass, got {names}")
    (home,) = homes
    try:
        model.to(device)
        yield
    finally:
        model.to(home)
