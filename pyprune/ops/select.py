"""Mask selection: which weights stay, by score, with exact counts.

All three ops share one score, computed in fp32 (fp64 for fp64 weights) and rounded after every
operation, in this order, so that every backend finds the same ties:

    score[i, j] = | w[i, j] * (column_scale[j] + addend[i, j]) * row_scale[i] |

An absent factor is left out rather than multiplied by one. This covers magnitude |w|, Wanda's
|w| s_j, GBLM's |w| (s_j + gamma_ij), OBD's w² / d_j (column_scale = d_j ** -0.5) and LLM Surgeon's
w² / (g_i a_j): only the order of the scores matters, so their roots serve as well.

Among equal scores the lower index is pruned first. NaN scores rank above infinity (are kept), all
alike. Positions where `preserve` is False rank below everything: they fill the quota first and stay
pruned even where the quota is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import (
    accumulation_dtype,
    check_array,
    check_float,
    check_matrices,
    check_rows,
    check_same_device,
    check_shape,
)
from pyprune.ops.storage import unit_columns

# Of a row whose keys mask_topk's cuda kernel keeps in registers.
TOPK_COLUMNS = 32768

Terms = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _check_scores(
    w: Tensor,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    addend: Tensor | None,
    preserve: Tensor | None,
) -> None:
    check_matrices("w", w)
    shape = tuple(w.shape)
    columns: tuple[int, ...] = (shape[-1],)
    if w.dim() == 3 and column_scale is not None and column_scale.dim() != 1:
        columns = (shape[0], shape[-1])
    wanted = {"column_scale": columns, "row_scale": shape[:-1], "addend": shape}
    given = {"column_scale": column_scale, "row_scale": row_scale, "addend": addend}
    for name, t in given.items():
        if t is not None:
            check_shape(name, t, wanted[name])
            check_float(name, t)
    if preserve is not None:
        check_array("preserve", preserve, torch.bool, shape)
    check_same_device(w, column_scale, row_scale, addend, preserve)


def _score_reference(
    w: Tensor,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    addend: Tensor | None,
    preserve: Tensor | None,
) -> Tensor:
    """Scores, with -1 where a weight must stay pruned."""
    dtype = accumulation_dtype(w)
    factor = None if column_scale is None else column_scale.to(dtype)
    if addend is not None:
        factor = addend.to(dtype) if factor is None else factor + addend.to(dtype)
    score = w.to(dtype)
    if factor is not None:
        score = score * factor
    if row_scale is not None:
        score = score * row_scale.to(dtype)[:, None]
    score = score.abs()
    return score if preserve is None else score.masked_fill(~preserve, -1.0)


def _keep_all_but(score: Tensor, pruned: int) -> Tensor:
    """Per row of `score`, True for all but the `pruned` first in stable ascending order."""
    order = score.sort(dim=1, stable=True).indices[:, :pruned]
    mask = torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)
    return mask & (score != -1.0)


def _native_terms(terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The terms in the layout that the kernels read: fp32 and bool, unit stride along columns."""
    column_scale, row_scale, addend, preserve = terms
    return [
        None if column_scale is None else column_scale.float().contiguous(),
        None if row_scale is None else row_scale.float().contiguous(),
        None if addend is None else unit_columns(addend.float()),
        None if preserve is None else unit_columns(preserve),
    ]


def _kernel(run: Callable[..., object], *numbers: int) -> Callable[..., None]:
    """What `fill_stack` takes, of `run(mask, w, *numbers, *terms)`, a function of `_C`."""

    def fill(mask: Tensor, w: Tensor, *terms: Tensor | None) -> None:
        run(mask, unit_columns(w), *numbers, *map(_native.optional_capsule, _native_terms(terms)))

    return fill


def fill_stack(fill: Callable[..., None], mask: Tensor, w: Tensor, *terms: Tensor | None) -> Tensor:
    """`mask`, written by `fill(mask, w, *terms)`, which takes matrices. Of a stack `[B, R, C]` it
    takes all rows at once, which do not know of one another, or a matrix at a time where each has
    column scales of its own."""
    column_scale, *by_row = terms
    if w.dim() == 2:
        fill(mask, w, *terms)
    elif column_scale is None or column_scale.dim() == 1:
        flat = [None if t is None else t.flatten(0, 1) for t in by_row]
        fill(mask.flatten(0, 1), w.flatten(0, 1), column_scale, *flat)
    else:
        for b in range(len(w)):
            fill(mask[b], w[b], *(None if t is None else t[b] for t in terms))
    return mask


# --- mask_nm -------------------------------------------------------------------------------------


