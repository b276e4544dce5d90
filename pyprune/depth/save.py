"""Layers out of a model in memory, so that what is left is an ordinary, smaller model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.models.stock import behaviour

# Fields of a configuration with one entry a layer: what it says of the attention (and of the layer
# as a whole), and what it says of the MLP.
ATTENTION_LISTS = (
    "layer_types",
    "no_rope_layers",
    "layers_block_type",
    "attention_layers",
    "num_attention_heads_per_layer",
    "layer_rope_theta",
)
MLP_LISTS = (
    "mlp_layer_types",
    "intermediate_size",
    "activation_sparsity_pattern",
    "layers_num_experts",
)
# Fields that list layers by their index, and fields that say from which layer on, or up to which
# one, something holds.
ATTENTION_INDICES, MLP_INDICES = ("hybrid_layer_ids",), ("mlp_only_layers", "moe_layers")
ATTENTION_BOUNDS, MLP_BOUNDS = ("max_window_layers",), ("first_k_dense_replace", "num_dense_layers")
# What makes a layer depend on its place in a way that no configuration can undo.
PLACE_DEPENDENT = (
    ("scale_attn_by_inverse_layer_idx", "scales attention by the layer's index"),
    ("num_kv_shared_layers", "lets late layers read the keys of earlier ones"),
    ("num_nextn_predict_layers", "has prediction layers addressed by index"),
)
# What a module knows of its place in the model; the KV cache is addressed by it.
INDEX_ATTRIBUTES = ("layer_idx", "layer_id")


@dataclass(frozen=True)
class Slot:
    """A layer of the new model. layer: the old one it is, but for its MLP. mlp: the old one whose
    MLP (and whose norms around it) it has."""

    layer: int
    mlp: int


def drop_layers(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Leaves the layers `keep` (indices, ascending) of `model`, in place; see `restack`.

    Raises:
        UserError: `keep` is empty, not ascending or out of range, or `obstacle` finds one.
    """
    count = len(Adapter.of(model).blocks)
    wanted = list(keep)
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] >= count:
        raise UserError(
            f"keep: expected at least one layer, ascending, of 0 to {count - 1}, got {wanted}"
        )
    restack(model, [Slot(i, i) for i in wanted])


def restack(model: PreTrainedModel, slots: Sequence[Slot], mlp: Sequence[str] = ()) -> None:
    """Makes `model`'s layers those of `slots`, in place.

    slots: both indices ascending, none twice. mlp: names, in a layer, of the modules that make up
    its MLP, where a slot takes it from another layer.

    The configuration says the same afterwards: the number of layers, every list with one entry a
    layer, lists of layer indices, and rules by index (every n-th layer is sparse, windows from
    layer n on), which become lists. `layer_idx` is renumbered, so that the KV cache works.

    Raises:
        UserError: `obstacle` finds one; nothing has been changed then.
    """
    adapter = Adapter.of(model)
    blocks = adapter.blocks
    if _unchanged(slots, len(blocks)):
        return
    reason = obstacle(model, slots, mlp)
    if reason is not None:
        raise UserError(f"no layers can be removed: {reason}")
    parts = [[blocks[slot.mlp].get_submodule(name) for name in mlp] for slot in slots]
    for slot, modules in zip(slots, parts, strict=True):
        for name, module in zip(mlp, modules, strict=True):
            blocks[slot.layer].set_submodule(name, module)
    kept = model.get_submodule(adapter.block_names[0].rpartition(".")[0])
    assert isinstance(kept, nn.ModuleList)
    del kept[:]  # the same list afterwards, in its own mode
    kept.extend([blocks[slot.layer] for slot in slots])
    for new, block in enumerate(kept):
        for module in block.modules():
            for attribute in INDEX_ATTRIBUTES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, new)
    _rewrite(model.config.get_text_config(), slots, len(blocks))


