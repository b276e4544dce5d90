"""vLLM's embeddings and heads with stored rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from pyprune.errors import UserError
from pyprune.integrations.vllm.weights import Arrivals, check_parts, empty_weight
from pyprune.sparse.embedding import StoredEmbedding
from pyprune.sparse.layout import FORMATS, LayerFormat
from pyprune.sparse.linear import SparseLinear
from pyprune.sparse.slices import take_rows


class StoredEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Looks up rows of a stored weight, and multiplies with it as a head does.

    Args:
        prefix: the layer's name, which is that of its weight in the checkpoint.
        source: how it is stored.
    """

    def __init__(self, prefix: str, source: LayerFormat) -> None:
        self.prefix, self.source = prefix, source

    def create_weights(
        self, layer: VocabParallelEmbedding, *sizes: Any, params_dtype: torch.dtype, **extra: Any
    ) -> None:
        if layer.num_added_embeddings:
            raise UserError(f"{self.prefix}: compressed: expected no entries beside its own")
        self._dtype = params_dtype
        self._arrivals = Arrivals(layer, [self.source], params_dtype, key=lambda: None)

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        weights, device = self._arrivals.finish(layer)
        parts, source = weights.get(None, {}), self.source
        width = layer.embedding_dim
        check_parts(self.prefix, source, parts, (layer.org_vocab_size, width))
        own = layer.shard_indices
        start, stop = own.org_vocab_start_index, own.org_vocab_end_index
        placed = self._arrivals.placed(take_rows(source, parts, start, stop), device)
        rows = stop - start
        own_rows = LayerFormat(source.format, (rows, width), source.int8)
        head = SparseLinear.of_parts(own_rows, placed, dtype=self._dtype).eval()
        layer.stored = head
        if source.format not in FORMATS:  # which no embedding has, but a head may
            layer.rows = StoredEmbedding(
                rows, width, source.format, dtype=self._dtype, device="meta", tied_to=head
            ).eval()

        layer.weight = empty_weight(device, self._dtype)

    def embedding(self, layer: VocabParallelEmbedding, ids: Tensor) -> Tensor:
        rows: Tensor = layer.rows(ids)
        return rows

    def apply(self, layer: VocabParallelEmbedding, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., entries]` of `x [..., C]`, with zeros for the entries that vLLM adds to have a
        round number."""
        y: Tensor = layer.stored(x)
        added = layer.num_embeddings_per_partition - y.shape[-1]
        y = nn.functional.pad(y, (0, added)) if added else y
        return y if bias is None else y + bias

    def tie_weights(self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        raise UserError(
            f"{self.prefix}: expected no weight of its own, the configuration ties it to the "
            "embedding's"
        )


class TiableHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """A head without a stored weight of its own. It may get the embedding's."""

    def tie_weights(self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        if not isinstance(embed_tokens.quant_method, StoredEmbeddingMethod):
            tied: nn.Module = super().tie_weights(layer, embed_tokens)
            return tied
        del layer.weight
        layer.quant_method = _TiedHeadMethod(embed_tokens)
        own: nn.Module = layer
        return own


class _TiedHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Multiplies with the rows of a stored embedding."""

    def __init__(self, embedding: VocabParallelEmbedding) -> None:
        self._embedding = embedding

    def create_weights(self, layer: nn.Module, *sizes: Any, **extra: Any) -> None:
        raise AssertionError("a tied head has none")

    def apply(self, layer: ParallelLMHead, x: Tensor, bias: Tensor | None = None) -> Tensor:
        embedding = self._embedding
        y: Tensor = embedding.quant_method.apply(embedding, x, bias)
        return y
