"""What is trained in a pruned model: something in the place of its matrices that leaves zeros zero,
and is written into them at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from pyprune.errors import UserError
from pyprune.models.running import replaced_forward

BOX = "model"


@dataclass(frozen=True, eq=False)
class Trainable:
    """parameters: what an optimiser moves. matrices: of the model, that this changes; masked: those
    of them with zeros. merge: writes it into them."""

    parameters: list[nn.Parameter]
    matrices: int
    masked: int
    merge: Callable[[], None]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)


def require_peft() -> Any:
    """The module; UserError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "LoRA needs peft: pip install 'pyprune[heal]' (or pip install peft)"
        ) from error
    return peft


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it no parameter of `model` has a gradient. Afterwards every parameter's
    `requires_grad` and every module's mode are what they were."""
    training = [module for module in model.modules() if module.training]
    required = {id(p): p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.eval()
        for module in training:
            module.training = True
        for p in model.parameters():
            p.requires_grad_(required[id(p)])


@contextmanager
def kept_weights(model: nn.Module, names: Sequence[str]) -> Iterator[Trainable]:
    """Within it the matrices called `names` are fp32 copies, of which the weights that are not zero
    train. They are rounded to the model's dtype where they are multiplied: an update below that
    rounding is not lost."""
    matrices = [_Kept(model.get_submodule(name)) for name in names]

    def merge() -> None:
        for matrix in matrices:
            matrix.merge()

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for matrix in matrices:
            stack.enter_context(replaced_forward(matrix.layer, matrix.forward))
        masked = sum(matrix.kept is not None for matrix in matrices)
        yield Trainable([m.values for m in matrices], len(matrices), masked, merge)


class _Kept:
    """An fp32 copy of a layer's matrix, in the matrix's own shape. kept: where it is not zero; None
    if no weight is zero."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        weight: Tensor = layer.weight.detach()
        self.values = nn.Parameter(weight.to(torch.float32, copy=True))
        kept = weight != 0
        self.kept = None if bool(kept.all()) else kept

    def forward(self, x: Tensor) -> Tensor:
        weight = self._masked().to(x.dtype)
        if isinstance(self.layer, Conv1D):
            weight = weight.T
        return F.linear(x, weight, self.layer.bias)

    def _masked(self) -> Tensor:
        return self.values if self.kept is None else torch.where(self.kept, self.values, 0)

    @torch.no_grad()
    def merge(self) -> None:
        self.layer.weight.copy_(self._masked())


@contextmanager
def lora_beside(
    model: nn.Module, names: Sequence[str], *, rank: int, alpha: float, dropout: float
) -> Iterator[Trainable]:
    """Within it nothing but LoRA (Hu et al., arXiv 2106.09685) beside the matrices called `names`
    is trained, masked where they have zeros. Afterwards the model has no adapters."""
    lora = require_peft()
    with frozen(model):
        # Of a mixture's model peft takes names like `mlp.up_proj` for experts that transformers has
        # fused, and would put its adapters there. A box without a configuration has none.
        wrapped = lora.get_peft_model(
            nn.ModuleDict({BOX: model}),
            lora.LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=[f"{BOX}.{name}" for name in names],
                fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
                bias="none",
            ),
        )
        try:
            layers = [m for m in wrapped.modules() if isinstance(m, lora.tuners.lora.LoraLayer)]
            masked = [layer for layer in layers if bool((layer.get_base_layer().weight == 0).any())]

            def merge() -> None:
                for layer in layers:
                    _merge(layer)

            with ExitStack() as stack:
                for layer in masked:
                    stack.enter_context(replaced_forward(layer, _masked_forward(layer)))
                trained = [p for p in model.parameters() if p.requires_grad]
                yield Trainable(trained, len(layers), len(masked), merge)
        finally:
            wrapped.unload()


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
