"""Above the decoder: the loss of the next tokens."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor

from pyprune.errors import UserError
from pyprune.models.adapter import Adapter

# Logits are made for this many numbers at a time: a vocabulary of 49 152 at 2 048 tokens would be
# 400 MB of fp32 for one sequence, and as much again for its gradient.
LOGITS_AT_ONCE = 1 << 24
IGNORED = -100


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
