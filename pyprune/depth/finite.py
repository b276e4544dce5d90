"""Where a model stops being finite: looked for only once something was found not to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.calibration.tokens import Batch
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.errors import OVERFLOW, UserError
from pyprune.models.running import positions_at_once


class NotFiniteError(UserError):
    """A state, loss or gradient is NaN or infinite. `located` adds where it begins, so that no
    method has to look at every branch while all is well."""


def located(
    error: NotFiniteError, graph: ResidualGraph, batches: Sequence[Batch]
) -> NotFiniteError:
    """The same with what is known of where in the model, as it is now, NaN or infinity begins."""
    where = first_not_finite(graph, batches)
    if where is None:  # the model is not to blame: what the method made of it is
        return error
    half = any(p.dtype == torch.float16 for p in graph.model.parameters())
    return NotFiniteError(f"{error}: NaN or infinity begins {where}{OVERFLOW if half else ''}")


@torch.no_grad()
def first_not_finite(graph: ResidualGraph, batches: Sequence[Batch]) -> str | None:
    """After which module of the model the state of a real token is first NaN or infinite, and in
    which batch (from 1); None where everything is finite up to the logits. One forward a batch, up
    to the first such."""
    for number, batch in enumerate(batches, 1):
        module = _first_module(graph, batch.to(graph.device))
        if module is not None:
            return f"after {module}, in batch {number} of {len(batches)}"
    return None


def _first_module(graph: ResidualGraph, batch: Batch) -> str | None:
    mask = batch.attention_mask
    state, context = graph.start(batch)
    if not _finite(state.total, mask):
        return "the embeddings"
    for branch in graph.branches:
        state = graph.run(branch, state, context)
        if not _finite(state.total, mask):
            return _named(graph, branch)
    finished = graph.finish(state.total, batch)
    if not _finite(finished, mask):
        return "the final norm"
    step = positions_at_once(graph.model, len(finished))
    for at in range(0, finished.shape[1], step):
        piece = slice(at, at + step)
        logits = graph.logits(finished[:, piece], batch.input_ids)
        if not _finite(logits, None if mask is None else mask[:, piece]):
            return "the head"
    return None


def _named(graph: ResidualGraph, branch: Branch) -> str:
    """The module of the model whose output the branch adds."""
    own = graph.layouts[branch.layer].last(branch.kind)
    return f"{graph.adapter.block_names[branch.layer]}.{own}"


def _finite(values: Tensor, mask: Tensor | None) -> bool:
    """Of the real tokens of values [B, T, n]; mask [B, T]."""
    finite = values.isfinite().all(-1)
    return bool((finite if mask is None else finite | (mask == 0)).all())
