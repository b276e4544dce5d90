"""Mixture-of-experts blocks whose experts live in fused 3-D parameters.

transformers 5 stores all experts of a block in `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]`.
There is no module per expert to hook, so while statistics are collected the experts module computes
its output here, where the input of every expert's matrices can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyprune.models.running import replaced_forward

# Classes whose eager forward is the one below (a gate and an up half in one matrix, no biases). A
# similar looking class may interleave the halves or clamp the gate, so each is listed once checked.
FUSED_EXPERTS = frozenset({"MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts"})
PROJECTIONS = ("gate_up_proj", "down_proj")


class ExpertInput(NamedTuple):
    """What one expert's matrix reads: `x [t, C]`, from those `rows [t]` of the `tokens` seen by the
    module that were routed to it (possibly none)."""

    expert: int
    x: Tensor
    rows: Tensor
    tokens: int


Observer = Callable[[nn.Module, str, list[ExpertInput]], None]
# An expert, and its hidden channels [t, I] to what `down_proj` reads in their place.
Hidden = Callable[[int, Tensor], Tensor]
# Module, projection, what one expert's matrix read, and its output [t, R].
OutputObserver = Callable[[nn.Module, str, ExpertInput, Tensor], None]


def expert_count(experts: nn.Module) -> int:
    parameter: Tensor = getattr(experts, PROJECTIONS[0])
    return parameter.shape[0]


def observed_forward(
    experts: nn.Module,
    observe: Observer,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    produced: OutputObserver | None = None,
    hidden: Hidden | None = None,
) -> Tensor:
    """What the module's eager forward computes, bit for bit, one projection of all experts after
    the other.

    `observe(experts, projection, inputs)` is called before each projection with the inputs of all
    experts; it may change the weights, which are read afterwards.

    Args:
        hidden_states: `[tokens, H]`.
        top_k_index, top_k_weights: `[tokens, k]`, the experts of each token and their shares.
        produced: called after each expert's matrix, with its input and output.
        hidden: what happens to each expert's hidden channels before `down_proj`; differentiable.

    Returns:
        `[tokens, H]`.
    """
    chosen, tokens = top_k_index.T, len(hidden_states)
    # Per expert (position among the k, token), ordered by position: the order of the eager forward.
    routes = [torch.where(chosen.eq(e)) for e in range(expert_count(experts))]
    states = [hidden_states[rows] for _, rows in routes]
    states = _project(experts, observe, PROJECTIONS[0], states, routes, tokens, produced)
    for e, state in enumerate(states):
        gate, up = state.chunk(2, dim=-1)
        states[e] = experts.act_fn(gate) * up  # type: ignore[operator]
        states[e] = states[e] if hidden is None else hidden(e, states[e])
    states = _project(experts, observe, PROJECTIONS[1], states, routes, tokens, produced)
    out = torch.zeros_like(hidden_states)
    for (position, rows), state in zip(routes, states, strict=True):
        if len(rows):
            state = state * top_k_weights[rows, position, None]
            out.index_add_(0, rows, state.to(out.dtype))
    return out


def _project(
    experts: nn.Module,
    observe: Observer,
    projection: str,
    states: list[Tensor],
    routes: list[tuple[Tensor, ...]],
    tokens: int,
    produced: OutputObserver | None,
) -> list[Tensor]:
    """Every expert's `states[e] @ W[e].T`; lets go of each input as soon as it was used."""
    pairs = zip(states, routes, strict=True)
    observe(
        experts, projection, [ExpertInput(e, x, r[1], tokens) for e, (x, r) in enumerate(pairs)]
    )
    weight: Tensor = getattr(experts, projection)
    for e in range(len(states)):
        x, states[e] = states[e], F.linear(states[e], weight[e])
        if produced is not None:
            produced(experts, projection, ExpertInput(e, x, routes[e][1], tokens), states[e])
    return states


@contextmanager
def observed(
    experts: nn.Module,
    observe: Observer,
    produced: OutputObserver | None = None,
    hidden: Hidden | None = None,
) -> Iterator[None]:
    """Within the context `experts(...)` runs `observed_forward`; restored on the way out."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return observed_forward(
            experts, observe, hidden_states, top_k_index, top_k_weights, produced, hidden
        )

    with replaced_forward(experts, forward):
        yield
