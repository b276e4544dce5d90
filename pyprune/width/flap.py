"""FLAP (An et al., AAAI 2024, arXiv 2312.11983): fluctuation of inputs, means into biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyprune.calibration.stats import MomentStatistic, Statistic
from pyprune.models.stock import InexpressibleError
from pyprune.width.apply import remove
from pyprune.width.cut import enable_biases
from pyprune.width.decision import WidthDecision
from pyprune.width.observe import too_few, visit_writers
from pyprune.width.registry import WidthTask, width_method
from pyprune.width.select import (
    UnitOptions,
    best,
    check_reachable,
    globally,
    prunable,
    uniform_sizes,
)
from pyprune.width.structure import Group, GroupKind, Kept, Widths

_WORDS: dict[GroupKind, str] = {"heads": "heads", "mlp": "channels"}
# Field of the configuration that gives a family's writers (and readers) biases.
BIAS_FIELDS: dict[GroupKind, str] = {"heads": "attention_bias", "mlp": "mlp_bias"}


@dataclass(frozen=True)
class FlapOptions(UnitOptions):
    """structure: uniform (equally many units per layer, so that the stock model is smaller by all
    that is removed) or adaptive (one ranking over all layers, AL-AM in the paper; a stock model is
    cut to its widest layer only). bias: put the means of removed inputs into biases where the
    family can have them. And those of `UnitOptions`.
    """

    structure: Literal["uniform", "adaptive"] = "uniform"
    bias: bool = True


@width_method(
    "flap",
    title="FLAP: channels and heads by fluctuation of their outputs, means moved into biases",
    paper="arXiv 2312.11983",
    options=FlapOptions,
    removes="channels and heads",
)
@torch.no_grad()
def flap(task: WidthTask) -> WidthDecision:
    """All statistics are those of the dense model, from one forward. Biases that had to be added
    are not counted against the ratio."""
    options: FlapOptions = task.config.own_options()
    widths = Widths.of(task.model)
    groups = prunable(widths, options.units)
    uniform = options.structure == "uniform"
    # Neither is left to after the forward: the target may be out of reach.
    check_reachable(widths, groups, task.target)
    sizes = uniform_sizes(widths, groups, task.target, options.multiple) if uniform else {}
    moments: dict[str, MomentStatistic] = {}

    def visit(group: Group, statistic: Statistic) -> None:
        assert isinstance(statistic, MomentStatistic)
        moments[group.name] = statistic

    visit_writers(task, widths, groups, MomentStatistic, visit)
    notes: list[str] = []
    scores: dict[str, Tensor] = {}
    for group in groups:
        variance = moments[group.name].variance()
        if too_few(group, moments[group.name]):
            notes.append(f"{group.name}: too few tokens, judged by its weights alone")
            variance = torch.ones_like(variance)
        scores[group.name] = flap_scores(group, variance)
    kept = best(scores, sizes) if uniform else globally(widths, groups, scores, task.target)
    transforms = []
    if options.bias:
        notes += give_biases(widths, kept)
        widths = Widths.of(task.model)
        means = {name: moment.mean for name, moment in moments.items()}
        transforms.append({"bias compensation": compensate(widths, kept, means)})
    return remove(
        task,
        widths,
        kept,
        notes=notes,
        transforms=transforms,
        scores=scores,
        objective="fluctuation, standardised",
    )


def flap_scores(group: Group, variance: Tensor) -> Tensor:
    """[units] fp64, comparable between groups.

    The metric of a column c of the writer is WIFV, `variance_c * sum_r W_rc^2` (equation 5); of
    attentions its square, as in the published code. It is standardised over the group's columns
    (minus mean, over standard deviation; zeros where all are equal), then averaged over each
    unit's.
    """
    w = group.writer.weight()
    metric = variance.double() * w.double().square().sum(dim=0)
    if group.kind == "heads":
        metric = metric.square()
    spread = metric.std() if len(metric) > 1 else metric.new_zeros(())
    centred = metric - metric.mean()
    standard = torch.zeros_like(metric) if bool(spread == 0) else centred / spread
    return group.per_unit(standard).mean(dim=1)


def compensate(widths: Widths, kept: Kept, means: Mapping[str, Tensor]) -> list[str]:
    """Adds `W[:, gone] @ mean[gone]` to the bias of each writer that has one (equation 4), before
    the units are cut; returns the names of those groups.

    means: group -> [C], the mean input of its writer.
    """
    changed = []
    for group, units in widths.removed(kept):
        bias = group.writer.bias()
        if bias is None or not len(units):
            continue
        mean = means[group.name]
        w = group.writer.weight()
        columns = group.columns[units].flatten().to(w.device)
        bias += (w[:, columns].double() @ mean[columns]).to(bias.dtype)
        changed.append(group.name)
    return changed


def give_biases(widths: Widths, kept: Kept) -> list[str]:
    """Zero biases for writers that lose inputs and have none, where the family can have them; what
    was done, in words. `widths` does not know of them: describe the model again."""
    notes = []
    for kind, field in BIAS_FIELDS.items():
        losing = [g for g, units in widths.removed(kept) if g.kind == kind and len(units)]
        missing = [group for group in losing if group.writer.bias() is None]
        if not missing:
            continue
        try:
            enable_biases(widths.model, field, [f"{group.name}.bias" for group in missing])
            notes.append(f"{field} was switched on to hold the means of removed {_WORDS[kind]}")
        except InexpressibleError as error:
            notes.append(f"the means of removed {_WORDS[kind]} have no bias to go to: {error}")
    return notes
