"""DISP-LLM (Gao et al., NeurIPS 2024, arXiv 2410.11988): channels chosen by a trained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyprune.errors import UserError
from pyprune.methods.options import Count, NotNegative, Positive
from pyprune.width.apply import remove
from pyprune.width.decision import WidthDecision
from pyprune.width.hypernet import BASE, Gate, Place, Training, train
from pyprune.width.registry import WidthTask, width_method
from pyprune.width.select import best, prunable, uniform_sizes
from pyprune.width.structure import Group, Slice, Widths

NOT_STOCK = (
    "the subsets of the residual stream that each matrix reads and writes are stored as zeros: no "
    "stock model can index its stream"
)


@dataclass(frozen=True)
class DispOptions:
    """gates: hidden (the channels between gate, up and down, equally many per layer, so that a
    stock model results; every fused expert chooses its own) or all (also which channels of the
    residual stream every matrix reads and writes, those of fused experts together; full shapes with
    zeros result). iterations: training steps, one batch each (published: 10000). rate, decay: of
    AdamW. strength: of the budget's penalty (paper 6, code 16). multiple: that the
    channels left are a multiple of, with hidden. seed: of the network's start and the gates' noise.
    """

    gates: Literal["hidden", "all"] = "hidden"
    iterations: Count = 1000
    rate: Positive = 1e-3
    decay: NotNegative = 0.05
    strength: NotNegative = 6.0
    multiple: Count = 8
    seed: int = 42


@width_method(
    "disp-llm",
    title="DISP-LLM: channels by a hyper-network trained on the frozen model",
    paper="arXiv 2410.11988",
    options=DispOptions,
    removes="channels",
)
def disp_llm(task: WidthTask) -> WidthDecision:
    """The final choice is made without noise (the published code draws it once more)."""
    options: DispOptions = task.config.own_options()
    widths = Widths.of(task.model)
    training = Training(
        options.iterations, options.rate, options.decay, options.strength, options.seed
    )
    if options.gates == "hidden":
        return _hidden(task, widths, options, training)
    return _all(task, widths, training)


# ---- hidden channels only


def _hidden(
    task: WidthTask, widths: Widths, options: DispOptions, training: Training
) -> WidthDecision:
    groups = prunable(widths, "mlp")
    sizes = uniform_sizes(widths, groups, task.target, options.multiple)
    gates = [_writer_gate(group) for group in groups]
    shares = [sizes[group.name] / group.units for group in groups]

    def penalty(values: Sequence[Tensor]) -> Tensor:
        """Every MLP has its own budget here: in the end all keep equally many."""
        off = [_log_ratio(v.mean(), share) for v, share in zip(values, shares, strict=True)]
        return torch.stack(off).mean()

    logits, losses = train(task.model, task.tokens.batches, gates, penalty, training, task.progress)
    scores = {group.name: logit for group, logit in zip(groups, logits, strict=True)}
    open_gates = [float((logit + BASE > 0).double().mean()) for logit in logits]
    return remove(
        task,
        widths,
        best(scores, sizes),
        transforms=[{"losses": _some(losses), "share of gates open": open_gates}],
        scores=scores,
        objective="logit of the gate",
    )


def _log_ratio(share: Tensor, wanted: float) -> Tensor:
    """|log(share / wanted)|; a share of nothing counts as a thousandth of what is wanted."""
    return (share / wanted).clamp(min=1e-3).log().abs()


def _writer_gate(group: Group) -> Gate:
    owner = torch.empty(group.columns.numel(), dtype=torch.int64)
    owner[group.columns] = torch.arange(group.units)[:, None].expand_as(group.columns)
    module, expert = group.writer.module, group.writer.index
    if expert is None:
        return Gate(group.name, group.units, (Place(module, "input", owner),))
    return Gate(group.name, group.units, (Place(module, "hidden", owner, expert),))


def _some(losses: list[float]) -> list[float]:
    """At most a hundred of them, evenly spread, the last one included."""
    step = -(-len(losses) // 100)
    return losses[::-1][::step][::-1]


# ---- every matrix's own part of the residual stream


@dataclass(frozen=True, eq=False)
class _Module:
    """An attention, an MLP or an expert: what reads the stream and what writes it.

    name: of the gates on the stream, which the experts of one module share. readers: matrices; rows
    of all of them.
    """

    group: Group
    name: str
    readers: tuple[Slice, ...]
    rows: int

    @classmethod
    def of(cls, group: Group) -> _Module:
        last = group.writer
        readers = tuple(part for part in group.slices[:-1] if part.tensor().dim() == 2)
        return cls(
            group,
            group.name if last.index is None else last.parameter_name,
            readers,
            sum(part.tensor().shape[part.axis] for part in readers),
        )


def _all(task: WidthTask, widths: Widths, training: Training) -> WidthDecision:
    modules = _modules(widths)
    gates = _stream_gates(modules, task.model.config.get_text_config().hidden_size)
    names = [gate.name for gate in gates]

    def kept_weights(values: Sequence[Tensor]) -> Tensor:
        at = dict(zip(names, values, strict=True))
        return sum((_kept(m, at) for m in modules), values[0].new_zeros(()))

    full = float(kept_weights([torch.ones(g.size, dtype=torch.float64) for g in gates]))
    left = full - task.target
    if left <= 0:
        most = full / task.parameters
        raise UserError(
            f"ratio: expected less than {most:.3f} of the parameters, got {task.config.ratio}"
        )

    def penalty(values: Sequence[Tensor]) -> Tensor:
        return _log_ratio(kept_weights(values) / full, left / full)

    logits, losses = train(task.model, task.tokens.batches, gates, penalty, training, task.progress)
    masks, shift = _within(logits, kept_weights, left)
    at = dict(zip(names, masks, strict=True))
    for module in modules:
        _zero_stream(module, at)
    trained = {"losses": _some(losses), "shift of the threshold": shift}
    stream = {name: _closed(mask).tolist() for name, mask in at.items() if ":" in name}
    decision = remove(
        task,
        widths,
        {name: mask.nonzero()[:, 0] for name, mask in at.items() if ":" not in name},
        notes=[NOT_STOCK],
        transforms=[trained, {"stream": stream}],
        scores={name: logit for name, logit in zip(names, logits, strict=True) if ":" not in name},
        objective="logit of the gate",
    )
    remaining = task.parameters - full + float(kept_weights([mask.double() for mask in masks]))
    return replace(decision, wanted=int(remaining))


def _modules(widths: Widths) -> list[_Module]:
    """All attentions, MLPs and experts. UserError if one of them has no units."""
    if widths.refused:
        name, why = next(iter(widths.refused.items()))
        raise UserError(
            f"{type(widths.model).__name__}: expected every module to have units: {name} {why}"
        )
    return [_Module.of(group) for group in widths.groups]


def _stream_gates(modules: Sequence[_Module], width: int) -> list[Gate]:
    """What each module reads (s1, s3) and writes (s2, s5) of the stream, and the MLPs' own channels
    (s4); the names of the former have a colon."""
    gates: dict[str, Gate] = {}
    every = torch.arange(width)
    for module in modules:
        group, name = module.group, module.name
        if f"{name}:reads" not in gates:
            readers = dict.fromkeys(part.module for part in module.readers)
            reads = tuple(Place(reader, "input", every) for reader in readers)
            gates[f"{name}:reads"] = Gate(f"{name}:reads", width, reads)
            writes = (Place(group.writer.module, "output", every),)
            gates[f"{name}:writes"] = Gate(f"{name}:writes", width, writes)
        if group.kind == "mlp":
            gates[group.name] = _writer_gate(group)
    return list(gates.values())


def _kept(module: _Module, at: Mapping[str, Tensor]) -> Tensor:
    """Weights of a module that are left (section 3.2): `reads x rows + columns x writes`, where
    rows and columns shrink with the hidden gate of an MLP."""
    group, name = module.group, module.name
    share = at[group.name].mean() if group.name in at else 1.0
    columns = group.columns.numel()
    reads, writes = at[f"{name}:reads"].sum(), at[f"{name}:writes"].sum()
    return share * (reads * module.rows + writes * columns)


def _within(logits: Sequence[Tensor], kept_weights: Any, most: float) -> tuple[list[Tensor], float]:
    """Masks `logit + BASE > shift`, at least one channel of each, with the smallest shift (zero if
    that will do) that leaves at most `most` weights; found among the logits themselves."""

    def masks(shift: float) -> list[Tensor]:
        found = []
        for logit in logits:
            mask = logit.double() + BASE > shift
            mask[logit.argmax()] = True
            found.append(mask)
        return found

    def fits(shift: float) -> bool:
        return float(kept_weights([m.double() for m in masks(shift)])) <= most

    if fits(0.0):
        return masks(0.0), 0.0
    levels = torch.unique(torch.cat([logit.double() for logit in logits]) + BASE)
    levels = levels[levels > 0]
    if not len(levels) or not fits(float(levels[-1])):
        raise UserError("ratio: expected a share that leaves one channel everywhere")
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(float(levels[middle])) else (middle + 1, high)
    return masks(float(levels[low])), float(levels[low])


@torch.no_grad()
def _zero_stream(module: _Module, at: Mapping[str, Tensor]) -> None:
    """Zeros where the module's gates on the stream are closed."""
    reads, writes = (_closed(at[f"{module.name}:{part}"]) for part in ("reads", "writes"))
    for part in module.readers:
        part.tensor().index_fill_(1 - part.axis, reads.to(part.tensor().device), 0)
    last = module.group.slices[-1]
    last.tensor().index_fill_(1 - last.axis, writes.to(last.tensor().device), 0)
    bias = getattr(last.module, "bias" if last.expert is None else f"{last.parameter}_bias", None)
    if isinstance(bias, nn.Parameter):
        bias.index_fill_(bias.dim() - 1, writes.to(bias.device), 0)


def _closed(mask: Tensor) -> Tensor:
    return (~mask).nonzero()[:, 0]
