"""Whole layers out of a model in memory, so that what is left is an ordinary, smaller model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pyprune.errors import UserError
from pyprune.models.adapter import Adapter

# Fields of a configuration with one entry a layer, and fields that list layers by their index.
PER_LAYER = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "layers_block_type",
    "attention_layers",
    "intermediate_size",
    "activation_sparsity_pattern",
    "layers_num_experts",
    "num_attention_heads_per_layer",
    "layer_rope_theta",
)
BY_INDEX = ("mlp_only_layers", "moe_layers", "hybrid_layer_ids")
# What a module knows of its place in the model; the KV cache is addressed by it.
INDEX_ATTRIBUTES = ("layer_idx", "layer_id")
# Plain attributes of a layer's modules that say how it behaves, where a configuration can make
# layers different from each other.
BEHAVIOUR = (
    "sliding_window",
    "is_sliding",
    "layer_type",
    "attention_type",
    "use_rope",
    "is_local",
    "attn_logit_softcapping",
    "scaling",
)


def drop_layers(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Leaves the layers `keep` (indices, ascending) of `model`, in place.

    The configuration says the same afterwards: the number of layers, every list with one entry a
    layer, lists of layer indices, and rules by index (every n-th layer is sparse, windows from
    layer n on), which become lists. `layer_idx` is renumbered, so that the KV cache works. The
    result is checked against an empty model built from the new configuration: the same parameters
    of the same shapes, and layers that behave the same.

    Raises:
        UserError: `keep` is empty, not ascending or out of range; or the architecture cannot
            express what is left. The model must not be used after the latter.
    """
    adapter = Adapter.of(model)
    count = len(adapter.blocks)
    wanted = list(keep)
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] >= count:
        raise UserError(
            f"keep: expected at least one layer, ascending, of 0 to {count - 1}, got {wanted}"
        )
    if len(wanted) == count:
        return
    config = model.config.get_text_config()
    _check_supported(config)
    before = [_behaviour(adapter.blocks[i]) for i in wanted]
    parent, _, name = adapter.block_names[0].rpartition(".")[0].rpartition(".")
    kept = nn.ModuleList([adapter.blocks[i] for i in wanted])
    setattr(model.get_submodule(parent), name, kept)
    for new, block in enumerate(kept):
        for module in block.modules():
            for attribute in INDEX_ATTRIBUTES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, new)
    _rewrite(config, wanted, count)
    _check_against_config(model, before)


def _check_supported(config: Any) -> None:
    for name, why in (
        ("scale_attn_by_inverse_layer_idx", "scales attention by the layer's index"),
        ("num_kv_shared_layers", "lets late layers read the keys of earlier ones"),
        ("num_nextn_predict_layers", "has prediction layers addressed by index"),
    ):
        if getattr(config, name, None):
            raise UserError(f"{config.model_type}: {name} {why}: no layers can be removed")


def _rewrite(config: Any, keep: list[int], count: int) -> None:
    """All that depends on the number of layers or on their indices."""
    place = {old: new for new, old in enumerate(keep)}
    sparse_rule = getattr(config, "decoder_sparse_step", None)
    if sparse_rule is not None:
        dense = set(getattr(config, "mlp_only_layers", None) or [])
        dense |= {i for i in range(count) if sparse_rule < 1 or (i + 1) % sparse_rule}
        config.mlp_only_layers = sorted(dense)
        config.decoder_sparse_step = 1
    for name in PER_LAYER:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(value) == count:
            # Set below num_hidden_layers' back: some configurations validate their length.
            config.__dict__[name] = [value[i] for i in keep]
    for name in BY_INDEX:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            config.__dict__[name] = [place[i] for i in value if i in place]
    for name in ("first_k_dense_replace", "num_dense_layers", "max_window_layers"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            config.__dict__[name] = sum(i < value for i in keep)
    per_layer = getattr(config, "per_layer_config", None)
    if isinstance(per_layer, dict):
        moved = {int(i): v for i, v in per_layer.items()}
        config.__dict__["per_layer_config"] = {place[i]: v for i, v in moved.items() if i in place}
    config.num_hidden_layers = len(keep)


def _behaviour(block: nn.Module) -> dict[str, Any]:
    """What the modules of a layer say about how they work."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        found[path] = type(module).__name__
        for name in BEHAVIOUR:
            value = getattr(module, name, None)
            if isinstance(value, (bool, int, float, str)):
                found[f"{path}:{name}"] = value
    return found


def _check_against_config(model: PreTrainedModel, before: list[dict[str, Any]]) -> None:
    """Raises UserError unless loading the saved model would give the model in memory."""
    name = type(model).__name__
    with torch.device("meta"):
        stock = type(model)(copy.deepcopy(model.config))
    expected = {key: tuple(p.shape) for key, p in stock.named_parameters()}
    got = {key: tuple(p.shape) for key, p in model.named_parameters()}
    wrong = sorted({k for k, _ in expected.items() ^ got.items()})
    if wrong:
        raise UserError(f"{name}: its configuration cannot express the layers left ({wrong[0]})")
    for i, (block, was) in enumerate(zip(Adapter.of(stock).blocks, before, strict=True)):
        now = _behaviour(block)
        wrong = sorted({k for k, _ in now.items() ^ was.items()})
        if wrong:
            raise UserError(
                f"{name}: its configuration cannot express the layers left (layer {i}, {wrong[0]})"
            )
