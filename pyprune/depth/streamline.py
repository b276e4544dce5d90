"""LLM-Streamline (arXiv 2403.19135): a window of layers replaced by one that is trained for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from pyprune.calibration.loss_scale import LossScale, all_finite
from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import OneAddOn
from pyprune.depth.criteria import run_layer
from pyprune.depth.finite import NotFiniteError
from pyprune.depth.given import Given
from pyprune.depth.graph import Context, ResidualGraph, State
from pyprune.depth.hidden import real_tokens
from pyprune.depth.layers import LayerChoice, LayerTask, layer_method, too_much
from pyprune.errors import UserError
from pyprune.progress import Progress

Start = Literal["first", "last", "best"]
# Of the published training.
WEIGHT_DECAY, CLIP = 1e-3, 5.0
FINAL_SHARE = 0.25  # of the learning rate that is left at the end


@dataclass(frozen=True)
class StreamlineOptions(OneAddOn):
    """epochs: over the calibration text; 0 only initialises. learning_rate: at its peak. start:
    weights that the replacement begins with: first, last or best of the window. epochs=0 with
    start=first is plain pruning. And one of the add-ons `compensate` and `refit` (with `ridge`),
    see `streamline`."""

    epochs: int = 1
    learning_rate: float = 2e-4
    start: Start = "best"


@layer_method(
    "llm-streamline",
    title="LLM-Streamline: a window replaced by one trained layer",
    paper="arXiv 2403.19135",
    options=StreamlineOptions,
)
def streamline(task: LayerTask) -> LayerChoice:
    """LLM-Streamline: of the windows of n + 1 layers the one that changes direction least becomes
    one trained layer; the smallest n that is enough. Ties go to the lower window.

    The add-ons come after the training, for the n layers that the replacement stands before, and
    are measured against the model as given. refit: the replacement's MLP is fitted to what is left
    of the error that it was trained on, in closed form (the sequences that choose the ridge are
    held out of this fit, not of the training). compensate: the size of the window's output over
    that of the replacement's, which a mean squared error trains to be too small. Untrained, both
    are what they are for layers removed otherwise.
    """
    options: StreamlineOptions = task.options
    graph, batches = task.graph, task.batches
    layers = len(graph.layouts)
    for n in range(1, layers):
        windows = [tuple(range(first, first + n)) for first in range(1, layers - n + 1)]
        if not any(map(task.enough, windows)):
            continue  # before the model runs for it
        start = int(window_similarity(graph, batches, n + 1).argmax())
        removed = windows[start]
        if not task.enough(removed):
            continue
        given = Given()
        if options.wanted:
            given.hold(list(graph.adapter.blocks[start].parameters()))
        result = replace_window(graph, batches, start, start + 1 + n, options, task.progress)
        trained = {"kind": "replacement", **asdict(result)}
        return LayerChoice(removed, "cosine of windows", (), (trained,), given)
    raise too_much(layers - 1, layers)


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
    options: StreamlineOptions,
    say: Progress | None = None,
) -> Replacement:
    """Trains layer `layer` in place to give, from its own input, the output of layer `end` - 1.

    Mean squared error over all real tokens; AdamW, the rate falling by a cosine over all steps to a
    quarter, one batch a step. `options.start`: weights of the window's first layer (as published),
    of its last, or of the one that has the lower error untrained. Inputs and targets are computed
    batch by batch and not kept (the published code hoards them). If training ends no better than it
    began, the weights that it began with are put back. Layers `layer` + 1 .. `end` - 1 must be
    removed afterwards.
    """
    if not 0 <= layer < end - 1 < len(graph.layouts) or options.epochs < 0:
        raise UserError(
            f"window: expected two layers or more of {len(graph.layouts)} and epochs >= 0, "
            f"got {layer} to {end} and {options.epochs}"
        )
    block, last = graph.adapter.blocks[layer], graph.adapter.blocks[end - 1]
    original = [p.detach().clone() for p in block.parameters()]
    window = _Window(graph, layer, end, list(block.parameters()), original)
    choices = {"first": original, "last": [p.detach().clone() for p in last.parameters()]}
    alike = [p.shape for p in choices["last"]] == [p.shape for p in original]
    if not alike and options.start != "first":
        raise UserError(f"start: layers {layer} and {end - 1} are built differently, use first")
    tried = [options.start] if options.start != "best" else ["first", "last"]
    errors = {name: window.error(batches, choices[name]) for name in tried}
    chosen = min(tried, key=lambda name: errors[name])
    if not all(map(math.isfinite, errors.values())):
        raise UserError("the window's states are NaN or infinite on this text")
    # Small steps would be lost in the rounding of 16-bit weights.
    current = [p.float() if p.dtype.itemsize < 4 else p.clone() for p in choices[chosen]]
    wanted = [(p, p.requires_grad) for p in graph.model.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        window.train(batches, current, options, say)
    finally:
        window.put(original)
        for p, required in wanted:
            p.requires_grad_(required)
    after = window.error(batches, current)
    if not after < errors[chosen]:
        current, after = choices[chosen], errors[chosen]
    window.put(current)
    return Replacement(layer, end, chosen, errors[chosen], after)


@dataclass(frozen=True)
class _Window:
    """Layers `layer` .. `end` - 1, of which the first is to stand for all. parameters: that one's;
    original: their values, which they have whenever no method runs."""

    graph: ResidualGraph
    layer: int
    end: int
    parameters: list[Parameter]
    original: list[Tensor]

    def train(
        self,
        batches: Sequence[Batch],
        current: list[Tensor],
        options: StreamlineOptions,
        say: Progress | None,
    ) -> None:
        """Changes `current`, the values to begin with; the parameters end with any."""
        optimiser = torch.optim.AdamW(current, options.learning_rate, weight_decay=WEIGHT_DECAY)
        scale = LossScale(self.parameters)
        steps, done = options.epochs * len(batches), 0
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimiser, max(1, steps), FINAL_SHARE * options.learning_rate
        )
        gen = torch.Generator().manual_seed(0)
        for _ in range(options.epochs):
            for i in torch.randperm(len(batches), generator=gen).tolist():
                error, gradients = self._gradients(batches[i], current, scale)
                for value, gradient in zip(current, gradients, strict=True):
                    value.grad = gradient
                torch.nn.utils.clip_grad_norm_(current, CLIP)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad(set_to_none=True)
                done += 1
                if say is not None:
                    say(f"replacement: step {done}/{steps}, {error:.3g}", done, steps)

    def _gradients(
        self, batch: Batch, values: list[Tensor], scale: LossScale
    ) -> tuple[float, list[Tensor | None]]:
        """The error on one batch with `values`, and its gradients."""
        state, context, target = self._pair(batch)
        self.put(values)
        for p in self.parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            loss = self._mse(state, context, batch, target)
            # Not added to the gradients that the model's owner may hold in `.grad`.
            found = scale.gradients(loss, self.parameters)
        for p in self.parameters:
            p.requires_grad_(False)
        if not all_finite(found):
            raise NotFiniteError("the gradient of the replacement's error is NaN or infinite")
        return float(loss.detach()), found

    @torch.no_grad()
    def error(self, batches: Sequence[Batch], values: list[Tensor]) -> float:
        """Mean squared error per element with `values` in the layer; its original ones after."""
        total, count = 0.0, 0
        for batch in batches:
            state, context, target = self._pair(batch)
            self.put(values)
            total += float(self._mse(state, context, batch, target)) * len(target)
            count += len(target)
            self.put(self.original)
        return total / count

    @torch.no_grad()
    def _pair(self, batch: Batch) -> tuple[State, Context, Tensor]:
        """The state before the window, and what the original window makes of it (real tokens)."""
        self.put(self.original)
        state, context = self.graph.start(batch)
        for i in range(self.layer):
            state = run_layer(self.graph, i, state, context)
        after = state
        for i in range(self.layer, self.end):
            after = run_layer(self.graph, i, after, context)
        return state, context, real_tokens(after.total, batch)

    def _mse(self, state: State, context: Context, batch: Batch, target: Tensor) -> Tensor:
        after = run_layer(self.graph, self.layer, state, context)
        return F.mse_loss(real_tokens(after.total, batch), target)

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
