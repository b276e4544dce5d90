"""How much the loss depends on some of the weights, seen in forwards alone.

The loss changes along a random direction z of the weights W by z . g, with g their gradient, and a
central difference of two losses shows it (Spall 1992; MeZO, arXiv 2305.17333). Over standard normal
z the mean of |z . g| is sqrt(2 / pi) ||g||, so that a few directions estimate the norm of the
gradient with the memory of inference (ECoFLaP, arXiv 2310.02998).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyprune.calibration.autograd import on_device
from pyprune.calibration.head import IGNORED, check_head, next_labels, sequence_targets
from pyprune.calibration.tokens import Batch
from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef
from pyprune.models.running import (
    evaluation,
    head_logits,
    positions_at_once,
    replaced_forward,
)
from pyprune.progress import CountProgress


@dataclass(frozen=True)
class Perturbed:
    """Matrices of block number `block` that move together. name: theirs in messages."""

    name: str
    block: int
    linears: Sequence[LinearRef]


def directional_differences(
    adapter: Adapter,
    groups: Sequence[Perturbed],
    batches: Sequence[Batch],
    *,
    epsilon: float = 1e-3,
    noises: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: CountProgress | None = None,
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
        sequence_targets(b, batch)
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


class _Replay:
    """The losses of one batch, from a block on. dense: those of the model as it is, `[B]` fp64."""

    def __init__(self, adapter: Adapter, batch: Batch, device: torch.device) -> None:
        self._adapter = adapter
        batch = batch.to(device)
        self._ids, self._mask = batch.input_ids, batch.attention_mask
        self._labels = next_labels(self._ids, None if self._mask is None else self._mask != 0)
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
                stack.enter_context(replaced_forward(block, partial(_answered, answer)))
            return self._losses()

    def _losses(self) -> Tensor:
        out = self._adapter.decoder(input_ids=self._ids, attention_mask=self._mask, use_cache=False)
        hidden: Tensor = out[0]
        labels = self._labels
        model, decoder = self._adapter.model, self._adapter.decoder
        step = positions_at_once(model, len(hidden))
        total = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        for a in range(0, labels.shape[1], step):
            targets = labels[:, a : a + step]
            part = hidden[:, a : a + targets.shape[1]]
            logits = head_logits(model, decoder, out, part, self._ids)
            losses = F.cross_entropy(
                logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                targets.flatten(),
                ignore_index=IGNORED,
                reduction="none",
            )
            total += losses.view(targets.shape).sum(1, dtype=torch.float64)
        return (total / (labels != IGNORED).sum(1)).cpu()


def _answered(answer: Any, *_args: Any, **_kwargs: Any) -> Any:
    """A block's forward that computes nothing."""
    return _copied(answer)


def _copied(answer: Any) -> Any:
    if isinstance(answer, Tensor):
        return answer.clone()
    return tuple(_copied(part) if isinstance(part, Tensor) else part for part in answer)
