"""Whole-layer pruning from a checkpoint to a smaller, ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from pyprune.calibration.tokens import Batch, calibration_tokens
from pyprune.checkpoint import Checkpoint, check_output
from pyprune.checkpoint.output import (
    AUXILIARY_BYTES,
    MAX_SHARD_SIZE,
    REPORT,
    output_directory,
    write_report,
)
from pyprune.config import CalibrationConfig
from pyprune.depth import layers
from pyprune.depth.graph import KINDS, Branch, ResidualGraph
from pyprune.depth.save import drop_layers
from pyprune.errors import UserError

DECISION = "pruning.json"
SCHEMA = 1


@dataclass(frozen=True)
class LayerMethod:
    """choose: a function of `pyprune.depth.layers`; options: its frozen dataclass."""

    title: str
    paper: str
    options: type
    choose: Any


LAYER_METHODS = {
    "shortgpt": LayerMethod(
        "layers of least Block Influence", "2403.03853", layers.ShortGptOptions, layers.shortgpt
    ),
    "angular": LayerMethod(
        "window of least angular distance", "2403.17887", layers.AddOns, layers.angular
    ),
    "shortened-llama": LayerMethod(
        "layers by perplexity, Taylor+ or magnitude+",
        "2402.02834",
        layers.ShortenedOptions,
        layers.shortened,
    ),
    "segments": LayerMethod(
        "CKA, Fisher partition, choice per segment",
        "2406.07929",
        layers.SegmentOptions,
        layers.segments,
    ),
    "laco": LayerMethod("layers folded together", "2402.11187", layers.LacoOptions, layers.laco),
    "llm-streamline": LayerMethod(
        "window replaced by one trained layer",
        "2403.19135",
        layers.StreamlineOptions,
        layers.streamline,
    ),
    "reverse": LayerMethod("last layers first", "2411.15558", layers.AddOns, layers.reverse),
}


def method_of(name: str) -> LayerMethod:
    if name not in LAYER_METHODS:
        raise UserError(f"method: expected one of {', '.join(LAYER_METHODS)}, got {name!r}")
    return LAYER_METHODS[name]


def options_of(kind: type, given: Mapping[str, Any]) -> Any:
    """The options dataclass `kind` with the values `given`. UserError: unknown or of another
    type."""
    hints = get_type_hints(kind)
    for name, value in given.items():
        if name not in {f.name for f in fields(kind)}:
            raise UserError(f"option {name!r}: unknown; known: {', '.join(hints)}")
        if get_origin(hints[name]) is Literal:
            right = value in get_args(hints[name])
        else:
            kinds = get_args(hints[name]) or (hints[name],)
            allowed = (*kinds, int) if float in kinds else kinds
            right = isinstance(value, allowed) and (bool in kinds or not isinstance(value, bool))
        if not right:
            raise UserError(f"option {name}: expected {hints[name]}, got {value!r}")
    return kind(**given)


def prune_layers(
    model: Any,
    batches: Sequence[Batch],
    method: str,
    *,
    ratio: float | None = None,
    count: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> layers.LayerChoice:
    """Removes whole layers from a model in memory.

    ratio / count: exactly one. ratio: removal stops as soon as this share of all parameters (tied
    ones once, embeddings included) is gone; count: of layers. options: of the method.

    Raises:
        UserError: unknown method or option, or more is asked for than leaves a layer.
    """
    row = method_of(method)
    if (ratio is None) == (count is None):
        raise UserError(f"expected exactly one of ratio and count, got {ratio} and {count}")
    if ratio is not None and not 0 < ratio < 1:
        raise UserError(f"ratio: expected a number between 0 and 1, got {ratio}")
    if count is not None and count < 1:
        raise UserError(f"count: expected at least 1, got {count}")
    built = options_of(row.options, options or {})
    graph = ResidualGraph.of(model)
    target = (ratio or 0.0) * sum(p.numel() for p in model.parameters())

    def enough(removed: Sequence[int]) -> bool:
        if count is not None:
            return len(removed) >= count
        branches = [Branch(kind, i) for i in removed for kind in KINDS]
        return bool(graph.removed_parameters(branches) >= target)

    choice: layers.LayerChoice = row.choose(
        graph, layers.moved(batches, graph.device), built, enough
    )
    drop_layers(model, [i for i in range(len(graph.layouts)) if i not in choice.removed])
    return choice


def prune_layers_checkpoint(
    source: str | Path,
    out: str | Path,
    method: str,
    *,
    ratio: float | None = None,
    count: int | None = None,
    options: Mapping[str, Any] | None = None,
    calibration: CalibrationConfig | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """`prune_layers` from a checkpoint into the new directory `out`, in the checkpoint's own dtype;
    dtype: to compute in. The model is held in memory. Writes what was decided to pruning.json, and
    returns it. Raises UserError as `prune_layers` does, and if `out` exists."""
    options_of(method_of(method).options, options or {})  # before anything is loaded
    check_output(out)
    text = calibration or CalibrationConfig(nsamples=32, seqlen=512)
    checkpoint = Checkpoint.open(source)
    tokenizer = checkpoint.tokenizer()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = checkpoint.load_model(device, dtype)
    config = model.config.get_text_config()
    tokens = calibration_tokens(
        text.source,
        tokenizer,
        nsamples=text.nsamples,
        seqlen=min(text.seqlen, getattr(config, "max_position_embeddings", text.seqlen)),
        seed=text.seed,
        batch_size=text.batch_size,
        padding=text.padding,
        bos=text.bos,
    )
    count_before = config.num_hidden_layers
    size_before = sum(p.numel() for p in model.parameters())
    choice = prune_layers(model, tokens.batches, method, ratio=ratio, count=count, options=options)
    decision = {
        **_decision(method, choice, count_before),
        "parameters": [size_before, sum(p.numel() for p in model.parameters())],
        "calibration": {"sha256": tokens.sha256, "tokens": tokens.tokens, **asdict(text)},
        "config": {"ratio": ratio, "count": count, "options": dict(options or {})},
    }
    for parameter in model.parameters():
        parameter.data = parameter.data.to(checkpoint.dtype)
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    with output_directory(out, needed=needed + AUXILIARY_BYTES) as folder:
        model.config.dtype = checkpoint.dtype
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        text_of = json.dumps(decision, indent=1, ensure_ascii=False)
        (folder / DECISION).write_text(text_of + "\n", encoding="utf-8")
        write_report(folder, _earlier(checkpoint.path) | {"layers": decision}, _card(decision))
        _keep_license(checkpoint.path, folder)
    return decision


def _decision(method: str, choice: layers.LayerChoice, count: int) -> dict[str, Any]:
    names = [f"A{i}+M{i}" for i in range(count)]
    steps = [
        {"unit": [[kind, i] for kind in KINDS], "score": _at(choice.importance, i)}
        for i in choice.removed
    ]
    return {
        "schema": SCHEMA,
        "method": method,
        "unit": "layer",
        "layers": count,
        "steps": steps,
        "objective": choice.objective,
        "importance": dict(zip(names, choice.importance, strict=False)),
        "transforms": list(choice.transforms),
    }


def _at(values: Sequence[float], i: int) -> float | None:
    return values[i] if values else None


def _earlier(source: Path) -> dict[str, Any]:
    file = source / REPORT
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _keep_license(source: Path, folder: Path) -> None:
    for file in source.glob("LICENSE*"):
        shutil.copyfile(file, folder / file.name)


def _card(decision: Mapping[str, Any]) -> str:
    removed = sorted(step["unit"][0][1] for step in decision["steps"])
    before, after = decision["parameters"]
    return (
        f"# Pruned by pyprune: {decision['method']}\n\nWithout the layers "
        f"{', '.join(map(str, removed))} of {decision['layers']}: {after:,} of {before:,} "
        f"parameters. An ordinary model of its family; details in {DECISION}.\n"
    )
