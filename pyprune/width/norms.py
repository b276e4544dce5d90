"""Norms that read a residual stream, whatever a family calls them and how it stores their scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.errors import UserError


@dataclass(frozen=True, eq=False)
class StreamNorm:
    """`core(x) * (offset + weight) + bias`, without what the module has no parameter for.

    centred: core is that of LayerNorm, `(x - mean(x)) / std(x)`, else that of RMSNorm,
        `x / rms(x)`. Any epsilon will do: what is computed must depend on the size of x only.
    offset: 1 where the scale is stored as what exceeds one (Gemma, Nemotron), else 0.
    """

    module: nn.Module
    centred: bool
    offset: float

    @classmethod
    def of(cls, model: str, module: nn.Module, width: int) -> StreamNorm:
        """Finds out by trying. Raises UserError if it is neither; `model`: to be named."""
        forms = (cls(module, centred, offset) for centred in (False, True) for offset in (0.0, 1.0))
        found = next((form for form in forms if form._holds(width)), None)
        if found is None:
            raise UserError(
                f"{model}: expected RMSNorm or LayerNorm to slice the stream, got "
                f"{type(module).__name__}, which does not commute with rotations"
            )
        return found

    def scale(self) -> Tensor | float:
        """What the normed stream is multiplied by: fp64 [d]."""
        weight: Tensor | None = getattr(self.module, "weight", None)
        return 1.0 if weight is None else weight.detach().double() + self.offset

    def shift(self) -> Tensor | None:
        """What is added to it then: fp64 [d]."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().double()

    def parameters(self) -> list[str]:
        """Names of the parameters, each [d]."""
        return [name for name, _ in self.module.named_parameters(recurse=False)]

    def reset(self, bias: Tensor) -> None:
        """Leaves no scale, and `bias` [d']; the scale of coordinates that have none is zero."""
        width = len(bias)
        values = {"weight": (bias != 0) * (1 - self.offset), "bias": bias}
        for name in self.parameters():
            old: nn.Parameter = getattr(self.module, name)
            new = values[name].to(old.device, old.dtype)
            setattr(self.module, name, nn.Parameter(new, requires_grad=old.requires_grad))
        if hasattr(self.module, "normalized_shape"):
            self.module.normalized_shape = (width,)  # type: ignore[assignment]

    @torch.no_grad()
    def _holds(self, width: int) -> bool:
        held = dict(self.module.named_parameters(recurse=False))
        if any(name not in ("weight", "bias") or p.shape != (width,) for name, p in held.items()):
            return False
        some = next(iter(held.values()), torch.empty(0))
        gen = torch.Generator().manual_seed(0)
        # So large that no epsilon shows.
        x = (10 * torch.randn(2, width, generator=gen) + 10).to(some.device, some.dtype)
        y = x.double()
        y = y - y.mean(-1, keepdim=True) if self.centred else y
        y = y / y.square().mean(-1, keepdim=True).sqrt() * self.scale()
        shift = self.shift()
        y = y if shift is None else y + shift
        tolerance = 64 * max(torch.finfo(kind).eps for kind in (some.dtype, torch.float32))
        return torch.allclose(self.module(x).double(), y, rtol=tolerance, atol=tolerance)
