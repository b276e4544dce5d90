"""How a checkpoint's tensors make up a model's parameters.

Almost always one tensor is one parameter, up to the prefix of the base model (published GPT-2 and
BLOOM checkpoints have none) and a few old names. Most mixtures' checkpoints store one tensor per
expert and projection, which transformers 5 holds fused: `experts.gate_up_proj [E, 2I, H]` (gate
rows first) and `experts.down_proj [E, H, I]`. Which names and which parts is asked of the rules by
which transformers itself loads the model's family; the few below are for files older than those.
Whatever these rules do not cover is reported, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from pyprune.checkpoint.shards import TensorEntry

# Old name -> name in transformers 5, where the model class renames on loading.
RENAMES = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"^embed_out\."), "lm_head."),
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)
# Buffers that files of earlier releases have, and that no model takes any more.
IGNORED = (r"rotary_emb\.inv_freq$",)
EXPERT = re.compile(
    r"^(?P<experts>.*\.experts)\.(?P<expert>\d+)\."
    r"(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
# projection -> (fused parameter, which half of the rows of gate_up_proj)
FUSED: dict[str, tuple[str, int]] = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w2": ("down_proj", 0),
}
HALVES = {"gate_up_proj": 2, "down_proj": 1}


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint and the part of a parameter that it is.

    expert: index along the parameter's first dimension; None = all of it.
    part: which of the `parts` equal shares of (that expert's) rows.
    """

    tensor: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    @property
    def whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.expert is None and self.parts == 1

    def view(self, parameter: Tensor) -> Tensor:
        """The part of `parameter` that the tensor is, without a copy."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        if self.parts == 1:
            return matrix
        rows = matrix.shape[0] // self.parts
        return matrix[self.part * rows : (self.part + 1) * rows]


@dataclass
class NameMap:
    """Which tensors make up each parameter or persistent buffer, and why not, where they do not.

    pieces: by the model's name. unused: tensors of the checkpoint that the model has no place for.
    unexplained: those of them that its class does not expect to be there for nothing, as it does
    rotary frequencies of old files.
    problem: why the model cannot be filled from the checkpoint by these rules; empty if it can.
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    problem: str = ""


def map_names(entries: Mapping[str, TensorEntry], model: PreTrainedModel) -> NameMap:
    """Maps the tensors of a checkpoint to the parameters and persistent buffers of `model`."""
    state = model.state_dict(keep_vars=True)
    names = NameMap()
    ignored = (*IGNORED, *(model._keys_to_ignore_on_load_unexpected or ()))
    for tensor in entries:
        found = _place(tensor, state, model)
        if found is None:
            names.unused.append(tensor)
            if not any(re.search(pattern, tensor) for pattern in ignored):
                names.unexplained.append(tensor)
        else:
            names.pieces.setdefault(found[0], []).append(found[1])
    names.problem = _problem(names, entries, state)
    return names


def has_place_for(model: PreTrainedModel, tensor: str) -> bool:
    """Whether `tensor` of a checkpoint is a parameter or persistent buffer of `model`, or part of
    one."""
    return places_of(model, [tensor])[tensor] is not None


def places_of(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str | None]:
    """The parameter or persistent buffer of `model` that each of `tensors` of a checkpoint is, or
    is a part of; None without one."""
    state = model.state_dict(keep_vars=True)
    places = {tensor: _place(tensor, state, model) for tensor in tensors}
    return {tensor: None if found is None else found[0] for tensor, found in places.items()}


def candidate_names(tensor: str, model: PreTrainedModel) -> Iterator[str]:
    """What a checkpoint's tensor may be called in the model, transformers' own name first."""
    renamed = tensor
    for old, new in RENAMES:
        renamed = old.sub(new, renamed)
    for name in dict.fromkeys((_rules(model).rename(tensor), tensor, renamed)):
        yield from _prefixed(name, model.base_model_prefix)


def _prefixed(name: str, prefix: str) -> Iterator[str]:
    yield name
    if prefix:
        yield f"{prefix}.{name}"
        if name.startswith(f"{prefix}."):
            yield name[len(prefix) + 1 :]


