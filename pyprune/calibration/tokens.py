"""Token batches for calibration: the same text, seed and tokenizer give the same tokens."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyprune.calibration.text import SEPARATOR, documents
from pyprune.errors import UserError

Padding = Literal["windows", "documents"]
READ_FACTOR = 8  # windows (or documents) read at most for each one that is asked for
TOKENIZED_PIECE = 1 << 16  # characters given to the tokenizer at once, at least
IGNORED_PAD_ID = 0  # where the tokenizer names no padding token; padding is masked anyway


@dataclass(frozen=True)
class Batch:
    """input_ids: int64 [B, T]. attention_mask: [B, T], 0 for padding, wherever it is; None when
    nothing is padded."""

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """bool [B, T]: which tokens are no padding."""
        mask = self.attention_mask
        return torch.ones_like(self.input_ids, dtype=torch.bool) if mask is None else mask != 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        mask = self.attention_mask
        return Batch(self.input_ids.to(device), None if mask is None else mask.to(device))

    def rows(self, which: slice | Tensor) -> Batch:
        """Some of its sequences."""
        mask = self.attention_mask
        return Batch(self.input_ids[which], None if mask is None else mask[which])


@dataclass(frozen=True)
class TokenSet:
    """Calibration tokens and what identifies them.

    sha256: over the real tokens of every sequence. tokens: real ones, padding excluded.
    """

    batches: list[Batch]
    source: str
    sha256: str
    tokens: int
    seqlen: int
    nsamples: int


def calibration_tokens(
    source: str | Path,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    batch_size: int,
    padding: Padding = "windows",
    bos: bool | None = None,
) -> TokenSet:
    """Draws `nsamples` sequences from `source` (see `pyprune.calibration.text.documents`).

    padding="windows": the documents are joined by empty lines and cut into consecutive windows of
    exactly `seqlen` tokens; `nsamples` of them are drawn without replacement, so no token is used
    twice. padding="documents": `nsamples` documents are drawn, cut after `seqlen` tokens, shorter
    ones padded on the right to the longest of their batch and masked.

    The draw is uniform over the first `READ_FACTOR * nsamples` windows or documents, by reservoir
    sampling: no more is read, and never more than those asked for (and a piece of text) are held.
    bos: begin every sequence with the beginning-of-sequence token; None: if the tokenizer itself
    does that. It counts among the `seqlen`.
    The reference repositories draw windows with replacement from documents longer than `seqlen`,
    which can repeat tokens and never ends where no document is long enough.

    Raises `UserError` when the text is too short, and states the tokens needed and found.
    """
    _check_sizes(nsamples=nsamples, seqlen=seqlen, batch_size=batch_size)
    if padding not in get_args(Padding):
        raise UserError(f"padding: expected one of {get_args(Padding)}, got {padding!r}")
    prefix = bos_prefix(tokenizer, begins_with_bos(tokenizer) if bos is None else bos)
    room = seqlen - len(prefix)
    if room < 1:
        raise UserError(f"seqlen: expected at least 2 with a BOS token, got {seqlen}")
    texts = documents(source, "calibration")
    found = _Counter()
    if padding == "windows":
        candidates = _windows(_token_pieces(texts, tokenizer), room, found)
    else:
        candidates = _document_tokens(texts, tokenizer, room, found)
    rng = random.Random(seed)
    drawn = _reservoir(itertools.islice(candidates, READ_FACTOR * nsamples), nsamples, rng)
    if len(drawn) < nsamples:
        raise UserError(_too_little(str(source), padding, nsamples, room, len(drawn), found.tokens))
    rng.shuffle(drawn)
    pad = getattr(tokenizer, "pad_token_id", None)
    return token_set(
        [prefix + ids for ids in drawn],
        source=str(source),
        seqlen=seqlen,
        batch_size=batch_size,
        pad_id=IGNORED_PAD_ID if pad is None else pad,
    )


def token_set(
    sequences: list[list[int]],
    *,
    source: str,
    seqlen: int,
    batch_size: int,
    pad_id: int = IGNORED_PAD_ID,
) -> TokenSet:
    """Batches of `batch_size` consecutive sequences (the last batch may have fewer), each padded on
    the right to the longest one of its batch."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(torch.tensor([len(ids), *ids], dtype=torch.int64).numpy().tobytes())
    batches = [
        _batch(sequences[start : start + batch_size], pad_id)
        for start in range(0, len(sequences), batch_size)
    ]
    return TokenSet(
        batches=batches,
        source=source,
        sha256=digest.hexdigest(),
        tokens=sum(map(len, sequences)),
        seqlen=seqlen,
        nsamples=len(sequences),
    )


