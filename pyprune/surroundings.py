"""What is around a call must not change what it does; and the model that a caller hands over."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pyprune.errors import UserError


@contextmanager
def undisturbed() -> Iterator[None]:
    """A run within this context (or decorated by it) depends on its own arguments alone.

    Inference mode ends: its tensors have no gradients, and a model that was given some as
    parameters could not be trained any more. `torch.autocast` ends: what is solved, rotated or
    compared in eight bits of mantissa is another result. Compiled modules run as they are written:
    compiled code knows nothing of hooks that come and go, and cannot be paused.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def in_memory(model: Any, *, structure: bool = False) -> Any:
    """The model behind `torch.compile(model)`, or the model itself, checked.

    structure: modules are going to be removed or replaced.

    Raises:
        UserError: some of its parameters have no data (they are on `meta`: nothing loaded them, or
            accelerate has offloaded them). With `structure` also for adapters of peft.
    """
    if type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    if not isinstance(model, nn.Module):
        return model  # refused by name where its parts are looked for
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    if empty:
        raise UserError(
            f"model: expected its parameters in memory, {len(empty)} are on meta and have no data, "
            f"the first is {empty[0]}: load it without offloading, or prune the checkpoint"
        )
    adapted = adapters(model) if structure else []
    if adapted:
        raise UserError(
            f"model: expected none with adapters of peft, got some at {adapted[0]}: merge them "
            "first (merge_and_unload)"
        )
    return model


def adapters(model: nn.Module) -> list[str]:
    """Names of the modules that peft has put beside a layer's own, with the layer inside."""
    return [name for name, module in model.named_modules() if is_adapted(module)]


def is_adapted(module: nn.Module) -> bool:
    """Whether this is one of peft's layers: `base_layer` and what is added to it."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and isinstance(module, layers.BaseTunerLayer)
