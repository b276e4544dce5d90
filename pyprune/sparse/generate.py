"""Text from a model, dense or compressed, piece by piece as it comes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer

from pyprune.checkpoint.source import load_tokenizer
from pyprune.errors import OVERFLOW, UserError
from pyprune.models.positions import check_ids, entries_of, positions_of
from pyprune.sparse.load import load


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands finished pieces of text to `write`; the base class finds where a piece ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


class _CheckedLogits(LogitsProcessor):  # type: ignore[misc]
    """Stops at logits that no token can be chosen by: the likeliest of NaNs is the first, often the
    end of the text. Minus infinity excludes a token and is fine, unless it excludes all."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._hint = OVERFLOW if dtype == torch.float16 else ""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        greatest = scores.amax(dim=-1)  # NaN where one is
        if not bool(greatest.isfinite().all()):
            raise UserError(f"the model gives NaN or infinite logits{self._hint}")
        return scores


def generate(
    source: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    write: Callable[[str], None],
) -> int:
    """Continues `prompt` with the model in `source` (as for `load`); returns how many tokens came.

    max_new_tokens: fewer come where the model's positions end, or where it ends the text.
    temperature: 0 takes the likeliest token each time. chat: put the prompt into the tokenizer's
    chat template. write: called with each piece of text. Raises UserError as `load` does, and for a
    prompt that is no text, without tokens, too long for the model or with tokens that it does not
    have, a number out of range, a tokenizer that does not load, logits that are NaN or infinite, or
    a generation_config.json that transformers refuses.
    """
    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise UserError(
            f"expected at least 1 new token and a temperature of at least 0, got {max_new_tokens} "
            f"and {temperature}"
        )
    if not -(1 << 63) <= seed < 1 << 64:
        raise UserError(f"seed: expected a number that 64 bits hold, got {seed}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # what the shell gave was no text
        raise UserError(f"prompt: expected text in UTF-8, got {prompt!r}") from error
    model = load(source, dtype, device)
    tokenizer = load_tokenizer(model.name_or_path)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{source}: its tokenizer has no chat template")
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise UserError("prompt: expected some text, it has no tokens")
    check_ids(ids, entries_of(model.config), "prompt")
    positions = positions_of(model.config)
    if positions is not None:
        if ids.shape[1] >= positions:
            raise UserError(
                f"prompt: expected fewer tokens than the model has positions, {positions}, got "
                f"{ids.shape[1]}"
            )
        max_new_tokens = min(max_new_tokens, positions - ids.shape[1])
    # The model's own generation_config.json may ask for beams, which cannot be streamed.
    options: dict[str, Any] = {"do_sample": temperature > 0, "num_beams": 1}
    options["max_new_tokens"] = max_new_tokens
    if temperature > 0:
        options["temperature"] = temperature
    torch.manual_seed(seed)
    ids = ids.to(model.device).long()
    with torch.inference_mode():
        try:
            done = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=_Streamer(tokenizer, write),
                logits_processor=LogitsProcessorList([_CheckedLogits(model.dtype)]),
                pad_token_id=tokenizer.pad_token_id or 0,
                **options,
            )
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            # transformers checks what that file says where it uses it.
            line = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            raise UserError(
                f"{model.name_or_path}: cannot generate, by its generation_config.json or "
                f"otherwise: {line}"
            ) from error
    return int(done.shape[1] - ids.shape[1])
