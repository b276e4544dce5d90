"""Running a model, or parts of it, with something in the place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn

from pyprune.errors import UserError

# Logits in fp32 that exist at once: those of a vocabulary of 49,152 for 2,048 tokens would take
# 400 MB a sequence, and as much again for their gradient.
LOGITS_BYTES = 64 << 20


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, calling `module` calls `forward`; nests."""
    own = module.__dict__.get("forward")  # set by us, or by libraries that wrap a model's forward
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward  # the class's own method shows again
        else:
            module.forward = own


def head_logits(
    model: Any, decoder: nn.Module, output: Any, hidden: Tensor, input_ids: Tensor
) -> Tensor:
    """The model's forward with its decoder's answer given: whatever it does after that (head,
    scaling, soft-capping). Logits `[B, t, V]`.

    Args:
        model: a transformers causal language model; decoder: what its `get_decoder()` names.
        output: what the decoder answered to some tokens.
        hidden: `[B, t, d]`, takes the place of the answer's hidden states: any of their positions.
        input_ids: `[B, T]`, for the model's signature alone.

    Raises:
        UserError: the model runs another decoder.
    """
    answer = copy(output)
    # Rows together: of a slice of positions PyTorch's bf16 product with a frozen head takes up to
    # 150 times as long on the CPU.
    answer["last_hidden_state"] = hidden.contiguous()
    with replaced_forward(decoder, lambda *_args, **_kwargs: answer):
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    if logits.shape[:2] != hidden.shape[:2]:
        raise UserError(
            f"{type(model).__name__} does not run the decoder that its get_decoder() names"
        )
    return logits


def positions_at_once(model: Any, rows: int, nbytes: int | None = None) -> int:
    """How many positions of `rows` sequences have logits of at most `nbytes` (None: LOGITS_BYTES)
    in fp32; 1 at least."""
    vocabulary: int = model.get_output_embeddings().out_features
    return max(1, (LOGITS_BYTES if nbytes is None else nbytes) // (4 * vocabulary * rows))
