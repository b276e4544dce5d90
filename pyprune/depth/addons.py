"""What can be done for a model whose branches or layers are about to go, without changing its
architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from pyprune.calibration.tokens import Batch
from pyprune.depth.given import Given
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.heldout import Change, HeldOut, Part, advance, least, parts_of, unchanged
from pyprune.depth.hidden import real_tokens
from pyprune.depth.ridge import LADDER, Moments, Solutions, check_ridge
from pyprune.errors import UserError
from pyprune.models.experts import is_fused, is_transposed

# Last linear maps of a branch, by name, in every supported family.
WRITERS = ("o_proj", "out_proj", "dense", "c_proj", "dense_4h_to_h", "down_proj", "fc2", "fc_out")
AFTER = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
# How far the output may be from what scaling the stream itself gives: norms have an epsilon.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class AddOns:
    """compensate: make up for the size that a gap leaves missing (Prune&Comp). refit: fit the
    branch before a gap to the stream after it by least squares (ReplaceMe). With both, gaps are
    refitted, and compensation is left to one that has no branch before it. ridge: of the refit,
    towards no change, times the mean squared output; none: chosen by the loss of held-out text."""

    compensate: bool = False
    refit: bool = False
    ridge: float | None = None

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if self.ridge is not None and not self.refit:
            raise UserError(f"ridge: expected none without refit, got {self.ridge:g}")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.compensate or self.refit


@dataclass(frozen=True)
class OneAddOn(AddOns):
    """`AddOns` of a method that leaves a layer before every gap, so that with both nothing would be
    left to compensation: UserError."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compensate and self.refit:
            raise UserError(
                "compensate, refit: expected one of them, got both; a layer stands before every "
                "gap, and once it is refitted nothing is left to compensate"
            )


def check_add_ons(graph: ResidualGraph, options: AddOns) -> None:
    """Raises UserError where the model's branches cannot have what `options` ask for: before a
    search, which may take hours, not after it."""
    for branch in graph.branches if options.wanted else ():
        if options.refit or norm_after(graph, branch) is None:
            writers(graph, branch)


def apply_add_ons(
    graph: ResidualGraph,
    removed: Collection[Branch],
    batches: Sequence[Batch],
    options: AddOns,
    given: Given | None = None,
) -> tuple[dict[str, Any], ...]:
    """What `options` ask for, in place, before `removed` go; what was done.

    given: what the method has changed in the weights that stay, with their values from before.
    Everything is then measured against that model, see `size_factors` and `refit`.
    """
    given = Given() if given is None else given
    found = gaps(removed, len(graph.layouts)) if options.compensate else []
    if options.refit:
        found = [gap for gap in found if gap[0] == 0]
    factors = size_factors(graph, removed, found, batches, given) if found else {}
    done: list[dict[str, Any]] = []
    if factors:
        done.append({"kind": "compensate", "factors": list(factors.values())})
    if options.refit:
        fits = refit(graph, removed, batches, options.ridge, given, factors)
        done += [{"kind": "refit", **fit} for fit in fits]
    if factors:
        compensate(graph, removed, batches, factors)
    return tuple(done)


def gaps(removed: Collection[Branch], layers: int) -> list[tuple[int, int]]:
    """Runs of consecutive removed branches as positions (first, end), end exclusive, ascending."""
    gone = {branch.position for branch in removed}
    if gone and not (min(gone) >= 0 and max(gone) < 2 * layers and len(gone) < 2 * layers):
        raise UserError(
            f"removed: expected some, not all, branches of {layers} layers, got "
            f"{', '.join(map(str, sorted(removed)))}"
        )
    starts = sorted(i for i in gone if i - 1 not in gone)
    ends = sorted(i + 1 for i in gone if i + 1 not in gone)
    return list(zip(starts, ends, strict=True))


def streams(graph: ResidualGraph, batch: Batch) -> Iterator[Tensor]:
    """The residual stream before every branch, and after the last: 2 L + 1 times float32 [n, d],
    n real tokens."""
    state, context = graph.start(batch)
    yield real_tokens(state.total, batch)
    for branch in graph.branches:
        state = graph.run(branch, state, context)
        yield real_tokens(state.total, batch)


