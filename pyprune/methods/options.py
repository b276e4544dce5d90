"""Options that only one method has: a frozen dataclass of plain fields each.

Types and bounds are in the annotations. `build_options`, which configurations go through, checks
them; a dataclass itself only refuses what several of its fields make together.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pyprune.errors import UserError

Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Bound:
    """Which numbers an option takes, as metadata of its annotation. words: what a message expects.
    holds: whether a number is one of them; None, where the option takes it, always is."""

    words: str
    holds: Callable[[float], bool]


def at_least(least: int) -> Bound:
    """Infinity is one of them."""
    words = f"at least {least}" if least else "0 or more"
    return Bound(words, lambda value: value >= least)


def within(low: float, high: float, ends: str = "[]") -> Bound:
    """ends: which of the two are numbers of the range, "(" and ")" where they are not."""

    def holds(value: float) -> bool:
        above = low <= value if ends[0] == "[" else low < value
        return above and (value <= high if ends[1] == "]" else value < high)

    return Bound(f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}", holds)


POSITIVE = Bound("a positive number", lambda value: 0 < value < math.inf)
Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, Bound("0 or more", lambda value: 0 <= value < math.inf)]


class OptionError(UserError):
    """What is wrong with an option: "name: expected ..., got ...". `build_options` says of which
    method. A dataclass of options raises it where several of its fields do not go together."""


_WORDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}


def build_options(
    method: str, kind: type | None, values: Mapping[str, Any], where: str = "method_options"
) -> object | None:
    """`kind(**values)`, or None for a method without options of its own. where: the field that
    `values` came in, for messages.

    Raises:
        UserError: a name is unknown (the closest one is given), a value of the wrong type or out of
            its `Bound`; what the dataclass itself refuses.
    """
    known = [] if kind is None else [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known) or 'none'}"
            raise UserError(f"{where}: {method} has no option {name!r}, {hint}")
    if kind is None:
        return None
    hints = get_type_hints(kind, include_extras=True)
    try:
        for name, value in values.items():
            _check(name, hints[name], value)
        built: object = kind(**values)
    except OptionError as error:
        raise UserError(f"{where}: {method} {error}") from error
    return built


def describe_options(kind: type | None) -> dict[str, str]:
    """Name -> what it takes and its default, for the table of methods."""
    if kind is None:
        return {}
    hints = get_type_hints(kind)
    return {
        field.name: f"{_takes(hints[field.name])}; by default {_shown(field.default)}"
        for field in dataclasses.fields(kind)
    }


def explain_options(kind: type | None) -> dict[str, str]:
    """Name -> what it does: what the docstring of the class that has the field says after
    `name: ` or `name, name: `."""
    if kind is None:
        return {}
    names = [field.name for field in dataclasses.fields(kind)]
    either = "|".join(names)
    head = re.compile(rf"(?:^|(?<=\. ))((?:{either})(?:, (?:{either}))*): ")
    meanings = {}
    for owner in kind.__mro__:
        own = inspect.get_annotations(owner)
        _, *parts = head.split(" ".join((owner.__doc__ or "").split()))
        for heads, words in zip(parts[::2], parts[1::2], strict=True):
            for name in heads.split(", "):
                if name in own:
                    meanings[name] = re.sub(
                        r" And (those|(one of )?the add-ons)\b.*", "", words
                    ).strip()
    return {name: meanings[name] for name in names if name in meanings}


def of_options(kind: type | None) -> dict[str, dict[str, str]]:
    """What a row of a table of methods says of them."""
    return {"options": describe_options(kind), "meanings": explain_options(kind)}


def _takes(hint: Any) -> str:
    if NoneType in get_args(hint):
        return f"{_takes(_without_none(hint))} or none"
    if get_origin(hint) is Annotated:
        return _takes(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " or ".join(map(_shown, get_args(hint)))
    return _WORDS.get(hint, "text")


def _without_none(hint: Any) -> Any:
    (inner,) = (kind for kind in get_args(hint) if kind is not NoneType)
    return inner


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | NoneType) else str(value)


def _check(name: str, hint: Any, value: Any) -> None:
    """Raises OptionError for a value of another type than `hint`, or out of its bound."""
    bounds: Sequence[Bound] = ()
    if get_origin(hint) is Annotated:
        hint, *bounds = get_args(hint)
    wanted = hint
    if NoneType in get_args(hint):
        if value is None:
            return
        wanted = _without_none(hint)
        if get_origin(wanted) is Annotated:
            wanted, *bounds = get_args(wanted)
    if get_origin(wanted) is Literal:
        right = value in get_args(wanted)
    elif wanted is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        right = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if not right:
        raise OptionError(f"{name}: expected {_takes(hint)}, got {value!r}")
    for bound in bounds:
        if not bound.holds(value):
            words = bound.words if wanted is hint else f"{bound.words} or none"
            raise OptionError(f"{name}: expected {words}, got {value!r}")