def obstacle(model: PreTrainedModel, slots: Sequence[Slot], mlp: Sequence[str] = ()) -> str | None:
    """Why an ordinary model of the same class cannot have the layers `slots` of `model`; None where
    it can. Changes nothing.

    An empty model is built from the configuration as it would be loaded from a file: it must have
    the same parameters of the same shapes, and layers that behave the same.
    """
    config = model.config.get_text_config()
    blocks = Adapter.of(model).blocks
    if _unchanged(slots, len(blocks)):
        return None
    for field, why in PLACE_DEPENDENT:
        if getattr(config, field, None):
            return f"{config.model_type}: {field} {why}"
    mixed = any(slot.layer != slot.mlp for slot in slots)
    if mixed and isinstance(getattr(config, "per_layer_config", None), dict):
        return f"{config.model_type}: per_layer_config does not tell attention from MLP"
    cannot = f"{type(model).__name__}: its configuration cannot express the layers left"
    stock = _empty(model, slots, len(blocks))
    if isinstance(stock, str):
        return f"{cannot} ({stock})"
    outside = _outside(stock).items() ^ _outside(model).items()
    if outside:
        return f"{cannot} ({min(name for name, _ in outside)})"
    for i, (block, slot) in enumerate(zip(Adapter.of(stock).blocks, slots, strict=True)):
        wanted = _behaviour(blocks[slot.layer])
        if slot.mlp != slot.layer:
            other = _behaviour(blocks[slot.mlp])
            wanted = {k: v for k, v in wanted.items() if not _within(k, mlp)}
            wanted |= {k: v for k, v in other.items() if _within(k, mlp)}
        wrong = wanted.items() ^ _behaviour(block).items()
        if wrong:
            return f"{cannot} (layer {i}, {min(name for name, _ in wrong)})"
    return None


def _unchanged(slots: Sequence[Slot], count: int) -> bool:
    return list(slots) == [Slot(i, i) for i in range(count)]


def _empty(model: PreTrainedModel, slots: Sequence[Slot], count: int) -> PreTrainedModel | str:
    """A model without weights of what would be saved, or what transformers has against it."""
    config = copy.deepcopy(model.config)
    try:
        _rewrite(config.get_text_config(), slots, count)
        as_saved = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            return type(model)(as_saved)
    except (ValueError, StrictDataclassError) as error:
        return " ".join(str(error).split())


def _rewrite(config: Any, slots: Sequence[Slot], count: int) -> None:
    """All that depends on the number of layers or on their indices."""
    layers, mlps = [slot.layer for slot in slots], [slot.mlp for slot in slots]
    sparse_rule = getattr(config, "decoder_sparse_step", None)
    if sparse_rule is not None:
        dense = set(getattr(config, "mlp_only_layers", None) or [])
        dense |= {i for i in range(count) if sparse_rule < 1 or (i + 1) % sparse_rule}
        config.mlp_only_layers = sorted(dense)
        config.decoder_sparse_step = 1
    for keep, lists, indices, bounds in (
        (layers, ATTENTION_LISTS, ATTENTION_INDICES, ATTENTION_BOUNDS),
        (mlps, MLP_LISTS, MLP_INDICES, MLP_BOUNDS),
    ):
        for name in lists:
            value = getattr(config, name, None)
            # Jamba derives its list from a period.
            derived = isinstance(getattr(type(config), name, None), property)
            if isinstance(value, (list, tuple)) and len(value) == count and not derived:
                # Set below num_hidden_layers' back: some configurations validate their length.
                config.__dict__[name] = [value[i] for i in keep]
        for name in indices:
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)):
                config.__dict__[name] = [new for new, old in enumerate(keep) if old in value]
        for name in bounds:
            value = getattr(config, name, None)
            if isinstance(value, int):
                config.__dict__[name] = sum(i < value for i in keep)
    per_layer = getattr(config, "per_layer_config", None)
    if isinstance(per_layer, dict):
        by_index = {int(i): v for i, v in per_layer.items()}
        config.__dict__["per_layer_config"] = {
            new: by_index[old] for new, old in enumerate(layers) if old in by_index
        }
    config.num_hidden_layers = len(slots)


def _behaviour(block: nn.Module) -> dict[str, Any]:
    """What the modules of a layer say about how they work, and the shapes of their parameters."""
    return {name: tuple(p.shape) for name, p in block.named_parameters()} | behaviour(block)


def _within(key: str, modules: Sequence[str]) -> bool:
    """Whether a key of `_behaviour` is of one of `modules`."""
    path = key.partition(":")[0]
    return any(path == name or path.startswith(f"{name}.") for name in modules)


def _outside(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that are not in a layer."""
    inside = {id(p) for block in Adapter.of(model).blocks for p in block.parameters()}
    return {n: tuple(p.shape) for n, p in model.named_parameters() if id(p) not in inside}
