"""How long a text a model takes."""

from __future__ import annotations

from typing import Any


def positions_of(config: Any) -> int | None:
    """Tokens that the model of a transformers configuration has positions for; None where nothing
    limits them (ALiBi). With learned positions the next token is an index error, with rotary ones
    outside of what the model was trained on."""
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest
