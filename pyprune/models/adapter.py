"""Where a transformers decoder keeps its blocks and the matrices that may be pruned.

Discovery is generic: the decoder is what `get_decoder()` returns, the blocks are its one ModuleList
with as many entries as the configuration has hidden layers, and the prunable matrices are the
linear maps inside them. The few names a family needs are in the tables below.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from copy import copy
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, Conv1D, PretrainedConfig, PreTrainedModel

from pyprune.errors import UserError
from pyprune.models.experts import expert_count, is_fused, is_transposed, projections
from pyprune.models.linears import LinearRef
from pyprune.surroundings import is_adapted

# The configuration's model_type -> path of the blocks in the decoder, where more than one
# ModuleList has as many entries as there are layers.
# LongCat counts two layers for each of its blocks.
BLOCK_PATHS: dict[str, str] = {"longcat_flash": "layers"}
# Linear maps that steer tokens rather than transform them: routers, recognised next to an `experts`
# module, and others: what chooses the tokens that an attention looks at (DeepSeek's sparse
# attention), and Doge's router.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
STEERING = frozenset({"indexer", "router_gate"})
# Classes that make more of their input than a linear map, or another one for each part of it: a
# subclass with a forward of its own is left as it is, but for Falcon's, which adds the bias later.
PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
FALCON = "FalconLinear"


class Adapter:
    """The parts of a model that pruning needs.

    Attributes:
        model: the whole model.
        decoder: the module that runs the blocks, without a language-model head:
            `decoder(input_ids=..., attention_mask=..., use_cache=False)`.
        blocks, block_names: the decoder blocks in order, and their dotted paths in `model`.
        shared: names of the matrices that `linears` leaves out, because another module holds their
            parameter too: what is best for one is not for the other.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, blocks: list[nn.Module]) -> None:
        self.model = model
        self.decoder = decoder
        self.blocks = blocks
        names = {id(module): name for name, module in model.named_modules()}
        self.block_names = [names[id(block)] for block in blocks]
        shared = _shared_parameters(model, blocks)
        found = [list(_linears(*pair)) for pair in zip(blocks, self.block_names, strict=True)]
        self._prunable = found
        self._linears = [[ref for ref in refs if id(_owner(ref)) not in shared] for refs in found]
        self.shared = tuple(ref.name for refs in found for ref in refs if id(_owner(ref)) in shared)

    @classmethod
    def of(cls, model: nn.Module) -> Adapter:
        """Finds the parts of a transformers decoder (parameters may still be on `meta`).

        Raises:
            UserError: the architecture is not a decoder whose blocks and matrices are understood;
                the message names it and what could not be found.
        """
        name = type(model).__name__
        config: Any = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_decoder"):
            raise UserError(f"{name}: expected a transformers decoder model (with a config)")
        if has_encoder(config):
            raise UserError(f"{name}: expected a decoder-only language model, got an encoder")
        decoder = decoder_of(model)
        text_config = config.get_text_config()
        count = getattr(text_config, "num_hidden_layers", None)
        if not count:
            raise UserError(f"{name}: its configuration has no num_hidden_layers")
        path = BLOCK_PATHS.get(text_config.model_type)
        blocks = _find_blocks(name, decoder, count, path)
        adapter = cls(model, decoder, blocks)
        if not any(adapter._linears):
            raise UserError(f"{name}: found no linear maps in its {count} blocks")
        return adapter

    def linears(self, i: int) -> list[LinearRef]:
        """The prunable matrices of block `i` in definition order, without routers and what is
        `shared`."""
        return list(self._linears[i])

    def restricted(self, names: Collection[str]) -> Adapter:
        """The same model with only the matrices called `names` left to prune."""
        adapter = copy(self)
        adapter._linears = [
            [ref for ref in linears if ref.name in names] for linears in self._linears
        ]
        return adapter

    def left_alone(self) -> dict[str, int]:
        """What is no vector, no bias and no prunable matrix: routers, indexers, convolutions,
        parameters of a family's own. Names within a block, numbers in them as *, and how many of
        each there are."""
        found: dict[str, int] = {}
        taken = {id(_owner(ref)) for refs in self._prunable for ref in refs}
        for block in self.blocks:
            for name, parameter in block.named_parameters():
                if parameter.dim() > 1 and id(parameter) not in taken and "bias" not in name:
                    where = re.sub(r"\b\d+\b", "*", name)
                    found[where] = found.get(where, 0) + 1
        return found

    def experts(self, i: int) -> list[nn.Module]:
        """The modules of block `i` that hold fused experts."""
        return list(dict.fromkeys(r.module for r in self._linears[i] if r.index is not None))


