"""What transformers would build from a changed configuration, to be compared with what is saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

# Whole numbers of a layer's modules that say how it works; all others are sizes.
WORKING_NUMBERS = ("sliding_window", "use_rope", "attention_chunk_size")
# What a module's owner has set, not its configuration.
NOT_BEHAVIOUR = ("training", "gradient_checkpointing")


class InexpressibleError(Exception):
    """No configuration of the architecture gives the model that is wanted; says why."""


def stock_config(model: PreTrainedModel, changes: Mapping[str, Any]) -> Any:
    """A copy of the configuration of `model` with other fields, as it comes back from a file.

    changes: of the text configuration.

    Raises:
        InexpressibleError: the configuration refuses the values.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    try:
        for name, value in changes.items():
            setattr(text, name, value)
        loaded = type(config).from_dict(config.to_dict())
    except (ValueError, AttributeError, StrictDataclassError) as error:
        raise _refused(text, changes, error) from error
    # The attention's implementation belongs to the process, not to the saved configuration.
    loaded._attn_implementation = model.config._attn_implementation
    return loaded


def stock_twin(model: PreTrainedModel, changes: Mapping[str, Any]) -> PreTrainedModel:
    """An empty model (on `meta`) from `stock_config`.

    Raises:
        InexpressibleError: the configuration refuses the values, or the model does.
    """
    config = stock_config(model, changes)
    try:
        with torch.device("meta"):
            return type(model)(config)
    except ValueError as error:
        raise _refused(config.get_text_config(), changes, error) from error


def _refused(config: Any, changes: Mapping[str, Any], error: Exception) -> InexpressibleError:
    given = ", ".join(f"{name} {value}" for name, value in changes.items())
    return InexpressibleError(
        f"{type(config).__name__} refuses {given}: {' '.join(str(error).split())}"
    )


def parameter_count(model: nn.Module) -> int:
    """Distinct parameters: tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every distinct parameter, by its name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def behaviour(block: nn.Module) -> dict[str, Any]:
    """What the modules of a layer say about how they work, by "path:" (their class) and
    "path:attribute": all public attributes that are text, flags or fractions (a family may make one
    of them depend on the layer's index), and the `WORKING_NUMBERS`."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        found[f"{path}:"] = type(module).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or name in NOT_BEHAVIOUR:
                continue
            number = type(value) is int and name in WORKING_NUMBERS
            if number or isinstance(value, (bool, float, str)):
                found[f"{path}:{name}"] = value
    return found


def adopt_attributes(model: nn.Module, twin: nn.Module) -> None:
    """Gives the modules of `model` the whole-number attributes (sizes, counts of heads) of their
    twins."""
    twins = dict(twin.named_modules())
    for name, module in model.named_modules():
        for key, value in vars(twins[name]).items():
            if type(value) is int and not key.startswith("_"):
                setattr(module, key, value)
