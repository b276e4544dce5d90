"""Mixture-of-experts blocks whose experts live in fused 3-D parameters.

transformers 5 stores all experts of a block in `gate_up_proj [E, 2I, H]` (or `up_proj [E, I, H]`)
and `down_proj [E, H, I]`. There is no module per expert to hook, so while statistics are collected
the experts module computes its output here, where the input of every expert's matrices can be seen.

Which modules these are is no matter of names. transformers runs an experts class with any of its
implementations (grouped, batched, eager) by a few attributes that its decorator
`use_experts_implementation` puts on it: whether there is a gate, whether there are biases, whether
matrices are stored inputs by outputs, what makes one hidden channel of gate and up
(`_apply_gate`, which may interleave or clamp them), whether a norm follows. What they say is what
is computed here. Two classes without them are known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyprune.models.running import replaced_forward

DOWN = "down_proj"
# Classes that are not decorated: LongCat's, called like those that are, whose last "experts" give
# back what they get; and Llama 4's, which is given all tokens once for every expert, in order of
# the experts, those not routed to it as zeros.
LONGCAT, LLAMA4 = "LongcatFlashExperts", "Llama4TextExperts"
# Of a class whose gate and up rows alternate; transformers 5.6 does not say it.
GPT_OSS = "GptOssExperts"


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


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds fused experts that are understood: all its parameters are the
    projections and biases that its attributes speak of."""
    decorated = all(hasattr(module, key) for key in ("has_gate", "has_bias", "is_transposed"))
    if not decorated and type(module).__name__ not in (LONGCAT, LLAMA4):
        return False
    matrices = set(projections(module))
    biases = {f"{name}_bias" for name in matrices} if has_bias(module) else set()
    own = dict(module.named_parameters(recurse=False))
    return own.keys() == matrices | biases and all(own[name].dim() == 3 for name in matrices)


def has_gate(experts: nn.Module) -> bool:
    """Whether a hidden channel is made of two rows of the first projection, gate and up."""
    return bool(getattr(experts, "has_gate", True))


def has_bias(experts: nn.Module) -> bool:
    """Whether each projection has a bias `<projection>_bias [E, R]`."""
    return bool(getattr(experts, "has_bias", False))


def is_transposed(experts: nn.Module) -> bool:
    """Whether the projections are stored `[E, C, R]`, inputs by outputs."""
    return bool(getattr(experts, "is_transposed", type(experts).__name__ == LLAMA4))


def is_interleaved(experts: nn.Module) -> bool:
    """Whether gate and up rows alternate, rather than all gates coming first."""
    return not getattr(experts, "is_concatenated", type(experts).__name__ != GPT_OSS)


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of the two parameters: what the hidden channels are made with, and of what."""
    return ("gate_up_proj" if has_gate(experts) else "up_proj"), DOWN


def expert_count(experts: nn.Module) -> int:
    parameter: Tensor = getattr(experts, DOWN)
    return parameter.shape[0]


def gate_rows(experts: nn.Module) -> Tensor:
    """int64 [I, 1 or 2]: the rows of the first projection that each hidden channel is made of."""
    units = getattr(experts, DOWN).shape[1 if is_transposed(experts) else 2]
    halves = 2 if has_gate(experts) else 1
    rows = torch.arange(halves * units)
    if is_interleaved(experts):
        return rows.view(units, halves)
    return rows.view(halves, units).T.contiguous()


def observed_forward(
    experts: nn.Module,
    observe: Observer | None,
    *given: Tensor,
    produced: OutputObserver | None = None,
    hidden: Hidden | None = None,
) -> Tensor:
    """What the module's eager forward computes, one projection of all experts after the other; the
    same bits where that sums the experts' outputs in the dtype of its input, as almost all do.

    `observe(experts, projection, inputs)` is called before each projection with the inputs of all
    experts; it may change the weights, which are read afterwards.

    Args:
        given: hidden states `[tokens, H]`; and `[tokens, k]`, the experts of each token and their
            shares. Llama 4 is given `[E tokens, H]` and nothing more.
        produced: called after each expert's matrix, with its input and output.
        hidden: what happens to each expert's hidden channels before `down_proj`; differentiable.

    Returns:
        Of the shape of the hidden states.
    """

    def compute(states: list[Tensor], rows: list[Tensor], tokens: int) -> list[Tensor]:
        return _experts(experts, observe, states, rows, tokens, produced, hidden)

    return run_experts(experts, expert_count(experts), compute, *given)


# The states that each expert reads, the rows that these are of the tokens, and how many tokens
# there are, to what the experts make of them.
Compute = Callable[[list[Tensor], list[Tensor], int], list[Tensor]]


def run_experts(experts: nn.Module, count: int, compute: Compute, *given: Tensor) -> Tensor:
    """Deals the tokens out to the `count` experts and adds up what `compute` makes of them.

    given: see `observed_forward`.
    """
    hidden_states, *routing = given
    if routing:
        return _routed(experts, count, compute, hidden_states, *routing)
    per_expert = hidden_states.view(count, -1, hidden_states.shape[-1])
    # No expert has a bias: zeros in, zeros out.
    rows = [torch.where(x.ne(0).any(dim=1))[0] for x in per_expert]
    states = [x[r] for x, r in zip(per_expert, rows, strict=True)]
    states = compute(states, rows, per_expert.shape[1])
    out = [
        torch.zeros_like(x).index_add(0, r, state.to(x.dtype))
        for x, r, state in zip(per_expert, rows, states, strict=True)
    ]
    return torch.cat(out)


def _routed(
    experts: nn.Module,
    count: int,
    compute: Compute,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    routes = _routes(top_k_index, count)
    # Numbers past those of the experts.
    others = routes.pop()
    rows = [r for _, r in routes]
    states = compute([hidden_states[r] for r in rows], rows, len(hidden_states))
    if hasattr(experts, "identity_expert"):
        routes.append(others)
        states.append(hidden_states[others[1]])
    out = torch.zeros_like(hidden_states)
    for (position, at), state in zip(routes, states, strict=True):
        if len(at):
            state = state * top_k_weights[at, position, None]
            out.index_add_(0, at, state.to(out.dtype))
    return out


def _routes(top_k_index: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """For each of `count` experts and then for all numbers past them: (position among the k, token)
    wherever `top_k_index [T, k]` names it, ordered by position: the order of the eager forward.
    Waits for a GPU once, whatever the number of experts."""
    tokens = len(top_k_index)
    order, first = sorted_by_expert(top_k_index, count)
    order[first[-1] :] = order[first[-1] :].sort().values  # not by their numbers
    position, token = order // max(1, tokens), order % max(1, tokens)
    spans = [slice(*span) for span in pairwise([*first, len(order)])]
    return [(position[span], token[span]) for span in spans]


def sorted_by_expert(top_k_index: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The places of `top_k_index.T.flatten()`, int64 [k T], by the expert that they name, those of
    one expert in their order; and, for each of `count` experts and then for all numbers past them,
    where its first place is. Negative numbers are before all. Waits for a GPU once.

    Args:
        top_k_index: int64 [T, k].
    """
    chosen, order = top_k_index.T.flatten().sort(stable=True)
    first = torch.searchsorted(chosen, torch.arange(count + 1, device=chosen.device))
    return order, first.tolist()


