"""LLM-Streamline (arXiv 2403.19135): a window of layers replaced by one that is trained for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyprune.calibration.loss_scale import LossScale, all_finite
from pyprune.calibration.tokens import Batch
from pyprune.depth.criteria import run_layer
from pyprune.depth.finite import NotFiniteError
from pyprune.depth.graph import Context, ResidualGraph, State
from pyprune.depth.hidden import real_tokens
from pyprune.errors import UserError
from pyprune.progress import Progress

Start = Literal["first", "last", "best"]


@dataclass(frozen=True)
class Replacement:
    """Layer `layer` now stands for `layer` .. `end` - 1. Mean squared errors per element of its
    output on the text: as initialised, and trained. start: whose weights it began with."""

    layer: int
    end: int
    start: str
    before: float
    after: float


@torch.no_grad()
def window_similarity(graph: ResidualGraph, batches: Sequence[Batch], width: int) -> Tensor:
    """S_j = E[(1 + cos(h_j, h_{j + width})) / 2] over all real tokens, float64
    [L - width + 1]; row by row, and the last state is not normed. Holds `width` + 1 states."""
    layers = len(graph.layouts)
    if not 1 <= width <= layers:
        raise UserError(f"width: expected 1 to {layers} layers, got {width}")
    sums = torch.zeros(layers - width + 1, dtype=torch.float64)
    count = 0
    for batch in batches:
        state, context = graph.start(batch)
        held = [real_tokens(state.total, batch)]
        for layer in range(layers):
            state = run_layer(graph, layer, state, context)
            held.append(real_tokens(state.total, batch))
            if len(held) > width:
                cosine = F.cosine_similarity(held.pop(0).double(), held[-1].double(), dim=1)
                sums[layer + 1 - width] += ((1 + cosine) / 2).sum().cpu()
        count += len(held[-1])
    return sums / count


def replace_window(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    layer: int,
    end: int,
    *,
    epochs: int = 1,
    learning_rate: float = 2e-4,
    final_rate: float = 5e-5,
    weight_decay: float = 1e-3,
    clip: float = 5.0,
    start: Start = "best",
    seed: int = 0,
    say: Progress | None = None,
) -> Replacement:
    """Trains layer `layer` in place to give, from its own input, the output of layer `end` - 1.

    Mean squared error over all real tokens; AdamW, the rate falling by a cosine over all steps, one
    batch a step. start: weights of the window's first layer (as published), of its last, or of the
    one that has the lower error untrained. Inputs and targets are computed batch by batch and not
    kept (the published code hoards them). If training ends no better than it began, the weights
    that it began with are put back. Layers `layer` + 1 .. `end` - 1 must be removed afterwards.
    """
    if not 0 <= layer < end - 1 < len(graph.layouts) or epochs < 0:
        raise UserError(
            f"window: expected two layers or more of {len(graph.layouts)} and epochs >= 0, "
            f"got {layer} to {end} and {epochs}"
        )
    block, last = graph.adapter.blocks[layer], graph.adapter.blocks[end - 1]
    original = [p.detach().clone() for p in block.parameters()]
    choices = {"first": original, "last": [p.detach().clone() for p in last.parameters()]}
    if [p.shape for p in choices["last"]] != [p.shape for p in original] and start != "first":
        raise UserError(f"start: layers {layer} and {end - 1} are built differently, use first")
    tried = [start] if start != "best" else ["first", "last"]
    errors = {n: _error(graph, batches, layer, end, original, choices[n]) for n in tried}
    chosen = min(tried, key=lambda name: errors[name])
    if not all(map(_finite, errors.values())):
        raise UserError("the window's states are NaN or infinite on this text")
    parameters = list(block.parameters())
    # Small steps would be lost in the rounding of 16-bit weights.
    current = [p.float() if p.dtype.itemsize < 4 else p.clone() for p in choices[chosen]]
    wanted = [(p, p.requires_grad) for p in graph.model.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        _train(
            graph, batches, layer, end, original, current, epochs,
            (learning_rate, final_rate, weight_decay, clip), seed, say,
        )  # fmt: skip
    finally:
        _put(parameters, original)
        for p, required in wanted:
            p.requires_grad_(required)
    after = _error(graph, batches, layer, end, original, current)
    if not after < errors[chosen]:
        current, after = choices[chosen], errors[chosen]
    _put(parameters, current)
    return Replacement(layer, end, chosen, errors[chosen], after)


def _train(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    layer: int,
    end: int,
    original: list[Tensor],
    current: list[Tensor],
    epochs: int,
    rates: tuple[float, float, float, float],
    seed: int,
    say: Progress | None,
) -> None:
    """Changes `current`. Before each step the layer gets its original weights for the target."""
    rate, final, decay, clip = rates
    parameters = list(graph.adapter.blocks[layer].parameters())
    optimiser = torch.optim.AdamW(current, lr=rate, weight_decay=decay)
    scale = LossScale(parameters)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps), final)
    gen = torch.Generator().manual_seed(seed)
    done = 0
    for _ in range(epochs):
        for i in torch.randperm(len(batches), generator=gen).tolist():
            state, context, target = _pair(graph, batches[i], layer, end, original)
            _put(parameters, current)
            for p in parameters:
                p.requires_grad_(True)
            with torch.enable_grad():
                loss = _mse(run_layer(graph, layer, state, context), batches[i], target)
                # Not added to the gradients that the model's owner may hold in `.grad`.
                found = scale.gradients(loss, parameters)
            if not all_finite(found):
                raise NotFiniteError("the gradient of the replacement's error is NaN or infinite")
            error = float(loss.detach())
            del loss
            for value, p, grad in zip(current, parameters, found, strict=True):
                value.grad = grad
                p.requires_grad_(False)
            torch.nn.utils.clip_grad_norm_(current, clip)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            done += 1
            if say is not None:
                say(f"replacement: step {done}/{steps}, {error:.3g}", done, steps)


@torch.no_grad()
def _pair(
    graph: ResidualGraph, batch: Batch, layer: int, end: int, original: list[Tensor]
) -> tuple[State, Context, Tensor]:
    """The state before `layer`, and what the original window makes of it (real tokens)."""
    _put(list(graph.adapter.blocks[layer].parameters()), original)
    state, context = graph.start(batch)
    for i in range(layer):
        state = run_layer(graph, i, state, context)
    after = state
    for i in range(layer, end):
        after = run_layer(graph, i, after, context)
    return state, context, real_tokens(after.total, batch)


def _mse(state: State, batch: Batch, target: Tensor) -> Tensor:
    return F.mse_loss(real_tokens(state.total, batch), target)


@torch.no_grad()
def _error(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    layer: int,
    end: int,
    original: list[Tensor],
    values: list[Tensor],
) -> float:
    """Mean squared error per element with `values` in the layer; its original ones afterwards."""
    parameters = list(graph.adapter.blocks[layer].parameters())
    total, count = 0.0, 0
    for batch in batches:
        state, context, target = _pair(graph, batch, layer, end, original)
        _put(parameters, values)
        total += float(_mse(run_layer(graph, layer, state, context), batch, target)) * len(target)
        count += len(target)
        _put(parameters, original)
    return total / count


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
