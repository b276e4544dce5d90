"""`gradient_computation` with the interface of GBLM-Pruner's script of that name.

from pyprune.integrations.gblm import gradient_computation  # instead of: class gradient_computation

No gradient of a weight is stored, and none is moved to the CPU: each layer's part of a backward
pass is added to the norms while the pass is there. The script's `lib/` takes `SparseGPT` and
`WrappedGPT` of this package too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.errors import UserError
from pyprune.integrations.layer import matrix

Norm = Literal["l1", "l2"]


class gradient_computation:
    """Norms over sequences of the weights' gradients in a model's decoder layers (Das et al. 2023,
    arXiv 2311.04902, eq. 4 and 5).

    Every nn.Linear of `model.model.layers` counts, name `NAME_layer_INDEX`. From its construction
    to `free`, their weights ask for no gradient: `.grad` stays None, and what is below the layers
    (the embeddings) has to ask for one.

    Attributes:
        gradients_l1: by name, `[R, C]` fp32 (fp64 for fp64 models) on the layer's device, the sum
            of |scale * gradient|.
        gradients_l2: likewise of its square: the script takes the root.
        nsample: backward passes seen.
    """

    def __init__(self, model: Any, scale: float, norms: Sequence[Norm] = ("l1", "l2")) -> None:
        """norms: which to keep; each takes 4 bytes a weight and a product of its own."""
        unknown = [norm for norm in norms if norm not in ("l1", "l2")]
        if unknown or not norms:
            raise UserError(f"norms: expected l1, l2 or both, got {list(norms)}")
        self.model, self.scale, self.nsample = model, scale, 0
        layers = {
            f"{name}_layer_{i}": layer
            for i, block in enumerate(model.model.layers)
            for name, layer in block.named_modules()
            if type(layer) is nn.Linear
        }
        sums = {norm: {name: _zeros(layer) for name, layer in layers.items()} for norm in norms}
        self.gradients_l1: dict[str, Tensor] = sums.get("l1", {})
        self.gradients_l2: dict[str, Tensor] = sums.get("l2", {})
        self._seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._asked = [(layer.weight, layer.weight.requires_grad) for layer in layers.values()]
        for weight, _ in self._asked:
            weight.requires_grad_(False)
        self._hooks = [
            layer.register_forward_hook(partial(self._forward, name))
            for name, layer in layers.items()
        ]

    def update_gradient(self, model: Any, nsample: int) -> None:
        """To be called after each backward pass, nsample the passes so far. Raises UserError if
        that is not one more than before, or if a layer was not in exactly one pass since, or had a
        gradient of zeros."""
        if nsample != self.nsample + 1:
            raise UserError(f"nsample: expected {self.nsample + 1}, got {nsample}")
        passes = {name: len(seen) for name, seen in self._seen.items() if len(seen) != 1}
        if passes:
            name, count = next(iter(passes.items()))
            raise UserError(
                f"{name}: expected one backward pass before each update_gradient, got {count} "
                "(none reaches a layer if the embeddings ask for no gradient)"
            )
        zero = [name for name, seen in self._seen.items() if not bool(seen[0])]
        if zero:
            raise UserError(f"{zero[0]}: expected a gradient that is not zero")
        for seen in self._seen.values():
            seen.clear()
        self.nsample = nsample

    def free(self) -> None:
        """Removes the hooks; the weights ask for a gradient again where they did. Sums stay."""
        for hook in self._hooks:
            hook.remove()
        for weight, asked in self._asked:
            weight.requires_grad_(asked)
        self._hooks, self._asked = [], []

    def _forward(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:  # not in the first of the two forwards of a checkpointed layer
            x = args[0].detach()
            arrived = partial(self._backward, name, x, x._version)
            out.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _backward(self, name: str, x: Tensor, version: int, g: Tensor) -> None:
        if x._version != version:
            raise UserError(f"{name}: expected an input that is not written to after the layer")
        flat = g.flatten(0, -2), x.flatten(0, -2).to(g.dtype)
        for power, sums in ((1, self.gradients_l1), (2, self.gradients_l2)):
            if name in sums:
                ops.fisher_accumulate(sums[name], *flat, power=power, scale=self.scale)
        self._seen[name].append(g.any())


def _zeros(layer: nn.Module) -> Tensor:
    w = matrix(layer)
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    return torch.zeros(w.shape, dtype=dtype, device=w.device)
