"""Wanda-sp, the structured form of Wanda that FLAP (arXiv 2312.11983) compares with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyprune.calibration.stats import NormStatistic, Statistic
from pyprune.calibration.tokens import TokenSet
from pyprune.progress import Progress
from pyprune.width.apply import remove
from pyprune.width.config import WidthConfig
from pyprune.width.decision import WidthDecision
from pyprune.width.observe import too_few, visit_writers
from pyprune.width.registry import width_method
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
def wanda_sp(
    model: Any, tokens: TokenSet, config: WidthConfig, progress: Progress | None = None
) -> WidthDecision:
    """Layer after layer in one forward: every score sees inputs that come from pruned layers."""
    options: UnitOptions = config.own_options()
    dense = sum(p.numel() for p in model.parameters())
    widths = Widths.of(model)
    groups = prunable(widths, options.units)
    sizes = uniform_sizes(widths, groups, math.ceil(config.ratio * dense), options.multiple)
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

    visit_writers(widths, groups, tokens, NormStatistic, visit, progress)
    notes = [f"{name}: too few tokens, judged by its weights alone" for name in unseen]
    return remove(
        widths,
        kept,
        tokens=tokens,
        config=config,
        dense_parameters=dense,
        notes=notes,
        scores=scores,
        objective="mean |W| x input norm",
    )


def wanda_sp_scores(group: Group, norms: Tensor) -> Tensor:
    """[units]: `sum over the unit's columns c of mean_r |W_rc| * norms_c`, W of the writer."""
    w = group.writer.weight()
    return group.per_unit(w.abs().mean(dim=0, dtype=torch.float32) * norms).sum(dim=1)
