"""Fine-tuning of a pruned model: zeros stay zero, the structure stays as it is.

By LoRA, merged: every matrix W gets a low-rank B A (Hu et al., arXiv 2106.09685) through `peft`.
Where W has zeros, what trains, and what is merged, is W + (W != 0) * scale * B A: the model that is
saved is the model that was trained. Merging an unmasked B A and cutting the zeros back afterwards
would save another. Or all kept weights train. The loss is that of the text, or, with a teacher, the
divergence from what the model before pruning predicts (Hinton et al., arXiv 1503.02531, at
temperature 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyprune.calibration.configured import configured_tokens
from pyprune.calibration.loss_scale import LossScale, all_finite
from pyprune.calibration.tokens import Batch
from pyprune.checkpoint import Checkpoint, Originals, check_output
from pyprune.checkpoint.output import REPORT, changed_model, earlier_report, write_report
from pyprune.config import (
    CalibrationConfig,
    check_call,
    check_choice,
    check_device,
    check_types,
    convert_fields,
)
from pyprune.devices import find_device
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.models.running import evaluation
from pyprune.progress import Progress
from pyprune.report import model_name, source_name
from pyprune.surroundings import in_memory, undisturbed
from pyprune.trainable import Trainable, kept_weights, lora_beside, require_peft

Trained = Literal["lora", "all"]


@dataclass(frozen=True)
class HealConfig:
    """Everything that decides the outcome of a run.

    train: "lora", or "all" weights that are not zero, which takes 16 bytes a weight for fp32
    copies, gradients and Adam. rank, alpha, dropout: of LoRA (the change is alpha / rank * B A).
    steps: optimiser steps, each over `accumulate` batches. learning_rate: its peak, after `warmup`
    (a share of the steps), from where it falls linearly to zero. clip: largest norm of the
    gradient. held_out: batches that are not trained on, whose loss is reported. training: text,
    sequences and seed; what steps need beyond it is seen again.
    """

    train: Trained = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    steps: int = 200
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    held_out: int = 1
    device: str = "auto"
    dtype: str = "float32"
    training: CalibrationConfig = field(
        default_factory=lambda: CalibrationConfig(nsamples=512, seqlen=512, batch_size=4)
    )

    def __post_init__(self) -> None:
        convert_fields(self)
        check_types(self, "")
        for name in ("rank", "steps", "accumulate", "held_out"):
            value = getattr(self, name)
            if not (type(value) is int and value >= 1):
                raise UserError(f"{name}: expected a whole number from 1, got {value!r}")
        for name in ("alpha", "learning_rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name}: expected a positive number, got {value!r}")
        for name, most in (("dropout", 1.0), ("warmup", 1.0), ("weight_decay", math.inf)):
            if not 0 <= getattr(self, name) < most:
                raise UserError(
                    f"{name}: expected from 0 to below {most:g}, got {getattr(self, name)!r}"
                )
        check_choice("train", self.train, get_args(Trained))
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        check_device(self.device)


@dataclass(frozen=True)
class HealReport:
    """Losses are nats per token of the held-out batches' text, with a teacher too. matrices: that
    were trained; masked: those of them with zeros. zeros: in all trained matrices, the same before
    and after. teacher: its name."""

    loss_before: float
    loss_after: float
    steps: int
    tokens: int
    matrices: int
    masked: int
    zeros: int
    trained_parameters: int
    config: dict[str, Any]
    text_sha256: str
    teacher: str | None = None


@undisturbed()
def heal_model(
    model: Any,
    tokenizer_or_batches: object,
    config: HealConfig,
    progress: Progress | None = None,
    *,
    only: Collection[str] | None = None,
    teacher: Any = None,
) -> HealReport:
    """Trains all matrices that pruning could touch, in place.

    Args:
        model: a causal language model; it stays on its device and in its dtype: the config's are a
            checkpoint's business.
        tokenizer_or_batches: a tokenizer, with which `config.training` is read; or the batches
            themselves, see `calibration.batches.as_token_set`.
        config: what to do. Dropout is seeded (`training.seed`).
        progress: called with (what happens, done, total or None).
        only: names of the matrices to train; None: all. Fused experts, embeddings and the head stay
            as they are.
        teacher: the model before pruning, or another with the same vocabulary, on any device: its
            distributions over the next token are learnt instead of the text's tokens. It stays as
            it is.

    Raises:
        UserError: peft is needed and not installed, too few batches, a teacher with another
            vocabulary, or a loss that is not finite (the model has its old weights then).
    """
    check_call(config, HealConfig, progress)
    _check_installed(config)
    model = in_memory(model, structure=True)
    teacher = None if teacher is None else in_memory(teacher)
    if teacher is model:
        raise UserError("teacher: expected another model than the one that is healed")
    tokens = configured_tokens(tokenizer_or_batches, config.training, model.config)
    train, held_out = _split(tokens.batches, config)
    names = [name for name in _targets(model) if only is None or name in only]
    if not names:
        raise UserError(f"{type(model).__name__}: it has no plain linear maps to train")
    zeros = sum(int((model.get_submodule(name).weight == 0).sum()) for name in names)
    before = _loss(model, held_out)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.training.seed)
        still = nullcontext() if teacher is None else evaluation(teacher)
        with still, _trainable(model, names, config) as trained:
            losses = partial(_divergences, teacher) if teacher is not None else _token_losses
            seen = _train(model, trained.parameters, losses, train, config, progress)
            trained.merge()
    after = _loss(model, held_out)
    return HealReport(
        loss_before=before,
        loss_after=after,
        steps=config.steps,
        tokens=seen,
        matrices=trained.matrices,
        masked=trained.masked,
        zeros=zeros,
        trained_parameters=trained.size,
        config=asdict(config),
        text_sha256=tokens.sha256,
        teacher=None if teacher is None else model_name(teacher),
    )


@undisturbed()
def heal_checkpoint(
    source: str | Path,
    out: str | Path,
    config: HealConfig,
    progress: Progress | None = None,
    *,
    teacher: str | Path | None = None,
) -> HealReport:
    """Heals the model in `source` into a new directory `out`, in the checkpoint's own dtypes.

    pyprune.json keeps what the source's said (what was removed stays true) and adds "heal". Raises
    UserError as `heal_model` does, if `out` exists, and for a `teacher` (a directory or hub id, see
    `heal_model`) with another tokenizer.
    """
    check_call(config, HealConfig, progress)
    check_output(out)
    _check_installed(config)
    checkpoint = Checkpoint.open(source)
    tokenizer = checkpoint.tokenizer()
    device, dtype = str(find_device(config.device)), getattr(torch, config.dtype)
    dense: Any = None
    if teacher is not None:
        opened = Checkpoint.open(teacher)
        if Path(opened.path).resolve() == Path(checkpoint.path).resolve():
            raise UserError(f"teacher: expected another model than {source_name(source)} itself")
        if opened.tokenizer().get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"teacher: expected the tokenizer of {source_name(source)}, "
                f"{source_name(teacher)} has other tokens"
            )
        dense = opened.load_model(device, dtype)
    model: Any = checkpoint.load_model(device, dtype)
    originals = Originals(checkpoint, model)
    report = heal_model(model, tokenizer, config, progress, teacher=dense)
    with changed_model(checkpoint, originals, model, out) as folder:
        write_report(folder, {**_before(checkpoint), "heal": asdict(report)}, _card(report))
    return report


def _before(checkpoint: Checkpoint) -> dict[str, Any]:
    """What pyprune.json said; of a model that has been healed already, under "earlier"."""
    found = earlier_report(checkpoint)
    return {"earlier": found} if "heal" in found else found


def _card(report: HealReport) -> str:
    what = "LoRA, merged," if report.config["train"] == "lora" else "All kept weights trained"
    teacher = f", taught by {report.teacher}" if report.teacher else ""
    return (
        "# Healed by pyprune\n\n"
        f"{what} in {report.matrices} matrices{teacher}: {report.tokens:,} tokens in "
        f"{report.steps} steps. Loss on held-out text {report.loss_before:.4f} before, "
        f"{report.loss_after:.4f} after (nats per token). "
        f"{report.zeros:,} zeros kept. Details: {REPORT}.\n"
    )


def _check_installed(config: HealConfig) -> None:
    if config.train == "lora":
        require_peft()


def _trainable(
    model: nn.Module, names: Sequence[str], config: HealConfig
) -> AbstractContextManager[Trainable]:
    if config.train == "all":
        return kept_weights(model, names)
    return lora_beside(model, names, rank=config.rank, alpha=config.alpha, dropout=config.dropout)


def _split(batches: Sequence[Batch], config: HealConfig) -> tuple[list[Batch], list[Batch]]:
    if len(batches) <= config.held_out:
        raise UserError(
            f"training: expected more than the {config.held_out} held-out batches, "
            f"got {len(batches)}; more nsamples or a smaller batch_size are needed"
        )
    return list(batches[config.held_out :]), list(batches[: config.held_out])


def _targets(model: Any) -> list[str]:
    """Full names of the layers' linear maps. A module that is tied to another is left out, and so
    is one that is all zero: a removed branch that only fills its layer has nothing to train."""
    adapter = Adapter.of(model)
    refs = [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
    return [ref.name for ref in refs if ref.index is None and bool(ref.weight().any())]


@torch.enable_grad()  # also when the caller has switched gradients off
def _train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    losses_of: Callable[[Any, Batch], Tensor],
    batches: list[Batch],
    config: HealConfig,
    say: Any,
) -> int:
    """Returns the number of tokens trained on."""
    scale = LossScale(model.parameters())
    optimiser = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    warm = max(1, round(config.warmup * config.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (config.steps - s) / max(1, config.steps - warm))
    )
    model.train()
    order: list[int] = []
    gen = torch.Generator().manual_seed(config.training.seed)
    seen = 0
    for step in range(config.steps):
        for _ in range(config.accumulate):
            if not order:
                order = torch.randperm(len(batches), generator=gen).tolist()
            batch = batches[order.pop()]
            losses = losses_of(model, batch)
            seen += losses.numel()
            loss = losses.mean()
            if not bool(loss.isfinite()):
                raise UserError(
                    f"the loss is NaN or infinite in step {step + 1} of {config.steps}; a lower "
                    "learning_rate may help"
                )
            mean = float(loss.detach())
            _accumulate(parameters, scale.gradients(loss / config.accumulate, parameters))
            del losses, loss  # with all activations, before the next forward
        if not all_finite([p.grad for p in parameters]):
            raise UserError(
                f"the gradient of the loss is NaN or infinite in step {step + 1} of {config.steps}"
            )
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if say is not None:
            say(
                f"step {step + 1}/{config.steps}, loss {mean:.3f}",
                step + 1,
                config.steps,
            )
    return seen


def _accumulate(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            p.grad = gradient.to(p.dtype) if p.grad is None else p.grad.add_(gradient)


def _token_losses(model: Any, batch: Batch) -> Tensor:
    """float32 [n]: of every real token that follows a real one."""
    logits, batch = _predictions(model, batch)
    targets = batch.input_ids[:, 1:].flatten()
    return _real(F.cross_entropy(logits, targets, reduction="none"), batch)


def _divergences(teacher: Any, model: Any, batch: Batch) -> Tensor:
    """float32 [n]: KL(teacher || model) of what they predict for the same tokens."""
    logits, batch = _predictions(model, batch)
    with torch.no_grad():
        wanted, _ = _predictions(teacher, batch)
    if wanted.shape != logits.shape:
        raise UserError(
            f"teacher: expected logits of {logits.shape[-1]} tokens, got {wanted.shape[-1]}"
        )
    wanted = wanted.to(logits.device).log_softmax(-1)
    terms = F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True)
    return _real(terms.sum(-1), batch)


def _predictions(model: Any, batch: Batch) -> tuple[Tensor, Batch]:
    """float32 logits `[B * (T - 1), V]` for the tokens after each sequence's first, and the batch
    where the model is."""
    batch = batch.to(next(model.parameters()).device)
    ids, mask = batch.input_ids, batch.attention_mask
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return logits.flatten(0, 1), batch


def _real(losses: Tensor, batch: Batch) -> Tensor:
    """Those of real tokens that follow a real one."""
    real = batch.real
    return losses[(real[:, 1:] & real[:, :-1]).flatten()]


@torch.no_grad()
def _loss(model: Any, batches: list[Batch]) -> float:
    """Mean over all tokens, dropout off."""
    with evaluation(model):
        losses = torch.cat([_token_losses(model, batch) for batch in batches])
    if not losses.isfinite().all():
        raise UserError("the model's loss is NaN or infinite on the held-out text")
    return float(losses.double().mean())
