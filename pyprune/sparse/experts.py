"""`SparseExperts`: a mixture's experts, each a few compressed linear layers of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# What the projections of an expert are called in checkpoints: gate, up, down.
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class SparseExperts(nn.Module):
    """Stands for transformers' fused experts (`pyprune.models.experts.FUSED_EXPERTS`): experts that
    no token was routed to are not touched.

    experts: by number, each with its three projections under one of the PROJECTIONS' names. They
    become submodules `<number>.<projection>`, named as in checkpoints.
    """

    def __init__(
        self, experts: list[dict[str, nn.Module]], act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn = len(experts), act_fn
        self.projections = next(names for names in PROJECTIONS if names[0] in experts[0])
        for number, expert in enumerate(experts):
            self.add_module(str(number), nn.ModuleDict(expert))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[tokens, H]`; top_k_index, top_k_weights `[tokens, k]`: the experts of
        each token and their shares. Returns `[tokens, H]`."""
        out = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            rows, position = torch.where(top_k_index == number)
            if not len(rows):
                continue
            expert = self.get_submodule(str(number))
            gate, up, down = (expert.get_submodule(name) for name in self.projections)
            state = hidden_states[rows]
            state = down(self.act_fn(gate(state)) * up(state))
            state = state * top_k_weights[rows, position, None]
            out.index_add_(0, rows, state.to(out.dtype))
        return out
