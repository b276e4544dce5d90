"""Perplexity of a causal language model on a text, by a protocol that is stated with the number."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyprune.calibration.text import SEPARATOR, documents
from pyprune.calibration.tokens import bos_prefix, encode
from pyprune.errors import UserError
from pyprune.models.adapter import decoder_of
from pyprune.models.positions import check_ids, entries_of, positions_of
from pyprune.models.running import evaluation, head_logits, positions_at_once
from pyprune.progress import CountProgress

# 48 windows of 1024, the protocol of the reference figures for the packaged model: 3.3 s of one
# core a window there.
DEFAULT_MAX_TOKENS = 48 * 1024
DEFAULT_SEQLEN = 1024
LOGITS_BYTES = 32 << 20  # of one chunk in float32: small enough to be reused out of the cache
CHARACTERS_PER_TOKEN = 8  # first guess of how much text gives the tokens asked for
CUT_MARGIN = 64  # tokens next to the cut may be tokenised differently than in the whole text


@dataclass(frozen=True)
class Perplexity:
    """The result and its protocol.

    nll: mean negative log-likelihood in nats over all scored tokens. ppl: exp(nll).
    window_nll: mean over windows of each window's mean; equal to nll unless `stride` is less than
    `seqlen`, where the first window scores more tokens than the others.
    tokens: scored ones. sha256: of the token ids read from the text (int64, little endian).
    seconds: wall time of all forwards. tokens_per_second: tokens fed to the model per second.
    """

    ppl: float
    nll: float
    window_nll: float
    tokens: int
    windows: int
    seqlen: int
    stride: int
    bos: bool
    text: str
    sha256: str
    seconds: float
    tokens_per_second: float

    @property
    def protocol(self) -> str:
        """One line that says how the number came about."""
        overlap = "" if self.stride == self.seqlen else f", stride {self.stride}"
        return (
            f"text {self.text}, {self.tokens:,} tokens scored in {self.windows} windows of "
            f"{self.seqlen}{overlap}, {'BOS' if self.bos else 'no BOS'}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def text_ids(source: str | Path, tokenizer: Any, max_tokens: int | None = None) -> Tensor:
    """int64 [N], N <= max_tokens: the tokens of `source` (`pyprune.calibration.text.documents`,
    evaluation part), documents joined by an empty line and tokenised as one text without special
    tokens. Of a long source no more is read than `max_tokens` need."""
    wanted = math.inf if max_tokens is None else max_tokens + CUT_MARGIN
    characters = wanted * CHARACTERS_PER_TOKEN
    stream = documents(source, "evaluation")
    collected: list[str] = []
    size = 0
    while True:
        ended = True
        for text in stream:
            collected.append(text)
            size += len(text) + len(SEPARATOR)
            if size >= characters:
                ended = False
                break
        ids = encode(tokenizer, SEPARATOR.join(collected))
        if ended or len(ids) >= wanted:
            return torch.tensor(ids[:max_tokens], dtype=torch.int64)
        characters *= 2


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer_or_ids: Any,
    *,
    text: str | Path = "wiki",
    seqlen: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    bos: bool = False,
    bos_token_id: int | None = None,
    progress: CountProgress | None = None,
) -> Perplexity:
    """exp of the mean negative log-likelihood per token, on windows of `seqlen` tokens (None:
    DEFAULT_SEQLEN, or as many as the model has positions where these are fewer).

    tokenizer_or_ids: a tokenizer, which reads `text` (see `text_ids`), or the ids themselves, int64
    [N]; `text` then only names them. Windows begin every `stride` tokens (None: `seqlen`, no
    overlap; the protocol of GPTQ, SparseGPT and Wanda) and are all full: the tail is dropped. A
    window scores every token but its first; if windows overlap, the later ones score only their
    last `stride` tokens, so that each token counts once and has at least seqlen - stride context.
    bos: every window begins with the BOS token (`bos_token_id`, or the tokenizer's) before
    seqlen - 1 tokens of text, all of which are scored.
    progress: called with (windows done, windows in all).

    Logits are the model's own, computed for a chunk of tokens at a time (`_losses`) and turned into
    losses in float32. Raises `UserError` on too little text, tokens that the model does not have, a
    `seqlen` beyond its positions, and logits that are NaN or infinite where it matters.
    """
    if seqlen is None:
        seqlen = min(DEFAULT_SEQLEN, _positions(model) or DEFAULT_SEQLEN)
    stride = seqlen if stride is None else stride
    _check_protocol(model, seqlen, stride, batch_size, max_tokens)
    if isinstance(tokenizer_or_ids, Tensor):
        ids = tokenizer_or_ids.reshape(-1)[:max_tokens].to("cpu", torch.int64)
    else:
        ids = text_ids(text, tokenizer_or_ids, max_tokens)
    prefix = _prefix(tokenizer_or_ids, bos, bos_token_id)
    room, step = seqlen - len(prefix), min(stride, seqlen - len(prefix))
    count = (len(ids) - room) // step + 1 if len(ids) >= room else 0
    if count == 0:
        if max_tokens is not None and len(ids) == max_tokens:
            raise UserError(
                f"max_tokens: expected {room} or more, one window of the text, got {max_tokens}"
            )
        raise UserError(f"text {text}: too little: a window needs {room} tokens, {len(ids)} found")
    check_ids(ids, _entries(model), f"text {text}")
    windows = ids.unfold(0, room, step)
    windows = torch.cat([torch.tensor(prefix).expand(count, -1).to(ids), windows], dim=1)
    sums, scored, seconds = _score(model, windows, step, batch_size, progress)
    nll = float(sums.sum()) / int(scored.sum())
    return Perplexity(
        ppl=math.exp(nll),
        nll=nll,
        window_nll=float((sums / scored).mean()),
        tokens=int(scored.sum()),
        windows=count,
        seqlen=seqlen,
        stride=seqlen if step == room else step,
        bos=bool(prefix),
        text=str(text),
        sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        seconds=seconds,
        tokens_per_second=windows.numel() / seconds,
    )


def _check_protocol(
    model: Any, seqlen: int, stride: int, batch_size: int, max_tokens: int | None
) -> None:
    if seqlen < 2:
        raise UserError(f"seqlen: expected at least 2, got {seqlen}")
    longest = _positions(model)
    if longest is not None and seqlen > longest:
        raise UserError(f"seqlen: the model has {longest} positions, got {seqlen}")
    if not 1 <= stride <= seqlen:
        raise UserError(f"stride: expected 1 to seqlen = {seqlen}, got {stride}")
    if batch_size < 1:
        raise UserError(f"batch_size: expected at least 1, got {batch_size}")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens: expected at least 1, got {max_tokens}")


def _positions(model: Any) -> int | None:
    return positions_of(model.config) if hasattr(model, "config") else None


def _entries(model: Any) -> int | None:
    return entries_of(model.config) if hasattr(model, "config") else None


def _prefix(tokenizer_or_ids: Any, bos: bool, bos_token_id: int | None) -> list[int]:
    if not bos:
        return []
    if bos_token_id is not None:
        return [bos_token_id]
    return bos_prefix(tokenizer_or_ids, bos)


def _score(
    model: Any, windows: Tensor, step: int, batch_size: int, progress: CountProgress | None
) -> tuple[Tensor, Tensor, float]:
    """Summed loss (float64) and number of scored tokens per window, and the seconds it took."""
    count, length = windows.shape
    scored = torch.full((count,), min(step, length - 1))
    scored[0] = length - 1
    sums = torch.zeros(count, dtype=torch.float64)
    device = next(model.parameters()).device
    started = time.perf_counter()
    with evaluation(model):
        for first in range(0, count, batch_size):
            batch = windows[first : first + batch_size].to(device)
            losses = _losses(model, batch).double().cpu()
            for row, loss in enumerate(losses):
                sums[first + row] = loss[length - 1 - int(scored[first + row]) :].sum()
            bad = (~sums[first : first + len(batch)].isfinite()).nonzero()
            if len(bad):
                raise UserError(
                    f"the model gives NaN or infinite logits in window {first + int(bad[0])}; "
                    f"its perplexity is undefined"
                )
            if progress is not None:
                progress(first + len(batch), count)
    return sums, scored, time.perf_counter() - started


def _losses(model: Any, input_ids: Tensor) -> Tensor:
    """-log p(token t+1 | tokens to t), float32 [B, T - 1].

    The decoder runs once over the whole batch. Its output then goes through the rest of the model's
    own forward (head, logit scaling, soft-capping) a chunk of positions at a time, so that at most
    `LOGITS_BYTES` of logits exist, whatever the vocabulary and the window.
    """
    decoder = _decoder(model)
    output = decoder(input_ids=input_ids, use_cache=False)
    hidden = output.last_hidden_state[:, :-1]
    chunk = positions_at_once(model, len(input_ids), LOGITS_BYTES)
    losses = []
    for start in range(0, hidden.shape[1], chunk):
        piece = hidden[:, start : start + chunk]
        logits = head_logits(model, decoder, output, piece, input_ids).float()
        targets = input_ids[:, 1 + start : 1 + start + chunk]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape))
    return torch.cat(losses, dim=1)


def _decoder(model: Any) -> Any:
    """The part of a transformers causal language model below its head."""
    if not hasattr(model, "get_decoder") or model.get_output_embeddings() is None:
        raise UserError(
            f"perplexity: expected a transformers model with a language-model head, "
            f"got {type(model).__name__}"
        )
    return decoder_of(model)