def size_ratios(
    graph: ResidualGraph, found: Sequence[tuple[int, int]], batches: Sequence[Batch]
) -> list[float]:
    """E[|x_end| / |x_first|] over all tokens, for every gap: what its removal leaves to make up
    for. UserError where a state is all zeros."""
    sums, count = [0.0] * len(found), 0
    for batch in batches:
        norms = [_sizes(x) for x in streams(graph, batch)]
        for i, (first, end) in enumerate(found):
            sums[i] += float((norms[end] / norms[first]).sum())
        count += len(norms[0])
    return [total / count for total in sums]


@torch.no_grad()
def size_factors(
    graph: ResidualGraph,
    removed: Collection[Branch],
    found: Sequence[tuple[int, int]],
    batches: Sequence[Batch],
    given: Given,
) -> dict[int, float]:
    """What the stream has to be multiplied by at each of the gaps `found`: first position of the
    gap -> E[|x_end| / |x_first|] over all tokens.

    As published both sizes are those of the model before anything went. Where a method has changed
    weights besides (`given` holds some), x_end is of the model as given, and x_first of the model
    as it will be: with the weights of now, without `removed`, earlier gaps made up for.
    """
    if not given:
        ratios = size_ratios(graph, found, batches)
        return dict(zip((first for first, _ in found), ratios, strict=True))
    factors: dict[int, float] = {}
    for first, end in found:
        total, count = 0.0, 0
        for batch in batches:
            begin = graph.start(batch)
            with given.back():
                after = advance(graph, (0, end), *begin)
            before = advance(graph, (0, first), *begin, removed, factors)
            large, small = (_sizes(real_tokens(state.total, batch)) for state in (after, before))
            total += float((large / small).sum())
            count += len(large)
        factors[first] = total / count
    return factors


def _sizes(rows: Tensor) -> Tensor:
    """Their norms, float64 [n]. UserError where one is 0."""
    sizes = rows.double().square().sum(1).sqrt()
    if not bool((sizes > 0).all()):
        raise UserError("a hidden state is all zeros: its size cannot be compensated")
    return sizes


def writers(graph: ResidualGraph, branch: Branch) -> list[Tensor]:
    """The parameters whose multiplication by a number multiplies what the branch adds: weights and
    biases of its last linear maps (every expert's). Raises UserError if they are not known, or if
    a norm comes after them."""
    block, layout = graph.adapter.blocks[branch.layer], graph.layouts[branch.layer]
    if norm_after(graph, branch) is not None:
        raise UserError(f"{type(block).__name__}: its branches end in a norm, not a linear map")
    names = (layout.attention,) if branch.kind == "attention" else layout.mlp[-1:]
    if branch.kind == "mlp" and any(
        "Norm" in type(module).__name__ for module in block.get_submodule(names[0]).modules()
    ):
        raise UserError(f"{type(block).__name__}: its MLPs hold a norm, behind their linear maps")
    found: list[Tensor] = []
    for name in names:
        for path, module in block.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, nn.Linear | Conv1D):
                if path.rpartition(".")[2] in WRITERS:
                    found += list(module.parameters(recurse=False))
            else:
                own = dict(module.named_parameters(recurse=False))
                found += [p for n, p in own.items() if n in ("down_proj", "down_proj_bias")]
    if not found:
        raise UserError(f"{type(block).__name__}: unknown last linear map of its {branch.kind}")
    return found


def norm_after(graph: ResidualGraph, branch: Branch) -> nn.Module | None:
    """The norm between a branch and the stream that it adds to, if there is one."""
    layout = graph.layouts[branch.layer]
    norms = layout.attention_norms if branch.kind == "attention" else layout.mlp_norms
    name = AFTER[branch.kind]
    return graph.adapter.blocks[branch.layer].get_submodule(name) if name in norms else None


