"""vLLM's linear layers with stored weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from pyprune.errors import UserError
from pyprune.integrations.vllm.weights import (
    WEIGHT,
    Arrivals,
    Parts,
    Piece,
    empty_weight,
    own_piece,
)
from pyprune.sparse.layout import LayerFormat
from pyprune.sparse.linear import SparseLinear
from pyprune.sparse.slices import alike, stack_rows


class Output(NamedTuple):
    """Rows of one of the weights that vLLM makes one: how many there are in all, and which of them
    this process has."""

    total: int
    start: int
    rows: int


# Those whose rows and columns are known, the more special first.
KINDS: tuple[type[LinearBase], ...] = (
    QKVParallelLinear, MergedColumnParallelLinear, ColumnParallelLinear, RowParallelLinear,
    ReplicatedLinear,
)  # fmt: skip


def outputs_of(layer: LinearBase) -> dict[Hashable, Output]:
    """What a layer's output consists of, in its order, by the keys that its loader has for that.
    Raises UserError for a kind of layer that is not known."""
    kind, rank = _loads_like(layer), layer.tp_rank
    if kind is QKVParallelLinear:
        shared = rank // layer.num_kv_head_replicas  # keys and values that several processes have
        heads = {
            "q": (layer.total_num_heads, layer.num_heads, layer.head_size, rank),
            "k": (layer.total_num_kv_heads, layer.num_kv_heads, layer.head_size, shared),
            "v": (layer.total_num_kv_heads, layer.num_kv_heads, layer.v_head_size, shared),
        }
        return {
            key: Output(total * size, at * own * size, own * size)
            for key, (total, own, size, at) in heads.items()
        }
    if kind in (RowParallelLinear, ReplicatedLinear):
        return {None: Output(layer.output_size, 0, layer.output_size)}
    merges = kind is MergedColumnParallelLinear
    sizes = dict(enumerate(layer.output_sizes)) if merges else {None: layer.output_size}
    parts = layer.tp_size
    return {key: Output(size, rank * (size // parts), size // parts) for key, size in sizes.items()}


def _loads_like(layer: LinearBase) -> type[LinearBase]:
    """The known class whose way of putting tensors into a layer is this one's. Raises UserError if
    there is none."""
    own = type(layer)
    for kind in KINDS:
        if issubclass(own, kind) and own.weight_loader is kind.weight_loader:
            return kind
    raise UserError(f"{layer.prefix}: {own.__name__}: not known to have compressed weights")


class StoredLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """`y = x W^T + bias` where W, or some of the weights that are one below the other in W, are
    stored.

    Args:
        prefix: the layer's name.
        sources: the weights of the checkpoint that W consists of, in their order, and how each is
            stored (None: dense).
    """

    def __init__(self, prefix: str, sources: Mapping[str, LayerFormat | None]) -> None:
        self.prefix, self.sources = prefix, dict(sources)

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self._columns, self._dtype = input_size_per_partition, params_dtype
        outputs_of(layer)  # what cannot be served is refused before anything is read
        self._arrivals = Arrivals(layer, self.sources.values(), params_dtype, _key)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        weights, device = self._arrivals.finish(layer)
        pieces = merged(self._pieces(layer, weights, device))
        bias = _own_bias(layer)
        rows = [_rows(piece) for piece in pieces]
        biases = [None] * len(rows) if bias is None else torch.split(bias, rows)
        layer.stored = nn.ModuleList(
            module_of(piece, shift, self._dtype)
            for piece, shift in zip(pieces, biases, strict=True)
        )
        self._has_bias = bias is not None
        layer.weight = empty_weight(device, self._dtype)

    def _pieces(
        self, layer: LinearBase, weights: dict[Hashable, Parts], device: torch.device
    ) -> Iterator[Piece]:
        """What this process has of each weight, in the order of the output."""
        outputs = outputs_of(layer)
        order = list(outputs)
        # One tensor may have several outputs, or all.
        spans = {
            key: order if key is None else list(key) if isinstance(key, tuple) else [key]
            for key in weights
        }
        keys = sorted(weights, key=lambda key: order.index(spans[key][0]))
        if list(chain.from_iterable(spans[key] for key in keys)) != order:
            raise UserError(
                f"{self.prefix}: expected {', '.join(self.sources)} in the checkpoint, got tensors "
                f"of {len(keys)} of them"
            )
        for (name, source), key in zip(self.sources.items(), keys, strict=True):
            wanted = [outputs[one] for one in spans[key]]
            parts = weights.pop(key)
            shape = (sum(o.total for o in wanted), layer.input_size)
            width = self._columns
            left = layer.tp_rank * width if isinstance(layer, RowParallelLinear) else 0
            first = 0
            for output in wanted:
                start = first + output.start
                rows, columns = (start, start + output.rows), (left, left + width)
                own, taken = own_piece(name, source, parts, shape, rows, columns)
                yield own, self._arrivals.placed(taken, device)
                first += output.total

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The layer's own bias is in the modules; vLLM passes no other.
        assert (bias is not None) == self._has_bias
        given = [module(x) for module in layer.stored]
        return given[0] if len(given) == 1 else torch.cat(given, dim=-1)


def _key(shard: Hashable = None) -> Hashable:
    return shard


def _own_bias(layer: LinearBase) -> Tensor | None:
    """The bias that the layer passes to `apply`: what products are summed over several processes
    gets it once."""
    bias: Tensor | None = layer.bias
    elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    return None if bias is None or layer.skip_bias_add or elsewhere else bias.detach()


def _rows(piece: Piece) -> int:
    source, parts = piece
    return len(parts[WEIGHT]) if source is None else source.shape[0]


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces, those that follow one another in one format as one: one product instead of
    several."""
    runs: list[list[Piece]] = []
    for source, parts in pieces:
        if runs and _same(source, runs[-1][0][0]):
            runs[-1].append((source, parts))
        else:
            runs.append([(source, parts)])
    return [_joined(run) for run in runs]


def _same(one: LayerFormat | None, other: LayerFormat | None) -> bool:
    return one is other if one is None or other is None else alike(one, other)


def _joined(run: list[Piece]) -> Piece:
    stored = [(source, parts) for source, parts in run if source is not None]
    if stored:
        return stack_rows(stored)
    return None, {WEIGHT: torch.cat([parts[WEIGHT] for _, parts in run])}


def module_of(piece: Piece, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The layer that multiplies with a piece, and adds `bias`."""
    source, parts = piece
    if source is not None:
        return SparseLinear.of_parts(source, parts, bias, dtype=dtype).eval()
    rows, cols = parts[WEIGHT].shape
    dense = nn.Linear(cols, rows, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(parts[WEIGHT], requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense
