"""What the pictures of all runs have in common: where they go, how they are laid out, colours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyprune.checkpoint import check_writable, replace_file, writing
from pyprune.errors import UserError
from pyprune.report import text_name

COLOURS = {"attention": "#1f77b4", "mlp": "#ff7f0e", "layer": "#1f77b4", "rest": "#8c8c8c"}
# Wide enough for the labels of so many layers; every fifth is named where there are more.
NAMED_LAYERS = 48
# A logarithmic axis where the largest value is so many times the least.
LOGARITHMIC = 20.0


@dataclass(frozen=True)
class Panel:
    """A part of a picture. height: inches. paint: draws it on a matplotlib axis."""

    name: str
    height: float
    paint: Callable[[Any], None]


def require_matplotlib() -> None:
    """Raises UserError, saying what to install, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError("a plot needs matplotlib: pip install 'pyprune[plot]'")


def check_picture(path: Path, option: str) -> None:
    """Raises UserError, naming `option`, unless a picture can go to `path`: a .png file in a
    directory that exists and can be written to; and matplotlib is there."""
    require_matplotlib()
    if path.suffix != ".png":
        raise UserError(f"{option}: expected a .png file, got {path}")
    if path.is_dir():
        raise UserError(f"{option}: expected a file, {path} is a directory")
    _check_parent(path, option)


def check_pictures(path: Path) -> None:
    """As `check_picture`, of a .png file or a directory for several."""
    require_matplotlib()
    if path.suffix == ".png":
        check_picture(path, "report")
    elif path.suffix != "":
        raise UserError(f"report: expected a directory or a .png file, got {path}")
    elif path.is_dir():
        check_writable(path, "report")
    elif path.exists():
        raise UserError(f"report: expected a directory, {path} is a file")
    else:
        _check_parent(path, "report")


def _check_parent(path: Path, option: str) -> None:
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option}: expected {path.absolute().parent} to exist")
    check_writable(path.absolute().parent, option)


def draw_panels(panels: Sequence[Panel], title: str, layers: int, path: Path) -> list[Path]:
    """Writes `<name>.png` of every panel into the directory `path`, or all of them below each other
    into the one file `path`, if that ends in .png. Returns the files.

    layers: that are side by side in some panels. Raises UserError as `check_pictures`.
    """
    check_pictures(path)
    from matplotlib.figure import Figure

    width = max(7.0, 0.32 * layers + 2)
    if path.suffix == ".png":
        sizes = [panel.height for panel in panels]
        figure = Figure(figsize=(width, sum(sizes) + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), 1, height_ratios=sizes, squeeze=False)[:, 0]
        figure.suptitle(title, fontsize=9)
        for axis, panel in zip(axes, panels, strict=True):
            panel.paint(axis)
        save_figure(figure, path, "report")
        return [path]
    with writing("report", path):
        path.mkdir(exist_ok=True)
    files = []
    for panel in panels:
        figure = Figure(figsize=(width, panel.height + 0.3), layout="constrained")
        figure.suptitle(title, fontsize=9)
        panel.paint(figure.subplots())
        files.append(path / f"{panel.name}.png")
        save_figure(figure, files[-1], "report")
    return files


def save_figure(figure: Any, file: Path, option: str) -> None:
    """Writes a matplotlib figure as a PNG, whole or not at all. Raises UserError, naming `option`,
    for what the file system refuses."""
    with writing(option, file.parent):
        replace_file(file, lambda path: figure.savefig(path, dpi=120, format="png"))


def layer_axis(axis: Any, layers: int) -> None:
    """The horizontal axis is the layers, from 0."""
    axis.set_xticks(range(0, layers, 1 if layers <= NAMED_LAYERS else 5))
    axis.tick_params(labelsize=8)
    axis.set_xlim(-0.7, layers - 0.3)
    axis.set_xlabel("layer", fontsize=8)


def millions(parameters: int) -> tuple[float, str]:
    """What to divide by for readable numbers, and the unit then."""
    return (1e9, "10⁹") if parameters >= 1e9 else (1e6, "10⁶")


def calibration_words(text: Mapping[str, Any]) -> str:
    """For a title; text: source and tokens."""
    if not text:
        return ""
    return f"; calibration {text_name(text['source'])}, {text['tokens']:,} tokens"


def short(value: float) -> str:
    """Three digits or all before the point: 0.361, 12.3, 1,775."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def paint_perplexity(
    axis: Any,
    points: Sequence[tuple[str, int, float]],
    *,
    labelled: Collection[int],
    whole: bool,
) -> None:
    """Perplexity over parameters.

    points: what went, the parameters left and the perplexity then; the dense model's first.
    labelled: which of them are named. whole: every removal is there, not only the two ends.
    """
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2, foreground="white")]  # names may lie on the line
    scale, unit = millions(points[0][1])
    sizes, scores = [size / scale for _, size, _ in points], [score for _, _, score in points]
    axis.plot(sizes, scores, "o-" if whole else "o--", markersize=4)
    for i, (name, _, _) in enumerate(points):
        if i in labelled:
            axis.annotate(
                name, (sizes[i], scores[i]), xytext=(3, 5), textcoords="offset points", fontsize=7,
                rotation=45, path_effects=halo,
            )  # fmt: skip
    if max(scores) > LOGARITHMIC * min(scores):
        axis.set_yscale("log")
    axis.margins(x=0.06, y=0.3)  # room for names
    axis.set_xlabel(f"parameters, {unit}", fontsize=8)
    axis.set_ylabel("perplexity", fontsize=8)
    axis.tick_params(labelsize=8)
    when = "after every removal" if whole else "before and after"
    axis.set_title(f"perplexity on the calibration text {when}", fontsize=9)
