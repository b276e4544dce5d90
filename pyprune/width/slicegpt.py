"""SliceGPT (Ashkboos et al., ICLR 2024, arXiv 2401.15024) with one basis for the whole stream."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pyprune.calibration.tokens import Batch
from pyprune.errors import UserError
from pyprune.methods.options import Count
from pyprune.models.stock import parameter_count
from pyprune.width.cut import TOLERANCE_EPS, TOLERANCE_MOST
from pyprune.width.decision import WidthDecision
from pyprune.width.families import EXPERT_STEP
from pyprune.width.registry import WidthTask, width_method
from pyprune.width.stream import Stream, one_basis, projected_states

NOTE = (
    "one basis for all layers: the published method has one per block and a matrix on every "
    "residual connection between them, which no stock model has"
)


@dataclass(frozen=True)
class SliceGptOptions:
    """multiple: that the width of the stream is a multiple of (with Llama it is one of the number
    of heads, with fused experts one of 8 in any case). normalised: directions are those of the
    stream as norms see it, every token alike (else of the stream itself)."""

    multiple: Count = 8
    normalised: bool = True


@width_method(
    "slicegpt",
    title="SliceGPT: a narrower residual stream, rotated to its principal directions",
    paper="arXiv 2401.15024",
    options=SliceGptOptions,
    removes="dimensions of the residual stream",
)
@torch.no_grad()
def slicegpt(task: WidthTask) -> WidthDecision:
    """The widest stream that meets the ratio. Tied embeddings are untied first, and the second copy
    counts: of small models with large vocabularies much of the stream has to go for that alone."""
    options: SliceGptOptions = task.config.own_options()
    stream = Stream.of(task.model)
    most = (1 - task.config.ratio) * task.parameters
    graph = stream.graph
    experts = any(graph.adapter.experts(i) for i in range(len(graph.layouts)))
    least = EXPERT_STEP if experts else 1
    multiple = math.lcm(options.multiple, least)
    width = fitting_width(stream, most, multiple)
    notes = _notes(stream, width, most, multiple, least)
    batches = [batch.to(graph.device) for batch in task.tokens.batches]
    if task.progress is not None:
        task.progress("principal directions of the stream", 0, None)
    count = stream.directions(width)
    basis = one_basis(graph, batches, count, options.normalised, stream.centred)
    probe = Batch(batches[0].input_ids[:1, :16])
    expected = graph.logits(
        graph.finish(projected_states(graph, probe, [basis] * (len(graph.branches) + 1)), probe),
        probe.input_ids,
    )
    wanted, stays = stream.numel(width), bool(stream.obstacle)
    stream.slice(basis)
    _compare(task.model, probe, expected)
    transform = {"rotation": "principal directions"}
    return task.decision(
        parameter_count(task.model),
        units={},
        removed={},
        sizes={} if stays else {"hidden_size": (stream.width, width)},
        wanted=wanted,
        zeroed={"hidden_size": stream.width - width} if stays else {},
        notes=notes,
        transforms=(transform if stays else transform | {"stream": "scaled by sqrt(d' / d)"},),
    )


def affordable_width(stream: Stream, most: float, multiple: int) -> int:
    """The widest stream, a multiple, with at most `most` parameters; 0 if there is none."""
    each = stream.numel(1) - stream.numel(0)
    widest = min(int((most - stream.numel(0)) // each), stream.width)
    return max(0, widest // multiple * multiple)


def fitting_width(stream: Stream, most: float, multiple: int) -> int:
    """The widest of them that the configuration takes.

    Raises UserError if there is none.
    """
    for width in range(affordable_width(stream, most, multiple), 0, -multiple):
        if stream.fits(width):
            return width
    total = parameter_count(stream.graph.model)
    widths = range(multiple, stream.width + 1, multiple)
    least = next((width for width in widths if stream.fits(width)), stream.width)
    untied = ", the head being untied" if stream.tied else ""
    raise UserError(
        f"ratio: expected at most {max(0.0, 1 - stream.numel(least) / total):.3f} of the "
        f"parameters (the stream is at least {least} wide{untied}), got {1 - most / total:.3f}"
    )


def _notes(stream: Stream, width: int, most: float, multiple: int, least: int) -> tuple[str, ...]:
    """What a reader of the result should know; of the stream as it still is. least: of which the
    width has to be a multiple, whatever is asked for."""
    notes = [NOTE]
    if stream.tied:
        notes.append("the head is no longer tied to the embeddings")
    if stream.obstacle:
        notes.append(
            f"{width} of {stream.width} dimensions are left, the others stay as zeros: "
            f"{stream.obstacle}"
        )
    affordable = affordable_width(stream, most, multiple)
    if width < affordable:
        name = type(stream.graph.model.config.get_text_config()).__name__
        wider = fitting_width(stream, most, least)
        instead = f" (-O multiple={least}: {wider})" if wider > width else ""
        notes.append(
            f"{width} is narrower than asked for, but {name} does not take {affordable}{instead}"
        )
    return tuple(notes)


def _compare(model: Any, probe: Batch, expected: torch.Tensor) -> None:
    """Raises UserError if the logits of half the tokens or more are not what is expected. (Of a few
    tokens rounding alone is seen: one of SmolLM2-135M's moves by 4e-4 from fp64 to fp32.)"""
    got = model(input_ids=probe.input_ids, use_cache=False).logits.float()
    dtype = next(model.parameters()).dtype
    tolerance = min(TOLERANCE_MOST, TOLERANCE_EPS * torch.finfo(dtype).eps)
    scale, difference = expected.abs().max(), (got - expected).abs().amax(-1).median()
    if not difference <= tolerance * scale:
        raise UserError(
            f"{type(model).__name__}: logits of the sliced model differ from those of the "
            f"projected stream by {float(difference / scale):.1e}: something besides the norms "
            "reads the stream's coordinates"
        )
