"""Pictures of a width run: how wide every module still is, how its units were ranked, and where the
parameters are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pyprune.pictures import (
    COLOURS,
    LOGARITHMIC,
    Panel,
    calibration_words,
    draw_panels,
    layer_axis,
    millions,
    paint_perplexity,
    short,
)
from pyprune.width.decision import ADD_ONS, WidthDecision

# Kind of group -> its colour, how it is called, and how a whole branch of it is.
KINDS = {"heads": ("attention", "KV groups", "A"), "mlp": ("mlp", "MLP channels", "M")}
ZEROS = "#d9d9d9"
# Share of what belongs to no unit that is left at least, if only whole units went: norms of whole
# branches belong to none.
WHOLE_UNITS = 0.95
GONE = "#b0b0b0"


def draw(model: str, decision: WidthDecision, path: Path) -> list[Path]:
    """Writes kept.png (share of units left in every layer), importance-heads.png and
    importance-mlp.png (scores of units, by layer; of methods that have some), parameters.png and,
    where the decision has a curve, perplexity.png; see `pyprune.pictures.draw_panels`."""
    layers = 1 + max((layer for _, layer, _ in decision.groups.values()), default=0)
    panels = []
    if decision.groups:
        panels.append(Panel("kept", 3.4, lambda axis: _kept(axis, decision, layers)))
    for kind in KINDS:
        scored = [g for g, (own, _, _) in decision.groups.items() if own == kind]
        if any(decision.importance.get(group) for group in scored):
            panels.append(
                Panel(
                    f"importance-{kind}",
                    2.9,
                    lambda axis, kind=kind: _importance(axis, decision, kind, layers),  # type: ignore[misc]
                )
            )
    panels.append(Panel("parameters", 2.2, lambda axis: _parameters(axis, decision)))
    if decision.curve:
        panels.append(Panel("perplexity", 3.8, lambda axis: _curve(axis, decision)))
    return draw_panels(panels, _title(model, decision), layers, path)


def _title(model: str, decision: WidthDecision) -> str:
    sizes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in decision.sizes.items())
    return (
        f"{model}: {decision.method}, ratio {decision.config['ratio']:g}"
        f"{calibration_words(decision.calibration)}\n{sizes or 'all shapes as before'}"
    )


def _groups(decision: WidthDecision, kind: str, layer: int) -> list[str]:
    """The one group of a layer's attention or MLP, or those of its experts."""
    return [g for g, place in decision.groups.items() if place[:2] == (kind, layer)]


def _left(decision: WidthDecision, group: str) -> int:
    kind, layer, _ = decision.groups[group]
    if f"{KINDS[kind][2]}{layer}" in decision.branches:
        return 0
    return decision.units[group] - len(decision.removed.get(group, []))


def _kept(axis: Any, decision: WidthDecision, layers: int) -> None:
    """A bar a module; its number of units is written in it. Grey on top: zeros that are still
    there."""
    kinds = [kind for kind in KINDS if any(own == kind for own, _, _ in decision.groups.values())]
    width = 0.86 / len(kinds)
    for i, kind in enumerate(kinds):
        colour, label, _ = KINDS[kind]
        for layer in range(layers):
            groups = _groups(decision, kind, layer)
            if not groups:
                continue
            whole = sum(decision.units[group] for group in groups)
            left = sum(_left(decision, group) for group in groups)
            zeros = sum(decision.zeroed.get(group, 0) for group in groups)
            at = layer + (i + 0.5) * width - 0.43
            axis.bar(at, 100 * left / whole, width, color=COLOURS[colour])
            axis.bar(
                at, 100 * zeros / whole, width, 100 * left / whole,
                color=ZEROS, hatch="////", edgecolor="white", linewidth=0,
            )  # fmt: skip
            # Small fixed offset from the bottom: readable also where little or nothing is left.
            axis.text(
                at, 2, f"{left:,}", rotation=90, ha="center", va="bottom", fontsize=7,
                color="white" if left / whole > 0.25 else "black",
            )  # fmt: skip
        axis.bar(0, 0, color=COLOURS[colour], label=label)
    if decision.zeroed:
        axis.bar(0, 0, color=ZEROS, hatch="////", edgecolor="white", label="there, but zero")
    axis.axhline(100, color="black", linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 122)
    axis.set_yticks(range(0, 101, 25))
    axis.set_ylabel("kept, %", fontsize=8)
    axis.legend(fontsize=8, loc="upper center", ncols=3, frameon=False)
    axis.set_title("units left in every layer", fontsize=9)
    layer_axis(axis, layers)