def _check_mask_nm(w: Tensor, n: int, m: int, *terms: Tensor | None) -> None:
    _check_scores(w, *terms)
    if not 1 <= n <= m:
        raise ValueError(f"n, m: expected 1 <= n <= m (n kept of every m), got {n}:{m}")
    if w.shape[-1] % m:
        raise ValueError(f"m: expected a divisor of w's {w.shape[-1]} columns, got {m}")


def mask_nm_reference(w: Tensor, n: int, m: int, *terms: Tensor | None) -> Tensor:
    def fill(mask: Tensor, w: Tensor, *terms: Tensor | None) -> None:
        groups = _score_reference(w, *terms).reshape(-1, m)
        mask.copy_(_keep_all_but(groups, m - n).view(mask.shape))

    return fill_stack(fill, w.new_empty(w.shape, dtype=torch.bool), w, *terms)


def _mask_nm_fake(w: Tensor, n: int, m: int, *terms: Tensor | None) -> Tensor:
    _check_mask_nm(w, n, m, *terms)
    return w.new_empty(w.shape, dtype=torch.bool)


def _mask_nm_native(w: Tensor, n: int, m: int, *terms: Tensor | None) -> Tensor:
    fill = _kernel(partial(_native.call, "mask_nm"), n, m)
    return fill_stack(fill, _native.empty(tuple(w.shape), torch.bool), w, *terms)


def _mask_nm_cuda(w: Tensor, n: int, m: int, *terms: Tensor | None) -> Tensor:
    fill = _kernel(partial(_native.launch, "mask_nm_cuda", w.device), n, m)
    return fill_stack(fill, w.new_empty(w.shape, dtype=torch.bool), w, *terms)


def _mask_nm_cuda_limits(w: Tensor, n: int, m: int, *terms: Tensor | None) -> str:
    taken = m in (4, 8) or (n, m) == (8, 16)
    return "" if taken else f"mask_nm's cuda kernel is for n:4, n:8 and 8:16, not {n}:{m}"


