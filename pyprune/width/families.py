"""Where the families keep the units of their MLPs and attentions.

Chosen by the names of a module's children; `Slice` checks that the units share each matrix among
them, `pyprune.width.cut` that the cut model computes what the masked one did, so that a family
that merely reuses the names is refused, not misread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from pyprune.depth.layouts import layout_of
from pyprune.models.adapter import Adapter
from pyprune.models.experts import (
    DOWN,
    expert_count,
    gate_rows,
    has_bias,
    is_fused,
    is_transposed,
    projections,
)
from pyprune.models.linears import LinearRef
from pyprune.width.structure import Group, Slice

# Names of the matrices that read the residual stream, and of the one that writes; halves: the
# reader is gate and up in one matrix.
_MLPS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("up_proj",), "down_proj", 1),
    (("fc1",), "fc2", 1),
    (("fc_in",), "fc_out", 1),
    (("c_fc",), "c_proj", 1),
    (("dense_h_to_4h",), "dense_4h_to_h", 1),
)
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_WRITERS = ("o_proj", "out_proj", "dense", "c_proj")
# torch's grouped products, which transformers runs experts with, want rows of a multiple of 16
# bytes; numbers of two bytes are the smallest that models are saved in.
EXPERT_STEP = 8
_DENSE_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERT_SIZES = ("moe_intermediate_size", "intermediate_size")
_SHARED_SIZES = ("shared_expert_intermediate_size", *_DENSE_SIZES)


class _RefusedError(Exception):
    """Why a module's units cannot be cut."""


def find_groups(model: Any, adapter: Adapter) -> tuple[list[Group], dict[str, str]]:
    """The groups of all layers, and modules without any (name -> reason)."""
    config = model.config.get_text_config()
    groups: list[Group] = []
    refused: dict[str, str] = {}
    for i, (block, name) in enumerate(zip(adapter.blocks, adapter.block_names, strict=True)):
        layout = layout_of(block, config)
        refs = {ref.name: ref for ref in adapter.linears(i)}
        layer = _Layer(block, name, i, config, refs)
        try:
            groups.append(layer.heads(layout.attention))
        except _RefusedError as error:
            refused[f"{name}.{layout.attention}"] = str(error)
        # Where the layer itself runs the MLP, its matrices are children of the layer.
        path = layout.mlp[0] if len(layout.mlp) == 1 else ""
        try:
            groups += list(layer.mlps(path, layout.mlp))
        except _RefusedError as error:
            refused[f"{name}.{path or layout.mlp[0]}"] = str(error)
    return groups, refused


