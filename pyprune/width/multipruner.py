"""MultiPruner (Munoz et al. 2025, arXiv 2501.09949): BlockPruner, then widths by the same rule.

Branches go first, then channels, then KV groups, each until its share of the ratio is gone; each
step takes whatever raises perplexity on the calibration text least. Within a module the units of
least L1 norm go first, so that a width says which units are left.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyprune.calibration.tokens import TokenSet
from pyprune.depth.config import StructureConfig
from pyprune.depth.graph import Branch, Context, ResidualGraph, State
from pyprune.depth.registry import run_search
from pyprune.depth.repack import repack
from pyprune.depth.score import Scorer
from pyprune.errors import UserError
from pyprune.progress import Progress
from pyprune.width.apply import remove
from pyprune.width.config import WidthConfig
from pyprune.width.decision import WidthDecision
from pyprune.width.registry import width_method
from pyprune.width.structure import Group, Widths

MEGABYTE = 1 << 20
_WORDS = {"mlp": "channels", "heads": "KV groups"}
Module = tuple[Group, ...]  # all groups of one branch: one, or one per expert


@dataclass(frozen=True)
class MultiPrunerOptions:
    """blocks, heads: the shares of what is removed that go as whole branches and as KV groups; the
    rest goes as channels (paper: 0.44 and 0.04, with grouped queries 0.3 and 0). steps: into which
    each MLP's channels are divided. mode: exact (everything is scored at every step, also in the
    search for branches) or fast (lazily: only what was best when last scored). memory_mb: for
    cached hidden states.
    """

    blocks: float = 0.44
    heads: float = 0.04
    steps: int = 10
    mode: Literal["exact", "fast"] = "fast"
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        if not (self.blocks >= 0 and self.heads >= 0 and self.blocks + self.heads <= 1):
            raise UserError(
                "options: expected shares blocks and heads of 0 or more and at most 1 together, "
                f"got {self.blocks} and {self.heads}"
            )
        if self.steps < 2 or self.memory_mb < 1:
            raise UserError(
                f"options: expected 2 steps or more and 1 MB or more, got {self.steps} and "
                f"{self.memory_mb}"
            )


@width_method(
    "multipruner",
    title="MultiPruner: branches, then channels, then heads, greedily by perplexity",
    paper="arXiv 2501.09949",
    options=MultiPrunerOptions,
    removes="branches, channels and heads",
)
@torch.no_grad()
def multipruner(
    model: Any, tokens: TokenSet, config: WidthConfig, progress: Progress | None = None
) -> WidthDecision:
    """A stock model has one width for all layers: it is as narrow as its widest layer, and what
    narrower ones lack beyond that is zeros. Branches are re-packed into fewer layers."""
    options: MultiPrunerOptions = config.own_options()
    dense = sum(p.numel() for p in model.parameters())
    target = config.ratio * dense
    widths = Widths.of(model)
    graph = ResidualGraph(model, widths.adapter)
    graph.check()
    removed = _branches(graph, tokens, config, options, progress)
    search = WidthSearch(graph, widths, tokens, removed, options, progress)
    gone = graph.removed_parameters(removed)
    norms = {group.name: norm_of_rows(group) for group in widths.groups}
    heads = int(target * options.heads) if widths.of_kind("heads") else 0
    gone += search.remove("mlp", math.ceil(target) - gone - heads)
    if heads:
        gone += search.remove("heads", math.ceil(target) - gone)
    decision = remove(
        widths,
        search.kept(),
        tokens=tokens,
        config=config,
        dense_parameters=dense,
        transforms=[{"steps": [list(step) for step in search.log]}],
        scores=norms,
        objective="L1 norm",
    )
    layers = len(graph.layouts)
    whole = {group.name for branch in removed for group in search.groups(branch)}
    packing = repack(graph, removed)
    sizes = dict(decision.sizes)
    if len(packing.pairs) < layers:
        sizes["num_hidden_layers"] = (layers, len(packing.pairs))
    after = sum(p.numel() for p in model.parameters())
    return replace(
        decision,
        sizes=sizes,
        branches=tuple(map(str, removed)),
        removed={k: v for k, v in decision.removed.items() if k not in whole},
        zeroed={k: v for k, v in decision.zeroed.items() if k not in whole},
        parameters=(dense, after),
        wanted=dense - gone,
        notes=(*decision.notes, *filter(None, [packing.reason])),
    )


def _branches(
    graph: ResidualGraph,
    tokens: TokenSet,
    config: WidthConfig,
    options: MultiPrunerOptions,
    progress: Progress | None,
) -> list[Branch]:
    """The branches that BlockPruner removes, in order; greedily, as the widths after them."""
    if not options.blocks:
        return []
    given = {"mode": options.mode, "memory_mb": options.memory_mb, "refine": "none"}
    wanted = StructureConfig(
        "blockpruner",
        ratio=config.ratio * options.blocks,
        method_options=given,
        calibration=config.calibration,
    )
    return run_search(graph.model, graph.adapter, tokens, wanted, progress).removed


class WidthSearch:
    """Narrows the modules that are left, one step at a time, by perplexity.

    Attributes:
        log: (module, units left, perplexity) of every step, in order.
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
        self._graph = graph
        self._removed = frozenset(removed)
        self._options = options
        self._progress = progress
        self._scorer = Scorer(graph, tokens.batches)
        self._modules = _modules(widths)
        self._order = {group.name: _by_norm(group) for group in widths.groups}
        self._left = {group.name: group.units for group in widths.groups}
        self.log: list[tuple[str, int, float]] = []
        self._cache: list[dict[int, State]] = []
        self._contexts: list[Context] = []
        self._stride = 1
        self._fill(0)

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

    def remove(self, kind: Literal["mlp", "heads"], parameters: int) -> int:
        """Narrows modules of a kind until at least `parameters` are gone; returns how many are.

        Raises UserError: there is not that much to remove while each keeps a step.
        """
        gone = step = 0
        by_position = {branch.position: branch for branch in self._modules}
        # Score, position of the branch, the step at which it was scored. An old score is taken for
        # a bound of the new one (damage grows with what is gone already); none is below all.
        queue = [(-math.inf, branch.position, -1) for branch in self._candidates(kind)]
        while gone < parameters:
            if not queue:
                raise UserError(
                    f"ratio: expected {_WORDS[kind]} that still can go, "
                    f"{parameters - gone:,} parameters are missing"
                )
            score, position, scored = heapq.heappop(queue)
            branch = by_position[position]
            if scored != step:
                heapq.heappush(queue, (self._score(branch), position, step))
                continue
            gone += self._accept(branch, score)
            step += 1
            if self._next(branch) is not None:
                queue.append((-math.inf, position, -1))
            if self._options.mode == "exact":
                queue = [(-math.inf, at, -1) for _, at, _ in queue]
            heapq.heapify(queue)
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

    def _score(self, branch: Branch) -> float:
        """Perplexity with the branch one step narrower."""
        narrower = self._next(branch)
        assert narrower is not None
        with _without(self._going(narrower)):
            start = branch.position // self._stride * self._stride
            rows = []
            for i, context in enumerate(self._contexts):
                state = self._cache[i][start]
                hidden = self._graph.run_from(start, state, context, self._removed)
                rows.append(self._scorer.rows(i, hidden))
        return self._scorer.total(rows)[0]

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
        self._fill(branch.position + 1)
        return gone

    def _going(self, narrower: Sequence[tuple[Group, int]]) -> list[tuple[Group, Tensor]]:
        return [
            (group, self._order[group.name][left : self._left[group.name]])
            for group, left in narrower
        ]

    def _fill(self, position: int) -> None:
        """Recomputes the cached states from `position` on."""
        if not self._contexts:
            for batch in self._scorer.batches:
                state, context = self._graph.start(batch)
                self._cache.append({0: state})
                self._contexts.append(context)
            size = sum(c[0].total.numel() * c[0].total.element_size() for c in self._cache)
            fitting = max(1, self._options.memory_mb * MEGABYTE // size)
            self._stride = -(-len(self._graph.branches) // fitting)
        start = max(0, position - 1) // self._stride * self._stride
        for cached, context in zip(self._cache, self._contexts, strict=True):
            state = cached[start]
            for branch in self._graph.branches[start:]:
                if branch.position % self._stride == 0:
                    cached[branch.position] = state
                if branch in self._removed:
                    state = self._graph.skip(branch, state)
                else:
                    state = self._graph.run(branch, state, context)


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


@contextmanager
def _without(units: Sequence[tuple[Group, Tensor]]) -> Iterator[None]:
    """Within it the units write nothing."""
    held = [(group.slices[-1].tensor(), group.slices[-1].tensor().clone()) for group, _ in units]
    try:
        for group, gone in units:
            group.slices[-1].zero(gone)
        yield
    finally:
        for live, copy in held:
            live.copy_(copy)
