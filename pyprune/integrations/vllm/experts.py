"""vLLM's mixtures of experts with stored weights.

A layer's experts are here as many small ones, each with products of its own, and only those that a
token was routed to are touched. Which these are the host has to know: on a GPU it waits for that
once a layer, so nothing of it can be in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from pyprune.errors import UserError
from pyprune.integrations.vllm.linear import merged, module_of
from pyprune.integrations.vllm.weights import ELSEWHERE, Arrivals, Parts, own_piece
from pyprune.models.experts import sorted_by_expert
from pyprune.sparse.experts import GATED
from pyprune.sparse.layout import LayerFormat

# What vLLM calls an expert's matrices: gate, up, down. Where there is no gate, up is the first.
GATE, UP, DOWN = SHARDS = ("w1", "w3", "w2")
# What vLLM's activations raise where they are not built, or do not take a width: it has no name.
ERRORS = (AssertionError, AttributeError, RuntimeError, TypeError, ValueError)
# A matrix: which expert's, and which of SHARDS.
Place = tuple[int, str]


def expert_names(layer: RoutedExperts, prefix: str, stored: Iterable[str]) -> dict[Place, str]:
    """What the checkpoint calls the matrices of the experts `prefix`. Raises UserError if there are
    names in `stored` below `prefix` that are none of theirs."""
    below = {name for name in stored if name.startswith(f"{prefix}.")}
    own = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    # Some models' loaders know other names than the layer was told.
    kinds = (own, *GATED) if layer.moe_config.is_act_and_mul else (own,)
    count = layer.moe_config.num_experts
    for kind in kinds:
        names = {
            (expert, shard): f"{prefix}.{expert}.{name}"
            for expert in range(count)
            for shard, name in zip(SHARDS, kind, strict=True)
            if name is not None
        }
        if below <= set(names.values()):
            return names
    raise UserError(
        f"{prefix}: expected layers of {count} experts called "
        f"{' or '.join(', '.join(name for name in kind if name) for kind in dict.fromkeys(kinds))}"
        f", got {', '.join(sorted(below)[:3])}"
    )


class Expert(nn.Module):
    """The layers of one expert: `first`, one or two, that make the hidden channels, and `last`."""

    def __init__(self, first: Iterable[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.ModuleList(first), last


class StoredExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """What a mixture's experts make of the tokens routed to them, some or all of their matrices
    being stored.

    Args:
        layer: the experts.
        prefix: their name.
        stored: how weights of the checkpoint are stored, by their names; the experts' others are
            dense.

    Raises:
        UserError: what is not done here: biases, load balancing that moves experts, shared experts
            among the others, CUDA graphs.
    """

    def __init__(
        self, layer: RoutedExperts, prefix: str, stored: Mapping[str, LayerFormat]
    ) -> None:
        super().__init__(layer.moe_config)
        self.prefix = prefix
        self.names = expert_names(layer, prefix, stored)
        self.sources = {place: stored.get(name) for place, name in self.names.items()}
        if self.moe.has_bias:
            raise UserError(f"{prefix}: compressed: expected experts without biases")
        if self.moe.moe_parallel_config.enable_eplb:
            raise UserError(f"{prefix}: compressed: cannot be moved by EPLB; leave --enable-eplb")
        if layer.expert_map_manager.num_fused_shared_experts:
            raise UserError(f"{prefix}: compressed: expected shared experts as layers of their own")
        refuse_graphs(prefix)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        if hidden_size != self.moe.hidden_dim_unpadded:
            backend = self.moe.moe_parallel_config.all2all_backend
            raise UserError(
                f"{self.prefix}: compressed: {backend} wants {hidden_size} channels instead of "
                f"{self.moe.hidden_dim_unpadded}; choose another --all2all-backend"
            )
        self._local = {
            expert: layer.expert_map_manager.map_global_to_local(expert)
            for expert in range(self.moe.num_experts)
        }
        self._channels, self._dtype = intermediate_size_per_partition, params_dtype
        quantized = self.get_fused_moe_quant_config(layer)
        self._activation = ApplyMoEActivationConfig.from_configs(self.moe, quantized)
        self._try_activation()
        self._first = self._arrivals(layer, "w13_", GATE, UP)
        self._last = self._arrivals(layer, "w2_", DOWN)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """What is special about the activation; nothing is quantized in vLLM's sense."""
        return FusedMoEQuantConfig.make(
            gemm1_alpha=layer.swiglu_alpha,
            gemm1_beta=layer.swiglu_beta,
            gemm1_clamp_limit=layer.swiglu_limit,
        )

    def _try_activation(self) -> None:
        """Raises UserError where vLLM cannot compute the activation: which it can differs between
        platforms, and some take certain widths alone."""
        kind, width = self.moe.activation, self._channels
        what = f"{self.prefix}: compressed: activation {kind.value} of {width} channels"
        if kind is MoEActivation.SWIGLUOAI:
            raise UserError(f"{what}: takes gates that alternate with what they multiply")
        rows = 2 * width if kind.is_gated else width
        first = torch.zeros(1, rows, dtype=self._dtype, device=self.moe.device)
        try:
            self._activated(first)
        except ERRORS as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{what}: not for vLLM on this platform: {reason}") from error

    def _arrivals(self, layer: RoutedExperts, prefix: str, *shards: str) -> Arrivals:
        sources = [source for (_, shard), source in self.sources.items() if shard in shards]
        return Arrivals(layer, sources, self._dtype, self._place, prefix)

    def _place(
        self, weight_name: str, shard_id: str, expert_id: int, return_success: bool = False
    ) -> Place | object:
        """Where a tensor belongs that vLLM's loader says this about."""
        return ELSEWHERE if self._local[expert_id] < 0 else (expert_id, shard_id)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        weights, device = self._first.finish(layer)
        weights |= self._last.finish(layer)[0]
        here = sorted((local, expert) for expert, local in self._local.items() if local >= 0)
        layer.stored = nn.ModuleList(
            self._expert(expert, weights, device) for _, expert in here
        ).eval()

    def _expert(self, expert: int, weights: dict[Any, Parts], device: torch.device) -> Expert:
        """What this process has of one expert, taken out of `weights`."""
        tp, hidden = self.moe.moe_parallel_config, self.moe.hidden_dim
        start, count = tp.tp_rank * self._channels, tp.tp_size * self._channels
        own, all_hidden = (start, start + self._channels), (0, hidden)
        pieces = []
        for shard in SHARDS:
            place = (expert, shard)
            if place in self.names:
                last = shard == DOWN
                source, parts = own_piece(
                    self.names[place],
                    self.sources[place],
                    weights.pop(place, {}),
                    (hidden, count) if last else (count, hidden),
                    all_hidden if last else own,
                    own if last else all_hidden,
                )
                pieces.append((source, self._first.placed(parts, device)))
        first = [module_of(piece, None, self._dtype) for piece in merged(pieces[:-1])]
        return Expert(first, module_of(pieces[-1], None, self._dtype))

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """`[T, H]`, this process's share of what the routed experts make of `x [T, H]`.

        Shared experts are not run here: vLLM's runner does that, before or beside, for a method
        without a kernel of vLLM's (`mk_can_overlap_shared_experts`).

        Args:
            topk_weights, topk_ids: `[T, k]`, float and integer.
        """
        if torch.compiler.is_compiling():  # on CPUs vLLM has no operator of its own around this
            given: Tensor = routed_experts_op(x, topk_weights, topk_ids, layer.layer_name)
            return given
        return self.run(layer, x, topk_weights, topk_ids)

    def run(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
    ) -> Tensor:
        """See `apply`. Summed in fp32, as vLLM's kernels do."""
        if layer.apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise UserError(
                    f"{self.prefix}: expected one expert a token where its share is applied to the "
                    "input"
                )
            x = x * topk_weights.to(x.dtype)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        order, starts = sorted_by_expert(_local_ids(layer.expert_map, topk_ids), len(layer.stored))
        tokens, shares = order % max(1, len(x)), topk_weights.T.flatten()[order].float()
        for expert, (start, stop) in enumerate(pairwise(starts)):
            if start < stop:
                rows = tokens[start:stop]
                y = self._one(layer.stored[expert], x[rows]).float()
                if not layer.apply_router_weight_on_input:
                    y *= shares[start:stop, None]
                out.index_add_(0, rows, y)
        return out.to(x.dtype)

    def _one(self, expert: Expert, x: Tensor) -> Tensor:
        given = [module(x) for module in expert.first]
        first = given[0] if len(given) == 1 else torch.cat(given, dim=-1)
        y: Tensor = expert.last(self._activated(first))
        return y

    def _activated(self, first: Tensor) -> Tensor:
        """The hidden channels `[t, I]` of what the first layers give: gates, then what these
        multiply. May overwrite that."""
        hidden = first.new_empty(len(first), self._channels)
        apply_moe_activation(self.moe.activation, hidden, first, activation_config=self._activation)
        return hidden


def _local_ids(expert_map: Tensor | None, ids: Tensor) -> Tensor:
    """The numbers that experts have in this process, negative for those elsewhere and for none."""
    ids = ids.long()
    if expert_map is None:
        return ids
    return torch.where(ids < 0, ids, expert_map[ids.clamp(min=0)].long())


def refuse_graphs(prefix: str) -> None:
    """Raises UserError where vLLM would put the experts `prefix` into CUDA graphs."""
    mode = get_current_vllm_config().compilation_config.cudagraph_mode
    if current_platform.is_cuda_alike() and mode != CUDAGraphMode.NONE:
        raise UserError(
            f"{prefix}: compressed experts cannot be in CUDA graphs; pass --enforce-eager"
        )


@torch.library.custom_op("pyprune::vllm_routed_experts", mutates_args=())
def routed_experts_op(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    """`StoredExpertsMethod.run` for the experts that vLLM calls `name`: what a compiler leaves as
    it is, for it depends on the tokens."""
    layer = get_forward_context().no_compile_layers[name].routed_experts
    y: Tensor = layer.quant_method.run(layer, x, topk_weights, topk_ids)
    return y


@routed_experts_op.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
