"""How long a text a model takes, and which tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyprune.errors import UserError


def positions_of(config: Any) -> int | None:
    """Tokens that the model of a transformers configuration has positions for; None where nothing
    limits them (ALiBi). With learned positions the next token is an index error, with rotary ones
    outside of what the model was trained on."""
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest


def entries_of(config: Any) -> int | None:
    """Tokens in the vocabulary of the model of a transformers configuration, if it says so."""
    entries: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return entries


def check_ids(ids: Tensor, entries: int | None, what: str) -> None:
    """UserError unless all ids are among the model's `entries` (None: any from 0 on). what: whose
    tokens they are, for the message."""
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (entries is not None and high >= entries):
        raise UserError(
            f"{what}: expected token ids in [0, {entries}), got {low} to {high} "
            "(a tokenizer of another model?)"
        )
