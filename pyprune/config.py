"""One pruning run as a frozen value: validated when built, saved with the model, and the same thing
whether it came from keyword arguments, a YAML file or the command line."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
import yaml

from pyprune.allocation import ALLOCATIONS, EcoflapOptions
from pyprune.allocation.base import MAX_SPARSITY
from pyprune.errors import UserError
from pyprune.methods import SHOT_METHODS, Method, MethodOptions, find_method
from pyprune.methods.base import RECONSTRUCT_TOKENS, Update
from pyprune.methods.options import Scalar, build_options
from pyprune.patterns import Pattern, Scope, Unstructured, parse_nm

Self = TypeVar("Self", bound="ConfigFile")
Walk = Literal["single", "two-pass", "naive"]
Spill = Literal["none", "host", "disk"]
Padding = Literal["windows", "documents"]
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CalibrationConfig:
    """What the model is shown while it is measured.

    source: "wiki" (packaged), a .txt or .jsonl file, a directory of them, or
        "hub:<datasets id>[:config[:split[:column]]]".
    nsamples: sequences. seqlen: tokens in each, at most (the model's own limit caps it).
    batch_size: sequences that go through the model at once. seed: which sequences are drawn.
    padding: "windows" of exactly `seqlen` tokens of the joined text, or one of the "documents" per
        sequence, padded. bos: begin sequences with BOS; None is what the tokenizer itself does.
    """

    source: str = "wiki"
    nsamples: int = 128
    seqlen: int = 2048
    batch_size: int = 8
    seed: int = 0
    padding: Padding = "windows"
    bos: bool | None = None

    def __post_init__(self) -> None:
        check_types(self, "calibration.")
        for name in ("nsamples", "seqlen", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"calibration.{name}: expected at least 1, got {getattr(self, name)}"
                )
        if self.seed < 0:
            raise UserError(f"calibration.seed: expected 0 or more, got {self.seed}")
        check_choice("calibration.padding", self.padding, get_args(Padding))
        if not self.source:
            raise UserError("calibration.source: expected a name or a path, got ''")


@dataclass(frozen=True)
class ConfigFile:
    """What every run's configuration can do: to dicts and YAML and back. Its fields hold scalars,
    tuples, mappings of scalars, and under `calibration` a CalibrationConfig."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: what `from_dict` takes back."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Keys may be missing (default) but not unknown (UserError)."""
        check_keys(cls, values, "config")
        values = dict(values)
        given = values.get("calibration", {})
        if not isinstance(given, CalibrationConfig):
            check_keys(CalibrationConfig, given, "calibration")
        return cls(**values)

    def idle(self) -> str:
        """What to say if nothing is asked to be removed; empty otherwise."""
        return ""

    def to_yaml(self) -> str:
        # Escaped ASCII: PyYAML writes some Unicode line breaks in a way that it reads as spaces.
        text: str = yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls: type[Self], text: str) -> Self:
        return cls.from_dict(read_yaml(text))

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """The config in a YAML file."""
        return cls.from_dict(read_yaml_file(path))


class RunConfig(ConfigFile):
    """Of a run that holds a model and may show it text. A subclass is a frozen dataclass that has
    these among its fields, where its files and reports say them."""

    device: str
    dtype: str
    calibration: CalibrationConfig

    def __post_init__(self) -> None:
        convert_fields(self)
        check_types(self, "")
        check_choice("dtype", self.dtype, DTYPES)
        check_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Of the model while it runs; None is the checkpoint's own."""
        found: torch.dtype | None = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return found


@dataclass(frozen=True)
class PruneConfig(RunConfig):
    """Everything that decides the outcome of a run.

    method: a name in `pyprune.methods.METHODS` or `SHOT_METHODS`.
    sparsity / pattern: exactly one; a fraction removed, or "N:M" with N kept of every M.
    scope: comparison group of `sparsity`; None is the method's own.
    allocation: how `sparsity` is shared out: a name in `pyprune.allocation.ALLOCATIONS`, e.g. the
        same for all blocks ("uniform") or by the spectra of their weights ("alphapruning").
    allocation_strength: epsilon of AlphaPruning, lambda of OWL; None is the paper's.
    allocation_options: what only this allocation has, by name; see `pyprune methods`.
    update, score_mass, reference_count, damping, block_size: see `MethodOptions`.
    reconstruct: see `MethodOptions`; None is the method's own (`Method.reconstructs`), in layers
        that saw enough tokens.
    method_options: what only this method has, by name; see `pyprune methods`.
    gradient_checkpointing: methods that need gradients run each block once more instead of holding
        the activations of all of them.
    preserve_zeros: weights that are zero already stay zero and count among the pruned.
    include, exclude: shell-style patterns of layer names ("model.layers.0.*"); what is pruned is
        what any `include` matches and no `exclude` does.
    walk: "single" (one true-sequential forward), "two-pass" (statistics of the dense block, then
        its outputs) or "naive" (true-sequential by re-running each block).
    spill: where activations wait that a batch does not need right now: "none" leaves them on the
        device, "host" and "disk" move them.
    device: "auto", "cpu", "cuda" or "cuda:N". dtype: of the model while it runs; "auto" is the
        checkpoint's own.
    """

    method: str = "sparsegpt"
    sparsity: float | None = None
    pattern: str | None = None
    scope: Scope | None = None
    allocation: str = "uniform"
    allocation_strength: float | None = None
    allocation_options: Mapping[str, Scalar] = field(default_factory=dict)
    update: Update = "none"
    score_mass: bool = False
    reference_count: bool = False
    reconstruct: bool | None = None
    preserve_zeros: bool = False
    damping: float = 0.01
    block_size: int = 128
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    walk: Walk = "single"
    spill: Spill = "none"
    device: str = "auto"
    dtype: str = "auto"
    method_options: Mapping[str, Scalar] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sparsity is None) == (self.pattern is None):
            raise UserError(
                "expected exactly one of sparsity and pattern, got "
                + ("neither" if self.pattern is None else f"{self.sparsity} and {self.pattern}")
            )
        if self.pattern is not None and self.scope is not None:
            raise UserError(f"scope: expected none with pattern {self.pattern}, got {self.scope!r}")
        self._check_allocation()
        check_choice("walk", self.walk, get_args(Walk))
        check_choice("spill", self.spill, get_args(Spill))
        if self.in_shots():
            self._check_shots()
        self.find_method().check(self.target(), self.options())

    def _check_shots(self) -> None:
        """There is no walk: what concerns it alone has no meaning."""
        for name, default in (("allocation", "uniform"), ("walk", "single"), ("spill", "none")):
            if getattr(self, name) != default:
                raise UserError(
                    f"{name}: {self.method} takes all matrices at once, expected {default}, "
                    f"got {getattr(self, name)!r}"
                )

    def _check_allocation(self) -> None:
        check_choice("allocation", self.allocation, tuple(ALLOCATIONS))
        strength = self.allocation_strength
        row = ALLOCATIONS[self.allocation]
        if row.strength is None and strength is not None:
            raise UserError(f"allocation_strength: expected none for {row.name}, got {strength}")
        own = self.own_allocation()
        if row.source is None:
            return
        if self.sparsity is None or self.scope == "global":
            got = f"pattern {self.pattern}" if self.sparsity is None else "scope global"
            raise UserError(
                f"allocation: {self.allocation} shares out a sparsity block by block, got {got}"
            )
        if strength is not None and not 0 <= strength < 1:
            raise UserError(f"allocation_strength: expected a number in [0, 1), got {strength}")
        if self.sparsity > MAX_SPARSITY:
            raise UserError(
                f"sparsity: expected at most {MAX_SPARSITY} with an allocation, got {self.sparsity}"
            )
        if isinstance(own, EcoflapOptions):
            own.cap(self.sparsity)
        if row.source == "blocks":
            self._check_learned()

    def _check_learned(self) -> None:
        """A mask is learned for every matrix from the method's scores: it does not choose."""
        for name, default in (("score_mass", False), ("reference_count", False)):
            if getattr(self, name) != default:
                raise UserError(f"{name}: {self.allocation} counts what goes, expected false")
        if self.update == "iterative":
            raise UserError(f"update: {self.allocation} scores once, got 'iterative'")
        if self.scope not in (None, "row"):
            raise UserError(
                f"scope: {self.allocation} compares within rows, expected row, got {self.scope!r}"
            )

    def own_allocation(self) -> object | None:
        """The allocation's own options; None if it has none."""
        kind = ALLOCATIONS[self.allocation].options_type
        given = self.allocation_options
        return build_options(self.allocation, kind, given, "allocation_options")

    def find_method(self) -> Method:
        return find_method(self.method)

    def in_shots(self) -> bool:
        """Whether the method takes all matrices at once, instead of a walk."""
        return self.method in SHOT_METHODS

    def target(self) -> Pattern:
        """The pattern as a value."""
        if self.pattern is not None:
            return parse_nm(self.pattern)
        if self.sparsity is None:
            raise UserError("expected sparsity or pattern, got neither")
        return Unstructured(self.sparsity, self.scope)

    def idle(self) -> str:
        target = self.target()
        return "" if target.sparsity else f"nothing is to be removed: the target is {target}"

    def options(self) -> MethodOptions:
        method = self.find_method()
        options = MethodOptions(
            damping=self.damping,
            block_size=self.block_size,
            update=self.update,
            score_mass=self.score_mass,
            reference_count=self.reference_count,
            own=build_options(self.method, method.options_type, self.method_options),
        )
        if self.reconstruct is not None:
            return replace(options, reconstruct=self.reconstruct)
        if not method.reconstructs or (method.rounds is not None and method.rounds(options)):
            return options
        return replace(options, reconstruct=True, reconstruct_tokens=RECONSTRUCT_TOKENS)

    def reconstructs(self) -> bool:
        """Whether kept weights are reconstructed (given enough tokens, unless it was asked for)."""
        return self.options().reconstruct


