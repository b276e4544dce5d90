"""Above the decoder: the loss of the next tokens, or of tokens that the model itself would draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyprune.calibration.tokens import Batch
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.models.running import head_logits, positions_at_once

IGNORED = -100


class Head:
    """What a model does with the output of its decoder, for one pass over a text.

    scale: multiplies the loss. fisher_samples: how often labels are drawn; 0: the text's own count.
    seed: of the draws.
    """

    def __init__(self, adapter: Adapter, scale: float, fisher_samples: int, seed: int) -> None:
        self._adapter, self._scale, self._samples = adapter, scale, fisher_samples
        self._generator = torch.Generator().manual_seed(seed)

    def gradients(self, out: Any, hidden: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """Gradients `[draws, B, T, d]` of the summed loss times the scale at the decoder's output
        `hidden [B, T, d]`: one for the `labels [B, T - 1]` (IGNORED where nothing is predicted), or
        of each draw of them over sqrt(draws).

        The head, with whatever the model does to its logits, runs on a few tokens at a time.

        Args:
            out: the decoder's answer that `hidden` is in. ids: `[B, T]`.
        """
        uniform = self._uniform(labels != IGNORED) if self._samples else None
        draws = max(self._samples, 1)
        gradients = hidden.new_zeros(draws, *hidden.shape)
        model, decoder = self._adapter.model, self._adapter.decoder
        step = positions_at_once(model, len(hidden))
        for a in range(0, labels.shape[1], step):
            part = hidden[:, a : min(a + step, labels.shape[1])].clone().requires_grad_()
            at = slice(a, a + part.shape[1])
            logits = head_logits(model, decoder, out, part, ids)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            text = labels[None, :, at]
            targets = text
            if uniform is not None:
                drawn = draw_labels(logits.detach(), uniform[:, :, at])
                targets = drawn.masked_fill(text == IGNORED, IGNORED)
            for draw in range(draws):
                loss = _summed(logits, targets[draw])
                (gradient,) = torch.autograd.grad(
                    loss * (self._scale / draws**0.5), part, retain_graph=draw + 1 < draws
                )
                gradients[draw, :, at] = gradient
        return gradients

    def _uniform(self, predicted: Tensor) -> Tensor:
        """`[draws, B, T - 1]`, in [0, 1) where `predicted [B, T - 1]`: drawn sequence by sequence
        and on the CPU, so that neither the batch nor the device matters."""
        uniform = torch.zeros(self._samples, *predicted.shape, dtype=torch.float64)
        for n, here in enumerate(predicted.cpu()):
            size = (self._samples, int(here.sum()))
            drawn = torch.rand(size, generator=self._generator, dtype=torch.float64)
            uniform[:, n, here] = drawn
        return uniform.to(predicted.device)


def next_labels(input_ids: Tensor, real: Tensor | None) -> Tensor:
    """`[B, T - 1]`: the next token where it and the one before it are real, else IGNORED. real:
    bool `[B, T]`; None: all are."""
    labels = input_ids[:, 1:]
    if real is None:
        return labels
    return labels.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)


def sequence_targets(index: int, batch: Batch) -> list[int]:
    """How many tokens of each sequence of batch number `index` are real and follow a real one;
    UserError for a sequence without."""
    ids, mask = batch.input_ids, batch.attention_mask
    if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
        shapes = [tuple(t.shape) for t in (ids, mask) if t is not None]
        raise UserError(f"batch {index}: expected ids and mask of one shape [B, T], {shapes}")
    real = batch.real
    targets: list[int] = (real[:, 1:] & real[:, :-1]).sum(1).tolist()
    for n, count in enumerate(targets):
        if not count:
            raise UserError(
                f"batch {index}, sequence {n}: expected at least two tokens in a row (the loss is "
                f"that of the next one), got {int(real[n].sum())}"
            )
    return targets


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