def _importance(axis: Any, decision: WidthDecision, kind: str, layers: int) -> None:
    """Of each layer's units: from the least to the greatest score, the middle 80 % thick, a dot for
    the median; a dash where the share that went ends. Grey: the whole branch went."""
    values: list[float] = []
    dashes = False
    for layer in range(layers):
        groups = [g for g in _groups(decision, kind, layer) if decision.importance.get(g)]
        if not groups:
            continue
        # Experts of a layer: their mean.
        tenths = [fmean(column) for column in zip(*(decision.importance[g] for g in groups),
                                                  strict=True)]  # fmt: skip
        values += tenths
        whole = f"{KINDS[kind][2]}{layer}" in decision.branches
        colour = GONE if whole else COLOURS[KINDS[kind][0]]
        axis.vlines(layer, tenths[0], tenths[-1], color=colour, linewidth=1)
        axis.vlines(layer, tenths[1], tenths[-2], color=colour, linewidth=6, alpha=0.45)
        axis.plot(layer, tenths[5], "o", color=colour, markersize=4)
        share = 1 - sum(_left(decision, g) for g in groups) / sum(decision.units[g] for g in groups)
        if share > 0 and not whole:
            dashes = True
            axis.hlines(_at(share, tenths), layer - 0.35, layer + 0.35, color="black", linewidth=1)
    _scale(axis, values)
    axis.set_ylabel(decision.objective, fontsize=8)
    below = "; dash: below it they went" if dashes else ""
    axis.set_title(
        f"scores of {KINDS[kind][1]}: line: all; band: the middle 80 %; dot: the median{below}",
        fontsize=9,
    )
    layer_axis(axis, layers)


def _at(share: float, tenths: Sequence[float]) -> float:
    """The score at a share of the units, between the deciles next to it."""
    low = min(int(share * 10), 9)
    return tenths[low] + (share * 10 - low) * (tenths[low + 1] - tenths[low])


def _scale(axis: Any, values: Sequence[float]) -> None:
    sizes = sorted(abs(value) for value in values if value)
    if not sizes or sizes[-1] <= LOGARITHMIC * sizes[len(sizes) // 2]:
        return
    if min(values) > 0:
        axis.set_yscale("log")
    else:
        axis.set_yscale("symlog", linthresh=sizes[len(sizes) // 2])


def _parameters(axis: Any, decision: WidthDecision) -> None:
    """Two bars: the dense model and what is saved, by what the parameters are part of."""
    before, after = decision.parameters
    scale, unit = millions(before)
    parts: dict[str, tuple[int, int]] = {}
    for kind, (colour, _, _) in KINDS.items():
        groups = [g for g, place in decision.groups.items() if place[0] == kind]
        own = [decision.groups[g][2] for g in groups]
        dense = sum(decision.units[g] * n for g, n in zip(groups, own, strict=True))
        left = sum(_left(decision, g) * n for g, n in zip(groups, own, strict=True))
        parts[colour] = (dense, left)
    rest = before - sum(dense for dense, _ in parts.values())
    zeros = after - decision.wanted
    parts["rest"] = (rest, after - zeros - sum(left for _, left in parts.values()))
    words = {"attention": "attention", "mlp": "MLPs", "rest": "embeddings and the rest"}
    # More than whole units went (parts of the stream): nobody counted out of which matrices.
    if not decision.groups or parts["rest"][1] < WHOLE_UNITS * rest:
        parts, words = {"rest": (before, after - zeros)}, {"rest": "all parameters"}
    parts = {name: counts for name, counts in parts.items() if any(counts)}
    for row in (0, 1):
        start = 0.0
        for name, counts in parts.items():
            length = counts[row] / scale
            axis.barh(row, length, 0.7, start, color=COLOURS[name],
                      label=words[name] if row == 0 else None)  # fmt: skip
            if counts[row] > 0.04 * before:
                share = f"{short(length)}\n{counts[row] / before:.0%}"
                axis.text(start + length / 2, row, share, ha="center", va="center",
                          color="white", fontsize=8)  # fmt: skip
            start += length
    if zeros:
        axis.barh(1, zeros / scale, 0.7, start, color=ZEROS, hatch="////", edgecolor="white",
                  label="zeros that fill shapes")  # fmt: skip
    axis.set_yticks([0, 1], ["dense", "saved"])
    axis.set_ylim(1.5, -1.05)  # room for the legend
    axis.set_xlabel(f"parameters, {unit}", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, loc="upper center", ncols=4, frameon=False)
    axis.set_title(
        f"{1 - decision.wanted / before:.1%} of the parameters removed; the saved model has "
        f"{after / before:.1%} of them",
        fontsize=9,
    )


def _curve(axis: Any, decision: WidthDecision) -> None:
    """Branches are named where they went; steps of width are too many."""
    named = {"dense", "pruned", ADD_ONS, *decision.branches}
    labelled = [i for i, (name, _, _) in enumerate(decision.curve) if name in named]
    whole = decision.curve[-1][0] != "pruned"
    paint_perplexity(axis, decision.curve, labelled=labelled, whole=whole)
