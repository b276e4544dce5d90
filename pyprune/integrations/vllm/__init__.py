"""vLLM serves what `pyprune compress` wrote: `vllm serve DIR`, or `vllm.LLM(DIR)`.

Nothing has to be imported or named: vLLM calls `register` in each of its processes, by the entry
point "vllm.general_plugins" of the installed package, and reads in config.json that the method is
"pyprune". What is stored compressed stays so in memory and is multiplied by the kernels of
`pyprune.ops`; what is not listed there is vLLM's own. Layers that vLLM makes one (q, k and v; gate
and up) are one product where their formats are alike. Of a mixture of experts only those that a
token was routed to are touched, and CUDA graphs are refused (`experts.py`). Tensor parallelism
takes rows or columns of the stored weights (`pyprune.sparse.slices`).

This package imports vLLM, and nothing else of pyprune imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from pyprune.errors import UserError
from pyprune.integrations.vllm.embedding import StoredEmbeddingMethod, TiableHeadMethod
from pyprune.integrations.vllm.experts import StoredExpertsMethod
from pyprune.integrations.vllm.linear import StoredLinearMethod
from pyprune.sparse.format import METHOD, parse_quantization_config
from pyprune.sparse.layout import FACTORED, FORMATS, LayerFormat

CONFIG = "config.json: quantization_config"
# What checkpoints call the head.
HEADS = ("lm_head", "embed_out")
# Families whose query_key_value has its rows head by head, which vLLM's loaders undo.
REORDERING = ("bloom", "falcon")
# What vLLM makes one under these names, which some of its models do not say of themselves
# (Qwen3-MoE's of its layers without experts).
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
DECOMPRESS = "`pyprune decompress DIR --out DENSE` writes what vLLM runs without pyprune"


class PyPruneVLLMConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a compressed checkpoint (docs/format.md), as vLLM asks it.

    Args:
        layers: the stored weights by the names that they have in the checkpoint.
    """

    def __init__(self, layers: Mapping[str, LayerFormat]) -> None:
        super().__init__()
        self.layers = dict(layers)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PyPruneVLLMConfig:
        """Raises UserError for what this version of the format does not describe, and for thin
        factors and stacked experts, which vLLM has no layers for."""
        layers = parse_quantization_config(config, CONFIG)
        for name, layer in layers.items():
            if layer.format == FACTORED or layer.stacked:
                kind = FACTORED if layer.format == FACTORED else "stacked experts"
                raise UserError(f"{CONFIG}: layer {name}: {kind}: not for vLLM; {DECOMPRESS}")
        return cls(layers)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # what the kernels are compiled for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of the checkpoint to those of vLLM's model."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def sources(self, prefix: str) -> dict[str, LayerFormat | None]:
        """The weights of the checkpoint that the module `prefix` is made of, in their order: its
        own, or those that vLLM makes one. None: stored dense."""
        if prefix in self.layers:
            return {prefix: self.layers[prefix]}
        parent, _, name = prefix.rpartition(".")
        parts = (PACKED | self.packed_modules_mapping).get(name, ())
        names = [f"{parent}.{part}" if parent else part for part in parts]
        return {name: self.layers.get(name) for name in names}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        sources = self.sources(prefix)
        stored = any(source is not None for source in sources.values())
        if isinstance(layer, LinearBase):
            if not stored:
                return UnquantizedLinearMethod()
            _refuse_reordered(prefix, sources)
            return StoredLinearMethod(prefix, sources)
        if isinstance(layer, VocabParallelEmbedding):
            head = isinstance(layer, ParallelLMHead)
            name = prefix if prefix or head else self._input_embedding(layer)
            if name in self.layers:
                return StoredEmbeddingMethod(name, self.layers[name])
            return TiableHeadMethod() if head else None
        if any(name.startswith(f"{prefix}.") for name in self.layers):
            if isinstance(layer, RoutedExperts):
                return StoredExpertsMethod(layer, prefix, self.layers)
            raise UserError(f"{prefix}: {type(layer).__name__}: not for vLLM; {DECOMPRESS}")
        return None

    def _input_embedding(self, layer: VocabParallelEmbedding) -> str:
        """The stored weight of an embedding that vLLM does not tell the name of (Llama's), "" if
        there is none: the one of its shape that is no head, in a format of embeddings."""
        shape = (layer.org_vocab_size, layer.embedding_dim)
        fitting = [
            name
            for name, source in self.layers.items()
            if source.shape == shape
            and source.format not in FORMATS
            and name.rpartition(".")[2] not in HEADS
        ]
        return fitting[0] if len(fitting) == 1 else ""


def _refuse_reordered(prefix: str, sources: Mapping[str, LayerFormat | None]) -> None:
    """Raises UserError for a bitmap whose rows vLLM puts into another order as it reads them: every
    tensor of 2:4 has as many rows, a bitmap's values have not."""
    config = get_current_vllm_config().model_config.hf_config
    reordered = config.model_type in REORDERING and prefix.endswith(".query_key_value")
    if reordered and any(s is not None and s.format == "bitmap" for s in sources.values()):
        raise UserError(
            f"{prefix}: bitmap: vLLM reorders the rows of {config.model_type}'s, which 2:4 alone "
            f"allows; {DECOMPRESS}"
        )


def register() -> None:
    """Makes "pyprune" a quantization method of vLLM's in this process; any number of times."""
    register_quantization_config(METHOD)(PyPruneVLLMConfig)
