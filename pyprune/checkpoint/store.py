"""One block of a checkpoint at a time: read, pruned elsewhere, written into the output in place."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyprune.checkpoint.names import owners
from pyprune.checkpoint.originals import Originals, holds, unrounded
from pyprune.checkpoint.output import copy_auxiliary, save_stock
from pyprune.checkpoint.shards import TensorEntry, read_tensor, write_tensor
from pyprune.checkpoint.source import Checkpoint
from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter


class StreamingStore:
    """Blocks come from `checkpoint` and go into the copies of its shards in `out_dir`.

    adapter: of `checkpoint.build_model("meta", dtype)`. Parameters are real, on `device` and of
    `dtype` (that of the adapter's model by default) between `load` and `flush`, meta otherwise.
    The output starts as a byte copy of the input, of which only the parameters of the adapter's
    linears are overwritten, in the dtype they are stored in: everything else is bit-identical, and
    shards and metadata stay as they are. Tensors are read from the copy, so that a block that is
    loaded again after a `flush` is the pruned one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter,
        out_dir: Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        reason = checkpoint.streaming_obstacle()
        if reason:
            raise UserError(f"{checkpoint.path}: cannot be read block by block: {reason}")
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.out_dir = out_dir
        self.device = torch.device(device)
        self.dtype = dtype
        self._pieces = checkpoint.names.pieces
        self._names = dict(adapter.model.state_dict(keep_vars=True))
        self._blocks = [self._under(name) for name in adapter.block_names]
        self._loaded: set[int] = set()
        self._check_disjoint()
        for file in checkpoint.files:
            shutil.copyfile(file, out_dir / file.name)

    def _under(self, prefix: str) -> list[str]:
        return [name for name in self._names if name.startswith(f"{prefix}.")]

    def _check_disjoint(self) -> None:
        seen: dict[int, str] = {}
        for names in self._blocks:
            for name in names:
                other = seen.setdefault(id(self._names[name]), name)
                if other != name:
                    raise UserError(f"{name} and {other} share one parameter across blocks")

    def load_rest(self) -> None:
        """Loads what the decoder holds outside its blocks: embeddings, final norm, projections."""
        in_blocks = {name for names in self._blocks for name in names}
        inside = {id(value) for value in self.adapter.decoder.state_dict(keep_vars=True).values()}
        self._load(
            [
                name
                for name, value in self._names.items()
                if name not in in_blocks and id(value) in inside
            ]
        )
        blocks = {id(module) for block in self.adapter.blocks for module in block.modules()}
        for module in self.adapter.decoder.modules():
            if id(module) not in blocks:
                _move_buffers(module, self.device)

    def load(self, i: int) -> None:
        """Makes block `i` real. Does nothing if it is."""
        if i in self._loaded:
            return
        self._load(self._blocks[i])
        self._loaded.add(i)
        for module in self.adapter.blocks[i].modules():
            _move_buffers(module, self.device)

    def flush(self, i: int) -> None:
        """Writes the weights of block `i`'s linears into the output and makes the block meta."""
        live = self._live(i)
        for name in dict.fromkeys(linear.parameter_name for linear in self.adapter.linears(i)):
            self.write(name, live[name])
        self.release(i)

    def release(self, i: int) -> None:
        """Makes block `i` meta again without writing it."""
        places = owners(self.adapter.model)
        for name, value in self._live(i).items():
            _replace(places[id(value)], self._names[name])
        for module in self.adapter.blocks[i].modules():
            _move_buffers(module, torch.device("cpu"))
        self._loaded.discard(i)

    def _live(self, i: int) -> dict[str, Tensor]:
        """The present parameters and persistent buffers of block `i`, by the model's names."""
        block, prefix = self.adapter.blocks[i], self.adapter.block_names[i]
        return {f"{prefix}.{name}": v for name, v in block.state_dict(keep_vars=True).items()}

    def _load(self, names: list[str]) -> None:
        places = owners(self.adapter.model)
        loaded: set[int] = set()
        for name in names:
            meta = self._names[name]
            # A tied parameter comes under several names, of which the checkpoint may hold one.
            if id(meta) in loaded or name not in self._pieces or not meta.is_meta:
                continue
            value: Tensor = self._read(name, meta)
            if isinstance(meta, nn.Parameter):
                value = nn.Parameter(value, requires_grad=meta.requires_grad)
            loaded.add(id(meta))
            _replace(places[id(meta)], value)

    def _read(self, name: str, meta: Tensor) -> Tensor:
        dtype = meta.dtype
        if dtype.is_floating_point and self.dtype is not None:
            dtype = self.dtype
        pieces = self._pieces[name]
        if pieces[0].whole:
            return self._read_entry(self.checkpoint.tensors[pieces[0].tensor]).to(
                self.device, dtype
            )
        value = torch.empty(meta.shape, dtype=dtype, device=self.device)
        for piece in pieces:
            piece.view(value).copy_(self._read_entry(self.checkpoint.tensors[piece.tensor]))
        return value

    def _read_entry(self, entry: TensorEntry) -> Tensor:
        return read_tensor(entry, self.out_dir / entry.file.name)

    def write(self, name: str, value: Tensor) -> None:
        """Writes the model's parameter `name` into the output, in the dtype it is stored in, with
        the numbers from there that the model's dtype has rounded and that have stayed; LayerError
        if that dtype cannot hold it."""
        for piece in self._pieces[name]:
            entry = self.checkpoint.tensors[piece.tensor]
            part = piece.view(value.detach())
            if holds(part.dtype, entry.dtype):
                stored = part.to("cpu", entry.dtype)
            else:
                stored = unrounded(part.cpu(), self._read_entry(entry))
            if not bool(stored.isfinite().all()) and bool(part.isfinite().all()):
                raise LayerError(name, f"its new weights do not fit into {entry.dtype}")
            write_tensor(entry, stored, self.out_dir / entry.file.name)


def write_parameters(
    checkpoint: Checkpoint,
    originals: Originals,
    model: PreTrainedModel,
    changed: Mapping[str, Tensor],
    out_dir: Path,
    dtype: torch.dtype | None,
) -> None:
    """Writes `model`, loaded whole from `checkpoint` in `dtype`, into `out_dir`, and what else the
    checkpoint consists of: copies of the shards in which only the parameters `changed`, by the
    model's names, are overwritten. Where there is a `streaming_obstacle`, it is saved in shards of
    its own. originals: noted when `model` was loaded.
    """
    streamed = not checkpoint.streaming_obstacle()
    copy_auxiliary(checkpoint, out_dir, index=streamed)
    if not streamed:
        originals.restore(model)
        save_stock(model, out_dir)
        return
    # Built again, empty, it says where in the shards its parameters are.
    empty = Adapter.of(checkpoint.build_model("meta", dtype))
    store = StreamingStore(checkpoint, empty, out_dir)
    for name, value in changed.items():
        store.write(name, value)


def _replace(places: list[tuple[nn.Module, str]], value: Tensor) -> None:
    for module, name in places:
        if isinstance(value, nn.Parameter):
            module._parameters[name] = value
        else:
            module._buffers[name] = value


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers that no checkpoint holds."""
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers[name]
        if buffer is not None:
            module._buffers[name] = buffer.to(device)