@dataclass(frozen=True)
class _Layer:
    """One decoder layer: `refs` are its matrices by their full names."""

    block: nn.Module
    name: str
    index: int
    config: Any
    refs: dict[str, LinearRef]

    # ---- MLPs

    def mlps(self, path: str, own: tuple[str, ...]) -> Iterator[Group]:
        """The MLP at `path`, or all that a mixture there consists of. own: the names of its
        matrices where the layer runs it itself (path "")."""
        found = False
        for inner, module in self.block.get_submodule(path).named_modules():
            at = ".".join(filter(None, (path, inner)))
            if is_fused(module):
                found = True
                yield from self._experts(at, module)
                continue
            children = set(own) if path == "" else _holding(module)
            for readers, writer, halves in _MLPS:
                if children == {*readers, writer}:
                    found = True
                    yield self._mlp(at, readers, writer, halves)
            if path == "":
                break
        if not found:
            children = _holding(self.block.get_submodule(path))
            raise _RefusedError(f"unknown MLP with children {', '.join(sorted(children))}")

    def _mlp(self, at: str, readers: tuple[str, ...], writer: str, halves: int) -> Group:
        parent = self.block.get_submodule(at)
        last = parent.get_submodule(writer)
        units = _inputs(last)
        index = torch.arange(halves * units).view(halves, units).T.contiguous()
        slices = [s for name in readers for s in _rows(parent.get_submodule(name), index)]
        columns = torch.arange(units)[:, None]
        slices.append(_columns(last, columns))
        names = _SHARED_SIZES if at.endswith("shared_expert") else _DENSE_SIZES
        gates = [parent.get_submodule(name) for name in readers] if _starts_at_zero(parent) else []
        name = ".".join(filter(None, (at, writer)))
        return self._group(name, "mlp", slices, columns, gates, self._size(names, units))

    def _experts(self, at: str, module: nn.Module) -> Iterator[Group]:
        first, rows = projections(module)[0], gate_rows(module)
        units, axis = len(rows), 1 if is_transposed(module) else 0
        fields = self._size(_EXPERT_SIZES, units)
        columns = torch.arange(units)[:, None]
        for e in range(expert_count(module)):
            slices = [Slice(module, first, axis, rows, e)]
            if has_bias(module):
                slices.append(Slice(module, f"{first}_bias", 0, rows, e))
            slices.append(Slice(module, DOWN, 1 - axis, columns, e))
            name = f"{at}.{DOWN}.{e}"
            yield self._group(name, "mlp", slices, columns, [], fields, step=EXPERT_STEP)

    def _size(self, names: tuple[str, ...], units: int) -> dict[str, int]:
        """The field that holds the size of an MLP (None in it: a size derived from others)."""
        for name in names:
            if hasattr(self.config, name) and getattr(self.config, name) in (units, None):
                return {name: 1}
        return {}

    # ---- attention

    def heads(self, path: str) -> Group:
        """The attention at `path`, by KV groups."""
        attention = self.block.get_submodule(path)
        children = _holding(attention)
        writers = [name for name in _WRITERS if name in children]
        size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
        if len(writers) != 1 or not isinstance(size, int):
            raise _RefusedError(f"unknown attention with children {', '.join(sorted(children))}")
        writer = attention.get_submodule(writers[0])
        heads = _inputs(writer) // size
        readers, groups, layout = _readers(attention, children, heads, size)
        if groups < 1 or heads % groups or heads * size != _inputs(writer):
            raise _RefusedError(f"its matrices are not made of heads of size {size}")
        if "q_proj" in readers and _outputs(attention.get_submodule("q_proj")) != heads * size:
            raise _RefusedError("its q_proj makes more than queries")  # gates of the heads
        _check_rest(attention, children - {*readers, writers[0]}, size)
        if groups == 1:
            raise _RefusedError("has a single key-value head")
        columns = torch.arange(heads * size).view(groups, -1)
        slices = [
            s
            for name, index in zip(readers, layout, strict=True)
            for s in _rows(attention.get_submodule(name), index)
        ]
        slices.append(_columns(writer, columns))
        fields = {"num_attention_heads": heads // groups}
        for name in ("num_key_value_heads", "num_kv_heads"):
            if hasattr(self.config, name):
                fields[name] = 1
        gates = [attention.get_submodule("v_proj")] if readers == _SEPARATE else []
        name = f"{path}.{writers[0]}"
        return self._group(name, "heads", slices, columns, gates, fields, {"head_dim": size})

    def _group(
        self,
        writer: str,
        kind: Any,
        slices: list[Slice],
        columns: Tensor,
        gates: list[nn.Module],
        fields: dict[str, int],
        fixed: dict[str, int] | None = None,
        step: int = 1,
    ) -> Group:
        name = f"{self.name}.{writer}"
        if name not in self.refs:
            raise _RefusedError(f"{name} is shared with something outside of its layer")
        return Group(
            name,
            kind,
            self.index,
            len(columns),
            tuple(slices),
            self.refs[name],
            columns,
            tuple(gates),
            fields,
            fixed or {},
            step,
        )


def _readers(
    attention: nn.Module, children: set[str], heads: int, size: int
) -> tuple[tuple[str, ...], int, list[Tensor]]:
    """Names of the matrices that make q, k and v; the number of KV groups; for each of the
    matrices its rows by group, int64 [groups, k]."""
    if set(_SEPARATE) <= children:
        groups = _outputs(attention.get_submodule("k_proj")) // size
        q = torch.arange(heads * size).view(groups, -1)
        kv = torch.arange(groups * size).view(groups, -1)
        return _SEPARATE, groups, [q, kv, kv]
    for name in ("qkv_proj", "c_attn"):
        if name in children:
            rows = _outputs(attention.get_submodule(name))
            groups = (rows // size - heads) // 2
            q = torch.arange(heads * size).view(groups, -1)
            kv = torch.arange(groups * size).view(groups, -1)
            k, v = heads * size, (heads + groups) * size
            return (name,), groups, [torch.cat([q, kv + k, kv + v], dim=1)]
    if "query_key_value" in children:
        # The rows of a group are consecutive: its queries, its key, its value.
        rows = _outputs(attention.get_submodule("query_key_value"))
        groups = (rows // size - heads) // 2
        if groups == 0 or rows % groups:
            raise _RefusedError("unknown order of queries, keys and values")
        return ("query_key_value",), groups, [torch.arange(rows).view(groups, -1)]
    raise _RefusedError(f"unknown attention with children {', '.join(sorted(children))}")


def _check_rest(attention: nn.Module, names: set[str], size: int) -> None:
    """Refuses parameters that are not one head's, applied to all heads alike."""
    held = {f"{n}.{k}": p for n in names for k, p in attention.get_submodule(n).named_parameters()}
    held |= dict(attention.named_parameters(recurse=False))
    for name, p in held.items():
        if tuple(p.shape) != (size,):
            raise _RefusedError(f"{name} {tuple(p.shape)} spans the heads")


def _starts_at_zero(mlp: nn.Module) -> bool:
    """Whether the MLP's activation turns zero into zero."""
    for name in ("act_fn", "activation_fn", "act", "activation"):
        function = getattr(mlp, name, None)
        if callable(function):
            return float(function(torch.zeros(1))) == 0
    return False


def _holding(module: nn.Module) -> set[str]:
    """Names of the children that have parameters."""
    return {
        name for name, child in module.named_children() if any(True for _ in child.parameters())
    }


def _outputs(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1 if isinstance(module, Conv1D) else 0]


def _inputs(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0 if isinstance(module, Conv1D) else 1]


def _rows(module: nn.Module, index: Tensor) -> Iterator[Slice]:
    """What units own of the outputs of a linear map: rows of its weight, entries of its bias."""
    yield Slice(module, "weight", 1 if isinstance(module, Conv1D) else 0, index)
    if getattr(module, "bias", None) is not None:
        yield Slice(module, "bias", 0, index)


def _columns(module: nn.Module, index: Tensor) -> Slice:
    """What units own of the inputs of a linear map."""
    return Slice(module, "weight", 0 if isinstance(module, Conv1D) else 1, index)