@torch.no_grad()
def compensate(
    graph: ResidualGraph,
    removed: Collection[Branch],
    batches: Sequence[Batch],
    factors: Mapping[int, float] | None = None,
) -> list[float]:
    """Prune&Comp (arXiv 2507.18212): makes up for the size that gaps leave missing, in place;
    returns the factors, gap by gap.

    The paper multiplies everything before a gap by its factor, embeddings included. Divided instead
    is everything after it (the last linear maps of those branches, or the norms after them where
    there are some): the stream differs by a scale, which every norm that reads it takes away, and
    tied embeddings stay tied. The branches to remove are still there, and must be removed
    afterwards. factors: by the first position of their gaps, None: of all gaps of the model as
    given, E[|x_after| / |x_before|]; see `size_factors`. Raises UserError if the output depends on
    the scale; the model must not be used after it.
    """
    found = gaps(removed, len(graph.layouts))
    if factors is None:
        factors = size_factors(graph, removed, found, batches, Given())
    if not factors:
        return []
    ends = dict(found)
    expected = _output(graph, removed, batches[0], factors)
    for branch in graph.branches:
        factor = math.prod(f for first, f in factors.items() if ends[first] <= branch.position)
        if factor != 1 and branch not in removed:
            _scale_branch(graph, branch, 1 / factor)
    off = (_output(graph, removed, batches[0], {}) - expected).norm() / expected.norm()
    if not off <= max(TOLERANCE, 10 * torch.finfo(next(graph.model.parameters()).dtype).eps):
        raise UserError(
            f"{type(graph.model).__name__}: its output depends on the scale of the residual stream "
            f"(off by {float(off):.1e}): compensation is not possible"
        )
    return list(factors.values())


def _output(
    graph: ResidualGraph, removed: Collection[Branch], batch: Batch, factors: Mapping[int, float]
) -> Tensor:
    """The decoder's output [n, d] without `removed`, the stream multiplied at these positions."""
    state = advance(graph, (0, len(graph.branches)), *graph.start(batch), removed, factors)
    return real_tokens(graph.finish(state.total, batch), batch)


def _scale_branch(graph: ResidualGraph, branch: Branch, factor: float) -> None:
    norm = norm_after(graph, branch)
    if norm is not None:
        _scale_norm(norm, factor)
        return
    for parameter in writers(graph, branch):
        parameter.mul_(factor)


