"""Single branches out of a model in memory, so that what is left is an ordinary model.

A stock layer is an attention and an MLP, so a model that has lost single ones is no stock model.
But what is left is a sequence of branches, and attention and MLP may come from different layers:
after removing M_7 and A_8, A_7 and M_8 make one layer. Only a branch that finds no partner needs a
layer of its own, whose other half has parameters that are all zero, and adds nothing. Nothing of
this changes what the model computes: rotary positions do not depend on the layer's index, and a
layer's kind (window, experts) goes with the branch that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pyprune.calibration.tokens import Batch
from pyprune.depth.graph import KINDS, STRUCTURE_TOLERANCE, Branch, ResidualGraph
from pyprune.depth.save import Slot, obstacle, restack
from pyprune.errors import UserError

Fill = Literal["packed", "zeros", "deci"]
# A layer's attention and MLP by the old layer that each was of; None: all zeros.
Pair = tuple[int | None, int | None]


@dataclass(frozen=True)
class Packing:
    """What the layers of the model are after `repack`.

    before: how many there were. pairs: for each layer, the old layers of its attention and of its
    MLP; None for a half that is there with parameters of zero. reason: why there are more layers
    than the branches that are left would need in a sequential stock model; "" if there are not.
    """

    before: int
    pairs: tuple[Pair, ...]
    reason: str = ""

    @property
    def zeros(self) -> list[Branch]:
        """The halves that are there but all zero, by their layer in the new model."""
        return [
            Branch(kind, i)
            for i, pair in enumerate(self.pairs)
            for kind, old in zip(KINDS, pair, strict=True)
            if old is None
        ]


def pack(
    kept: Sequence[Branch], together: Callable[[int, int], bool] = lambda a, m: True
) -> list[Pair]:
    """The fewest layers, in order, that hold the branches `kept` (ascending) one after the other.

    An MLP joins the attention right before it in `kept` if `together(its layer, the MLP's layer)`;
    those pairs exclude each other nowhere, so to take every one of them is optimal.
    """
    pairs: list[Pair] = []
    opened: int | None = None  # the attention that still waits for an MLP
    for branch in kept:
        if branch.kind == "attention":
            if opened is not None:
                pairs.append((opened, None))
            opened = branch.layer
            continue
        if opened is not None and not together(opened, branch.layer):
            pairs.append((opened, None))
            opened = None
        pairs.append((opened, branch.layer))
        opened = None
    if opened is not None:
        pairs.append((opened, None))
    return pairs


@torch.no_grad()
def repack(graph: ResidualGraph, removed: Collection[Branch], fill: Fill = "packed") -> Packing:
    """Takes `removed` out of `graph`'s model, in place; the graph must not be used afterwards.

    fill: "packed": as few layers as the class of the model allows, see `pack`. Where attention and
    MLP of different layers cannot share one (parallel layers; a configuration that cannot say what
    would be in it), layers that lost both branches still go, and where not even that can be
    expressed, all stay, with zeros; `Packing.reason` says why. "zeros": all layers stay. "deci": as
    "packed", for `pyprune.deci` to leave the zeros out.

    Raises:
        UserError: nothing would be left, a branch is unknown, or the result does not compute what
            `graph.skipping(removed)` does (the model must not be used then).
    """
    gone = set(removed)
    if not gone <= set(graph.branches):
        raise UserError(f"removed: expected branches of the model, got {sorted(map(str, gone))}")
    kept = [branch for branch in graph.branches if branch not in gone]
    if not kept:
        raise UserError("removed: expected a branch to stay, got all of them")
    probe, expected = _probe(graph, gone)
    pairs, reason = _plan(graph, kept, fill)
    for branch in _dead(pairs):
        block = graph.adapter.blocks[branch.layer]
        for module in graph.layouts[branch.layer].inner(branch.kind):
            for parameter in block.get_submodule(module).parameters():
                parameter.zero_()
    # Equal layouts wherever a layer takes another one's MLP.
    names = graph.layouts[0].modules("mlp")
    restack(graph.model, _slots(pairs), names)
    got = graph.model(input_ids=probe, use_cache=False).logits.float()
    tolerance = STRUCTURE_TOLERANCE * torch.finfo(next(graph.model.parameters()).dtype).eps
    scale, difference = expected.abs().max(), (got - expected).abs().max()
    if scale.isfinite() and not difference <= tolerance * scale:
        raise UserError(
            f"{type(graph.model).__name__}: without the branches its logits differ from those with "
            f"them skipped by {float(difference / scale):.1e}: it cannot be saved as a stock model"
        )
    return Packing(len(graph.layouts), tuple(pairs), reason)


def _probe(graph: ResidualGraph, removed: Collection[Branch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Some tokens, and the logits with `removed` skipped."""
    vocabulary = graph.model.config.get_text_config().vocab_size
    ids = Batch(torch.arange(16, device=graph.device).view(2, 8) % vocabulary).input_ids
    with graph.skipping(removed):
        return ids, graph.model(input_ids=ids, use_cache=False).logits.float()


def _plan(graph: ResidualGraph, kept: list[Branch], fill: Fill) -> tuple[list[Pair], str]:
    """The layers of the new model, and why there are not fewer."""
    layers = range(len(graph.layouts))
    left = set(kept)
    whole: list[Pair] = [
        (i if Branch("attention", i) in left else None, i if Branch("mlp", i) in left else None)
        for i in layers
    ]
    if fill == "zeros":
        return whole, ""
    best = pack(kept)
    name = type(graph.adapter.blocks[0]).__name__
    if len({*graph.layouts}) > 1:
        mixing = f"{name}: its layers are not all made the same way"
    elif graph.layouts[0].parallel:
        mixing = f"{name}: attention and MLP of a layer read the same state"
    else:
        mixing = obstacle(graph.model, _slots(best), graph.layouts[0].modules("mlp")) or ""
        if not mixing:
            return best, ""
    own = pack(kept, lambda attention, mlp: attention == mlp)
    dropping = obstacle(graph.model, _slots(own))
    if dropping is not None:
        return whole, f"all layers stay: {dropping}"
    reason = f"halves of different layers cannot share one: {mixing}"
    return own, reason if len(own) > len(best) else ""


def _slots(pairs: Sequence[Pair]) -> list[Slot]:
    """A half that is missing is the dead one of the other half's layer; of an empty layer, both."""
    slots = []
    for i, (attention, mlp) in enumerate(pairs):
        layer = attention if attention is not None else mlp
        if layer is None:  # only where all layers stay
            layer = i
        slots.append(Slot(layer, layer if mlp is None else mlp))
    return slots


def _dead(pairs: Sequence[Pair]) -> list[Branch]:
    """The halves that are to become zero, by their layer in the old model."""
    found = []
    for slot, (attention, mlp) in zip(_slots(pairs), pairs, strict=True):
        if attention is None:
            found.append(Branch("attention", slot.layer))
        if mlp is None:
            found.append(Branch("mlp", slot.mlp))
    return found