def has_encoder(config: PretrainedConfig) -> bool:
    """Whether the model is an encoder (BERT and its kin), or has one (BART). transformers gives
    such a configuration a causal model too: one that reads the tokens it has to predict, or the
    decoder alone. A decoder that was saved as one says so in its configuration."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    encoder = masked and getattr(config, "is_decoder", None) is False
    return encoder or bool(getattr(config, "is_encoder_decoder", False))


def decoder_of(model: Any) -> nn.Module:
    """What `get_decoder()` returns; of a model that returns itself (Llama 4) the one transformers
    model in it, if there is one."""
    decoder: nn.Module = model.get_decoder()
    inner = [child for child in decoder.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if decoder is model and len(inner) == 1 else decoder


def _find_blocks(name: str, decoder: nn.Module, count: int, path: str | None) -> list[nn.Module]:
    if path is not None:
        return list(decoder.get_submodule(path).children())
    found: dict[str, nn.ModuleList] = {}
    for at, module in decoder.named_modules():
        nested = any(at.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not nested:
            found[at] = module
    if len(found) > 1:  # rotary embeddings hold no parameters
        found = {at: m for at, m in found.items() if any(True for _ in m.parameters())}
    if len(found) != 1:
        raise UserError(
            f"{name}: expected one list of {count} decoder blocks in {type(decoder).__name__}, "
            f"found {sorted(found) or 'none'}; the model's type needs an entry in "
            "pyprune.models.adapter.BLOCK_PATHS"
        )
    (blocks,) = found.values()
    if len({id(block) for block in blocks}) != count:
        raise UserError(f"{name}: its blocks share weights, which cannot be pruned one by one")
    return list(blocks)


def _owner(ref: LinearRef) -> Tensor:
    owner: Tensor = getattr(ref.module, ref.parameter)
    return owner


def _shared_parameters(model: nn.Module, blocks: list[nn.Module]) -> set[int]:
    """Identities of the parameters that live outside the blocks or in more than one module:
    embeddings, the head, and whatever is tied to them or to each other."""
    owners: dict[int, int] = {}
    outside: set[int] = set()
    within = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
            if id(module) not in within:
                outside.add(id(parameter))
    return outside | {key for key, count in owners.items() if count > 1}


def _linears(block: nn.Module, block_name: str) -> Iterator[LinearRef]:
    beside: list[str] = []
    for path, module in block.named_modules():
        name = f"{block_name}.{path}" if path else block_name
        if is_adapted(module):
            parts = [part for part, _ in module.named_children() if part != "base_layer"]
            beside += [f"{path}.{part}" for part in parts]
        if any(f"{path}.".startswith(f"{part}.") for part in beside):
            continue  # what peft has added: it is to be trained, or merged
        if isinstance(module, nn.Linear | Conv1D):
            if _is_linear_map(module) and not (_is_router(block, path) or _is_step(block, path)):
                _check_plain(name, module)
                yield LinearRef(name, module, "weight", transposed=isinstance(module, Conv1D))
        elif is_fused(module):
            for projection in projections(module):
                for e in range(expert_count(module)):
                    at, transposed = f"{name}.{projection}.{e}", is_transposed(module)
                    yield LinearRef(at, module, projection, index=e, transposed=transposed)
        else:
            _check_no_hidden_experts(name, path, module)


def is_computed(module: nn.Module) -> bool:
    """Whether the module's weight is made of other parameters at each call."""
    return "weight" not in module._parameters


def _is_linear_map(module: nn.Module) -> bool:
    kind = type(module)
    return kind.forward in PLAIN_FORWARDS or kind.__name__ == FALCON


def _is_router(block: nn.Module, path: str) -> bool:
    """Whether the module is a router or part of one, or of an indexer."""
    parts = path.split(".")
    if not STEERING.isdisjoint(parts):
        return True
    beside = [".".join(parts[:k]) for k, part in enumerate(parts) if part in ROUTERS]
    return any(hasattr(block.get_submodule(parent), "experts") for parent in beside)


def _is_step(block: nn.Module, path: str) -> bool:
    """Whether it makes the step sizes of a state space, which takes its weight and does not call
    it (Mamba's, in Jamba)."""
    parent, _, leaf = path.rpartition(".")
    return leaf == "dt_proj" and hasattr(block.get_submodule(parent), "A_log")


def _check_plain(name: str, module: nn.Module) -> None:
    if is_computed(module):
        raise UserError(
            f"{name}: expected a weight that is a parameter, got one that is computed before each "
            "use (torch.nn.utils.prune, weight_norm, a parametrization), where what is written to "
            "it would be lost: make it a parameter first (prune.remove, remove_parametrizations)"
        )
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UserError(
            f"{name}: expected a floating point matrix, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}; load the model without quantisation"
        )


def _check_no_hidden_experts(name: str, path: str, module: nn.Module) -> None:
    """Refuses what would otherwise be skipped in silence: experts stored in an unknown way."""
    fused = [key for key, p in module.named_parameters(recurse=False) if p.dim() == 3]
    one_by_one = path.rpartition(".")[2] == "experts"
    if one_by_one or (fused and not isinstance(module, nn.Conv1d | nn.Conv2d)):
        if fused:
            held = f"3-D parameters {', '.join(fused)}"
        else:
            listed = isinstance(module, nn.ModuleList | nn.ModuleDict)
            held = "one module per expert" if listed else "modules inside"
        raise UserError(
            f"{name}: unknown layout of experts in {type(module).__name__} ({held}); skipped in "
            "silence they would stay dense. Known are those that transformers runs by "
            "use_experts_implementation, as it does most families' (pyprune.models.experts): use a "
            "release of transformers that does so with this one, or leave the model as it is"
        )