def _experts(
    experts: nn.Module,
    observe: Observer | None,
    states: list[Tensor],
    rows: list[Tensor],
    tokens: int,
    produced: OutputObserver | None,
    hidden: Hidden | None,
) -> list[Tensor]:
    """What each expert makes of its `states`, those `rows` of the `tokens`."""
    first, last = projections(experts)
    states = _project(experts, observe, first, states, rows, tokens, produced)
    for e, state in enumerate(states):
        states[e] = activated(experts, state)
        states[e] = states[e] if hidden is None else hidden(e, states[e])
    states = _project(experts, observe, last, states, rows, tokens, produced)
    if getattr(experts, "has_post_expert_norm", False):
        states = [experts.post_expert_norm(state) for state in states]  # type: ignore[operator]
    return states


def activated(experts: Any, first: Tensor) -> Tensor:
    """The hidden channels `[t, I]` of what the first projection gives."""
    if not has_gate(experts):
        channels: Tensor = experts.act_fn(first)
    elif hasattr(experts, "_apply_gate"):
        channels = experts._apply_gate(first)
    else:
        gate, up = first.chunk(2, dim=-1)
        channels = experts.act_fn(gate) * up
    return channels


def _project(
    experts: nn.Module,
    observe: Observer | None,
    projection: str,
    states: list[Tensor],
    rows: list[Tensor],
    tokens: int,
    produced: OutputObserver | None,
) -> list[Tensor]:
    """Every expert's `states[e] @ W[e].T + b[e]`; lets go of each input as soon as it was used."""
    if observe is not None:
        pairs = enumerate(zip(states, rows, strict=True))
        observe(experts, projection, [ExpertInput(e, x, r, tokens) for e, (x, r) in pairs])
    weight: Tensor = getattr(experts, projection)
    weight = weight.mT if is_transposed(experts) else weight
    bias: Tensor | None = getattr(experts, f"{projection}_bias") if has_bias(experts) else None
    for e in range(len(states)):
        x, states[e] = states[e], F.linear(states[e], weight[e])
        states[e] = states[e] if bias is None else states[e] + bias[e]
        if produced is not None:
            produced(experts, projection, ExpertInput(e, x, rows[e], tokens), states[e])
    return states


@contextmanager
def observed(
    experts: nn.Module,
    observe: Observer | None = None,
    produced: OutputObserver | None = None,
    hidden: Hidden | None = None,
) -> Iterator[None]:
    """Within the context `experts(...)` runs `observed_forward`; restored on the way out."""

    def forward(*given: Tensor) -> Tensor:
        return observed_forward(experts, observe, *given, produced=produced, hidden=hidden)

    with replaced_forward(experts, forward):
        yield