def read_yaml_file(path: str | Path) -> Mapping[str, Any]:
    """What a configuration's YAML file says. UserError: unreadable, or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path}: {error}") from error
    return read_yaml(text)


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2: in PyYAML's 1.1 the pattern 2:4 is 124 (base 60), 1e-3 is a text.
    A key that is there twice is an error, not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", node.start_mark
                )
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either version would take for a number: others read our files too."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    for _tag, _form in _NUMBERS.items():
        _kind.add_implicit_resolver(_tag, re.compile(rf"^(?:{_form})$"), list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """What a YAML text says, with the numbers of YAML 1.2. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(text: str) -> Mapping[str, Any]:
    """The mapping that a YAML text is; an empty text is an empty one."""
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config: expected YAML, got something else: {reason}") from error
    if values is not None and not isinstance(values, Mapping):
        raise UserError(f"config: expected a mapping of names to values, got {values!r}")
    return values or {}


def check_device(device: str) -> None:
    """Raises UserError unless `device` is auto, cpu, cuda or cuda:N."""
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdigit()):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}")


def check_keys(cls: type, values: object, where: str) -> None:
    """Raises UserError unless `values` is a mapping whose keys are fields of the dataclass."""
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where}: expected a mapping of names to values, got {_shown(where, values)}"
        )
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            close = get_close_matches(str(key), names, n=1)
            hint = f", did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _shown(name: str, value: object) -> str:
    """What was given, in few words, and where token ids go that were given as `calibration`."""
    text = repr(value)
    if len(text) > 200:  # a whole data set
        text = f"a {type(value).__name__}"
    if name == "calibration" and isinstance(value, Iterable) and not isinstance(value, str):
        text += ": token ids are given as such, not in the configuration"
    return text