def _scale_norm(norm: nn.Module, factor: float) -> None:
    """Whether the norm multiplies by its weight or by 1 + it (Gemma) is tried out."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    probe = torch.linspace(-1.0, 2.0, weight.numel(), device=weight.device).to(weight.dtype)[None]
    expected = norm(probe) * factor
    old = weight.clone()
    for scaled in (old * factor, (1 + old) * factor - 1):
        weight.copy_(scaled)
        if torch.allclose(norm(probe), expected, rtol=1e-2, atol=1e-5):
            break
    for name, parameter in norm.named_parameters(recurse=False):
        if name == "bias":
            parameter.mul_(factor)


def untie(model: Any) -> None:
    """Gives the head its own copy of the embeddings, so that they can differ."""
    head, entry = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not entry.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


@torch.no_grad()
def refit(
    graph: ResidualGraph,
    removed: Collection[Branch],
    batches: Sequence[Batch],
    ridge: float | None = None,
    given: Given | None = None,
    factors: Mapping[int, float] | None = None,
) -> list[dict[str, Any]]:
    """ReplaceMe (arXiv 2505.02819, section 3.2), for gaps of branches: what the branch before each
    gap p..q-1 adds is multiplied by the matrix T that minimises |M T - (x_q - u)|^2 +
    lambda |T - I|^2, in place. Before a gap of whole layers that branch is an MLP, as published.

    u: the stream before that branch and M what it adds, in the model as pruned (earlier gaps
    refitted); x_q: of the model as given. Padding excluded. The Gram matrix and the solve are
    float64; lambda = ridge x mean diagonal of M'M, and pulls to the identity (the paper pulls to
    zero). A gap with nothing before it is left, and so is one after a branch that adds nothing (the
    zeros of an earlier re-packing).

    ridge: None chooses it for each gap by the loss of held-out tokens in the model as pruned, later
    gaps as they are (`HeldOut`, `_chosen`); T = I is one of the choices. The squared error does not
    say what a map does to the model: rows count by their size, and a few huge states, which
    attention rests on, can be nearly all of it; fitting them can move all others away. Weighted by
    1 / |x_q|^2 they come off worst instead. Perplexity rises both ways (measured).

    given: weights that a method has changed since; refitted ones are added to it. factors: of gaps
    that are compensated, by their first position: in the model as pruned the stream is multiplied
    there (`compensate` comes afterwards).

    Returns per gap {"branch", "removed", "ridge", "held_out", "before", "after"}: names; the ridge,
    None if T = I was best; [held-out loss of T = I, of the T that the other sequences give] (None
    if the ridge was given, and if no held-out token can be predicted: T = I then); relative squared
    errors of the stream at the gap's end on this text. The branches to remove must be removed
    afterwards.
    """
    check_ridge(ridge)
    found = [gap for gap in gaps(removed, len(graph.layouts)) if gap[0] > 0]
    gone = set(removed)
    for start, _ in found:
        writers(graph, graph.branches[start - 1])  # refused before anything is changed
    given = Given() if given is None else given
    parts = parts_of(batches)
    by_loss = found and ridge is None and HeldOut.predicted(parts)
    held_out = HeldOut(graph, parts, given) if by_loss else None
    report = []
    for start, end in found:
        last = graph.branches[start - 1]
        fitted, held, scale = _moments(graph, gone, (start, end), parts, given, factors)
        both, used, losses = fitted + held, ridge, None
        change = None if ridge is None else both.solve(ridge)
        if held_out is not None:
            measure = partial(held_out.losses, start, gone, factors)
            used, change, losses = _chosen(fitted, held, measure)
        if change is None:
            change = torch.zeros_like(both.gram)
        given.hold(writers(graph, last))
        if change.any():
            _fold(graph, last, change)
        report.append(
            {
                "branch": str(last),
                "removed": "+".join(map(str, graph.branches[start:end])),
                "ridge": used,
                "held_out": losses,
                "before": float(both.error) / scale,
                "after": both.error_of(change) / scale,
            }
        )
    return report


def _chosen(
    fitted: Moments, held: Moments, losses: Callable[[Sequence[Change]], list[float]]
) -> tuple[float | None, Tensor | None, list[float]]:
    """The ridge whose map, of the sequences that are not held out, has the least loss on those that
    are; W for it; the losses without a map and with that one. None, None where no map is better
    than none, which wins ties; of equals the larger ridge.

    W is made from all sequences unless that has a higher loss on the held-out ones, though it has
    seen them: so the loss there never rises.
    """
    if not fitted.unit > 0:
        none = losses([unchanged])
        return None, None, none * 2
    solutions = Solutions(fitted)
    found = losses([unchanged, *(partial(solutions.change_of, ridge=r) for r in LADDER)])
    best = least(found)
    if best == 0:
        return None, None, [found[0]] * 2
    ridge = LADDER[best - 1]
    change = (fitted + held).solve(ridge)
    (again,) = losses([lambda rows: rows @ change])
    if least([again, found[best]]) != 0:
        change = fitted.solve(ridge)
    return ridge, change, [found[0], found[best]]


def _moments(
    graph: ResidualGraph,
    gone: set[Branch],
    gap: tuple[int, int],
    parts: Sequence[Part],
    given: Given,
    factors: Mapping[int, float] | None,
) -> tuple[Moments, Moments, float]:
    """Of the tokens to fit and of those held out, with the sum of |x_q|^2 over both."""
    start, end = gap
    sums: list[Any] = [None, None]
    scale = 0.0
    for part in parts:
        batch = part.batch
        first, context = graph.start(batch)
        with given.back():
            target = real_tokens(advance(graph, (0, end), first, context).total, batch)
        state = advance(graph, (0, start - 1), first, context, gone, factors)
        u = real_tokens(state.total, batch)
        state = graph.run(graph.branches[start - 1], state, context)
        m = real_tokens(state.total, batch) - u
        missing = target - u - m
        held = part.held_rows()
        for k, rows in enumerate((~held, held)):
            moments = Moments.of(m[rows], missing[rows])
            sums[k] = moments if sums[k] is None else sums[k] + moments
        scale += float(target.double().square().sum())
    return sums[0], sums[1], scale


def _fold(graph: ResidualGraph, branch: Branch, change: Tensor) -> None:
    """Right-multiplies what the branch adds by I + `change`."""
    width = len(change)
    transform = change + torch.eye(width, dtype=change.dtype, device=change.device)
    block = graph.adapter.blocks[branch.layer]
    modules = {id(p): m for m in block.modules() for p in m.parameters(recurse=False)}
    for parameter in writers(graph, branch):
        value, module = parameter.double(), modules[id(parameter)]
        fused = is_fused(module)
        bias = fused and value.dim() == 2  # [experts, d]
        transposed = is_transposed(module) if fused else isinstance(module, Conv1D)
        if value.dim() == 1 or bias or transposed:
            value = value @ transform
        elif value.shape[-2] == width:  # [d, f], or [experts, d, f]
            value = transform.T @ value
        else:
            raise UserError(f"{branch}: unknown shape {tuple(value.shape)} of its last linear map")
        parameter.copy_(value)
