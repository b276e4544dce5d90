"""`SparseExperts`: a mixture's experts, each a few compressed linear layers of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pyprune.models import experts as fused_experts

# What checkpoints with a tensor for each expert call its projections: gate, up, down; or up, down.
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
UNGATED = ("up_proj", "down_proj")


class SparseExperts(nn.Module):
    """Stands for transformers' fused experts (`pyprune.models.experts.is_fused`): experts that no
    token was routed to are not touched.

    Args:
        fused: what it stands for; loses its projections. Its biases and norm stay as they are, and
            what one hidden channel is made of is asked of it.
        linears: the linear layers by `<expert>.<projection>` with one of the names in GATED or
            UNGATED, or by `<projection>.<expert>` with those of `fused`; they become submodules of
            these paths, named as in checkpoints.
    """

    def __init__(self, fused: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.num_experts = fused_experts.expert_count(fused)
        self.has_gate, self.has_bias = fused_experts.has_gate(fused), fused_experts.has_bias(fused)
        self.has_post_expert_norm = getattr(fused, "has_post_expert_norm", False)
        self._first = fused_experts.projections(fused)[0]
        for place, linear in linears.items():
            outer, _, inner = place.partition(".")
            if outer not in self._modules:
                self.add_module(outer, nn.ModuleDict())
            self.get_submodule(outer).add_module(inner, linear)
        self._expert_first = "0" in self._modules
        names = next(iter(kinds(fused, self._expert_first, linears)))
        self._readers, self._writer = names[:-1], names[-1]
        for name in fused_experts.projections(fused):
            delattr(fused, name)
        for name, parameter in fused.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name in ("act_fn", "_apply_gate"):
            if hasattr(fused, name) and not hasattr(self, name):
                setattr(self, name, getattr(fused, name))

    def forward(self, *given: Tensor) -> Tensor:
        """given: as for `pyprune.models.experts.observed_forward`; what the experts give, of the
        shape of the first."""
        return fused_experts.run_experts(self, self.num_experts, self._compute, *given)

    def _compute(self, states: list[Tensor], rows: list[Tensor], tokens: int) -> list[Tensor]:
        return [self._expert(e, x) if len(x) else x for e, x in enumerate(states)]

    def _expert(self, e: int, x: Tensor) -> Tensor:
        given = [self._linear(e, name)(x) for name in self._readers]
        first = given[0] if len(given) == 1 else torch.cat(given, dim=-1)
        if self.has_bias:
            first = first + getattr(self, f"{self._first}_bias")[e]
        y: Tensor = self._linear(e, self._writer)(fused_experts.activated(self, first))
        if self.has_bias:
            y = y + getattr(self, f"{fused_experts.DOWN}_bias")[e]
        return self.post_expert_norm(y) if self.has_post_expert_norm else y  # type: ignore

    def _linear(self, e: int, name: str) -> nn.Module:
        return self.get_submodule(f"{e}.{name}" if self._expert_first else f"{name}.{e}")


def kinds(
    fused: nn.Module, expert_first: bool, places: Mapping[str, object]
) -> Iterator[tuple[str, ...]]:
    """The names of an expert's projections that fit the `places` of the linear layers."""
    if not expert_first:
        yield fused_experts.projections(fused)
    elif not fused_experts.has_gate(fused):
        yield UNGATED
    else:
        yield from (names for names in GATED if f"0.{names[0]}" in places)
