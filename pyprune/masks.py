"""Masks of an earlier pruning that a new one is to respect."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter

# By layer name, or a safetensors file of such.
Masks = Mapping[str, Tensor] | str | Path


def read_masks(given: Masks | None, adapter: Adapter) -> dict[str, Tensor]:
    """The masks, by layer name, checked against the model.

    Args:
        given: layer name (as in a report, `model.layers.0.mlp.up_proj`) -> bool `[R, C]`, outputs
            x inputs, True = may stay; or the path of a safetensors file with such tensors. Layers
            that are not named are free. None: no mask.

    Raises:
        UserError: the file cannot be read, a name is not that of a layer to be pruned.
        LayerError: a mask is not bool or of another shape than its layer.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping | str | Path):
        raise UserError(
            "preserve_mask: expected bool tensors by layer name or a safetensors file, "
            f"got {type(given).__name__}"
        )
    masks = given if isinstance(given, Mapping) else _load(Path(given))
    shapes = {
        ref.name: tuple(ref.weight().shape)
        for i in range(len(adapter.blocks))
        for ref in adapter.linears(i)
    }
    for name, mask in masks.items():
        if name not in shapes:
            close = get_close_matches(name, shapes, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"preserve_mask: {name!r} is no layer that is pruned{hint}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise LayerError(name, f"preserve_mask: expected a bool tensor, got {got}")
        if tuple(mask.shape) != shapes[name]:
            raise LayerError(
                name, f"preserve_mask: expected shape {shapes[name]}, got {tuple(mask.shape)}"
            )
    return dict(masks)


def _load(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():  # of which safetensors says "No such device"
        raise UserError(f"preserve_mask: expected a safetensors file, {path} is a directory")
    try:
        masks: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"preserve_mask: cannot read {path}: {error}") from error
    return masks


def describe_masks(masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What the report says of them."""
    if not masks:
        return ()
    closed = sum(int((~mask).sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return (f"preserve_mask: {closed} of {total} weights in {len(masks)} layers had to go",)
