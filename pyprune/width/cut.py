"""Cutting units out for good, as far as the architecture's configuration can say it.

A stock model has one size for all layers, so every group of a class is cut to the largest number of
units that one of them keeps; what a group has beyond its own stays in it as zeros. Whether a size
can be said at all is asked of transformers itself: the configuration is changed, saved, loaded and
built empty, and has to give the shapes that are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.models.stock import (
    InexpressibleError,
    adopt_attributes,
    behaviour,
    parameter_count,
    shapes_of,
    stock_config,
    stock_twin,
)
from pyprune.width.structure import Group, Kept, Slice, Widths

# Relative deviation of logits, in units of the dtype's eps, beyond which a cut model does not
# compute what the masked one did; a tenth where eps is that coarse.
TOLERANCE_EPS = 1e3
TOLERANCE_MOST = 0.1


@dataclass(frozen=True)
class Cut:
    """What became of the units.

    sizes: field of the configuration -> (before, after), only where it changed.
    parameters: of the model before and after (tied ones once). wanted: what would be left if every
        group had exactly the units that it keeps.
    zeroed: group -> units that are zeros now but still there.
    reasons: why, one line for each class of groups that has some.
    """

    sizes: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    wanted: int
    zeroed: Mapping[str, int]
    reasons: tuple[str, ...]


@torch.no_grad()
def cut(widths: Widths, kept: Kept) -> Cut:
    """Leaves the units `kept` of a model, in place, and its configuration saying so.

    The result saves and loads as an ordinary model of its family. `widths` describes the model from
    before and is of no use afterwards.

    Raises:
        UserError: as `Widths.kept`; or the cut model does not compute what the masked one did, so
            the family is not what it looks like. The model must not be used after the latter.
    """
    model = widths.model
    left = widths.kept(kept)
    before = parameter_count(model)
    wanted = before - widths.removed_parameters(kept)
    with _same_logits(widths, kept):
        widths.mask(kept)
        sizes: dict[str, tuple[int, int]] = {}
        zeroed: dict[str, int] = {}
        reasons: list[str] = []
        for groups in widths.classes().values():
            why = _cut_class(model, groups, left, sizes)
            extra = {g.name: _units_now(g) - len(left[g.name]) for g in groups}
            extra = {name: count for name, count in extra.items() if count}
            zeroed |= extra
            if extra:
                reasons.append(_reason(groups, why))
    after = parameter_count(model)
    return Cut(sizes, (before, after), wanted, zeroed, tuple(reasons))


def fitting_sizes(widths: Widths, groups: Sequence[Group], sizes: Sequence[int]) -> list[int]:
    """Those of `sizes` to which all `groups` (of one class) could be cut in a stock model."""
    found: list[int] = []
    for size in sizes:
        try:
            stock_config(widths.model, _changes(groups[0], size))
            if not found:  # the shapes follow from the fields: once is enough
                _twin(widths.model, groups, size)
        except InexpressibleError:
            continue
        found.append(size)
    return found


def cut_entries(parts: Sequence[tuple[Slice, Tensor]]) -> None:
    """Replaces parameters by what is left of them: of each slice's axis the entries given.

    parts: slices, each parameter once, or once for each of its experts, then in their order and
        with equally many entries; with int64 [n] ascending indices along the slice's axis. This is
        all there is to cutting rows or columns of any matrix, whatever they stand for.
    """
    by_parameter: dict[tuple[int, str], list[tuple[Slice, Tensor]]] = {}
    for part, entries in parts:
        by_parameter.setdefault((id(part.module), part.parameter), []).append((part, entries))
    for same in by_parameter.values():
        first = same[0][0]
        cut_parts = [
            part.tensor().index_select(part.axis, entries.to(part.tensor().device))
            for part, entries in same
        ]
        new = cut_parts[0] if first.expert is None else torch.stack(cut_parts)
        old = getattr(first.module, first.parameter)
        setattr(first.module, first.parameter, nn.Parameter(new, requires_grad=old.requires_grad))


@torch.no_grad()
def enable_biases(model: Any, field: str, needed: Sequence[str]) -> None:
    """Switches biases of a family on: `field` of the configuration, and zeros in the model.

    needed: names of parameters that have to come into being.

    Raises:
        InexpressibleError: the configuration has no such field, or it changes more than biases, or
            not those that are needed.
    """
    text = model.config.get_text_config()
    if not hasattr(text, field):
        raise InexpressibleError(f"{type(text).__name__} has no {field}")
    twin = stock_twin(model, {field: True})
    mine, theirs = shapes_of(model), shapes_of(twin)
    new = sorted(theirs.keys() - mine.keys())
    if not all(name.endswith(".bias") for name in new) or not mine.items() <= theirs.items():
        raise InexpressibleError(f"{type(text).__name__}: {field} changes more than biases")
    lacking = sorted(set(needed) - set(new))
    if lacking:
        raise InexpressibleError(f"{type(text).__name__}: {field} gives no {lacking[0]}")
    for name in new:
        owner = model.get_submodule(name.rpartition(".")[0])
        weight = owner.weight
        zeros = torch.zeros(theirs[name], dtype=weight.dtype, device=weight.device)
        owner.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))
    setattr(text, field, True)


def _cut_class(
    model: Any,
    groups: Sequence[Group],
    left: Mapping[str, Tensor],
    sizes: dict[str, tuple[int, int]],
) -> str:
    """Cuts groups of one class to the smallest size that holds what each keeps; returns why it is
    not the largest number that one of them keeps, if so. Adds to `sizes`."""
    step = groups[0].step
    most = max(1, *(len(left[group.name]) for group in groups))
    why = "" if most % step == 0 else f"experts have a multiple of {step} channels"
    for size in range(-(-most // step) * step, max(group.units for group in groups), step):
        try:
            stock_config(model, _changes(groups[0], size))
        except InexpressibleError as error:
            why = why or str(error)
            continue
        try:
            twin = _twin(model, groups, size)
        except InexpressibleError as error:
            return str(error)  # the fields do not make these shapes: no other size will
        _apply(model, groups, left, size, twin, sizes)
        break
    return why


def _units_now(group: Group) -> int:
    """How many units the module has, cut or not."""
    last = group.slices[-1]
    return last.tensor().shape[last.axis] // last.index.shape[1]


def _twin(model: Any, groups: Sequence[Group], size: int) -> Any:
    """The stock model with `size` units in each of `groups`."""
    config = model.config.get_text_config()
    first = groups[0]
    if not first.fields:
        raise InexpressibleError(
            f"{type(config).__name__} has no field for the size of {first.name.rpartition('.')[0]}"
        )
    if len({group.units for group in groups}) > 1:
        raise InexpressibleError("layers have different sizes already")
    twin = stock_twin(model, _changes(first, size))
    expected = _shapes(model, groups, size)
    wrong = sorted({name for name, _ in expected.items() ^ shapes_of(twin).items()})
    if wrong:
        raise InexpressibleError(
            f"{type(config).__name__} cannot say that {wrong[0]} is {expected.get(wrong[0])}"
        )
    pairs = zip(Adapter.of(model).blocks, Adapter.of(twin).blocks, strict=True)
    for i, (mine, theirs) in enumerate(pairs):
        different = sorted({key for key, _ in behaviour(mine).items() ^ behaviour(theirs).items()})
        if different:
            raise InexpressibleError(
                f"{type(config).__name__} would change {different[0]} of layer {i}"
            )
    return twin


def _changes(group: Group, size: int) -> dict[str, int]:
    counts = {field: factor * size for field, factor in group.fields.items()}
    return counts | dict(group.fixed)


def _shapes(model: Any, groups: Sequence[Group], size: int) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes with `size` units in each of `groups`."""
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = shapes_of(model)
    for group in groups:
        for part in group.slices:
            name = names[id(getattr(part.module, part.parameter))]
            axis = part.axis + (part.expert is not None)
            shape = list(shapes[name])
            shape[axis] = size * part.index.shape[1]
            shapes[name] = tuple(shape)
    return shapes


