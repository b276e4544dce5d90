"""Checkpoints whose layers differ in size: DeciLM, the architecture of NVIDIA's nemotron-nas.

A stock model has one size for all layers, so what single layers lost stays in it as zeros. DeciLM
says for each layer whether it has an attention, how many key-value heads, and how wide its MLP is;
vLLM (`DeciLMForCausalLM`) and llama.cpp (`deci`) run that. transformers does not.

Everything is judged by zeros in the weights, whichever method put them there. Two rules come from
the runtimes (vLLM's nemotron_nas.py, llama.cpp's deci.cpp):

- The first layer needs its attention: without it vLLM has no residual stream to add to.
- A layer with an attention needs an MLP: without one llama.cpp drops what the attention computed.
  It gets one of 256 channels, all zero.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyprune import configuration_deci
from pyprune.checkpoint.output import MAX_SHARD_SIZE
from pyprune.checkpoint.source import DECI
from pyprune.depth.config import FIRST_ATTENTION
from pyprune.depth.graph import Branch, BranchKind, ResidualGraph
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.models.stock import parameter_count
from pyprune.width.structure import Widths

ARCHITECTURE = "DeciLMForCausalLM"
# Norm, attention, norm, gated MLP, and nothing else that DeciLM has no word for.
FAMILIES = ("llama", "mistral", "qwen2")
MULTIPLE = 256  # of an MLP's channels: the runtimes round up to it
ROPE_TYPES = ("default", "llama3")  # llama.cpp's deci reads no other
# Fields that DeciLM and its stock model share.
SHARED = (
    "vocab_size", "hidden_size", "num_attention_heads", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings",
)  # fmt: skip
BIASES = ("attention_bias", "mlp_bias")
NOTE = (
    "saved as DeciLM (nemotron-nas) for vLLM, with --trust-remote-code for its configuration, and "
    "llama.cpp; plain transformers cannot load it: `pyprune decompress` makes it a stock model"
)
# Of a layer, all that there may be.
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
PARTS = {
    *(f"{name}.{kind}" for name in LINEARS for kind in ("weight", "bias")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}
ATTENTION = ("self_attn.", "input_layernorm.")  # what of a layer is the attention's
NONE = -1  # a unit that the model does not have: zeros


@dataclass(frozen=True)
class Deci:
    """A model as DeciLM. config: of config.json. tensors: by name, without a tied head. wanted: how
    many parameters would be left if every layer had exactly what it needs; those beyond are
    padding."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    wanted: int

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    @property
    def padding(self) -> int:
        return self.parameters - self.wanted


def ffn_mult(channels: int, hidden: int) -> float:
    """What says that an MLP has `channels` (a multiple of 256) where the model has width `hidden`:
    the middle of all that are rounded up to it, so that no rounding error counts."""
    return 3 * (channels - MULTIPLE / 2) / (2 * hidden)


def ffn_channels(mult: float, hidden: int) -> int:
    """The inverse, as the runtimes compute it."""
    return _rounded(int(2 * mult * hidden / 3))


