"""From a stock checkpoint with zeros to DeciLM and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from pyprune.checkpoint import (
    Checkpoint,
    Originals,
    check_output,
    copy_auxiliary,
    output_directory,
    write_report,
)
from pyprune.checkpoint.output import (
    AUXILIARY_BYTES,
    MAX_SHARD_SIZE,
    changed_model,
    earlier_report,
)
from pyprune.checkpoint.shards import read_tensor
from pyprune.checkpoint.source import DECI, locate, main_dtype, read_json, read_tensors
from pyprune.deci import (
    ATTENTION,
    BIASES,
    NOTE,
    SHARED,
    check_family,
    dead_branches,
    ffn_channels,
    save_deci,
    to_deci,
)
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.repack import repack
from pyprune.errors import UserError
from pyprune.models.stock import parameter_count, shapes_of
from pyprune.progress import Progress
from pyprune.sparse.convert import ConversionReport
from pyprune.width.structure import Widths


def compress_deci(
    source: str | Path, out: str | Path, *, progress: Progress | None = None
) -> ConversionReport:
    """Writes the dense checkpoint `source` into the new directory `out`, as DeciLM, without the
    branches, channels and key-value heads that are zero: those of any method, and after healing.
    The model is held in memory.

    Raises UserError: see `to_deci`, `Checkpoint.open` and `output_directory`.
    """
    check_output(out)
    checkpoint = Checkpoint.open(source)
    if progress is not None:
        progress("loading the model", 0, None)
    model = checkpoint.load_model()
    originals = Originals(checkpoint, model)
    check_family(model)
    graph = ResidualGraph.of(model)
    dead = dead_branches(graph, Widths.of(model, graph.adapter).live())
    before = parameter_count(model)
    repack(graph, dead)
    report = earlier_report(checkpoint)
    with changed_model(checkpoint, originals, model, out, save_deci) as folder:
        deci = to_deci(model)
        # Of the model before anything was pruned, where a structural method has said it.
        sizes = {"before": before, **report.get("parameters", {})}
        sizes |= {"after": deci.parameters, "zeros": deci.padding}
        sizes["removed_share"] = 1 - deci.wanted / sizes["before"]
        sizes["realised_share"] = 1 - deci.parameters / sizes["before"]
        stock = [f"of the stock model: {note}" for note in report.get("notes", [])]
        report |= {"parameters": sizes, "notes": [*stock, NOTE]}
        write_report(folder, report, _card(checkpoint.path.name, deci.parameters))
    after = sum(entry.nbytes for entry in read_tensors(Path(out).expanduser()).values())
    return ConversionReport(str(out), {}, checkpoint.nbytes, after, checkpoint.nbytes)


def _card(name: str, parameters: int) -> str:
    return (
        f"# {name} as DeciLM\n\n{parameters:,} parameters; {NOTE}.\n\nWhat was pruned is in "
        "`pyprune.json`.\n"
    )


def is_deci(source: str | Path) -> bool:
    """Whether a directory or hub id is a DeciLM checkpoint."""
    return read_json(locate(source) / "config.json").get("model_type") == DECI


def decompress_deci(
    source: str | Path, out: str | Path, *, progress: Progress | None = None
) -> ConversionReport:
    """Writes the stock checkpoint that computes what the DeciLM checkpoint `source` does into the
    new directory `out`, see `stock_tensors`."""
    check_output(out)
    path = locate(source)
    if progress is not None:
        progress("reading", 0, None)
    config, tensors = stock_tensors(path)
    entries = read_tensors(path)
    stock = Checkpoint(path, config, main_dtype(path, entries), entries)
    nbytes = sum(t.nbytes for t in tensors.values())
    report: dict[str, Any] = earlier_report(stock)
    with output_directory(out, needed=nbytes + AUXILIARY_BYTES) as folder:
        copy_auxiliary(stock, folder, index=False)
        config.save_pretrained(folder)
        save_torch_state_dict(
            {name: t.contiguous() for name, t in tensors.items()},
            folder,
            max_shard_size=MAX_SHARD_SIZE,
            metadata={"format": "pt"},
        )
        write_report(folder, report, "A DeciLM model as a stock one, with zeros.\n")
    return ConversionReport(str(out), {}, stock.nbytes, nbytes, nbytes)


def stock_tensors(folder: Path) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Configuration and parameters of the stock model that computes what the DeciLM checkpoint in
    `folder` does: a Llama, or a Qwen2 where queries, keys and values alone have biases. All layers
    are as large as the largest, the rest is zeros (and ones, in norms that are not there).

    Raises:
        UserError: the configuration is not that of a DeciLM, or has linear maps in place of
            branches; a tensor is missing, or is too many, or has another shape.
    """
    raw, entries = read_json(folder / "config.json"), read_tensors(folder)
    heads, channels = _sizes(raw, folder)
    config = _stock_config(raw, heads, channels, folder)
    with torch.device("meta"):
        shapes = shapes_of(AutoModelForCausalLM.from_config(config))
    known = {*shapes, "lm_head.weight"}  # which a tied model may have twice
    if entries.keys() - known:
        raise UserError(f"{folder}: expected no tensor {min(entries.keys() - known)}")
    # Of what is missing: as in the layers that have it.
    main = main_dtype(folder, entries)
    dtypes = {_part(name): entry.dtype for name, entry in entries.items()}
    groups, tensors = config.num_key_value_heads, {}
    for name, shape in shapes.items():
        _, inside, rest = name.partition(".layers.")
        number, _, part = rest.partition(".")
        layer = int(number or 0)
        keys, width = (heads[layer], groups), channels[layer]
        if inside and not (keys[0] if part.startswith(ATTENTION) else width):
            if name in entries:
                raise UserError(f"{folder}: expected no tensor {name}")
            fill = torch.ones if "layernorm" in part else torch.zeros
            tensors[name] = fill(shape, dtype=dtypes.get(part, main))
            continue
        if name not in entries:
            raise UserError(f"{folder}: expected a tensor {name}, it is missing")
        t, expected = read_tensor(entries[name]), _stored_shape(shape, part, keys, width)
        if t.shape != expected:
            raise UserError(f"{folder}: {name}: expected shape {expected}, got {tuple(t.shape)}")
        tensors[name] = t if expected == shape else _widened(t, shape, part, keys)
    return config, tensors


