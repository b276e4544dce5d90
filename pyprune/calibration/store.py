"""How the blocks of a model come into memory and leave it again."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pyprune.models.adapter import Adapter


class BlockStore(Protocol):
    """Where the walk gets its blocks from. At most one is loaded at a time, in order."""

    def load_rest(self) -> None:
        """Makes everything of the decoder outside the blocks real and puts it on the device; not
        called if nothing runs (no statistics)."""

    def load(self, i: int) -> None:
        """Makes block `i` real and puts it on the device."""

    def flush(self, i: int) -> None:
        """Block `i` is final: persists it, then frees it or moves it away."""

    def release(self, i: int) -> None:
        """Block `i` was only looked at: frees it or moves it away as it was."""


class InMemoryStore:
    """A model that is in memory: blocks visit `device` one at a time and go back where they were.

    A context manager: leaving it takes whatever still is on the device back too. On one device
    nothing moves.
    """

    def __init__(self, adapter: Adapter, device: torch.device | str) -> None:
        self._adapter = adapter
        # "cuda" is one of its devices, and tensors say which.
        self._device = torch.empty(0, device=device).device
        self._homes: dict[tuple[nn.Module, str], torch.device] = {}

    def __enter__(self) -> InMemoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._take_back()

    def load_rest(self) -> None:
        in_blocks = {m for block in self._adapter.blocks for m in block.modules()}
        for module in self._adapter.decoder.modules():
            if module not in in_blocks:
                self._bring(module)

    def load(self, i: int) -> None:
        for module in self._adapter.blocks[i].modules():
            self._bring(module)

    def flush(self, i: int) -> None:
        self.release(i)

    def release(self, i: int) -> None:
        self._take_back(set(self._adapter.blocks[i].modules()))

    def _bring(self, module: nn.Module) -> None:
        for name, t in _own_tensors(module):
            if t.device != self._device:
                self._homes[module, name] = t.device
                _move(module, name, t, self._device)

    def _take_back(self, modules: set[nn.Module] | None = None) -> None:
        for module, name in list(self._homes):
            if modules is None or module in modules:
                home = self._homes.pop((module, name))
                _move(module, name, getattr(module, name), home)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = list(module.named_parameters(recurse=False))
    return [*parameters, *module.named_buffers(recurse=False)]


def _move(module: nn.Module, name: str, t: Tensor, device: torch.device) -> None:
    moved = t.detach().to(device)
    if isinstance(t, nn.Parameter):
        # The Parameter stays the same object: a tied head and an optimizer keep referring to it.
        t.data = moved
    else:
        setattr(module, name, moved)
