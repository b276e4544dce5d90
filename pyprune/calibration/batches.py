"""Calibration data that a caller hands over: token ids in whatever container they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyprune.calibration.head import IGNORED
from pyprune.calibration.tokens import Batch, TokenSet
from pyprune.errors import UserError
from pyprune.models.positions import check_ids


def as_token_set(data: object, *, vocabulary: int | None, positions: int | None) -> TokenSet:
    """Batches of token ids as a TokenSet.

    Args:
        data: a TokenSet, or an iterable of Batch, of integer tensors `[B, T]` or `[T]`, or of
            mappings with `input_ids` and perhaps `attention_mask` (a tokenizer's output, a row of a
            dataset). Lists of integers and NumPy arrays are taken for tensors; of a list that holds
            one tensor (from a DataLoader over a TensorDataset), and of a pair of ids and targets
            whose last one counts alone (of the SparseGPT and Wanda loaders) or that are the ids
            (of GBLM-Pruner's for gradients), the ids.
        vocabulary, positions: what the model takes: ids below the one, `T` up to the other.

    Raises:
        UserError: something else was given, a batch does not fit the model, or there is no token.
    """
    if isinstance(data, TokenSet):
        data = replace(data, batches=[_ordinary(batch) for batch in data.batches])
        for i, batch in enumerate(data.batches):
            _check(i, batch, vocabulary, positions)
        return data
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise UserError(
            "calibration: expected a tokenizer or an iterable of token id tensors, "
            f"got {type(data).__name__}"
        )
    batches = [_ordinary(_as_batch(i, item)) for i, item in enumerate(data)]
    for i, batch in enumerate(batches):
        _check(i, batch, vocabulary, positions)
    tokens = sum(int(batch.real.sum()) for batch in batches)
    if tokens == 0:
        raise UserError(f"calibration: expected some tokens, got {len(batches)} batches without")
    return TokenSet(
        batches=batches,
        source="batches",
        sha256=_sha256(batches),
        tokens=tokens,
        seqlen=max(batch.input_ids.shape[1] for batch in batches),
        nsamples=sum(len(batch.input_ids) for batch in batches),
    )


def _as_batch(i: int, item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping) and "input_ids" in item:
        mask = item.get("attention_mask")
        return Batch(
            _two_dimensional(i, "input_ids", item["input_ids"]),
            None if mask is None else _two_dimensional(i, "attention_mask", mask),
        )
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        return Batch(_two_dimensional(i, "token ids", _ids_of(i, item)), None)
    if isinstance(item, Tensor | list | np.ndarray):
        return Batch(_two_dimensional(i, "token ids", item), None)
    got = type(item).__name__
    if isinstance(item, Mapping):
        got = f"one with {', '.join(map(str, item)) or 'nothing'}"
    elif isinstance(item, str):
        got = "text: tokenise it first, or name a file of it as calibration.source"
    raise UserError(
        f"calibration batch {i}: expected a tensor of token ids or a mapping with input_ids, "
        f"got {got}"
    )


def _ids_of(i: int, item: Sequence[Any]) -> Tensor:
    """The ids among the tensors of one batch, where it is plain which they are."""
    ids: Tensor = item[0]
    if len(item) == 1:
        return ids
    targets = item[1]
    if len(item) == 2 and isinstance(targets, Tensor) and targets.shape == ids.shape:
        ignored = targets[..., :-1]
        if torch.equal(targets, ids):
            return ids
        if bool((ignored == IGNORED).all()) and torch.equal(targets[..., -1], ids[..., -1]):
            return ids
    raise UserError(
        f"calibration batch {i}: expected token ids, got {len(item)} tensors: give a mapping with "
        "input_ids, and attention_mask where there is padding"
    )


def _ordinary(batch: Batch) -> Batch:
    """Without tensors of `torch.inference_mode`, which no gradient can be taken behind."""
    ids, mask = batch.input_ids, batch.attention_mask
    if ids.is_inference() or (mask is not None and mask.is_inference()):
        return Batch(ids.clone(), None if mask is None else mask.clone())
    return batch


def _two_dimensional(i: int, name: str, x: Any) -> Tensor:
    if isinstance(x, list | np.ndarray):
        try:
            x = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"calibration batch {i}: expected {name} as integers [B, T], got a "
                f"{type(x).__name__} that is none: {error}"
            ) from error
    wrong = not isinstance(x, Tensor) or x.dim() not in (1, 2) or x.is_floating_point()
    if wrong or (x.dtype == torch.bool and name != "attention_mask"):
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"calibration batch {i}: expected {name} as integers [B, T], got {got}")
    ids: Tensor = x[None] if x.dim() == 1 else x
    return ids.long()


def _check(i: int, batch: Batch, vocabulary: int | None, positions: int | None) -> None:
    ids, mask = batch.input_ids, batch.attention_mask
    if mask is not None and mask.shape != ids.shape:
        raise UserError(
            f"calibration batch {i}: expected an attention_mask {tuple(ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    if positions is not None and ids.shape[1] > positions:
        raise UserError(
            f"calibration batch {i}: expected at most the model's {positions} positions, "
            f"got {ids.shape[1]}"
        )
    check_ids(ids, vocabulary, f"calibration batch {i}")


def _sha256(batches: list[Batch]) -> str:
    """Of the length and the real tokens of every sequence, as in `tokens.token_set`."""
    digest = hashlib.sha256()
    for batch in batches:
        for row, real in zip(batch.input_ids.cpu(), batch.real.cpu(), strict=True):
            ids = row[real]
            digest.update(torch.tensor([len(ids), *ids.tolist()]).numpy().tobytes())
    return digest.hexdigest()
