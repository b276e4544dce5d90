"""The picture of a `BenchResult`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyprune.inspection import SHORT_DTYPES
from pyprune.pictures import require_matplotlib, save_figure, short
from pyprune.sparse.bench import OWN, PHASES, BenchResult, threads
from pyprune.sparse.stored import DENSE

DENSE_COLOUR = "#7f7f7f"
COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#d62728", "#8c564b", "#e377c2", "#bcbd22",
    "#17becf",
)  # fmt: skip


def colour(name: str, names: list[str]) -> str:
    """Grey for the dense model, which is one of `names`; the others' colours come round again."""
    others = [other for other in names if other != DENSE]
    return DENSE_COLOUR if name == DENSE else COLOURS[others.index(name) % len(COLOURS)]


def plot(result: BenchResult, file: Path) -> None:
    """Writes a PNG: rates of the fastest dtype by batch size, relative to dense, and bytes.

    Bars are medians, whiskers run from the least to the greatest sample; each bar carries its
    tokens per second and its dtype.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for axis, phase in zip(axes, PHASES, strict=False):
        _rates(axis, result, phase)
    _sizes(axes[2], result)
    # Under the axes: inside it would hide a bar.
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=9)
    figure.suptitle(
        f"{result.device}, {threads(result.threads)}, torch {result.torch_version}; prompt "
        f"{result.protocol.prompt}, {result.protocol.steps} tokens decoded, "
        f"{result.protocol.rounds} rounds",
        fontsize=9,
    )
    save_figure(figure, file, "--plot")


def _rates(axis: Any, result: BenchResult, phase: str) -> None:
    from matplotlib.patheffects import withStroke

    width = 0.8 / len(result.names)
    for i, name in enumerate(result.names):
        for j, batch in enumerate(result.protocol.batches):
            rate = result.fastest(name, phase, batch)
            dense = result.fastest(DENSE, phase, batch).median
            x, height = j + (i + 0.5) * width - 0.4, rate.median / dense
            spread = [[(rate.median - rate.least) / dense], [(rate.greatest - rate.median) / dense]]
            axis.bar(
                x, height, width * 0.92, color=colour(name, result.names),
                label=name if j == 0 else None, yerr=spread, capsize=2,
                error_kw={"elinewidth": 0.8},
            )  # fmt: skip
            own = "own " if (rate.name, rate.kernels) == (DENSE, OWN) else ""
            words = f" {rate.median:,.4g} tok/s, {own}{SHORT_DTYPES[rate.dtype]}"
            # White would end where a bar is shorter than its words, or a whisker crosses them.
            outline = withStroke(linewidth=2.5, foreground=colour(name, result.names))
            axis.text(
                x, 0.02, words, rotation=90, ha="center", va="bottom", fontsize=7, color="white",
                path_effects=[outline], zorder=4,
            )  # fmt: skip
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(result.protocol.batches)), [str(b) for b in result.protocol.batches])
    axis.set_xlabel("batch size")
    axis.set_ylabel("tokens/s over the fastest dense")
    axis.set_title(phase)


def _sizes(axis: Any, result: BenchResult) -> None:
    labels, megabytes, colours = [], [], []
    for model in result.models:
        if (model["name"], model["kernels"]) == (DENSE, OWN):
            continue  # the same weights once more
        labels.append(f"{model['name']} {model['dtype']}")
        megabytes.append(model["weight_bytes"] / 1e6)
        colours.append(colour(model["name"], result.names))
    bars = axis.barh(range(len(labels)), megabytes, color=colours)
    axis.bar_label(bars, [short(value) for value in megabytes], fontsize=8, padding=2)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("MB")
    axis.set_title("weights in memory")
