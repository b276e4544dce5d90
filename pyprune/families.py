"""The kinds of pruning methods that `pyprune prune` and `pyprune methods` know.

A kind is a table of methods, the configuration of a run, and the run itself; one line in `FAMILIES`
makes it known. Modules are imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyprune.errors import UserError
from pyprune.registry import unknown_method

if TYPE_CHECKING:
    from rich.table import Table

    from pyprune.config import ConfigFile
    from pyprune.progress import ProgressBar

# Each has a `FAMILY`.
FAMILIES = (
    "pyprune.prune",
    "pyprune.eigendamage.run",
    "pyprune.depth.run",
    "pyprune.width.run",
)


class Outcome(Protocol):
    """What a run reports: `to_dict` as JSON, `table` for people."""

    def to_dict(self) -> dict[str, Any]: ...
    def table(self) -> Table: ...


@dataclass(frozen=True)
class Run:
    """One call of the command. out: a new directory for the model. pictures: where they go, a
    directory or a .png file; None: nowhere. state: a directory for what an interrupted run needs to
    go on; None: nowhere. preserve_mask: a file of masks that an earlier pruning left."""

    source: str
    out: Path
    config: Any
    bar: ProgressBar
    trust_remote_code: bool = False
    pictures: Path | None = None
    state: Path | None = None
    preserve_mask: Path | None = None

    def needs_none(self, *names: str) -> None:
        """Raises UserError if one of these fields is given: the method has no use for it."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise UserError(f"{name}: {self.config.method} has no use for it, got {value}")


@dataclass(frozen=True)
class Family:
    """One kind of methods.

    title: what they prune. methods: the rows, by name. config: of a run. call: the function of
    `pyprune` that does it to a model in memory. targets: for each of the configuration's fields
    that say how much goes, the fields that it takes the place of when a configuration file says
    otherwise. run: does it. headers, describe: of the table of methods; `describe` turns a row into
    cells and into a mapping for JSON, with the method's own options under "options".
    """

    title: str
    methods: Callable[[], Mapping[str, Any]]
    config: type[ConfigFile]
    call: str
    targets: Mapping[str, tuple[str, ...]]
    run: Callable[[Run], Outcome]
    headers: tuple[str, ...]
    describe: Callable[[Any], tuple[tuple[str, ...], dict[str, Any]]]


def families() -> Iterator[Family]:
    """All of them, in the order of `FAMILIES`."""
    for module in FAMILIES:
        family: Family = import_module(module).FAMILY
        yield family


def find_family(method: object) -> Family:
    """The family that has a method of this name; UserError with the closest name otherwise."""
    names: list[str] = []
    for family in families():
        if isinstance(method, str) and method in family.methods():
            return family
        names += family.methods()
    raise unknown_method(method, names)
