"""One structural pruning run as a frozen value: validated when built, saved with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from pyprune.config import DTYPES, CalibrationConfig
from pyprune.errors import UserError

BudgetUnit = Literal["params", "blocks", "latency"]
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class StructureConfig:
    """Everything that decides the outcome of a run.

    method: a name in `pyprune.depth.registry.DEPTH_METHODS`.
    ratio / count: exactly one. How much goes: a share, or a number of the method's units (branches,
        or layers for methods that remove whole ones).
    unit: what `ratio` is a share of: "params" (all of the model's parameters), "blocks" (the
        method's units) or "latency" (measured on the calibration batches). Removal stops as soon
        as the share is reached.
    options: of the method, by name; see `pyprune methods`.
    device: "auto", "cpu", "cuda" or "cuda:N". dtype: of the model while it runs.
    """

    method: str = "blockpruner"
    ratio: float | None = None
    count: int | None = None
    unit: BudgetUnit = "params"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        from pyprune.depth.registry import find_depth_method

        if (self.ratio is None) == (self.count is None):
            raise UserError(
                "expected exactly one of ratio and count, got "
                f"ratio {self.ratio} and count {self.count}"
            )
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio < 1):
            raise UserError(f"ratio: expected a number between 0 and 1, got {self.ratio!r}")
        if self.count is not None and not (type(self.count) is int and self.count >= 1):
            raise UserError(f"count: expected a whole number from 1, got {self.count!r}")
        _check_choice("unit", self.unit, get_args(BudgetUnit))
        _check_choice("dtype", self.dtype, DTYPES)
        if not isinstance(self.calibration, CalibrationConfig):
            raise UserError(f"calibration: expected a mapping, got {self.calibration!r}")
        if not isinstance(self.options, Mapping):
            raise UserError(f"options: expected a mapping, got {self.options!r}")
        # Once here, so that a bad option is found before anything is loaded.
        built = build_options(find_depth_method(self.method).options, self.options)
        kept = {k: getattr(built, k) for k in self.options}
        object.__setattr__(self, "options", kept)

    def method_options(self) -> Any:
        """The method's options dataclass."""
        from pyprune.depth.registry import find_depth_method

        return build_options(find_depth_method(self.method).options, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: what `from_dict` takes back."""
        values = dataclasses.asdict(self)
        values["options"] = {
            k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()
        }
        return values

    @classmethod
    def from_dict(cls, values: object) -> StructureConfig:
        """The inverse of `to_dict`. Keys may be missing (default) but not unknown (UserError)."""
        values = dict(_known(cls, values, "config"))
        calibration = values.get("calibration", {})
        if not isinstance(calibration, CalibrationConfig):
            given = _known(CalibrationConfig, calibration, "calibration")
            values["calibration"] = CalibrationConfig(**given)
        return cls(**values)

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> StructureConfig:
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"config: expected YAML, got something else: {reason}") from error
        return cls.from_dict({} if values is None else values)

    @classmethod
    def load(cls, path: str | Path) -> StructureConfig:
        """The config in a YAML file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"config: cannot read {path}: {error}") from error
        return cls.from_yaml(text)


def build_options(kind: type, given: Mapping[str, Any]) -> Any:
    """An options dataclass from names and values; text, as the command line gives it, is converted
    to what the field's annotation says (int, float, bool, str, Literal, or one of them | None).

    Raises UserError: unknown option, or a value of another type.
    """
    given = _known(kind, given, "options")
    hints = get_type_hints(kind)
    return kind(**{name: _convert(name, hints[name], value) for name, value in given.items()})


def _convert(name: str, annotation: Any, value: Any) -> Any:
    choices = [a for a in get_args(annotation) if isinstance(a, str)]
    if choices:
        _check_choice(f"options.{name}", value, tuple(choices))
        return value
    kinds = [k for k in (get_args(annotation) or (annotation,)) if k is not type(None)]
    if value is None or (value == "none" and type(None) in get_args(annotation)):
        if type(None) in get_args(annotation):
            return None
        raise UserError(f"options.{name}: expected a value, got none")
    kind = kinds[0]
    right = _as(kind, value)
    if right is None:
        words = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
        raise UserError(f"options.{name}: expected {words}, got {value!r}")
    return right


def _as(kind: type, value: Any) -> Any:
    """`value` as `kind`, or None."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        return str(value).lower() in _TRUE if str(value).lower() in _TRUE + _FALSE else None
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        return None
    try:
        return kind(value)
    except (TypeError, ValueError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _known(kind: type, values: object, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of names to values, got {values!r}")
    names = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            close = get_close_matches(str(key), names, n=1)
            hint = f", did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
    return values


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
