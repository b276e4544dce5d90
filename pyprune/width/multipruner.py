"""MultiPruner (Munoz et al. 2025, arXiv 2501.09949): BlockPruner, then widths by the same rule.

Branches go first, then channels, then KV groups, each until its share of the ratio is gone; each
step takes whatever raises perplexity on the calibration text least. Within a module the units of
least L1 norm go first, so that a width says which units are left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Annotated, Literal

import torch
from torch import Tensor

from pyprune.calibration.tokens import Batch, TokenSet
from pyprune.depth.addons import AddOns, apply_add_ons, check_add_ons
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import DepthDecision
from pyprune.depth.given import Given
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.greedy import PARTS, in_parts
from pyprune.depth.registry import run_search
from pyprune.depth.repack import repack
from pyprune.depth.score import Scorer, or_inf
from pyprune.depth.walkdown import WalkDown
from pyprune.errors import UserError
from pyprune.methods.options import Count, Natural, OptionError, at_least
from pyprune.models.stock import parameter_count
from pyprune.progress import Progress
from pyprune.width.apply import remove
from pyprune.width.decision import ADD_ONS, WidthDecision
from pyprune.width.registry import WidthTask, width_method
from pyprune.width.structure import Group, Widths

MEGABYTE = 1 << 20
# Of what is removed as branches and as KV groups, without and with grouped queries.
PAPER_SHARES = {False: (0.44, 0.04), True: (0.3, 0.0)}
_WORDS = {"mlp": "channels", "heads": "KV groups"}
Module = tuple[Group, ...]  # all groups of one branch: one, or one per expert


@dataclass(frozen=True)
class MultiPrunerOptions(AddOns):
    """blocks, heads: the shares of what is removed that go as whole branches and as KV groups; the
    rest goes as channels; none: the paper's, 0.44 and 0.04, with grouped queries 0.3 and 0. steps:
    into which each MLP's channels are divided. mode: exact (everything is scored at every step,
    also in the search for branches) or fast (lazily: what cost least when last scored).
    audit_every: in every n-th step fast also looks at the module that it has not looked at for
    longest (0: never). every: score each n-th token (1: all, as published); the head and its loss
    are half of the time of a small model's scores. memory_mb: for cached hidden states and live
    streams. width: streams that run at once. And the add-ons `compensate`, `refit`, `ridge`, see
    `multipruner`.
    """

    blocks: float | None = None
    heads: float | None = None
    steps: Annotated[int, at_least(2)] = 10
    mode: Literal["exact", "fast"] = "fast"
    audit_every: Natural = 2
    every: Count = 2
    memory_mb: Count = 2048
    width: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wanted and self.blocks == 0:
            raise OptionError(
                "compensate, refit: expected with blocks above 0, got 0; they make up for branches "
                "that went"
            )
        for grouped in (False, True):
            blocks, heads = self.shares(grouped)
            if not (blocks >= 0 and heads >= 0 and blocks + heads <= 1):
                raise OptionError(
                    "blocks, heads: expected shares of 0 or more and at most 1 together, got "
                    f"{blocks} and {heads}"
                )

    def shares(self, grouped: bool) -> tuple[float, float]:
        """`blocks` and `heads` of a model. grouped: whether several query heads share a key."""
        blocks, heads = PAPER_SHARES[grouped]
        return (
            blocks if self.blocks is None else self.blocks,
            heads if self.heads is None else self.heads,
        )


@width_method(
    "multipruner",
    title="MultiPruner: branches, then channels, then heads, greedily by perplexity",
    paper="arXiv 2501.09949",
    options=MultiPrunerOptions,
    removes="branches, channels and heads",
)
@torch.no_grad()
def multipruner(task: WidthTask) -> WidthDecision:
    """A stock model has one width for all layers: it is as narrow as its widest layer, and what
    narrower ones lack beyond that is zeros. Branches are re-packed into fewer layers.

    The add-ons act on the gaps that branches leave, and come when both searches are done, before
    anything is cut: what they are fitted to is the stream of the dense model, and what they start
    from that of the model as narrow as it will be. What narrower modules lack elsewhere is left to
    the next gap.
    """
    options: MultiPrunerOptions = task.config.own_options()
    dense = task.parameters
    target = task.config.ratio * dense
    widths = Widths.of(task.model)
    graph = ResidualGraph(task.model, widths.adapter)
    graph.check()
    check_add_ons(graph, options)
    kv_groups = widths.of_kind("heads")
    blocks, share = options.shares(any(g.fields["num_attention_heads"] > 1 for g in kv_groups))
    found = _branches(task, graph, blocks)
    removed = [] if found is None else found.removed
    given = Given()
    if options.wanted:
        given.hold([group.slices[-1].owner() for group in widths.groups])
    search = WidthSearch(graph, widths, task.tokens, removed, options, task.progress)
    gone = graph.removed_parameters(removed)
    norms = {group.name: norm_of_rows(group) for group in widths.groups}
    curve = _curve(found, dense, search.perplexity)
    heads = int(target * share) if kv_groups else 0
    gone += search.remove("mlp", math.ceil(target) - gone - heads)
    if heads:
        gone += search.remove("heads", math.ceil(target) - gone)
    curve += search.curve(curve[-1][1])
    done = apply_add_ons(graph, removed, search.batches, options, given)
    if done:
        curve.append((ADD_ONS, curve[-1][1], search.score()))
    decision = remove(
        task,
        widths,
        search.kept(),
        transforms=[
            {"steps": [list(step) for step in search.log], "evaluations": search.evaluations},
            *done,
        ],
        scores=norms,
        objective="L1 norm",
    )
    layers = len(graph.layouts)
    whole = {group.name for branch in removed for group in search.groups(branch)}
    packing = repack(graph, removed)
    sizes = dict(decision.sizes)
    if len(packing.pairs) < layers:
        sizes["num_hidden_layers"] = (layers, len(packing.pairs))
    return replace(
        decision,
        sizes=sizes,
        branches=tuple(map(str, removed)),
        removed={k: v for k, v in decision.removed.items() if k not in whole},
        zeroed={k: v for k, v in decision.zeroed.items() if k not in whole},
        parameters=(dense, parameter_count(task.model)),
        wanted=dense - gone,
        curve=tuple(curve),
        notes=(*decision.notes, *filter(None, [packing.reason])),
    )


def _curve(
    found: DepthDecision | None, dense: int, perplexity: float
) -> list[tuple[str, int, float]]:
    """See `WidthDecision.curve`: up to the last branch; perplexity: of the dense model where no
    branch went."""
    if found is None:
        return [("dense", dense, perplexity)]
    assert found.dense is not None
    points = [("dense", dense, found.dense)]
    for step in found.steps:
        assert step.parameters is not None and step.score is not None  # of a search over rounds
        points.append((str(step.unit[0]), step.parameters, step.score))
    return points


def _branches(task: WidthTask, graph: ResidualGraph, blocks: float) -> DepthDecision | None:
    """BlockPruner's: greedily, as the widths after them, and in mode fast without its audits, which
    look at everything; None where no branches are wanted."""
    if not blocks:
        return None
    config = task.config
    options: MultiPrunerOptions = config.own_options()
    given = {name: getattr(options, name) for name in ("mode", "every", "memory_mb", "width")}
    given |= {"refine": "none", "audit_every": 0}
    wanted = StructureConfig(
        "blockpruner",
        ratio=config.ratio * blocks,
        method_options=given,
        calibration=config.calibration,
    )
    try:
        return run_search(graph.model, graph.adapter, task.tokens, wanted, task.progress)
    except UserError as error:
        raise UserError(
            f"ratio {config.ratio:g}, of which blocks={blocks:g} as branches: {error}"
        ) from error


class WidthSearch:
    """Narrows the modules that are left, one step at a time, by perplexity.

    Attributes:
        log: (module, units left, perplexity) of every step, in order.
        perplexity: with what is left.
        evaluations: of candidates so far.
    """

    def __init__(
        self,
        graph: ResidualGraph,
        widths: Widths,
        tokens: TokenSet,
        removed: Collection[Branch],
        options: MultiPrunerOptions,
        progress: Progress | None = None,
    ) -> None:
        self._removed = frozenset(removed)
        self._options = options
        self._progress = progress
        self._modules = _modules(widths)
        self._order = {group.name: _by_norm(group) for group in widths.groups}
        self._left = {group.name: group.units for group in widths.groups}
        batches = in_parts(tokens.batches) if options.mode == "fast" else tokens.batches
        self._scorer = Scorer(graph, batches, every=options.every)
        memory = options.memory_mb * MEGABYTE
        most = max(len(self._candidates(kind)) for kind in _WORDS)
        self._walk = WalkDown(graph, self._scorer, memory, options.width, most, self._narrower)
        self.perplexity = self._walk.reference(self._removed)
        # Of each module's latest step that was scored: the rise of the mean loss, and when.
        self._rises: dict[Branch, float] = {}
        self._looked: dict[Branch, int] = {}
        self.log: list[tuple[str, int, float]] = []
        self._gone: list[int] = []  # parameters, in every step
        self.evaluations = 0

    @property
    def batches(self) -> list[Batch]:
        """What it is measured on, on the model's device."""
        return self._scorer.batches

    def score(self) -> float:
        """Perplexity of the model as it is now, without the branches; from no cached state."""
        return self._scorer.score(self._removed)

    def groups(self, branch: Branch) -> Module:
        """What of the branch has units; nothing if its family has none."""
        return self._modules.get(branch, ())

    def kept(self) -> dict[str, Tensor]:
        """Of every group the units that stay; none where the whole branch went."""
        found = {}
        for branch, module in self._modules.items():
            for group in module:
                left = 0 if branch in self._removed else self._left[group.name]
                found[group.name] = self._order[group.name][:left].sort().values
        return found

    def curve(self, before: int) -> list[tuple[str, int, float]]:
        """See `WidthDecision.curve`; before: parameters before the first step."""
        sizes = accumulate(self._gone, lambda left, gone: left - gone, initial=before)
        next(sizes)
        return [
            (f"{name}: {left} left", size, score)
            for (name, left, score), size in zip(self.log, sizes, strict=True)
        ]

    def remove(self, kind: Literal["mlp", "heads"], parameters: int) -> int:
        """Narrows modules of a kind until at least `parameters` are gone; returns how many are.

        Raises UserError: there is not that much to remove while each keeps a step.
        """
        gone = 0
        self._rises.clear()
        self._walk.forget_streams()
        while gone < parameters:
            left = self._candidates(kind)
            if not left:
                raise UserError(
                    f"ratio: expected to remove at most {gone:,} parameters as {_WORDS[kind]} "
                    f"(each module keeps a step), got {parameters:,}"
                )
            if self._options.mode == "fast":
                scores = self._lazily(left)
            else:
                scores = self._scores(left, self.perplexity)
            # The first of equals; a score that is no number is never best.
            branch = min(scores, key=lambda b: (or_inf(scores[b]), b.position))
            if math.isnan(scores[branch]):
                raise UserError("calibration: every step gives NaN; expected finite scores")
            gone += self._accept(branch, scores[branch])
            if self._progress is not None:
                self._progress(f"{branch} narrowed", gone, parameters)
        return gone

    # ---- inside

    def _candidates(self, kind: str) -> list[Branch]:
        wanted = "mlp" if kind == "mlp" else "attention"
        return [
            branch
            for branch in self._modules
            if branch.kind == wanted
            and branch not in self._removed
            and self._next(branch) is not None
        ]

    def _next(self, branch: Branch) -> list[tuple[Group, int]] | None:
        """The module's groups with the units that each keeps after one more step; None if one would
        have none left."""
        found = []
        for group in self._modules[branch]:
            step = 1 if group.kind == "heads" else -(-group.units // self._options.steps)
            found.append((group, self._left[group.name] - step))
        return found if all(left >= 1 for _, left in found) else None

    def _scores(
        self, branches: Sequence[Branch], before: float, batches: int | None = None
    ) -> dict[Branch, float]:
        """Perplexity with each of `branches` one step narrower; before: without that. batches: only
        the first so many; None: all."""
        self.evaluations += len(branches)
        units = [(branch,) for branch in branches]
        scores = self._walk.score(units, self._removed, batches)
        found = dict(zip(branches, scores, strict=True))
        for branch, score in found.items():
            mean_of = self._scorer.mean_of
            self._rises[branch] = or_inf(mean_of(score) - mean_of(before))
            self._looked[branch] = len(self.log)
        return found

    def _lazily(self, left: Sequence[Branch]) -> dict[Branch, float]:
        """Looks at the steps that raised the mean loss least when last seen, one by one, until the
        least is one that was looked at now (Minoux's lazy greedy).

        Of a module that has just lost a step, what that one cost stands for the next. What a step
        costs can also fall as more is removed, and would not be looked at again: hence audits. The
        first costs are estimates, from a part of the batches.
        """
        new = [branch for branch in left if branch not in self._rises]
        if new:
            part = max(1, len(self._scorer.batches) // PARTS)
            self._scores(new, self._walk.reference(self._removed, part), part)
        seen: dict[Branch, float] = {}
        every = self._options.audit_every
        if every and len(self.log) % every == every - 1:
            oldest = min(left, key=lambda b: (self._looked[b], b.position))
            seen |= self._scores([oldest], self.perplexity)
        while True:
            best = min(left, key=lambda b: (self._rises[b], b.position))
            if best in seen:
                return seen
            seen |= self._scores([best], self.perplexity)

    def _accept(self, branch: Branch, score: float) -> int:
        """Narrows the branch for good; returns the parameters that this removes."""
        narrower = self._next(branch)
        assert narrower is not None
        gone = 0
        for group, units in self._going(narrower):
            group.slices[-1].zero(units)
            gone += group.unit_parameters * len(units)
        for group, left in narrower:
            self._left[group.name] = left
        self.log.append((str(branch), narrower[0][1], score))
        self._gone.append(gone)
        self._walk.accept((branch,))
        self.perplexity = score
        return gone

    def _going(self, narrower: Sequence[tuple[Group, int]]) -> list[tuple[Group, Tensor]]:
        return [
            (group, self._order[group.name][left : self._left[group.name]])
            for group, left in narrower
        ]

    @contextmanager
    def _narrower(self, branch: Branch) -> Iterator[None]:
        """Within it the units of the branch's next step write nothing."""
        narrower = self._next(branch)
        assert narrower is not None
        going = self._going(narrower)
        held = [
            (group.slices[-1].tensor(), group.slices[-1].tensor().clone()) for group, _ in going
        ]
        try:
            for group, units in going:
                group.slices[-1].zero(units)
            yield
        finally:
            for live, copy in held:
                live.copy_(copy)


def _modules(widths: Widths) -> dict[Branch, Module]:
    found: dict[Branch, Module] = {}
    for group in widths.groups:
        branch = Branch("attention" if group.kind == "heads" else "mlp", group.layer)
        found[branch] = (*found.get(branch, ()), group)
    return found


def norm_of_rows(group: Group) -> Tensor:
    """[units] fp64: L1 norm of the rows that each unit owns, biases included."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for part in group.slices[:-1]:
        t = part.tensor().double().abs().movedim(part.axis, 0)
        total += (t.flatten(1).sum(dim=1) if t.dim() > 1 else t).cpu()[part.index].sum(dim=1)
    return total


def _by_norm(group: Group) -> Tensor:
    """Units by descending norm, the lower index first among equals."""
    return norm_of_rows(group).sort(descending=True, stable=True).indices