def keeps_suffix(model: PreTrainedModel, tensor: str, suffix: str) -> bool:
    """Whether transformers renames `tensor`, which ends in ".weight", just as it does when it ends
    in ".<suffix>" instead: parts of a compressed weight come under such names."""
    rename, stem = _rules(model).rename, tensor.removesuffix(".weight")
    return rename(f"{stem}.{suffix}") == f"{rename(tensor).removesuffix('.weight')}.{suffix}"


class _Rules:
    """How transformers renames the tensors of a model's checkpoints, and puts them together."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def rename(self, tensor: str) -> str:
        """Its name, where it is not put together with others."""
        for rule in self._renamings:
            tensor, _ = rule.rename_source_key(tensor)
        return tensor

    def convert(self, tensor: str) -> tuple[str, Piece | None] | None:
        """The parameter that it becomes part of and which part; None for a part that no `Piece` can
        say. None if it is not put together with others."""
        name = self.rename(tensor)
        for rule in self._converters:
            made, source = rule.rename_source_key(name)
            if source is not None:
                return made, self._piece(tensor, rule, source, name)
        return None

    def _piece(self, tensor: str, rule: WeightConverter, source: str, name: str) -> Piece | None:
        kinds = [(type(operation), operation.dim) for operation in rule.operations]
        sources = len(rule.source_patterns)
        part = rule.source_patterns.index(source)
        if kinds == [(Concatenate, 0)]:
            return Piece(tensor, None, part, sources)
        merged = kinds == [(MergeModulelist, 0)] and sources == 1
        if not merged and kinds != [(MergeModulelist, 0), (Concatenate, 1)]:
            return None
        before, _, after = source.partition("*")
        number = re.search(rf"{before}(\d+){after}", name)
        return None if number is None else Piece(tensor, int(number[1]), part, sources)


_RULES: WeakKeyDictionary[PreTrainedModel, _Rules] = WeakKeyDictionary()


def _rules(model: PreTrainedModel) -> _Rules:
    if model not in _RULES:
        _RULES[model] = _Rules(model)
    return _RULES[model]


def _place(
    tensor: str, state: Mapping[str, Tensor], model: PreTrainedModel
) -> tuple[str, Piece] | None:
    converted = _rules(model).convert(tensor)
    if converted is not None:
        parameter, piece = converted
        for name in _prefixed(parameter, model.base_model_prefix):
            if name in state:
                return None if piece is None else (name, piece)
    for name in candidate_names(tensor, model):
        if name in state:
            return name, Piece(tensor)
        match = EXPERT.match(name)
        if match:
            parameter, part = FUSED[match["projection"]]
            fused = f"{match['experts']}.{parameter}"
            if fused in state:
                return fused, Piece(tensor, int(match["expert"]), part, HALVES[parameter])
    return None


def _problem(
    names: NameMap, entries: Mapping[str, TensorEntry], state: Mapping[str, Tensor]
) -> str:
    """The first parameter that is not made up exactly once."""
    filled = {id(state[name]) for name in names.pieces}
    for name, value in state.items():
        pieces = names.pieces.get(name)
        if pieces is None:
            # A tied parameter has several names; a checkpoint needs to hold only one of them.
            if id(value) in filled:
                continue
            return f"no tensor of the checkpoint is {name}"
        elements, parts = 0, {(piece.expert, piece.part) for piece in pieces}
        for piece in pieces:
            if piece.expert is not None and piece.expert >= value.shape[0]:
                return f"{piece.tensor} is not among the {value.shape[0]} experts of {name}"
            expected, got = tuple(piece.view(value).shape), entries[piece.tensor].shape
            if expected != got:
                return f"{piece.tensor} has shape {list(got)}, {name} takes {list(expected)}"
            elements += piece.view(value).numel()
        if elements != value.numel() or len(parts) != len(pieces):
            return f"{len(pieces)} tensors of the checkpoint do not make up {name}"
    return ""


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place (module, name within it) where each parameter or buffer object sits, by `id`."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                places.setdefault(id(value), []).append((module, name))
    return places
