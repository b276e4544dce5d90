"""Fine-tuning of a pruned model by LoRA, merged: zeros stay zero, the structure stays as it is.

Every matrix W gets a low-rank B A (Hu et al., arXiv 2106.09685) through `peft`. Where W has zeros,
what trains, and what is merged, is W + (W != 0) * scale * B A: the model that is saved is the model
that was trained. Merging an unmasked B A and cutting the zeros back afterwards would save another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from pyprune.calibration.configured import configured_tokens
from pyprune.calibration.loss_scale import LossScale, all_finite
from pyprune.calibration.tokens import Batch
from pyprune.checkpoint import Checkpoint, Originals, check_output
from pyprune.checkpoint.output import REPORT, changed_model, earlier_report, write_report
from pyprune.config import (
    CalibrationConfig,
    check_call,
    check_device,
    check_types,
    convert_fields,
)
from pyprune.devices import find_device
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.models.running import evaluation, replaced_forward
from pyprune.progress import Progress
from pyprune.surroundings import in_memory, undisturbed

BOX = "model"


@dataclass(frozen=True)
class HealConfig:
    """Everything that decides the outcome of a run.

    rank, alpha, dropout: of LoRA (the change is alpha / rank * B A). steps: optimiser steps, each
    over `accumulate` batches. learning_rate: its peak, after `warmup` (a share of the steps), from
    where it falls linearly to zero. clip: largest norm of the gradient. held_out: batches that are
    not trained on, whose loss is reported. training: text, sequences and seed; what steps need
    beyond it is seen again.
    """

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
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        check_device(self.device)


@dataclass(frozen=True)
class HealReport:
    """Losses are nats per token on the held-out batches. matrices: that were trained; masked: those
    of them with zeros. zeros: in all trained matrices, the same before and after."""

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


@undisturbed()
def heal_model(
    model: Any,
    tokenizer_or_batches: object,
    config: HealConfig,
    progress: Progress | None = None,
    *,
    only: Collection[str] | None = None,
) -> HealReport:
    """Trains and merges LoRA on all matrices that pruning could touch, in place.

    Args:
        model: a causal language model; it stays on its device and in its dtype: the config's are a
            checkpoint's business.
        tokenizer_or_batches: a tokenizer, with which `config.training` is read; or the batches
            themselves, see `calibration.batches.as_token_set`.
        config: what to do. Dropout is seeded (`training.seed`).
        progress: called with (what happens, done, total or None).
        only: names of the matrices to train; None: all. Fused experts, embeddings and the head stay
            as they are.

    Raises:
        UserError: peft is not installed, too few batches, or a loss that is not finite (the model
            has its old weights then).
    """
    check_call(config, HealConfig, progress)
    require_peft()
    model = in_memory(model, structure=True)
    tokens = configured_tokens(tokenizer_or_batches, config.training, model.config)
    train, held_out = _split(tokens.batches, config)
    names = [name for name in _targets(model) if only is None or name in only]
    if not names:
        raise UserError(f"{type(model).__name__}: it has no plain linear maps to train")
    zeros = sum(int((model.get_submodule(name).weight == 0).sum()) for name in names)
    before = _loss(model, held_out)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.training.seed)
        with _lora_beside(model, names, config) as (layers, masked):
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            seen = _train(model, train, config, progress)
            for layer in layers:
                _merge(layer)
    after = _loss(model, held_out)
    return HealReport(
        loss_before=before,
        loss_after=after,
        steps=config.steps,
        tokens=seen,
        matrices=len(layers),
        masked=masked,
        zeros=zeros,
        trained_parameters=trained,
        config=asdict(config),
        text_sha256=tokens.sha256,
    )


@undisturbed()
def heal_checkpoint(
    source: str | Path, out: str | Path, config: HealConfig, progress: Progress | None = None
) -> HealReport:
    """Heals the model in `source` into a new directory `out`, in the checkpoint's own dtypes.

    pyprune.json keeps what the source's said (what was removed stays true) and adds "heal". Raises
    UserError as `heal_model` does, and if `out` exists.
    """
    check_call(config, HealConfig, progress)
    check_output(out)
    require_peft()
    checkpoint = Checkpoint.open(source)
    tokenizer = checkpoint.tokenizer()
    device = str(find_device(config.device))
    model: Any = checkpoint.load_model(device, getattr(torch, config.dtype))
    originals = Originals(checkpoint, model)
    report = heal_model(model, tokenizer, config, progress)
    with changed_model(checkpoint, originals, model, out) as folder:
        write_report(folder, {**_before(checkpoint), "heal": asdict(report)}, _card(report))
    return report


def _before(checkpoint: Checkpoint) -> dict[str, Any]:
    """What pyprune.json said; of a model that has been healed already, under "earlier"."""
    found = earlier_report(checkpoint)
    return {"earlier": found} if "heal" in found else found


def _card(report: HealReport) -> str:
    return (
        "# Healed by pyprune\n\n"
        f"LoRA on {report.matrices} matrices, merged: {report.tokens:,} tokens in {report.steps} "
        f"steps. Loss on held-out text {report.loss_before:.4f} before, {report.loss_after:.4f} "
        f"after (nats per token). {report.zeros:,} zeros kept. Details: {REPORT}.\n"
    )


def require_peft() -> Any:
    """The module; UserError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "healing needs peft: pip install 'pyprune[heal]' (or pip install peft)"
        ) from error
    return peft


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


