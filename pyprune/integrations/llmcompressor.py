"""llm-compressor's SparseGPT and Wanda on our kernels.

    from pyprune.integrations import llmcompressor

    with llmcompressor.accelerated():
        oneshot(model=..., recipe=SparseGPTModifier(sparsity=0.5, mask_structure="2:4"), ...)

Four functions are replaced where its modifiers look them up; recipes, hooks, offloading and saving
stay its own. Its package is imported only by `install`. Releases 0.12 to 0.14 take a transformers
that this package takes too (0.14: 5.15 to 5.17), so pip installs both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.errors import UserError
from pyprune.integrations.layer import accumulate, like_weight, matrix, sweep, tokens

_PRUNING = "llmcompressor.modifiers.pruning"


def accumulate_hessian(
    inp: Tensor, module: nn.Module, H: Tensor, num_samples: int
) -> tuple[Tensor, int]:
    """`H [C, C]`, 2 / num_samples * X^T X, with the inputs `[B, T, C]` added, in place."""
    x, sequences = tokens(module, inp.to(H.device))
    return H, accumulate(lambda acc: ops.gram(x, out=acc), H, 2.0, num_samples, sequences)


def sparsegpt_weight(
    module: nn.Module,
    hessians_dict: dict[nn.Module, Tensor],
    sparsity: float,
    prune_n: int,
    prune_m: int,
    block_size: int,
    dampening_frac: float,
    preserve_sparsity_mask: bool,
) -> tuple[float, Tensor]:
    """Loss and pruned weight of a layer, whose Hessian leaves the dictionary. Zeros that are to be
    preserved count among the pruned; more of them than `sparsity` are a ValueError."""
    w, h = matrix(module), hessians_dict.pop(module)
    preserve = w != 0 if preserve_sparsity_mask else None
    if preserve is not None and not prune_n:
        zeros = 1 - float(preserve.float().mean())
        if zeros > sparsity:
            raise ValueError(
                f"sparsity: expected at least the {zeros:.4f} of zeros that are to be preserved, "
                f"got {sparsity}"
            )
    swept = sweep(
        w, h, sparsity=sparsity, pruned=prune_n, group=prune_m, block_size=block_size,
        damping=dampening_frac, preserve=preserve,
    )  # fmt: skip
    return float(swept.loss.sum()), like_weight(module, swept.weight)


def accumulate_row_scalars(
    inp: Tensor, module: nn.Module, row_scalars: Tensor, num_samples: int
) -> tuple[Tensor, int]:
    """`row_scalars [C]`, 1 / num_samples * sum of x_j^2, with the inputs added, in place."""
    x, sequences = tokens(module, inp.to(row_scalars.device))
    n = accumulate(
        lambda acc: ops.column_norms(x, out=acc), row_scalars, 1.0, num_samples, sequences
    )
    return row_scalars, n


def wanda_weight(
    module: nn.Module,
    row_scalars_dict: dict[nn.Module, Tensor],
    sparsity: float,
    prune_n: int,
    prune_m: int,
) -> Tensor:
    """The weight with the `int(C * sparsity)` lowest scores of every row, or prune_n of every
    prune_m, set to zero; the row scalars leave the dictionary."""
    w, scale = matrix(module), row_scalars_dict.pop(module).sqrt()
    if prune_n:
        mask = ops.mask_nm(w, prune_m - prune_n, prune_m, column_scale=scale)
    else:
        mask = ops.mask_topk(w, int(w.shape[1] * sparsity), column_scale=scale)
    return like_weight(module, torch.where(mask, w, 0))


# Where its modifiers look a function up, and what is to be found there.
_REPLACED: dict[tuple[str, str], Callable[..., Any]] = {
    (f"{_PRUNING}.sparsegpt.base", "accumulate_hessian"): accumulate_hessian,
    (f"{_PRUNING}.sparsegpt.base", "sparsify_weight"): sparsegpt_weight,
    (f"{_PRUNING}.wanda.base", "accumulate_row_scalars"): accumulate_row_scalars,
    (f"{_PRUNING}.wanda.base", "sparsify_weight"): wanda_weight,
}
_originals: dict[tuple[str, str], Callable[..., Any]] = {}


def install() -> None:
    """Puts our functions in place, until `uninstall`. A second call changes nothing.

    Raises:
        ImportError: llm-compressor is not installed. UserError: its functions have other arguments
            than those known (of releases 0.12 to 0.14): nothing is replaced.
    """
    if _originals:
        return
    found: dict[tuple[str, str], Callable[..., Any]] = {}
    modules: dict[str, ModuleType] = {}
    for (home, name), ours in _REPLACED.items():
        modules[home] = import_module(home)
        original = getattr(modules[home], name, None)
        want = list(inspect.signature(ours).parameters)
        if original is None or list(inspect.signature(original).parameters) != want:
            raise UserError(
                f"{home}.{name}: expected the arguments {want}; this release of llm-compressor is "
                "not known"
            )
        found[home, name] = original
    for (home, name), ours in _REPLACED.items():
        setattr(modules[home], name, ours)
    _originals.update(found)


def uninstall() -> None:
    """Puts llm-compressor's own functions back."""
    for (home, name), original in _originals.items():
        setattr(import_module(home), name, original)
    _originals.clear()


@contextmanager
def accelerated() -> Iterator[None]:
    """`install` for the time of a block; nothing changes if it was called before."""
    outermost = not _originals
    install()
    try:
        yield
    finally:
        if outermost:
            uninstall()
