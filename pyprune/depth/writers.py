"""The weights of a branch that write into the residual stream, or the norm behind them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Conv1D

from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.errors import UserError

# Last linear maps of a branch, by name, in every supported family.
WRITERS = ("o_proj", "out_proj", "dense", "c_proj", "dense_4h_to_h", "down_proj", "fc2", "fc_out")
AFTER = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}


def writers(graph: ResidualGraph, branch: Branch) -> list[Tensor]:
    """The parameters whose multiplication by a number multiplies what the branch adds: weights and
    biases of its last linear maps (every expert's). Raises UserError if they are not known, or if
    a norm comes after them."""
    block, layout = graph.adapter.blocks[branch.layer], graph.layouts[branch.layer]
    if norm_after(graph, branch) is not None:
        raise UserError(f"{type(block).__name__}: its branches end in a norm, not a linear map")
    name = layout.last(branch.kind)
    inside = dict(block.get_submodule(name).named_modules(prefix=name))
    if branch.kind == "mlp" and any("Norm" in type(m).__name__ for m in inside.values()):
        raise UserError(f"{type(block).__name__}: its MLPs hold a norm, behind their linear maps")
    found: list[Tensor] = []
    for path, module in inside.items():
        if isinstance(module, nn.Linear | Conv1D):
            if path.rpartition(".")[2] in WRITERS:
                found += list(module.parameters(recurse=False))
        else:
            own = dict(module.named_parameters(recurse=False))
            found += [p for n, p in own.items() if n in ("down_proj", "down_proj_bias")]
    if not found:
        raise UserError(f"{type(block).__name__}: unknown last linear map of its {branch.kind}")
    return found


def norm_after(graph: ResidualGraph, branch: Branch) -> nn.Module | None:
    """The norm between a branch and the stream that it adds to, if there is one."""
    name = AFTER[branch.kind]
    if name not in graph.layouts[branch.layer].norms(branch.kind):
        return None
    return graph.adapter.blocks[branch.layer].get_submodule(name)
