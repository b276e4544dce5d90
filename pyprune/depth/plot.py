"""Pictures of a structural run: what went in which order, how much each branch matters, and what
every removal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyprune.depth.decision import DepthDecision, name_of
from pyprune.depth.graph import KINDS, Branch
from pyprune.pictures import (
    COLOURS,
    Panel,
    calibration_words,
    draw_panels,
    layer_axis,
    paint_perplexity,
    short,
)

LABELS = {"attention": "attention", "mlp": "MLP", "layer": "layer"}
OBJECTIVES = {"kl": "KL to the dense model, nats per token"}  # others are called what they are
KEPT, FRAME = "#e9e9e9", "#d62728"
# Bars longer than so many times this quantile of all are cut off.
CUT, QUANTILE = 1.5, 0.85
Points = Sequence[tuple[int, float]]


def draw(decision: DepthDecision, curve: Points, path: Path) -> list[Path]:
    """Writes order.png, importance.png (of methods that score single branches or layers),
    exchanges.png (where a list was improved by some) and perplexity.png (with a `curve` of
    parameters and perplexity, the dense model first); see `pyprune.pictures.draw_panels`."""
    panels = [Panel("order", 1.9, lambda axis: _order(axis, decision))]
    if any(value is not None for value in decision.importance.values()):
        panels.append(Panel("importance", 3.6, lambda axis: _importance(axis, decision)))
    if decision.refinement is not None:
        panels.append(Panel("exchanges", 3.4, lambda axis: _exchanges(axis, decision)))
    if curve:
        panels.append(Panel("perplexity", 3.8, lambda axis: _curve(axis, decision, curve)))
    return draw_panels(panels, _title(decision), decision.layers, path)


def _title(decision: DepthDecision) -> str:
    return f"{decision.model} without {_units(decision)}: {decision.method}" + calibration_words(
        decision.calibration
    )


def _units(decision: DepthDecision) -> str:
    """How many layers or branches went: of branches, two may have gone together."""
    if decision.unit == "layer":
        number, words = len(decision.steps), ("layer", "layers")
    else:
        number, words = len(decision.removed), ("branch", "branches")
    return f"{number} {words[number != 1]}"


def _order(axis: Any, decision: DepthDecision) -> None:
    from matplotlib import colormaps

    ranks = {branch: i for i, step in enumerate(decision.steps) for branch in step.unit}
    colours, last = colormaps["viridis"], max(1, len(decision.steps) - 1)
    exchanges = decision.refinement.exchanges if decision.refinement is not None else ()
    moved = {branch for exchange in exchanges for branch in (*exchange.back, *exchange.out)}
    for row, kind in enumerate(KINDS):
        for layer in range(decision.layers):
            rank = ranks.get(Branch(kind, layer))
            share = None if rank is None else rank / last
            framed = Branch(kind, layer) in moved
            axis.bar(
                layer, 0.9, 0.9, row - 0.45,
                color=KEPT if share is None else colours(share),
                edgecolor=FRAME if framed else "none", linewidth=1.5,
            )  # fmt: skip
            if share is not None and rank is not None:
                ink = "white" if share < 0.6 else "black"
                axis.text(
                    layer, row, str(rank + 1), ha="center", va="center", color=ink, fontsize=8
                )
    axis.set_yticks(range(len(KINDS)), [LABELS[kind] for kind in KINDS])
    axis.set_ylim(len(KINDS) - 0.5, -0.5)
    words = "; framed: exchanged on the way" if moved else ""
    axis.set_title(f"removed, by order (grey: stays{words})", fontsize=9)
    layer_axis(axis, decision.layers)


def _importance(axis: Any, decision: DepthDecision) -> None:
    """Bars from the dense model's score, if it is known. A few branches of almost any model are
    many times as important as the rest: their bars are cut off and say how long they are."""
    kinds = ("layer",) if decision.unit == "layer" else KINDS
    width, base = 0.8 / len(kinds), decision.dense or 0.0
    known = [v for v in decision.importance.values() if v is not None and math.isfinite(v)]
    rises = sorted(v - base for v in known)
    top = base + CUT * rises[int(QUANTILE * (len(rises) - 1))]
    if not base < top < max(known):
        top = math.inf
    for i, kind in enumerate(kinds):
        found = [(x, v) for x, v in _scores(decision, kind) if v is not None and math.isfinite(v)]
        places = [x + (i + 0.5) * width - 0.4 for x, _ in found]
        axis.bar(
            places, [min(v, top) - base for _, v in found], width, base,
            color=COLOURS[kind], label=LABELS[kind],
        )  # fmt: skip
        for place, (_, v) in zip(places, found, strict=True):
            if v > top:
                axis.text(
                    place, top, f" {short(v)}", rotation=90, ha="center", va="bottom", fontsize=7
                )
    highest = min(top, max(known))
    if highest > base:  # room for the legend
        axis.set_ylim(top=base + 1.3 * (highest - base))
    if base:  # else the axis is that line
        axis.axhline(base, color="black", linewidth=0.8, linestyle=":", label="dense")
    axis.set_ylabel(OBJECTIVES.get(decision.objective, decision.objective), fontsize=8)
    words = "; cut bars say how long they are" if max(known) > top else ""
    axis.set_title(f"each alone: the higher, the more it matters{words}", fontsize=9)
    axis.legend(fontsize=8, loc="upper center", ncols=3)
    layer_axis(axis, decision.layers)


def _exchanges(axis: Any, decision: DepthDecision) -> None:
    """The objective of the greedy lists, and after every exchange."""
    refinement = decision.refinement
    assert refinement is not None
    for name, score in refinement.starts.items():
        if name != refinement.start:
            axis.plot([0], [score], "o", color=COLOURS["rest"])
        axis.annotate(
            f"greedy over {name}", (0, score), xytext=(6, 4), textcoords="offset points",
            fontsize=7,
        )  # fmt: skip
    scores = [refinement.starts[refinement.start], *(e.score for e in refinement.exchanges)]
    axis.plot(range(len(scores)), scores, "o-", markersize=4)
    for i, exchange in enumerate(refinement.exchanges, 1):
        axis.annotate(
            str(exchange).replace("; ", "\n"), (i, exchange.score), xytext=(3, 5),
            textcoords="offset points", fontsize=7,
        )  # fmt: skip
    axis.set_xticks(range(len(scores)))
    axis.margins(x=0.15, y=0.25)
    axis.set_xlabel("exchanges", fontsize=8)
    axis.set_ylabel(OBJECTIVES.get(decision.objective, decision.objective), fontsize=8)
    axis.tick_params(labelsize=8)
    words = ", improved by exchanges" if refinement.exchanges else "; no exchange was better"
    axis.set_title(f"greedy lists{words}", fontsize=9)


def _scores(decision: DepthDecision, kind: str) -> list[tuple[int, float | None]]:
    found = []
    for layer in range(decision.layers):
        unit = tuple(Branch(k, layer) for k in (KINDS if kind == "layer" else (kind,)))  # type: ignore[arg-type]
        found.append((layer, decision.importance.get(name_of(unit))))
    return found


def _curve(axis: Any, decision: DepthDecision, curve: Points) -> None:
    # Of a method that changed weights there are only the two ends.
    whole = len(curve) == len(decision.steps) + 1
    names = [name_of(step.unit) for step in decision.steps] if whole else ["pruned"]
    points = [(name, *point) for name, point in zip(["dense", *names], curve, strict=True)]
    paint_perplexity(axis, points, labelled=range(len(points)), whole=whole)
