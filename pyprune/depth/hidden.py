"""Hidden states between layers, and what is counted over them, one batch at a time.

States are numbered by position: h_0 is the input of the first layer, h_l the output of layer
l - 1, h_L the output of the last layer *before* the final norm. transformers' own
`output_hidden_states` returns the normed one last, which published code then compares with
un-normed states; these here come from hooks on the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyprune.calibration.tokens import Batch
from pyprune.depth.finite import NotFiniteError
from pyprune.models.adapter import Adapter

Visit = Callable[[int, Tensor], None]


@torch.no_grad()
def visit_states(adapter: Adapter, batch: Batch, visit: Visit) -> None:
    """Runs the decoder over `batch`; calls `visit(l, h_l)` for l = 0..L, in order, as they occur.

    h_l: [B, T, d], padding included (see `real_tokens`); it is not held afterwards.
    """
    batch = batch.to(next(adapter.decoder.parameters()).device)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit(0, args[0] if args else kwargs["hidden_states"])

    def after(position: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            visit(position, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack:
        first = adapter.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(first.remove)
        for i, block in enumerate(adapter.blocks):
            stack.callback(block.register_forward_hook(after(i + 1)).remove)
        adapter.decoder(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )


def real_tokens(state: Tensor, batch: Batch) -> Tensor:
    """[n, d] float32: the states of `batch` that are no padding. Raises NotFiniteError on NaN
    or infinity (the published code scores them as 0.5)."""
    if batch.attention_mask is None:
        return _finite(state.flatten(0, 1))
    return _finite(state[batch.attention_mask.to(state.device) != 0])


def _finite(rows: Tensor) -> Tensor:
    if not rows.isfinite().all():
        raise NotFiniteError("the model's hidden states have NaN or infinite values on this text")
    return rows.float()


def last_tokens(state: Tensor, batch: Batch) -> Tensor:
    """[B, d] float32: the states of each row's last real token. Raises NotFiniteError on
    NaN or infinity."""
    if batch.attention_mask is None:
        return _finite(state[:, -1])
    mask = batch.attention_mask.to(state.device) != 0
    places = torch.arange(mask.shape[1], device=state.device).expand_as(mask)
    last = places.masked_fill(~mask, -1).amax(1)
    return _finite(state[last >= 0, last[last >= 0]])


def block_influence(adapter: Adapter, batches: Iterable[Batch]) -> Tensor:
    """BI_l = 1 - E[cos(h_l, h_{l+1})] over all real tokens; float64 [L], in [0, 2].

    Source: ShortGPT (arXiv 2403.03853), equation 1. Row by row: no token x token product.
    """
    sums = torch.zeros(len(adapter.blocks), dtype=torch.float64)
    count = 0
    for batch in batches:
        held: list[Tensor] = []

        def visit(position: int, state: Tensor, batch: Batch = batch, held: Any = held) -> None:
            rows = real_tokens(state, batch).double()
            if held:
                # Of a layer that changes nothing the cosine is one, up to rounding of the norms.
                cosine = F.cosine_similarity(held.pop(), rows, dim=1)
                sums[position - 1] += cosine.clamp(-1, 1).sum().cpu()
            held.append(rows)

        visit_states(adapter, batch, visit)
        count += len(held[0])
    return 1 - sums / count


def angular_distances(adapter: Adapter, batches: Iterable[Batch]) -> Tensor:
    """d(l, m) = E[arccos(cos(h_l, h_m)) / pi] over the sequences' last real tokens; float64
    [L + 1, L + 1], in [0, 1]: one forward for windows of every width.

    Source: Gromov et al. (arXiv 2403.17887), equation 7. Position 0 is the first layer's input,
    and the last state is not normed.
    """
    sums = torch.zeros(len(adapter.blocks) + 1, len(adapter.blocks) + 1, dtype=torch.float64)
    count = 0
    for batch in batches:
        states: list[Tensor] = []
        visit_states(adapter, batch, _into(states, partial(last_tokens, batch=batch)))
        # Rounding of a float32 cosine near one is 3e-4 rad of angle.
        unit = F.normalize(torch.stack(states).double(), dim=2)
        cosine = torch.einsum("lbd,mbd->lmb", unit, unit)
        sums += cosine.clamp(-1, 1).arccos().sum(2).cpu() / math.pi
        count += len(states[0])
    return sums / count


def token_states(adapter: Adapter, batches: Iterable[Batch], tokens: int) -> Tensor:
    """float32 [L + 1, n, d]: the states of n <= `tokens` real tokens, spread evenly over the
    batches and drawn without replacement in each."""
    batches = list(batches)
    gen = torch.Generator().manual_seed(0)
    kept: list[Tensor] = []
    for i, batch in enumerate(batches):
        share = tokens * (i + 1) // len(batches) - tokens * i // len(batches)
        chosen = torch.randperm(int(batch.real.sum()), generator=gen)[:share]
        states: list[Tensor] = []

        def some(state: Tensor, batch: Batch = batch, chosen: Tensor = chosen) -> Tensor:
            return real_tokens(state, batch)[chosen.to(state.device)].cpu()

        visit_states(adapter, batch, _into(states, some))
        kept.append(torch.stack(states))
    return torch.cat(kept, dim=1)


def _into(found: list[Tensor], reduced: Callable[[Tensor], Tensor]) -> Visit:
    return lambda _position, state: found.append(reduced(state))
