"""Above the decoder: the loss of the next tokens, or of tokens that the model itself would draw."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyprune.errors import UserError
from pyprune.models.adapter import Adapter

# Logits are made for this many numbers at a time: a vocabulary of 49 152 at 2 048 tokens would be
# 400 MB of fp32 for one sequence, and as much again for its gradient.
LOGITS_AT_ONCE = 1 << 24
IGNORED = -100


class Head:
    """What a model does with the output of its decoder, for one pass over a text.

    scale: multiplies the loss. fisher_samples: how often labels are drawn; 0: the text's own count.
    seed: of the draws.
    """

    def __init__(self, adapter: Adapter, scale: float, fisher_samples: int, seed: int) -> None:
        self._adapter, self._scale, self._samples = adapter, scale, fisher_samples
        self._generator = torch.Generator().manual_seed(seed)

    def gradients(
        self, out: Any, hidden: Tensor, ids: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients `[draws, B, T, d]` of the summed loss times the scale at the decoder's output
        `hidden [B, T, d]`: one for the `labels [B, T - 1]` (IGNORED where nothing is predicted), or
        of each draw of them over sqrt(draws). And the loss of `labels` itself, fp64.

        The head, with whatever the model does to its logits, runs on a few tokens at a time.

        Args:
            out: the decoder's answer that `hidden` is in. ids: `[B, T]`.
        """
        uniform = self._uniform(labels != IGNORED) if self._samples else None
        draws = max(self._samples, 1)
        gradients = hidden.new_zeros(draws, *hidden.shape)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        vocabulary = self._adapter.model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        step = max(1, LOGITS_AT_ONCE // (vocabulary * len(hidden)))
        for a in range(0, labels.shape[1], step):
            part = hidden[:, a : min(a + step, labels.shape[1])].clone().requires_grad_()
            at = slice(a, a + part.shape[1])
            logits = head_logits(self._adapter, out, part, ids)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            text = labels[None, :, at]
            targets = text
            if uniform is not None:
                drawn = draw_labels(logits.detach(), uniform[:, :, at])
                targets = drawn.masked_fill(text == IGNORED, IGNORED)
                total += _summed(logits.detach(), text)
            for draw in range(draws):
                loss = _summed(logits, targets[draw])
                if uniform is None:
                    total += loss.detach()
                (gradient,) = torch.autograd.grad(
                    loss * (self._scale / draws**0.5), part, retain_graph=draw + 1 < draws
                )
                gradients[draw, :, at] = gradient
        return gradients, total

    def _uniform(self, predicted: Tensor) -> Tensor:
        """`[draws, B, T - 1]`, in [0, 1) where `predicted [B, T - 1]`: drawn sequence by sequence
        and on the CPU, so that neither the batch nor the device matters."""
        uniform = torch.zeros(self._samples, *predicted.shape, dtype=torch.float64)
        for n, here in enumerate(predicted.cpu()):
            size = (self._samples, int(here.sum()))
            drawn = torch.rand(size, generator=self._generator, dtype=torch.float64)
            uniform[:, n, here] = drawn
        return uniform.to(predicted.device)


def head_logits(adapter: Adapter, out: Any, hidden: Tensor, input_ids: Tensor) -> Tensor:
    """The model's forward with the decoder's answer given: whatever it does after that.

    out: what the decoder answered on `input_ids [B, T]`; hidden: `[B, t, d]`, which takes the place
    of its hidden states (some of the positions, say). Logits `[B, t, V]`.
    """
    answer = copy(out)
    answer[next(iter(answer))] = hidden
    decoder = adapter.decoder
    previous = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: answer
    try:
        ids = input_ids[:, : hidden.shape[1]]
        logits: Tensor = adapter.model(input_ids=ids, use_cache=False).logits
    finally:
        if previous is None:
            del decoder.forward
        else:
            decoder.forward = previous
    return logits


def check_head(adapter: Adapter) -> None:
    """UserError for a model without a head: it has no loss."""
    model = adapter.model
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UserError(
            f"{type(model).__name__}: expected a causal language model with its head for a "
            "gradient, got a model without"
        )


def draw_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """Labels `[S, B, T]` from the softmax of `logits [B, T, V]`, one for each number of `uniform
    [S, B, T]` in [0, 1): where the distribution's running total passes it."""
    totals = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    wanted = uniform.movedim(0, -1) * totals[..., -1:]
    drawn = torch.searchsorted(totals, wanted.contiguous(), right=True)
    return drawn.clamp_max_(logits.shape[-1] - 1).movedim(-1, 0)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
