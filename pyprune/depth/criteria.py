"""How much each whole layer matters: one number a layer, larger = keep. Float64 [L]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyprune.calibration.loss_scale import LossScale
from pyprune.calibration.tokens import Batch
from pyprune.depth.finite import NotFiniteError
from pyprune.depth.graph import Branch, Context, ResidualGraph, State
from pyprune.depth.hidden import block_influence
from pyprune.errors import UserError
from pyprune.models.running import positions_at_once

# Shortened LLaMA's "+" keeps these out of harm's way: removed only after all others.
PLUS_FIRST, PLUS_LAST = 4, 2


def run_layer(graph: ResidualGraph, layer: int, state: State, context: Context) -> State:
    """The state after both branches of a layer."""
    after = graph.run(Branch("attention", layer), state, context)
    return graph.run(Branch("mlp", layer), after, context)


def token_losses(graph: ResidualGraph, hidden: Tensor, batch: Batch) -> Tensor:
    """-log p(next token), float32 [n]: of every real token that has one, from the last layer's
    output `hidden` [B, T, d]; the logits of a few positions exist at once."""
    finished = graph.finish(hidden, batch)
    ids = batch.input_ids.to(hidden.device)
    chunk = positions_at_once(graph.model, len(ids))
    losses = []
    for start in range(0, ids.shape[1] - 1, chunk):
        targets = ids[:, start + 1 : start + 1 + chunk]
        piece = finished[:, start : start + targets.shape[1]]
        logits = graph.logits(piece, ids).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape))
    found = torch.cat(losses, dim=1)
    if batch.attention_mask is None:
        return found.flatten()
    return found[batch.attention_mask.to(found.device)[:, 1:] != 0]


@torch.no_grad()
def removal_losses(graph: ResidualGraph, batches: Sequence[Batch]) -> Tensor:
    """Mean loss per token (nats; its exp is the perplexity) without each layer in turn.

    Shortened LLaMA (arXiv 2402.02834), "PPL". The layers before the removed one run once for all
    candidates, so this costs half of L forwards. Raises NotFiniteError if a loss is not finite.
    """
    layers = len(graph.layouts)
    sums = torch.zeros(layers, dtype=torch.float64)
    count = 0
    for batch in batches:
        batch = batch.to(graph.device)
        state, context = graph.start(batch)
        for removed in range(layers):
            rest = state
            for later in range(removed + 1, layers):
                rest = run_layer(graph, later, rest, context)
            losses = token_losses(graph, rest.total, batch)
            sums[removed] += losses.double().sum().cpu()
            state = run_layer(graph, removed, state, context)
        count += losses.numel()
    if count == 0:
        raise UserError("calibration: expected sequences of at least two tokens")
    bad = (~sums.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteError(f"the loss without layer {bad[0]} is NaN or infinite on this text")
    return sums / count


def taylor(graph: ResidualGraph, batches: Sequence[Batch]) -> Tensor:
    """Sum over a layer's parameters (its norms too) of |w * dLoss/dw|, the loss being the mean over
    the tokens of a batch, the gradients summed over batches (in fp32, or fp64 in fp64 models).

    Shortened LLaMA, "Taylor". Holds one gradient of all layers; embeddings and head get none. In
    fp16 the loss is scaled (`LossScale`), and an overflow begins all over with a smaller scale.
    Raises NotFiniteError if a loss or gradient is not finite. Gradients come from the end, so of
    the layers whose gradient is not, the last is where that begins.
    """
    scale = LossScale(graph.model.parameters())
    sums = _taylor(graph, batches, scale.value)
    while not bool(sums.isfinite().all()) and scale.lower():
        sums = _taylor(graph, batches, scale.value)
    bad = (~sums.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteError(
            "the gradient of the loss is NaN or infinite on this text, in the weights of "
            f"{graph.adapter.block_names[bad[-1]]} and of {len(bad) - 1} layers before it"
        )
    return sums


def _taylor(graph: ResidualGraph, batches: Sequence[Batch], scale: float) -> Tensor:
    """With gradients of the loss times `scale`, which is divided out again."""
    with _gradients_of(graph) as gradients:
        for batch in batches:
            batch = batch.to(graph.device)
            state, context = graph.start(batch)
            state = State(state.read.detach(), state.total.detach())
            for layer in range(len(graph.layouts)):
                state = run_layer(graph, layer, state, context)
            loss = token_losses(graph, state.total, batch).mean()
            if not loss.isfinite():
                raise NotFiniteError("the model's loss is NaN or infinite on this text")
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        return _layer_sums(
            graph, lambda p: _product(p, gradients[p]) / scale if p in gradients else 0.0
        )


@torch.no_grad()
def magnitude(graph: ResidualGraph) -> Tensor:
    """Sum of |w| over a layer's parameters. Shortened LLaMA, "Magnitude"; no text is needed."""
    return _layer_sums(graph, lambda p: float(p.double().abs().sum()))


def reverse(layers: int) -> Tensor:
    """Last layers first: the baseline that criteria have to beat (arXiv 2411.15558)."""
    return torch.arange(layers, 0, -1, dtype=torch.float64)


def importance_by(name: str, graph: ResidualGraph, batches: Sequence[Batch]) -> Tensor:
    """By the criterion that is called ppl, taylor, influence or magnitude."""
    if name == "ppl":
        return removal_losses(graph, batches).exp()
    if name == "taylor":
        return taylor(graph, batches)
    if name == "influence":
        return block_influence(graph.adapter, batches)
    return magnitude(graph)


def removal_order(importance: Tensor, *, plus: bool = False) -> list[int]:
    """Layers by ascending importance, ties by index. plus: the first 4 and the last 2 come after
    all others (Shortened LLaMA's "+", there for every criterion by default). Source: the paper's
    section 3.1 and its code."""
    layers = len(importance)
    bad = (~importance.isfinite()).nonzero().flatten().tolist()
    if bad:
        value = float(importance[bad[0]])
        raise UserError(f"importance: expected finite numbers, got {value} of layer {bad[0]}")
    kept = {i for i in range(layers) if plus and (i < PLUS_FIRST or i >= layers - PLUS_LAST)}
    return sorted(range(layers), key=lambda i: (i in kept, float(importance[i]), i))


def _product(p: Tensor, grad: Tensor) -> float:
    return float((p.detach().double() * grad.double()).abs().sum())


def _layer_sums(graph: ResidualGraph, value: Any) -> Tensor:
    sums = [sum(value(p) for p in block.parameters()) for block in graph.adapter.blocks]
    return torch.tensor(sums, dtype=torch.float64)


@contextmanager
def _gradients_of(graph: ResidualGraph) -> Iterator[Mapping[Tensor, Tensor]]:
    """Within it exactly the layers' parameters take gradients; what is yielded has their sums over
    all backward passes, in at least fp32. Afterwards none are left over."""
    model: nn.Module = graph.model
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    inside = {id(p) for block in graph.adapter.blocks for p in block.parameters()}
    sums: dict[Tensor, Tensor] = {}

    def arrived(p: Tensor) -> None:
        assert p.grad is not None
        # Summed by autograd itself, a 16-bit gradient would be rounded after every batch.
        wide = p.grad.to(torch.promote_types(p.dtype, torch.float32))
        sums[p] = sums[p].add_(wide) if p in sums else wide
        p.grad = None

    hooks = []
    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(id(p) in inside)
            if id(p) in inside:
                hook = p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
                hooks.append(hook)
        with torch.enable_grad():
            yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad
