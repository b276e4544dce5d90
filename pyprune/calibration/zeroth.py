"""How much the loss depends on some of the weights, seen in forwards alone.

The loss changes along a random direction z of the weights W by z . g, with g their gradient, and a
central difference of two losses shows it (Spall 1992; MeZO, arXiv 2305.17333). Over standard normal
z the mean of |z . g| is sqrt(2 / pi) ||g||, so that a few directions estimate the norm of the
gradient with the memory of inference (ECoFLaP, arXiv 2310.02998).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyprune.calibration.autograd import on_device
from pyprune.calibration.coroutine import TokenBatch, evaluation
from pyprune.calibration.head import IGNORED, LOGITS_AT_ONCE, check_head, head_logits
from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef


@dataclass(frozen=True)
class Perturbed:
    """Matrices of block number `block` that move together. name: theirs in messages."""

    name: str
    block: int
    linears: Sequence[LinearRef]


def directional_differences(
    adapter: Adapter,
    groups: Sequence[Perturbed],
    batches: Sequence[TokenBatch],
    *,
    epsilon: float = 1e-3,
    noises: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """For each group the mean of |L_n(W + epsilon z) - L_n(W - epsilon z)| / (2 epsilon) over
    sequences n and directions z, with all other weights as they are.

    L_n is the mean cross entropy of the next tokens of a sequence (padding excluded), summed in
    fp64 from logits of at least fp32. A direction serves the sequences of one batch. The blocks
    before a group answer what they answered on the dense model, so a loss costs the blocks from
    there on and the head.

    Args:
        groups: each of matrices of one block, e.g. `Perturbed(name, i, adapter.linears(i))`.
        batches: token ids `[B, T]`, each sequence of at least two real tokens in a row.
        epsilon: length of the step; z is standard normal.
        noises: directions per batch and group. seed: of their numbers, which are made anew from it
            for either sign, a matrix at a time.
        device: where the model runs; afterwards it is back where it was.
        progress: called with (batch, group) pairs done and in all.

    Returns:
        The means, in the order of `groups`. The weights are bit for bit what they were, whatever
        happens: the group that moves is kept as a copy.

    Raises:
        LayerError: a loss of a moved group is NaN or infinite.
        UserError: the dense loss is; the model has no head, or computes in 16 bits, which do not
            resolve the differences; a sequence has fewer than two tokens; no batch.
    """
    model, device = adapter.model, torch.device(device)
    check_head(adapter)
    _check_precision(model)
    if not batches:
        raise UserError("calibration: expected at least one sequence, got none")
    for b, batch in enumerate(batches):
        scored = (_labels(batch) != IGNORED).any(1)
        if not bool(scored.all()):
            raise UserError(
                f"batch {b}, sequence {int(scored.int().argmin())}: expected at least two tokens "
                "in a row (the loss is that of the next one), got none"
            )
    sums = torch.zeros(len(groups), dtype=torch.float64)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation(model))
        stack.enter_context(on_device(model, device))
        for b, batch in enumerate(batches):
            run = _Replay(adapter, batch, device)
            if not bool(run.dense.isfinite().all()):
                raise UserError(f"calibration: the loss of the dense model in batch {b} is NaN")
            for k, group in enumerate(groups):
                for draw in range(noises):
                    stream = _seed(seed, b, k, draw)
                    sums[k] += _difference(run, group, epsilon, stream) / noises
                if progress is not None:
                    progress(b * len(groups) + k + 1, len(batches) * len(groups))
    sequences = sum(len(batch.input_ids) for batch in batches)
    return (sums / sequences).tolist()


def _difference(run: _Replay, group: Perturbed, epsilon: float, seed: int) -> float:
    """Sum over the batch's sequences of |L_n(W + epsilon z) - L_n(W - epsilon z)| / (2 epsilon)."""
    originals = [ref.weight().clone() for ref in group.linears]
    losses = []
    try:
        for step in (epsilon, -epsilon):
            _move(group.linears, originals, step, seed)
            losses.append(run.losses(group.block))
    finally:
        for ref, original in zip(group.linears, originals, strict=True):
            ref.write(original)
    difference = float((losses[0] - losses[1]).abs().sum()) / (2 * epsilon)
    if difference != difference or difference == float("inf"):
        raise LayerError(
            group.name, f"expected finite losses at epsilon {epsilon:g}, got NaN or infinity"
        )
    return difference


def _move(refs: Sequence[LinearRef], originals: list[Tensor], step: float, seed: int) -> None:
    """Weights `original + step * z`, with the z of `seed`."""
    generator = torch.Generator(originals[0].device).manual_seed(seed)
    for ref, original in zip(refs, originals, strict=True):
        z = torch.randn(
            original.shape, generator=generator, device=original.device, dtype=original.dtype
        )
        ref.write(original.add(z, alpha=step))


def _seed(*parts: int) -> int:
    """One number below 2^63 that tells the parts apart (a polynomial modulo a prime)."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % ((1 << 61) - 1)
    return mixed


def _check_precision(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"differences of losses: expected a model in float32, got {dtype}, which does not "
            "resolve them (--dtype float32 for a checkpoint, or gradients: -A order=first)"
        )


def _labels(batch: TokenBatch) -> Tensor:
    """`[B, T - 1]`: the next token where it and the one before it are real."""
    labels, mask = batch.input_ids[:, 1:], batch.attention_mask
    if mask is None:
        return labels
    real = mask != 0
    return labels.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)


class _Replay:
    """The losses of one batch, from a block on. dense: those of the model as it is, `[B]` fp64."""

    def __init__(self, adapter: Adapter, batch: TokenBatch, device: torch.device) -> None:
        self._adapter = adapter
        self._ids = batch.input_ids.to(device)
        mask = batch.attention_mask
        self._mask = None if mask is None else mask.to(device)
        self._labels = _labels(batch).to(device)
        # What the blocks answer on the dense model.
        self._answers: list[Any] = []
        with ExitStack() as stack:
            for block in adapter.blocks:
                stack.callback(block.register_forward_hook(self._keep_answer).remove)
            self.dense = self._losses()

    def _keep_answer(self, block: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        self._answers.append(_copied(answer))  # the next block may write to it

    def losses(self, first: int) -> Tensor:
        """With the weights as they are now, which differ from block number `first` on: `[B]`."""
        with ExitStack() as stack:
            for block, answer in zip(self._adapter.blocks[:first], self._answers, strict=False):
                stack.enter_context(_answering(block, answer))
            return self._losses()

    def _losses(self) -> Tensor:
        out = self._adapter.decoder(input_ids=self._ids, attention_mask=self._mask, use_cache=False)
        hidden: Tensor = out[0]
        labels = self._labels
        vocabulary = self._adapter.model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        step = max(1, LOGITS_AT_ONCE // (vocabulary * len(hidden)))
        total = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        for a in range(0, labels.shape[1], step):
            targets = labels[:, a : a + step]
            part = hidden[:, a : a + targets.shape[1]]
            logits = head_logits(self._adapter, out, part, self._ids)
            losses = F.cross_entropy(
                logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                targets.flatten(),
                ignore_index=IGNORED,
                reduction="none",
            )
            total += losses.view(targets.shape).sum(1, dtype=torch.float64)
        return (total / (labels != IGNORED).sum(1)).cpu()


@contextmanager
def _answering(block: nn.Module, answer: Any) -> Iterator[None]:
    """Within it the block computes nothing and answers this."""
    previous = block.__dict__.get("forward")
    block.forward = lambda *args, **kwargs: _copied(answer)
    try:
        yield
    finally:
        if previous is None:
            del block.forward
        else:
            block.forward = previous


def _copied(answer: Any) -> Any:
    if isinstance(answer, Tensor):
        return answer.clone()
    return tuple(_copied(part) if isinstance(part, Tensor) else part for part in answer)
