"""The configuration of a DeciLM model (NVIDIA's nemotron-nas): a Llama whose layers differ.

transformers has no such class, and vLLM asks the checkpoint for one: pyprune puts a copy of this
file into every DeciLM directory that it writes. So it imports nothing of pyprune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlamaConfig


class Fields(dict[str, Any]):
    """A JSON object whose entries are attributes too, as vLLM reads them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciConfig(LlamaConfig):  # type: ignore[misc]
    """block_configs: for each layer what its attention is (no_op, n_heads_in_group: query heads
    that share a key-value head) and its MLP (no_op, ffn_mult: 2/3 of it times hidden_size, rounded
    up to a multiple of 256, is its width). All else is a Llama's."""

    model_type = "nemotron-nas"

    def __init__(
        self, block_configs: Sequence[Mapping[str, Mapping[str, Any]]] = (), **fields: Any
    ) -> None:
        super().__init__(**fields)
        self.block_configs = [
            Fields({part: Fields(values) for part, values in block.items()})
            for block in block_configs
        ]