@contextmanager
def _lora_beside(
    model: Any, names: Sequence[str], config: HealConfig
) -> Iterator[tuple[list[Any], int]]:
    """Within it nothing but LoRA beside the matrices called `names` is trained, masked where they
    have zeros: peft's layers, and how many are masked. Afterwards the model has no adapters, and
    every module's mode and every parameter's `requires_grad` are what they were."""
    lora = require_peft()
    training = [module for module in model.modules() if module.training]
    required = {id(p): p.requires_grad for p in model.parameters()}
    # Of a mixture's model peft takes names like `mlp.up_proj` for experts that transformers has
    # fused, and would put its adapters there. A box without a configuration has none.
    wrapped = lora.get_peft_model(
        nn.ModuleDict({BOX: model}),
        lora.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=[f"{BOX}.{name}" for name in names],
            fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
            bias="none",
        ),
    )
    try:
        layers = [m for m in wrapped.modules() if isinstance(m, lora.tuners.lora.LoraLayer)]
        masked = [layer for layer in layers if bool((layer.get_base_layer().weight == 0).any())]
        with ExitStack() as stack:
            for layer in masked:
                stack.enter_context(replaced_forward(layer, _masked_forward(layer)))
            yield layers, len(masked)
    finally:
        wrapped.unload()
        model.eval()
        for module in training:
            module.training = True
        for p in model.parameters():
            p.requires_grad_(required[id(p)])


def _mask_times(layer: Any) -> Tensor:
    """The change of the base matrix, in its own shape: (W != 0) * scale * B A."""
    weight: Tensor = layer.get_base_layer().weight
    (name,) = layer.active_adapters
    change: Tensor = layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight)
    if isinstance(layer.get_base_layer(), Conv1D):
        change = change.T
    return change * (weight != 0)


def _masked_forward(layer: Any) -> Callable[..., Tensor]:
    base = layer.get_base_layer()
    (name,) = layer.active_adapters

    def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        change = _mask_times(layer).to(x.dtype)
        if isinstance(base, Conv1D):
            change = change.T
        result: Tensor = base(x) + F.linear(layer.lora_dropout[name](x), change)
        return result

    return forward


@torch.no_grad()
def _merge(layer: Any) -> None:
    weight = layer.get_base_layer().weight
    weight.add_(_mask_times(layer).to(weight.dtype))


@torch.enable_grad()  # also when the caller has switched gradients off
def _train(model: nn.Module, batches: list[Batch], config: HealConfig, say: Any) -> int:
    """Returns the number of tokens trained on."""
    parameters = [p for p in model.parameters() if p.requires_grad]
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
            losses = _token_losses(model, batch)
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
    batch = batch.to(next(model.parameters()).device)
    ids, mask = batch.input_ids, batch.attention_mask
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    if mask is None:
        return losses
    return losses[((mask[:, 1:] != 0) & (mask[:, :-1] != 0)).flatten()]


@torch.no_grad()
def _loss(model: Any, batches: list[Batch]) -> float:
    """Mean over all tokens, dropout off."""
    with evaluation(model):
        losses = torch.cat([_token_losses(model, batch) for batch in batches])
    if not losses.isfinite().all():
        raise UserError("the model's loss is NaN or infinite on the held-out text")
    return float(losses.double().mean())
