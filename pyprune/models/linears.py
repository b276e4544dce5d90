"""One prunable matrix of a model, whatever the parameter that holds it looks like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class LinearRef:
    """The weight `[R, C]` (outputs x inputs) of a linear map somewhere in a model.

    name: dotted path of the module, `model.layers.0.self_attn.q_proj`; for one expert of a fused
        parameter the path of the parameter and the expert, `...mlp.experts.gate_up_proj.3`.
    module, parameter: the module that owns the parameter, and the parameter's attribute name. The
        parameter is looked up on every use: loading a block may replace it.
    index: the expert within a fused `[E, R, C]` parameter.
    transposed: the parameter is stored `[C, R]` (transformers' Conv1D), `[E, C, R]` of experts.
    """

    name: str
    module: nn.Module
    parameter: str
    index: int | None = None
    transposed: bool = False

    @property
    def parameter_name(self) -> str:
        """Full name of the owning parameter, as in the model's state dict."""
        if self.index is None:
            return f"{self.name}.{self.parameter}"
        return self.name.rsplit(".", 1)[0]

    def weight(self) -> Tensor:
        """The live weight as a detached view `[R, C]`; writing to it changes the model."""
        w: Tensor = getattr(self.module, self.parameter).detach()
        if self.index is not None:
            w = w[self.index]
        return w.T if self.transposed else w

    @property
    def bias_name(self) -> str:
        """Full name of the parameter that `bias` is of, if there is one: all experts' for one."""
        return f"{self.name}.bias" if self.index is None else f"{self.parameter_name}_bias"

    def bias(self) -> Tensor | None:
        """The live bias `[R]` as a detached view; None without one."""
        name = "bias" if self.index is None else f"{self.parameter}_bias"
        bias = getattr(self.module, name, None)
        if not isinstance(bias, Tensor):
            return None
        return bias.detach() if self.index is None else bias.detach()[self.index]

    def write(self, w: Tensor) -> None:
        """Overwrites the weight in place with `w` `[R, C]`, rounded to the parameter's dtype."""
        target = self.weight()
        if w.shape != target.shape:
            raise ValueError(
                f"{self.name}: expected a weight {tuple(target.shape)}, got {tuple(w.shape)}"
            )
        with torch.no_grad():
            target.copy_(w)


def parameters_of(
    refs: Iterable[LinearRef], weights: Mapping[str, Tensor], root: str
) -> dict[str, Tensor]:
    """The parameters of the module at `root`, by their names in it, that hold the matrices `[R, C]`
    in `weights` (by `LinearRef.name`) in the place of their own; what `torch.func.functional_call`
    takes. Experts of a fused parameter without one keep theirs. Differentiable."""
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for ref in refs:
        if ref.name not in weights:
            continue
        w = weights[ref.name].T if ref.transposed else weights[ref.name]
        name = ref.parameter_name.removeprefix(f"{root}.")
        if ref.index is None:
            found[name] = w
        else:
            dense: Tensor = getattr(ref.module, ref.parameter).detach()
            experts.setdefault(name, list(dense.unbind()))[ref.index] = w
    return found | {name: torch.stack(parts) for name, parts in experts.items()}
