"""Statistics of what the units hand to the matrices that write into the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pyprune.calibration import walk as walks
from pyprune.calibration.stats import Statistic
from pyprune.width.registry import WidthTask
from pyprune.width.structure import Group, Widths

# An expert that saw fewer tokens than this share of its channels is judged by its weights alone.
FEWEST_TOKENS = 0.25

Visit = Callable[[Group, Statistic], None]


def visit_writers(
    task: WidthTask,
    widths: Widths,
    groups: Sequence[Group],
    statistic: Callable[[int, torch.device], Statistic],
    visit: Visit,
) -> None:
    """Calls `visit` for each of `groups` in the order of the forward, with the statistic of its
    writer's inputs over all real tokens. What it changes in the model, later groups see."""
    by_name = {group.name: group for group in groups}
    adapter = widths.adapter.restricted(by_name)
    device = next(widths.model.parameters()).device

    def reached(found: walks.Group) -> None:
        for ref in found.linears:
            assert found.statistic is not None
            visit(by_name[ref.name], found.statistic)

    def moved(event: walks.WalkEvent) -> None:
        if task.progress is not None:
            task.progress(f"block {event.block + 1}/{event.blocks}", event.block, event.blocks)

    with walks.InMemoryStore(adapter, device) as store:
        walks.walk(
            adapter,
            task.tokens.batches,
            statistic=statistic,
            prune_group=reached,
            store=store,
            device=device,
            progress=moved,
        )


def too_few(group: Group, statistic: Statistic) -> bool:
    """Whether an expert saw too few tokens to be judged by them (other modules see all)."""
    columns = group.columns.numel()
    return statistic.tokens < FEWEST_TOKENS * columns and group.writer.index is not None