def _apply(
    model: Any,
    groups: Sequence[Group],
    left: Mapping[str, Tensor],
    size: int,
    twin: Any,
    sizes: dict[str, tuple[int, int]],
) -> None:
    parts = []
    for group in groups:
        units = padded(left[group.name], size, group.units)
        parts += [(part, part.entries(units)) for part in group.slices]
    cut_entries(parts)
    config = model.config.get_text_config()
    for name, value in _changes(groups[0], size).items():
        old = getattr(config, name, None)
        if name in groups[0].fields:
            old = groups[0].fields[name] * groups[0].units
            sizes[name] = (old, value)
        setattr(config, name, value)
    adopt_attributes(model, twin)


def padded(units: Tensor, size: int, whole: int) -> Tensor:
    """`units` and the first of the others of `whole`, `size` in all, ascending."""
    other = torch.ones(whole, dtype=torch.bool)
    other[units] = False
    return torch.cat([units, other.nonzero()[: size - len(units), 0]]).sort().values


def _reason(groups: Sequence[Group], why: str) -> str:
    what = "heads" if groups[0].kind == "heads" else "channels"
    why = why or "a stock model has one size, that of the layer that keeps most"
    return f"{what}: {_units_now(groups[0])} stay in every module, some as zeros: {why}"


@contextmanager
def _same_logits(widths: Widths, kept: Kept) -> Iterator[None]:
    """Raises UserError if the model's logits within differ from those of the model whose units are
    only cut off from the residual stream."""
    model = widths.model
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(12, device=next(model.parameters()).device).view(2, 6) % vocabulary
    for group, units in widths.removed(kept):
        group.slices[-1].zero(units)
    expected = model(input_ids=ids, use_cache=False).logits
    yield
    got = model(input_ids=ids, use_cache=False).logits
    tolerance = min(TOLERANCE_MOST, TOLERANCE_EPS * torch.finfo(expected.dtype).eps)
    scale = expected.abs().max()
    difference = (got - expected).abs().max()
    if scale.isfinite() and not difference <= tolerance * scale:
        raise UserError(
            f"{type(model).__name__}: unknown structure of attention or MLP: logits of the cut "
            f"model differ from the masked one's by {float(difference / scale):.1e}; it has to be "
            "described in pyprune.width.families"
        )
