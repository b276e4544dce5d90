"""What a model that was loaded whole goes back to when it is saved: the dtypes of its checkpoint,
and the numbers, where it was held in a dtype that does not have them all."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyprune.checkpoint.names import Piece
from pyprune.checkpoint.shards import TensorEntry, read_tensor
from pyprune.checkpoint.source import Checkpoint
from pyprune.errors import UserError

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, eq=False)
class _Origin:
    """tensor: the parameter, for as long as it lives. pieces: what it is made of. dtype: the widest
    of theirs."""

    tensor: weakref.ref[Tensor]
    shape: torch.Size
    pieces: list[Piece]
    dtype: torch.dtype


class Originals:
    """Where the parameters and persistent buffers of `model`, just loaded from `checkpoint`, come
    from. They are told apart by what they are, not by name: layers may be renumbered since."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self._origins: dict[int, _Origin] = {}
        # By name without numbers, for parameters that have taken the place of others.
        self._dtypes: dict[str, torch.dtype] = {}
        if not self._is_plain(model):
            self._note(model)

    def _is_plain(self, model: PreTrainedModel) -> bool:
        """Whether parameters are all there is, stored in one dtype and held in one that has all
        of its numbers: then there is nothing to note."""
        tensors = _floating(model)
        entries = self._checkpoint.tensors.values()
        stored = {entry.dtype for entry in entries if entry.dtype.is_floating_point}
        held = {tensor.dtype for tensor in tensors.values()}
        if len(stored) > 1 or not all(isinstance(t, nn.Parameter) for t in tensors.values()):
            return False
        return all(holds(h, s) for h in held for s in stored)

    def _note(self, model: PreTrainedModel) -> None:
        checkpoint = self._checkpoint
        pieces = _pieces(checkpoint, model)
        for name, tensor in _floating(model).items():
            if name in pieces and id(tensor) not in self._origins:
                entries = [checkpoint.tensors[piece.tensor] for piece in pieces[name]]
                self._origins[id(tensor)] = _Origin(
                    weakref.ref(tensor), tensor.shape, pieces[name], _widest(entries)
                )
        for name, tensor in _floating(model).items():  # once more for the other names of tied ones
            if id(tensor) in self._origins:
                kind, dtype = _NUMBER.sub("*", name), self._origins[id(tensor)].dtype
                self._dtypes[kind] = torch.promote_types(self._dtypes.get(kind, dtype), dtype)

    @torch.no_grad()
    def restore(self, model: PreTrainedModel) -> None:
        """Gives everything in `model` the dtype it is stored in, in place. What is there as it was
        loaded gets the checkpoint's numbers, also those that the model's dtype has rounded (but
        not to zero).

        Parameters that are new since then take the dtype of those that they have taken the place
        of; others that of the checkpoint. UserError for a number that the dtype cannot hold.
        """
        done: set[int] = set()
        for name, tensor in _floating(model).items():
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            dtype = self._dtypes.get(_NUMBER.sub("*", name), self._checkpoint.dtype)
            origin, now = self._origins.get(id(tensor)), tensor.data
            if origin is not None and origin.tensor() is tensor:
                tensor.data = self._stored(origin, now)
            elif isinstance(tensor, nn.Parameter):
                tensor.data = now.to(dtype)
            if bool(now.isfinite().all()) and not bool(tensor.isfinite().all()):
                raise UserError(f"{name}: its new values do not fit into {tensor.dtype}")
        model.config.dtype = self._checkpoint.dtype

    def _stored(self, origin: _Origin, now: Tensor) -> Tensor:
        """`now` in the dtype that it is stored in, with what it still has of the numbers there."""
        if holds(now.dtype, origin.dtype) or now.shape != origin.shape:
            return now.to(origin.dtype)
        stored = torch.empty(origin.shape, dtype=origin.dtype)
        for piece in origin.pieces:
            piece.view(stored).copy_(read_tensor(self._checkpoint.tensors[piece.tensor]))
        return unrounded(now, stored.to(now.device))


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether the first floating point dtype has every number of the second."""
    return torch.promote_types(wide, narrow) == wide


def unrounded(now: Tensor, stored: Tensor) -> Tensor:
    """`now` in the dtype of `stored`, of one shape with it, and with its numbers where rounding
    makes them those of `now`. Zeros stay, whatever was there: they may be made on purpose."""
    same = (stored.to(now.dtype) == now) & (now != 0)
    return torch.where(same, stored, now.to(stored.dtype))


def _floating(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers; tied ones under each of their names."""
    state = model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if t.is_floating_point()}


def _pieces(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, list[Piece]]:
    """By the model's names. Where the rules for names do not do, tensors that have those names."""
    if not checkpoint.streaming_obstacle():
        return checkpoint.names.pieces
    return {
        name: [Piece(name)]
        for name, tensor in _floating(model).items()
        if name in checkpoint.tensors and checkpoint.tensors[name].shape == tuple(tensor.shape)
    }


def _widest(entries: list[TensorEntry]) -> torch.dtype:
    dtype = entries[0].dtype
    for entry in entries:
        dtype = torch.promote_types(dtype, entry.dtype)
    return dtype
