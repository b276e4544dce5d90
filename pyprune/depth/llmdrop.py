"""LLM-Drop (He et al., TMLR 2026, arXiv 2406.15786): branches that change the stream least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pyprune.depth.addons import AddOns, apply_add_ons, check_add_ons
from pyprune.depth.budget import Budget, units_of
from pyprune.depth.decision import DepthDecision, Step
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.hidden import real_tokens
from pyprune.depth.registry import DepthTask, depth_method
from pyprune.depth.score import Scorer
from pyprune.errors import UserError
from pyprune.models.stock import parameter_count


@dataclass(frozen=True)
class LlmDropOptions(AddOns):
    """blocks: which branches may go: attention (as recommended by the paper), mlp or mixed.
    iterative: rank again after every removal. And the add-ons `compensate`, `refit`, `ridge`."""

    blocks: Literal["attention", "mlp", "mixed"] = "attention"
    iterative: bool = False


@depth_method(
    "llm-drop",
    title="LLM-Drop: branches by similarity of their input and output",
    paper="arXiv 2406.15786",
    options=LlmDropOptions,
)
@torch.no_grad()
def llm_drop(task: DepthTask) -> DepthDecision:
    """Removes by descending cosine between the stream before and after a branch, token by token,
    padding excluded. The last MLP is scored on the stream itself, never behind the final norm."""
    graph, tokens, config = task.graph, task.tokens, task.config
    options: LlmDropOptions = config.own_options()
    check_add_ons(graph, options)
    kinds = ("attention", "mlp") if options.blocks == "mixed" else (options.blocks,)
    units = units_of(
        [b for b in graph.branches if b.kind in kinds and config.allows(b)], layers=False
    )
    budget = Budget.of(graph, config, units, tokens.batches[0])
    scorer = Scorer(graph, tokens.batches)
    similarity = branch_similarity(graph, scorer, [])
    importance = {str(unit[0]): 1.0 - similarity[unit[0]] for unit in units}
    steps: list[Step] = []
    while not budget.reached(gone := [step.unit[0] for step in steps]):
        if steps and options.iterative:
            similarity = branch_similarity(graph, scorer, gone)
        left = [unit for unit in units if unit[0] not in gone]
        if not left or len(gone) + 1 >= len(graph.branches):
            raise UserError(f"expected a target that leaves one branch, got {budget.target:g}")
        unit = max(left, key=lambda u: similarity[u[0]])
        removed = [*gone, unit[0]]
        size = parameter_count(graph.model) - graph.removed_parameters(removed)
        candidates = {str(u[0]): 1.0 - similarity[u[0]] for u in left}
        steps.append(Step(unit, 1.0 - similarity[unit[0]], size, 0, candidates))
        if task.progress is not None:
            task.progress(f"removed {unit[0]}", len(steps), None)
    return task.decision(
        steps,
        objective="1 - cosine",
        importance=importance,
        transforms=apply_add_ons(graph, gone, scorer.batches, options),
    )


def branch_similarity(
    graph: ResidualGraph, scorer: Scorer, removed: list[Branch]
) -> dict[Branch, float]:
    """Mean over tokens of cos(stream before, stream after) of every branch that is left. Raises
    NotFiniteError where the stream is NaN or infinite."""
    sums = {branch: 0.0 for branch in graph.branches if branch not in removed}
    tokens = 0
    for batch in scorer.batches:
        state, context = graph.start(batch)
        rows = real_tokens(state.total, batch).double()
        tokens += len(rows)
        for branch in graph.branches:
            if branch in removed:
                state = graph.skip(branch, state)
                continue
            state = graph.run(branch, state, context)
            before, rows = rows, real_tokens(state.total, batch).double()
            sums[branch] += float(torch.cosine_similarity(before, rows, dim=-1).sum())
    return {branch: value / tokens for branch, value in sums.items()}
