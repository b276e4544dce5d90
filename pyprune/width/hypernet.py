"""DISP-LLM's network that proposes which channels stay (arXiv 2410.11988, section 3.3), and its
training on a frozen model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyprune.calibration.autograd import without_parameter_gradients
from pyprune.calibration.head import IGNORED
from pyprune.calibration.loss_scale import LossScale, all_finite
from pyprune.calibration.tokens import Batch
from pyprune.depth.finite import NotFiniteError
from pyprune.models.experts import Hidden, observed
from pyprune.models.running import evaluation
from pyprune.progress import Progress

INPUT, HIDDEN = 32, 64  # of the recurrent network, as published
BASE, TEMPERATURE = 3.0, 0.4  # every gate starts open


class Place(NamedTuple):
    """A tensor that goes through switches: a module's input or output, or the hidden channels of
    one `expert` of a module of fused experts. switch: int64 [C], that of each of its channels."""

    module: nn.Module
    where: Literal["input", "output", "hidden"]
    switch: Tensor
    expert: int = 0


@dataclass(frozen=True, eq=False)
class Gate:
    """Switches for `size` channels, and the places where channels go through them."""

    name: str
    size: int
    places: tuple[Place, ...]


class HyperNet(nn.Module):
    """Fixed random inputs -> bidirectional GRU over the gates -> LayerNorm, GELU -> one linear map
    per gate -> logits. Weights and inputs follow from `seed`."""

    inputs: Tensor

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", torch.randn(len(sizes), 1, INPUT))
            self.recurrent = nn.GRU(INPUT, HIDDEN, bidirectional=True)
            self.norm = nn.LayerNorm(2 * HIDDEN)
            self.heads = nn.ModuleList(nn.Linear(2 * HIDDEN, size, bias=False) for size in sizes)

    def forward(self) -> list[Tensor]:
        """One `[size]` of logits per gate; a channel stays where `logit + BASE > 0`."""
        states = F.gelu(self.norm(self.recurrent(self.inputs)[0]))[:, 0]
        return [head(state) for head, state in zip(self.heads, states, strict=True)]


def gumbel_gates(logits: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """`[g > 0.5]` of the relaxed `g = sigmoid((logit + gumbel + BASE) / TEMPERATURE)`, with the
    gradient of g (straight through)."""
    gates = []
    for logit in logits:
        uniform = torch.rand(len(logit), generator=generator).clamp(1e-9, 1 - 1e-7)
        noise = -(-uniform.log()).log()
        soft = torch.sigmoid((logit + noise.to(logit.device) + BASE) / TEMPERATURE)
        gates.append((soft > 0.5).to(soft) - soft.detach() + soft)
    return gates


@contextmanager
def gated(gates: Sequence[Gate], values: list[Tensor]) -> Iterator[None]:
    """Within it the model runs with its channels multiplied by `values` (one `[size]` per gate; the
    list is read at every forward)."""

    def of_input(i: int, switch: Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (through(i, switch, args[0]), *args[1:])

        return hook

    def of_output(i: int, switch: Tensor) -> Callable[..., Any]:
        return lambda _module, _args, output: through(i, switch, output)

    def of_experts(switches: Mapping[int, tuple[int, Tensor]]) -> Hidden:
        return lambda e, x: through(*switches[e], x) if e in switches else x

    def through(i: int, switch: Tensor, x: Tensor) -> Tensor:
        return x * values[i][switch].to(x.dtype)

    experts: dict[nn.Module, dict[int, tuple[int, Tensor]]] = {}
    with ExitStack() as stack:
        for i, gate in enumerate(gates):
            for module, where, switch, expert in gate.places:
                switch = switch.to(next(module.parameters()).device)
                if where == "hidden":
                    experts.setdefault(module, {})[expert] = (i, switch)
                elif where == "input":
                    handle = module.register_forward_pre_hook(of_input(i, switch))
                    stack.callback(handle.remove)
                else:
                    handle = module.register_forward_hook(of_output(i, switch))
                    stack.callback(handle.remove)
        for module, switches in experts.items():
            stack.enter_context(observed(module, hidden=of_experts(switches)))
        yield


@dataclass(frozen=True)
class Training:
    """iterations: steps, one batch each. rate, decay: of AdamW. strength: lambda, of the penalty
    `|log(share kept / share asked for)|`. seed: of initialisation and noise."""

    iterations: int
    rate: float
    decay: float
    strength: float
    seed: int


def train(
    model: Any,
    batches: Sequence[Batch],
    gates: Sequence[Gate],
    penalty: Callable[[Sequence[Tensor]], Tensor],
    options: Training,
    progress: Progress | None = None,
) -> tuple[list[Tensor], list[float]]:
    """Trains a HyperNet for `gates` on the frozen model: next-token loss plus `strength` times
    `penalty` (of the hard gates, with straight-through gradients).

    Returns:
        The logits without noise, detached, and the losses (without penalty) step by step.

    Raises NotFiniteError: the loss or its gradient is NaN or infinite.
    """
    device = next(model.parameters()).device
    scale = LossScale(model.parameters())
    net = HyperNet([gate.size for gate in gates], options.seed).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.rate, weight_decay=options.decay)
    noise = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    values: list[Tensor] = []
    with (
        without_parameter_gradients(model),
        evaluation(model),
        torch.enable_grad(),
        gated(gates, values),
    ):
        for step in range(options.iterations):
            values[:] = gumbel_gates(net(), noise)
            loss = next_token_loss(model, batches[step % len(batches)])
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                words = f"expected a finite loss, got {losses[-1]} in step {step + 1}"
                raise NotFiniteError(words)
            loss = loss + options.strength * penalty(values)
            found = scale.gradients(loss, list(net.parameters()))
            del loss  # with all activations, before the next forward
            if not all_finite(found):
                raise NotFiniteError(
                    f"expected finite gradients, got NaN or infinity in step {step + 1}"
                )
            for p, gradient in zip(net.parameters(), found, strict=True):
                p.grad = gradient
            optimizer.step()
            if progress is not None:
                words = f"step {step + 1}/{options.iterations}, loss {losses[-1]:.3f}"
                progress(words, step + 1, options.iterations)
    with torch.no_grad():
        return [logit.cpu() for logit in net()], losses


def next_token_loss(model: Any, batch: Batch) -> Tensor:
    """Mean over the real targets of a batch, in fp32."""
    batch = batch.to(next(model.parameters()).device)
    ids, mask = batch.input_ids, batch.attention_mask
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    targets = ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, IGNORED)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED
    )