def first_sequences(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first `count` sequences (or all, if there are fewer), in the batches that they are in."""
    found: list[Batch] = []
    left = count
    for batch in batches:
        if left > 0:
            found.append(batch.rows(slice(left)))
            left -= len(found[-1].input_ids)
    return found


def one_by_one(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The sequences as batches of one."""
    for batch in batches:
        for n in range(len(batch.input_ids)):
            yield batch.rows(slice(n, n + 1))


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS token before every text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("a").input_ids)[:1] == [bos]


def bos_prefix(tokenizer: Any, bos: bool) -> list[int]:
    """`[bos_token_id]` or `[]`; `UserError` when a BOS is asked of a tokenizer without one."""
    if not bos:
        return []
    if getattr(tokenizer, "bos_token_id", None) is None:
        raise UserError("bos: expected a tokenizer with a BOS token, this one has none")
    return [int(tokenizer.bos_token_id)]


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text` alone, without special ones around it."""
    # verbose=False: texts longer than the model's context are cut up by us, no warning is due
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


class _Counter:
    """How many tokens of the source have been read."""

    tokens = 0


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")


def _token_pieces(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of the documents joined by empty lines, some `TOKENIZED_PIECE` characters at a time
    (a piece ends with a document, so that no word is cut)."""
    collected: list[str] = []
    size = 0
    for text in texts:
        collected.append(text)
        size += len(text) + len(SEPARATOR)
        if size >= TOKENIZED_PIECE:
            yield encode(tokenizer, SEPARATOR.join([*collected, ""]))
            collected, size = [], 0
    if collected:
        yield encode(tokenizer, SEPARATOR.join(collected))


def _windows(pieces: Iterable[list[int]], length: int, found: _Counter) -> Iterator[list[int]]:
    """Consecutive windows of `length` tokens; an incomplete last one is dropped."""
    held: list[int] = []
    for piece in pieces:
        found.tokens += len(piece)
        held += piece
        whole = len(held) // length * length
        for start in range(0, whole, length):
            yield held[start : start + length]
        held = held[whole:]


def _document_tokens(
    texts: Iterable[str], tokenizer: Any, length: int, found: _Counter
) -> Iterator[list[int]]:
    """The first `length` tokens of every document that has any."""
    for text in texts:
        ids = encode(tokenizer, text)[:length]
        found.tokens += len(ids)
        if ids:
            yield ids


def _reservoir(candidates: Iterator[list[int]], count: int, rng: random.Random) -> list[list[int]]:
    """`count` of the candidates, uniformly without replacement (Vitter's algorithm R)."""
    kept = list(itertools.islice(candidates, count))
    for seen, candidate in enumerate(candidates, start=count + 1):
        slot = rng.randrange(seen)
        if slot < count:
            kept[slot] = candidate
    return kept


def _too_little(
    source: str, padding: Padding, nsamples: int, length: int, drawn: int, tokens: int
) -> str:
    if padding == "documents":
        needed = f"{nsamples} documents needed, {drawn} found"
        return f"text {source}: too little: {needed}; give more text or a smaller nsamples"
    needed = f"{nsamples} windows of {length} need {nsamples * length} tokens"
    return (
        f"text {source}: too little: {needed}, {tokens} found; give more text or a smaller "
        "nsamples or seqlen"
    )


def _batch(sequences: list[list[int]], pad_id: int) -> Batch:
    longest = max(map(len, sequences))
    rows = [ids + [pad_id] * (longest - len(ids)) for ids in sequences]
    input_ids = torch.tensor(rows, dtype=torch.int64)
    if all(len(ids) == longest for ids in sequences):
        return Batch(input_ids)
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = torch.arange(longest) < lengths[:, None]
    return Batch(input_ids, mask.to(torch.int64))
