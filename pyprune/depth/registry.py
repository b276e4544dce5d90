"""The table of methods that remove branches and layers.

A module of this package adds itself with one `@depth_method(...)` line; its name in `MODULES` is
what makes it known without importing torch's models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyprune.errors import UserError
from pyprune.methods.options import describe_options

if TYPE_CHECKING:
    from pyprune.calibration.tokens import TokenSet
    from pyprune.depth.config import StructureConfig
    from pyprune.depth.decision import Decision
    from pyprune.models.adapter import Adapter

# (what happens, done, total or None), as `pyprune.progress.ProgressBar.step` takes it.
Progress = Callable[[str, float, float | None], None]
Search = Callable[..., "Decision"]

# Modules of pyprune.depth that register methods, one a line.
MODULES = (
    "blockpruner",
    "sleb",
    "llmdrop",
    "layers",
)


@dataclass(frozen=True)
class DepthMethod:
    """A row of the table.

    options: a frozen dataclass; its docstring says what each one does.
    search: `(model, adapter, tokens, config, progress) -> Decision`, see `Search` below. It may
        change kept weights in place (and says so in `Decision.transforms`), never the structure:
        removing what the decision lists is the caller's (`ResidualGraph.skipping`, `drop_layers`).
    unit: "block" (a branch) or "layer", what `count` counts.
    """

    name: str
    title: str
    paper: str
    options: type
    search: Search
    unit: str


DEPTH_METHODS: dict[str, DepthMethod] = {}


def depth_method(
    name: str, *, title: str, paper: str, options: type, unit: str = "block"
) -> Callable[[Search], Search]:
    """Registers the decorated search function under `name`."""

    def register(search: Search) -> Search:
        DEPTH_METHODS[name] = DepthMethod(name, title, paper, options, search, unit)
        return search

    return register


def load_depth_methods() -> dict[str, DepthMethod]:
    """The whole table, in the order of `MODULES`."""
    for module in MODULES:
        import_module(f"pyprune.depth.{module}")
    return DEPTH_METHODS


def find_depth_method(name: str) -> DepthMethod:
    """The row called `name`; UserError with the closest name otherwise."""
    table = load_depth_methods()
    if name in table:
        return table[name]
    close = get_close_matches(name, table, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"method: expected one of {', '.join(table)}, got {name!r}{hint}")


HEADERS = ("method", "what", "removes")


def describe(method: DepthMethod) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Its cells under `HEADERS`, and a mapping with its options."""
    unit = {"block": "attention and MLP branches", "layer": "layers"}[method.unit]
    row = {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "removes": unit,
        "options": describe_options(method.options),
    }
    return (method.name, f"{method.title} ({method.paper})", unit), row


def run_search(
    model: Any,
    adapter: Adapter,
    tokens: TokenSet,
    config: StructureConfig,
    progress: Progress | None = None,
) -> Decision:
    """Runs the method that `config` names on a model in memory."""
    search = find_depth_method(config.method).search
    return search(model, adapter, tokens, config, progress)