_TERMS = "Tensor? column_scale, Tensor? row_scale, Tensor? addend, Tensor? preserve"
registry.register(
    f"mask_nm(Tensor w, int n, int m, {_TERMS}) -> Tensor",
    fake=_mask_nm_fake,
    impls={
        "reference": registry.Impl(mask_nm_reference),
        "native": registry.Impl(_mask_nm_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl("pyprune.kernels.select:mask_nm_triton", registry.HALF_OR_SINGLE),
        "cuda": registry.Impl(_mask_nm_cuda, registry.HALF_OR_SINGLE, _mask_nm_cuda_limits),
    },
)


def mask_nm(
    w: Tensor,
    n: int,
    m: int,
    *,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    preserve: Tensor | None = None,
) -> Tensor:
    """The `n` highest scores of every `m` consecutive columns are kept.

    Score, tie rule and NaN rule: see the module's docstring.

    Args:
        w: weights `[R, C]`, or a stack `[B, R, C]`; bf16, fp16, fp32 or fp64; any strides. `m`
            divides C.
        n, m: n kept of m, `1 <= n <= m` (2:4 and 4:8 in Zhou et al. 2021, arXiv 2102.04010).
        column_scale: `[C]`, e.g. Wanda's activation norms (Sun et al. 2023, eq. 1). Of a stack also
            `[B, C]`; the other terms have one for each matrix.
        row_scale: `[R]`.
        addend: `[R, C]`, added to the column scale, e.g. GBLM's scaled gradient magnitude.
        preserve: bool `[R, C]`; False positions stay pruned and count among the pruned.

    Returns:
        bool mask like `w`, contiguous, True = kept: exactly n in each group, fewer only where
        `preserve` leaves fewer.

    Raises:
        ValueError: a shape, dtype, device or n:m rule is broken.
    """
    terms = (column_scale, row_scale, addend, preserve)
    _check_mask_nm(w, n, m, *terms)
    if w.numel() == 0:
        return w.new_empty(w.shape, dtype=torch.bool)
    mask: Tensor = torch.ops.pyprune.mask_nm(w, n, m, *terms)
    return mask


# --- mask_topk -----------------------------------------------------------------------------------


def _check_mask_topk(w: Tensor, pruned: int, *terms: Tensor | None) -> None:
    _check_scores(w, *terms)
    if not 0 <= pruned <= w.shape[-1]:
        raise ValueError(f"pruned: expected 0 to {w.shape[-1]} (columns), got {pruned}")


def mask_topk_reference(w: Tensor, pruned: int, *terms: Tensor | None) -> Tensor:
    def fill(mask: Tensor, w: Tensor, *terms: Tensor | None) -> None:
        mask.copy_(_keep_all_but(_score_reference(w, *terms), pruned))

    return fill_stack(fill, w.new_empty(w.shape, dtype=torch.bool), w, *terms)


def _mask_topk_fake(w: Tensor, pruned: int, *terms: Tensor | None) -> Tensor:
    _check_mask_topk(w, pruned, *terms)
    return w.new_empty(w.shape, dtype=torch.bool)


def _mask_topk_native(w: Tensor, pruned: int, *terms: Tensor | None) -> Tensor:
    fill = _kernel(partial(_native.call, "mask_topk"), pruned)
    return fill_stack(fill, _native.empty(tuple(w.shape), torch.bool), w, *terms)


def _mask_topk_cuda(w: Tensor, pruned: int, *terms: Tensor | None) -> Tensor:
    if pruned == 0:
        return _allowed(w, terms[3])
    fill = _kernel(partial(_native.launch, "mask_topk_cuda", w.device), pruned)
    return fill_stack(fill, w.new_empty(w.shape, dtype=torch.bool), w, *terms)


def _mask_topk_cuda_limits(w: Tensor, pruned: int, *terms: Tensor | None) -> str:
    if w.shape[-1] <= TOPK_COLUMNS:
        return ""
    return f"mask_topk's cuda kernel takes up to {TOPK_COLUMNS} columns, not {w.shape[-1]}"


def _allowed(w: Tensor, preserve: Tensor | None) -> Tensor:
    """The mask of `w` when nothing needs to go."""
    if preserve is None:
        return torch.ones_like(w, dtype=torch.bool, memory_format=torch.contiguous_format)
    return preserve.clone(memory_format=torch.contiguous_format)


registry.register(
    f"mask_topk(Tensor w, int pruned, {_TERMS}) -> Tensor",
    fake=_mask_topk_fake,
    impls={
        "reference": registry.Impl(mask_topk_reference),
        "native": registry.Impl(_mask_topk_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl("pyprune.kernels.select:mask_topk_triton", registry.HALF_OR_SINGLE),
        "cuda": registry.Impl(_mask_topk_cuda, registry.HALF_OR_SINGLE, _mask_topk_cuda_limits),
    },
)


def mask_topk(
    w: Tensor,
    pruned: int,
    *,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    addend: Tensor | None = None,
    preserve: Tensor | None = None,
) -> Tensor:
    """Per row, exactly the `pruned` lowest scores are removed.

    `mask_topk(w.reshape(1, -1), k)` compares within the whole layer. Score, tie rule and NaN rule:
    see the module's docstring.

    Args:
        w: weights `[R, C]`, or a stack `[B, R, C]`; bf16, fp16, fp32 or fp64; any strides.
        pruned: how many of a row's C weights go, 0 to C.
        column_scale, row_scale, addend, preserve: as for `mask_nm`.

    Returns:
        bool mask like `w`, contiguous, True = kept: exactly C - pruned in each row, fewer only
        where `preserve` leaves fewer. Masks are nested in `pruned`.

    Raises:
        ValueError: a shape, dtype, device or range rule is broken.
    """
    terms = (column_scale, row_scale, addend, preserve)
    _check_mask_topk(w, pruned, *terms)
    if w.numel() == 0:
        return w.new_empty(w.shape, dtype=torch.bool)
    mask: Tensor = torch.ops.pyprune.mask_topk(w, pruned, *terms)
    return mask


# --- mask_global ---------------------------------------------------------------------------------

TermLists = Sequence[Tensor] | None


def _terms_of(lists: Sequence[TermLists], i: int) -> Terms:
    column_scale, row_scale, addend, preserve = (None if t is None else t[i] for t in lists)
    return column_scale, row_scale, addend, preserve


def _check_mask_global(ws: Sequence[Tensor], pruned: int, *lists: TermLists) -> None:
    if len(ws) == 0:
        raise ValueError("ws: expected at least one tensor")
    for name, t in zip(("column_scales", "row_scales", "addends", "preserves"), lists, strict=True):
        if t is not None and len(t) != len(ws):
            raise ValueError(f"{name}: expected {len(ws)} tensors as in ws, got {len(t)}")
    for i, w in enumerate(ws):
        check_rows(f"ws[{i}]", w)
        _check_scores(w, *_terms_of(lists, i))
        if w.dtype != ws[0].dtype:
            raise ValueError(f"ws[{i}]: expected {ws[0].dtype} as ws[0], got {w.dtype}")
    check_same_device(*ws)
    total = sum(w.numel() for w in ws)
    if not 0 <= pruned <= total:
        raise ValueError(f"pruned: expected 0 to {total} (elements of ws), got {pruned}")


def mask_global_reference(ws: Sequence[Tensor], pruned: int, *lists: TermLists) -> list[Tensor]:
    scores = [_score_reference(w, *_terms_of(lists, i)).reshape(-1) for i, w in enumerate(ws)]
    mask = _keep_all_but(torch.cat(scores)[None], pruned)[0]
    parts = torch.split(mask, [w.numel() for w in ws])
    return [part.view(w.shape).clone() for part, w in zip(parts, ws, strict=True)]


def _mask_global_fake(ws: Sequence[Tensor], pruned: int, *lists: TermLists) -> list[Tensor]:
    _check_mask_global(ws, pruned, *lists)
    return [w.new_empty(w.shape, dtype=torch.bool) for w in ws]


def _capsules(
    ws: Sequence[Tensor], masks: Sequence[Tensor], lists: Sequence[TermLists]
) -> list[list[object]]:
    """The masks, the weights and the four lists of terms as the kernels take them: of those that
    are not empty; an absent term's list has no items."""
    filled = [i for i, w in enumerate(ws) if w.numel()]
    terms = [_native_terms(_terms_of(lists, i)) for i in filled]
    return [
        [_native.capsule(masks[i]) for i in filled],
        [_native.capsule(unit_columns(ws[i])) for i in filled],
        *([_native.capsule(u) for t in terms if (u := t[j]) is not None] for j in range(4)),
    ]


def _mask_global_native(ws: Sequence[Tensor], pruned: int, *lists: TermLists) -> list[Tensor]:
    masks = [_native.empty(tuple(w.shape), torch.bool) for w in ws]
    groups = _capsules(ws, masks, lists)
    _native.call("mask_global", *groups[:2], pruned, *groups[2:])
    return masks


# What mask_global's cuda kernels count in: words for digits, and one for each so many columns.
_WORKSPACE_WORDS = 4096
_TILE_CHUNKS, _CHUNK = 1024, 8


def _mask_global_cuda(ws: Sequence[Tensor], pruned: int, *lists: TermLists) -> list[Tensor]:
    if pruned == 0:
        return [_allowed(w, _terms_of(lists, i)[3]) for i, w in enumerate(ws)]
    masks = [w.new_empty(w.shape, dtype=torch.bool) for w in ws]
    chunks = [w.shape[0] * -(-w.shape[1] // _CHUNK) for w in ws]
    words = _WORKSPACE_WORDS + sum(-(-count // _TILE_CHUNKS) for count in chunks)
    workspace = ws[0].new_empty(words, dtype=torch.int64)
    groups = _capsules(ws, masks, lists)
    _native.launch("mask_global_cuda", ws[0].device, *groups[:2], pruned, *groups[2:], workspace)
    return masks


registry.register(
    "mask_global(Tensor[] ws, int pruned, Tensor[]? column_scales, Tensor[]? row_scales, "
    "Tensor[]? addends, Tensor[]? preserves) -> Tensor[]",
    fake=_mask_global_fake,
    impls={
        "reference": registry.Impl(mask_global_reference),
        "native": registry.Impl(_mask_global_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl(
            "pyprune.kernels.select_global:mask_global_triton", registry.HALF_OR_SINGLE
        ),
        "cuda": registry.Impl(_mask_global_cuda, registry.HALF_OR_SINGLE),
    },
)


def mask_global(
    ws: Sequence[Tensor],
    pruned: int,
    *,
    column_scales: TermLists = None,
    row_scales: TermLists = None,
    addends: TermLists = None,
    preserves: TermLists = None,
) -> list[Tensor]:
    """Exactly the `pruned` lowest scores of all tensors together are removed.

    Scores are never stored: the cut is found by counting passes over the weights. Among equal
    scores the lower tensor index is pruned first, then the lower flat index. Score and NaN rule:
    see the module's docstring.

    Args:
        ws: weights, each `[R_t, C_t]`, of one dtype (bf16, fp16, fp32 or fp64) on one device.
        pruned: how many of all their elements go.
        column_scales, row_scales, addends, preserves: None, or one tensor for each of `ws`, as for
            `mask_nm`.

    Returns:
        One bool mask for each tensor, True = kept; together exactly total - pruned are True, fewer
        only where `preserves` leaves fewer.

    Raises:
        ValueError: a shape, dtype, device, length or range rule is broken.
    """
    lists = (column_scales, row_scales, addends, preserves)
    _check_mask_global(ws, pruned, *lists)
    given = [None if t is None else list(t) for t in lists]
    masks: list[Tensor] = torch.ops.pyprune.mask_global(list(ws), pruned, *given)
    return masks
