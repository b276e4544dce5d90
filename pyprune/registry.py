"""Tables of methods that fill themselves: a module of a package registers its rows when it is
imported, and its name in the table's list is what makes it known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Generic, TypeVar

from pyprune.errors import UserError
from pyprune.methods.options import of_options

HEADERS = ("method", "what", "removes")


@dataclass(frozen=True)
class MethodRow:
    """What a table says of a method.

    options: a frozen dataclass; its docstring says what each one does. removes: what goes, in
    words.
    """

    name: str
    title: str
    paper: str
    options: type
    removes: str

    def describe(self) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Its cells under `HEADERS`, and a mapping with its options."""
        row = {
            "name": self.name,
            "title": self.title,
            "paper": self.paper,
            "removes": self.removes,
            **of_options(self.options),
        }
        return (self.name, f"{self.title} ({self.paper})", self.removes), row


Row = TypeVar("Row", bound=MethodRow)


class MethodTable(Generic[Row]):
    """Rows by name.

    package, modules: whose import registers them, in the order in which they are shown.
    """

    def __init__(self, package: str, modules: tuple[str, ...]) -> None:
        self._modules = [f"{package}.{module}" for module in modules]
        self._rows: dict[str, Row] = {}

    def add(self, row: Row) -> None:
        self._rows[row.name] = row

    def load(self) -> dict[str, Row]:
        """All of it."""
        for module in self._modules:
            import_module(module)
        return self._rows

    def find(self, name: str) -> Row:
        """The row called `name`; UserError with the closest name otherwise."""
        rows = self.load()
        if name not in rows:
            raise unknown_method(name, rows)
        return rows[name]


def unknown_method(name: object, known: Iterable[str]) -> UserError:
    """What to raise for a name that a table does not have: it says which there are, and the
    closest, or what knows the name."""
    from pyprune.allocation import ALLOCATIONS
    from pyprune.families import families

    names = list(known)
    if isinstance(name, str) and name in ALLOCATIONS:
        return UserError(
            f"method: {name} is an allocation, which shares out the sparsity of a method: "
            f"expected e.g. -m wanda --allocation {name} (method and allocation in Python)"
        )
    for family in families():
        if isinstance(name, str) and name in family.methods():
            call, config = family.call, family.config.__name__
            hint = f": pyprune.{call} does that, with a {config}"
            return UserError(f"method: expected one of {', '.join(names)}, got {name!r}{hint}")
    by_lower = {known.lower(): known for known in names}
    close = get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f" (did you mean {by_lower[close[0]]}?)" if close else ""
    return UserError(f"method: expected one of {', '.join(names)}, got {name!r}{hint}")