# What a field's annotation admits, and how it is called in a message. An int is a fine float.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    int: ((int,), "a whole number"),
    int | None: ((int, type(None)), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    bool | None: ((bool, type(None)), "true or false"),
    float | None: ((int, float, type(None)), "a number"),
    str | None: ((str, type(None)), "text"),
    Scope | None: ((str, type(None)), "text"),
    tuple[str, ...]: ((tuple,), "a list of texts"),
    CalibrationConfig: ((CalibrationConfig,), "a mapping or CalibrationConfig"),
    Mapping[str, Scalar]: ((Mapping,), "a mapping of names to values"),
}


def convert_fields(config: Any) -> None:
    """Lists become tuples, mappings a CalibrationConfig, where a frozen dataclass has such fields:
    what a mapping leaves out has the default of that dataclass."""
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if hints[f.name] is CalibrationConfig and isinstance(value, Mapping):
            check_keys(CalibrationConfig, value, f.name)
            made: Callable[[], CalibrationConfig] = f.default_factory  # type: ignore[assignment]
            object.__setattr__(config, f.name, replace(made(), **value))
        elif hints[f.name] == tuple[str, ...] and isinstance(value, list):
            object.__setattr__(config, f.name, tuple(value))


def check_call(config: object, kind: type, progress: object) -> None:
    """Raises UserError unless `config` is a `kind`, and `progress` can be called or is None."""
    if not isinstance(config, kind):
        raise UserError(f"config: expected a {kind.__name__}, got {type(config).__name__}")
    if progress is not None and not callable(progress):
        raise UserError(f"progress: expected a function or None, got {progress!r}")


def check_types(config: Any, prefix: str) -> None:
    """YAML and callers can put anything into a field; the rest relies on what it says."""
    for name, annotation in get_type_hints(type(config)).items():
        kind = str if get_origin(annotation) is Literal else annotation
        types, words = _KINDS[kind]
        value = getattr(config, name)
        right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if isinstance(value, float):
            right = right and math.isfinite(value)
        if isinstance(value, tuple):
            right = right and all(isinstance(item, str) for item in value)
        if not right:
            raise UserError(f"{prefix}{name}: expected {words}, got {_shown(name, value)}")