def _part(name: str) -> str:
    """What a parameter is called inside its layer."""
    return name.partition(".layers.")[2].partition(".")[2]


def _sizes(raw: Mapping[str, Any], folder: Path) -> tuple[list[int], list[int]]:
    """Key-value heads and channels of each layer, 0 where there is no such branch."""
    heads, channels = [], []
    try:
        for block in raw["block_configs"]:
            attention, ffn = block["attention"], block["ffn"]
            if attention.get("replace_with_linear") or ffn.get("replace_with_linear"):
                raise UserError(f"{folder}: expected branches, got replace_with_linear")
            group = None if attention["no_op"] else attention["n_heads_in_group"]
            heads.append(raw["num_attention_heads"] // group if group else 0)
            mult = None if ffn["no_op"] else ffn["ffn_mult"]
            channels.append(ffn_channels(mult, raw["hidden_size"]) if mult else 0)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: expected block_configs of a DeciLM: {error!r}") from error
    if not any(heads) or not any(channels):
        raise UserError(f"{folder}: expected layers with an attention and an MLP, got none")
    return heads, channels


def _stock_config(
    raw: Mapping[str, Any], heads: list[int], channels: list[int], folder: Path
) -> PreTrainedConfig:
    kind = "qwen2" if raw.get("qkv_bias") else "llama"
    fields = {name: raw[name] for name in SHARED if name in raw}
    fields |= {name: raw[name] for name in ("rope_theta", "rope_scaling") if name in raw}
    if kind == "llama":
        fields |= {name: raw.get(name, False) for name in BIASES}
    elif any(raw.get(name) for name in BIASES):
        raise UserError(f"{folder}: expected biases as Llama or Qwen2 have them, got others")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(
            kind,
            **fields,
            num_hidden_layers=len(heads),
            intermediate_size=max(channels),
            # Of which every layer's number is a divisor: its heads are there several times.
            num_key_value_heads=math.lcm(*filter(None, heads)),
            dtype=raw.get("dtype", raw.get("torch_dtype")),
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{folder}: config.json cannot be used: {line}") from error
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    return config


def _stored_shape(
    shape: tuple[int, ...], part: str, keys: tuple[int, int], channels: int
) -> tuple[int, ...]:
    """Of a layer's parameter that has `shape` in the stock model. keys: key-value heads of the
    layer and of the stock model; channels: of the layer."""
    if part.startswith(("self_attn.k_proj", "self_attn.v_proj")):
        return (shape[0] // keys[1] * keys[0], *shape[1:])
    if part == "mlp.down_proj.weight":
        return (shape[0], channels)
    return (channels, *shape[1:]) if part.startswith(("mlp.gate", "mlp.up")) else shape


def _widened(t: Tensor, shape: tuple[int, ...], part: str, keys: tuple[int, int]) -> Tensor:
    """A layer's parameter in the shape that all layers have. keys: see `_stored_shape`."""
    if part.startswith("self_attn."):
        copies = keys[1] // keys[0]
        return t.view(keys[0], -1, *t.shape[1:]).repeat_interleave(copies, dim=0).view(shape)
    lacking = [new - old for old, new in zip(t.shape, shape, strict=True)]
    return nn.functional.pad(t, [n for lack in reversed(lacking) for n in (0, lack)])
