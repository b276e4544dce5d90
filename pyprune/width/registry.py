"""The table of methods that narrow layers; what `pyprune.depth.registry` is for depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyprune.depth.registry import Progress
from pyprune.errors import UserError
from pyprune.methods.options import describe_options

if TYPE_CHECKING:
    from pyprune.calibration.tokens import TokenSet
    from pyprune.width.config import WidthConfig
    from pyprune.width.decision import WidthDecision

Prune = Callable[..., "WidthDecision"]

# Modules of pyprune.width that register methods, one a line.
MODULES = (
    "wanda_sp",
    "flap",
    "multipruner",
    "slicegpt",
    "disp",
    "surgeon",
)


@dataclass(frozen=True)
class WidthMethod:
    """A row of the table.

    options: a frozen dataclass; its docstring says what each one does.
    removes: what goes, in words.
    prune: `(model, tokens, config, progress) -> WidthDecision`. It changes the model in place and
        leaves it such that it saves and loads as an ordinary one of its family.
    """

    name: str
    title: str
    paper: str
    options: type
    removes: str
    prune: Prune


WIDTH_METHODS: dict[str, WidthMethod] = {}


def width_method(
    name: str, *, title: str, paper: str, options: type, removes: str
) -> Callable[[Prune], Prune]:
    """Registers the decorated function under `name`."""

    def register(prune: Prune) -> Prune:
        WIDTH_METHODS[name] = WidthMethod(name, title, paper, options, removes, prune)
        return prune

    return register


def load_width_methods() -> dict[str, WidthMethod]:
    """The whole table, in the order of `MODULES`."""
    for module in MODULES:
        import_module(f"pyprune.width.{module}")
    return WIDTH_METHODS


def find_width_method(name: str) -> WidthMethod:
    """The row called `name`; UserError with the closest name otherwise."""
    table = load_width_methods()
    if name in table:
        return table[name]
    close = get_close_matches(name, table, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"method: expected one of {', '.join(table)}, got {name!r}{hint}")


HEADERS = ("method", "what", "removes")


def describe(method: WidthMethod) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Its cells under `HEADERS`, and a mapping with its options."""
    row = {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "removes": method.removes,
        "options": describe_options(method.options),
    }
    return (method.name, f"{method.title} ({method.paper})", method.removes), row


def run_width(
    model: Any, tokens: TokenSet, config: WidthConfig, progress: Progress | None = None
) -> WidthDecision:
    """Runs the method that `config` names on a model in memory, which is narrower afterwards."""
    return find_width_method(config.method).prune(model, tokens, config, progress)