def _rounded(channels: int) -> int:
    return -(-channels // MULTIPLE) * MULTIPLE


def check_family(model: PreTrainedModel) -> None:
    """Raises UserError unless DeciLM has words for all that a model of this kind computes."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise UserError(
            f"deci: expected a model of {', '.join(FAMILIES)}, got {config.model_type}: DeciLM has "
            "no norms of queries and keys, no experts and no kinds of layers"
        )
    window = getattr(config, "sliding_window", None)
    if window or set(getattr(config, "layer_types", None) or []) - {"full_attention"}:
        raise UserError(f"deci: expected attention without a sliding window, got one of {window}")
    if config.hidden_act != "silu":
        raise UserError(f"deci: hidden_act: expected silu, got {config.hidden_act}")
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"deci: rope_type: expected {' or '.join(ROPE_TYPES)}, got {rope}")
    size = _head_size(config)
    if size * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"deci: head_dim: expected hidden_size {config.hidden_size} / num_attention_heads "
            f"{config.num_attention_heads}, got {size}"
        )


def check_before(model: PreTrainedModel, adapter: Adapter) -> None:
    """Raises UserError where `to_deci` will, whatever else goes of `model`: before a search, which
    may take hours, not after it. Branches that go have to leave the first attention."""
    check_family(model)
    widths = Widths.of(model, adapter)
    _check_layers(widths)
    _check_first(dead_branches(ResidualGraph(model, adapter), widths.live()))


def _check_layers(widths: Widths) -> None:
    adapter = widths.adapter
    for block, name in zip(adapter.blocks, adapter.block_names, strict=True):
        if f"{name}.mlp" in widths.refused:
            raise UserError(f"deci: {name}.mlp: {widths.refused[f'{name}.mlp']}")
        unknown = {part for part, _ in block.named_parameters()} - PARTS
        if unknown:
            raise UserError(f"deci: {name}: DeciLM has no {min(unknown)}")


def _check_first(gone: Collection[Branch]) -> None:
    if FIRST_ATTENTION in gone:
        raise UserError(
            "deci: the attention of the first layer is removed, and vLLM's DeciLM does not run "
            "without it; expected it to stay (--fill packed keeps it as zeros)"
        )


def _head_size(config: Any) -> int:
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def dead_branches(graph: ResidualGraph, live: Mapping[str, Tensor]) -> list[Branch]:
    """Branches that add nothing but zeros. live: `Widths.live` of the same model."""
    dead = []
    for branch in graph.branches:
        block, name = graph.adapter.blocks[branch.layer], graph.adapter.block_names[branch.layer]
        path = "self_attn.o_proj" if branch.kind == "attention" else "mlp.down_proj"
        writer: Any = block.get_submodule(path)
        units = live.get(f"{name}.{path}")  # None: not divided into units (a single KV head)
        adds = bool(writer.weight.any()) if units is None else len(units) > 0
        if not adds and (writer.bias is None or not writer.bias.any()):
            dead.append(branch)
    return dead


@torch.no_grad()
def to_deci(model: PreTrainedModel) -> Deci:
    """`model` without the branches, channels and key-value heads that are zero. It stays as it is.

    An MLP keeps a multiple of 256 channels, the last ones zeros. Of KV groups the keys and values
    go where fewer, a divisor of the number of query heads, hold the groups that are left; query
    heads stay, as zeros, for all layers have equally many. What nothing goes from is the model's
    own memory.

    Raises:
        UserError: DeciLM cannot say what the model computes (see `check_family`), or the attention
            of the first layer is gone.
    """
    check_family(model)
    config, adapter = model.config, Adapter.of(model)
    graph, widths = ResidualGraph(model, adapter), Widths.of(model, adapter)
    _check_layers(widths)
    live = widths.live()
    gone = set(dead_branches(graph, live))
    _check_first(gone)
    inside = {id(p) for block in adapter.blocks for p in block.parameters()}
    tensors = {n: p.detach() for n, p in model.named_parameters() if id(p) not in inside}
    heads, channels = [], []
    layers: Iterator[tuple[Any, str]] = zip(adapter.blocks, adapter.block_names, strict=True)
    for i, (block, name) in enumerate(layers):
        parts: dict[str, Tensor] = {}
        heads.append(0)
        if Branch("attention", i) not in gone:
            units = live.get(f"{name}.self_attn.o_proj")
            heads[i] = _attention(parts, block.self_attn, config, units)
            parts["input_layernorm.weight"] = block.input_layernorm.weight
        channels.append(_mlp(parts, block.mlp, live[f"{name}.mlp.down_proj"]))
        parts["post_attention_layernorm.weight"] = block.post_attention_layernorm.weight
        tensors |= {f"{name}.{part}": t.detach() for part, t in parts.items()}
    wanted = parameter_count(model) - graph.removed_parameters(gone)
    for group in widths.groups:
        kind: BranchKind = "attention" if group.kind == "heads" else "mlp"
        if Branch(kind, group.layer) not in gone:
            wanted -= group.unit_parameters * (group.units - len(live[group.name]))
    return Deci(_config(model, heads, channels), tensors, wanted)


def _attention(
    parts: dict[str, Tensor], attention: nn.Module, config: Any, live: Tensor | None
) -> int:
    """Adds the parameters to `parts`; returns the number of key-value heads. live: the KV groups
    that write something."""
    size, heads = _head_size(config), config.num_attention_heads
    count: int = config.num_key_value_heads
    groups = count
    keys, queries = torch.arange(groups), torch.arange(heads)
    if live is not None:
        least = next(n for n in range(max(1, len(live)), heads + 1) if heads % n == 0)
        if least < groups:
            count, keys = least, _filled(live, least)
            # The queries of a group that is left come first among those that its keys serve now.
            owners = torch.full((count, heads // count), NONE)
            owners[: len(live), : heads // groups] = queries.view(groups, -1)[live]
            queries = owners.flatten()
    for name, units in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        _linear(parts, f"self_attn.{name}", attention.get_submodule(name), 0, units, size)
    _linear(parts, "self_attn.o_proj", attention.get_submodule("o_proj"), 1, queries, size)
    return count


def _mlp(parts: dict[str, Tensor], mlp: nn.Module, live: Tensor) -> int:
    """Adds the parameters to `parts`; returns the number of channels. live: those that write
    something."""
    down: nn.Linear = mlp.get_submodule("down_proj")  # type: ignore[assignment]
    whole = down.in_features
    count = _rounded(max(1, len(live)))
    # Nothing is gained where the rounding gives back what went, so nothing is moved.
    units = _filled(torch.arange(whole) if count >= whole else live, count)
    for name in ("gate_proj", "up_proj"):
        _linear(parts, f"mlp.{name}", mlp.get_submodule(name), 0, units)
    _linear(parts, "mlp.down_proj", down, 1, units)
    return count


def _filled(units: Tensor, count: int) -> Tensor:
    return torch.cat([units, torch.full((count - len(units),), NONE)])


def _linear(
    parts: dict[str, Tensor], name: str, module: Any, axis: int, units: Tensor, size: int = 1
) -> None:
    """Adds what belongs to `units`, of `size` rows (axis 0) or columns (axis 1) each."""
    parts[f"{name}.weight"] = _taken(module.weight, axis, units, size)
    if module.bias is not None:
        parts[f"{name}.bias"] = _taken(module.bias, 0, units, size) if axis == 0 else module.bias


def _taken(t: Tensor, axis: int, units: Tensor, size: int) -> Tensor:
    index = (units[:, None] * size + torch.arange(size)).flatten().to(t.device)
    if torch.equal(index, torch.arange(t.shape[axis], device=t.device)):
        return t
    taken = t.index_select(axis, index.clamp(min=0))
    return taken.index_fill_(axis, (index < 0).nonzero()[:, 0], 0)


def _config(model: PreTrainedModel, heads: list[int], channels: list[int]) -> dict[str, Any]:
    """config.json. heads: key-value heads of each layer, 0 without an attention."""
    config = model.config
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    qwen = config.model_type == "qwen2"
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": "configuration_deci.DeciConfig"},
        "model_type": DECI,
        **{name: getattr(config, name, None) for name in SHARED},
        **{name: bool(getattr(config, name, False)) for name in BIASES},
        # Of queries, keys and values alone; without it attention_bias is of the output too.
        **({"qkv_bias": True} if qwen else {}),
        "head_dim": _head_size(config),
        "intermediate_size": max(channels),
        "num_key_value_heads": max(heads),
        "num_hidden_layers": len(heads),
        # As transformers 4 had them: llama.cpp's converter and older vLLM look for these.
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "dtype": str(_dtype(model)).removeprefix("torch."),
        "transformers_version": transformers.__version__,
        "block_configs": [
            {
                "attention": {
                    "n_heads_in_group": config.num_attention_heads // groups if groups else None,
                    "no_op": groups == 0,
                    "replace_with_linear": False,
                },
                "ffn": {
                    "ffn_mult": ffn_mult(width, config.hidden_size),
                    "no_op": False,
                    "replace_with_linear": False,
                },
            }
            for groups, width in zip(heads, channels, strict=True)
        ],
    }


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """What the configuration says, if it is true of some parameters; else that of the first."""
    said, first = model.config.dtype, model.dtype
    dtype: torch.dtype = said if said in {p.dtype for p in model.parameters()} else first
    return dtype


def save_deci(model: PreTrainedModel, folder: Path) -> None:
    """Writes what `model` is as DeciLM into `folder`: weights, configuration, and the code of the
    configuration. Raises as `to_deci`."""
    deci = to_deci(model)
    tensors = {name: t.contiguous() for name, t in deci.tensors.items()}
    save_torch_state_dict(tensors, folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
    text = json.dumps(deci.config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    shutil.copyfile(inspect.getfile(configuration_deci), folder / "configuration_deci.py")
