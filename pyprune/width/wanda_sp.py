"""Wanda-sp, the structured form of Wanda that FLAP (arXiv 2312.11983) compares with."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune.calibration.stats import NormStatistic, Statistic
from pyprune.width.apply import remove
from pyprune.width.decision import WidthDecision
from pyprune.width.observe import too_few, visit_writers
from pyprune.width.registry import WidthTask, width_method
from pyprune.width.select import UnitOptions, best, prunable, uniform_sizes
from pyprune.width.structure import Group, Widths


@width_method(
    "wanda-sp",
    title="Wanda-sp: channels and heads by weight times input norm, equally many per layer",
    paper="arXiv 2312.11983",
    options=UnitOptions,
    removes="channels and heads",
)
@torch.no_grad()
def wanda_sp(task: WidthTask) -> WidthDecision:
    """Layer after layer in one forward: every score sees inputs that come from pruned layers."""
    options: UnitOptions = task.config.own_options()
    widths = Widths.of(task.model)
    groups = prunable(widths, options.units)
    sizes = uniform_sizes(widths, groups, task.target, options.multiple)
    kept: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    unseen: list[str] = []

    def visit(group: Group, statistic: Statistic) -> None:
        assert isinstance(statistic, NormStatistic)
        norms = statistic.column_norms().sqrt()
        if too_few(group, statistic):
            unseen.append(group.name)
            norms = torch.ones_like(norms)
        scores[group.name] = wanda_sp_scores(group, norms).cpu()
        kept.update(best({group.name: scores[group.name]}, {group.name: sizes[group.name]}))
        widths.mask({group.name: kept[group.name]})

    visit_writers(task, widths, groups, NormStatistic, visit)
    notes = [f"{name}: too few tokens, judged by its weights alone" for name in unseen]
    return remove(
        task,
        widths,
        kept,
        notes=notes,
        scores=scores,
        objective="mean |W| x input norm",
    )


def wanda_sp_scores(group: Group, norms: Tensor) -> Tensor:
    """[units]: `sum over the unit's columns c of mean_r |W_rc| * norms_c`, W of the writer."""
    w = group.writer.weight()
    return group.per_unit(w.abs().mean(dim=0, dtype=torch.float32) * norms).sum(dim=1)
