"""The forward of one batch through the whole decoder, as a coroutine that hooks can pause."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from pyprune.calibration.schedule import Site, SiteInput, Stage, TensorId
from pyprune.calibration.tokens import Batch
from pyprune.errors import LayerError, UserError


@dataclass
class Pause:
    """Where a forward waits.

    Attributes:
        name: of the block that is about to run, or of the site.
        tensors: activations that wait there.
        args, kwargs: what the model is about to call the block with.
        inputs: of the site; empty at a block's entry.
    """

    name: str
    tensors: list[Tensor]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: list[SiteInput] = field(default_factory=list)


class Forward:
    """One batch on its way through the decoder.

    `resume()` runs until the next pause. Hooks find the forward that is running by `running()` and
    pause it by `wait(...)`.
    """

    def __init__(self, decoder: nn.Module, batch: Batch, index: int, device: torch.device) -> None:
        self.index = index
        self.pause: Pause | None = None
        self.read: dict[Stage, TensorId] = {}
        self._decoder = decoder
        self._batch = batch.to(device)
        self._real = _real_tokens(index, self._batch)
        self._greenlet = greenlet(self._run)
        self._greenlet.gr_context = contextvars.copy_context()
        self._greenlet.forward = self

    @staticmethod
    def running() -> Forward | None:
        """The forward that the caller is part of, if any."""
        forward: Forward | None = getattr(getcurrent(), "forward", None)
        return forward

    @property
    def real_tokens(self) -> int:
        return self._batch.input_ids.numel() if self._real is None else int(self._real.sum())

    def _run(self) -> None:
        ids, mask = self._batch.input_ids, self._batch.attention_mask
        self._decoder(input_ids=ids, attention_mask=mask, use_cache=False)

    def resume(self) -> Pause | None:
        """Runs on to the next pause; None once the decoder has returned."""
        self.pause = None
        self.pause = self._greenlet.switch()
        return self.pause

    def wait(self, pause: Pause) -> None:
        """Called from within the forward: pauses it."""
        self._greenlet.parent.switch(pause)

    def stop(self) -> None:
        """Abandons the forward where it waits; its frames unwind and let go of their tensors."""
        self.pause = None
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)
        self._greenlet.forward = None

    def real_rows(self, site: Site, inputs: list[SiteInput]) -> list[Tensor]:
        """Each input's rows `[t, C]` that are real tokens.

        Padding is left out rather than multiplied by zero: what a model computes for it may be NaN.

        Raises:
            LayerError: there is padding, and the rows cannot be told to be the batch's tokens.
        """
        rows = [given.x.reshape(-1, given.x.shape[-1]) for given in inputs]
        if self._real is None:
            return rows
        self._check_rows(site, inputs)
        return [
            x[self._real if given.rows is None else self._real[given.rows]]
            for given, x in zip(inputs, rows, strict=True)
        ]

    def real_outputs(self, name: str, output: Any) -> Tensor:
        """Rows `[t, d]` of what block `name` answered (a tensor, or a tuple that begins with it)
        that are real tokens; LayerError if they cannot be told to be."""
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        batch, length = self._batch.input_ids.shape
        if hidden.shape[:-1] != (batch, length):
            raise LayerError(
                name,
                f"expected an output for each of the {batch}x{length} tokens, got one of shape "
                f"{tuple(hidden.shape)}",
            )
        rows = hidden.flatten(0, -2)
        return rows if self._real is None else rows[self._real]

    def _check_rows(self, site: Site, inputs: list[SiteInput]) -> None:
        batch, length = self._batch.input_ids.shape
        tokens = batch * length
        if site.fused:
            fits = inputs[0].tokens == tokens
        else:
            fits = tuple(inputs[0].x.shape[:-1]) in {(batch, length), (tokens,)}
        if not fits:
            raise LayerError(
                site.name,
                f"expected one row for each of the {batch}x{length} tokens, got an input of shape "
                f"{tuple(inputs[0].x.shape)}: padding cannot be told apart; calibrate on sequences "
                "of one length",
            )


def _real_tokens(index: int, batch: Batch) -> Tensor | None:
    """Which of the `B * T` tokens are not padding, bool; None if all are."""
    input_ids, mask = batch.input_ids, batch.attention_mask
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UserError(
            f"batch {index}: expected token ids [B, T], got shape {tuple(input_ids.shape)}"
        )
    if mask is None:
        return None
    if mask.shape != input_ids.shape:
        raise UserError(
            f"batch {index}: expected an attention mask of shape {tuple(input_ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    real = mask.reshape(-1) != 0
    return None if bool(real.all()) else real


@contextmanager
def stopping_at_entries(blocks: list[nn.Module], names: list[str]) -> Iterator[None]:
    """Within the context a Forward waits before each block with what the block is called with."""

    def stop_at(name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            forward = Forward.running()
            if forward is not None:
                hidden = args[0] if args else kwargs["hidden_states"]
                forward.wait(Pause(name, [hidden], args, kwargs))

        return hook

    with ExitStack() as stack:
        for block, name in zip(blocks, names, strict=True):
            hook = block.register_forward_pre_hook(stop_at(name), with_kwargs=True)
            stack.callback(hook.remove)
        yield
