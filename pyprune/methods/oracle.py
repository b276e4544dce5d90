"""How far layer-wise methods are from exact greedy OBS, on sampled rows of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.errors import UserError
from pyprune.methods import MethodOptions, exactobs, find_method
from pyprune.methods.base import LayerInputs
from pyprune.methods.update import without_dead
from pyprune.ops.obs_factor import ObsFactor
from pyprune.patterns import Pattern, Unstructured


@dataclass(frozen=True)
class Gap:
    """One method against ExactOBS; errors are tr(D H D^T) with the damped H, summed over the rows.

    error: of the method's weights, over that of ExactOBS. mask_error: of the best weights for the
    method's mask, over that of ExactOBS: what its choice costs; `error / mask_error` is what its
    update leaves. agreement: share of the weights that ExactOBS removes which it removes too.
    relative_error: of the method's weights, over tr(W H W^T).
    """

    error: float
    mask_error: float
    agreement: float
    relative_error: float


def gap_to_exact(
    w: Tensor,
    inputs: LayerInputs,
    pattern: Pattern,
    methods: Iterable[str] = ("magnitude", "wanda", "sparsegpt"),
    *,
    rows: int = 32,
    seed: int = 0,
    options: MethodOptions | None = None,
) -> dict[str, Gap]:
    """Each method's layer error over that of `methods.exactobs` (1 = equal), on `rows` rows of
    `w [R, C]` drawn with `seed`; all of them if there are no more.

    Rows are alike to ExactOBS only within themselves, so every method compares within rows here:
    an unstructured pattern's scope is to be row or None. Everything is computed in fp64.

    Args:
        inputs: with the Gram matrix of the layer's inputs.
        methods: names of methods that need no gradients.

    Raises:
        UserError: another scope, a sparsity that removes nothing, a method that needs gradients.
        NotPositiveDefiniteError, ValueError: see `ops.obs_factor`.
    """
    if isinstance(pattern, Unstructured):
        if pattern.scope not in (None, "row"):
            raise UserError(f"scope: expected row, got {pattern.scope!r}")
        pattern = Unstructured(pattern.sparsity, "row")
    if inputs.gram is None:
        raise ValueError("gap_to_exact: expected the Gram matrix, got column norms")
    options = options or MethodOptions()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(w), generator=generator)[:rows].sort().values.to(w.device)
    gram = inputs.gram.double()
    inputs = LayerInputs(gram.diagonal(), inputs.tokens, gram)
    factor = inputs.factor(options)
    h = _damped(gram, factor)
    w = without_dead(w[chosen].double(), factor)
    exact = exactobs.exact_mask(w, factor.u, pattern, "row")
    best = _least_error(w, h, exact)
    if not best > 0:
        raise UserError(f"pattern: expected one that costs something, got {pattern}")
    gaps = {}
    for name in methods:
        method = find_method(name)
        if method.gradient is not None:
            raise UserError(f"methods: expected some that need no gradients, got {name!r}")
        solution = method.solve(w, inputs, pattern, options, None, None)
        error = _error(solution.weight - w, h)
        gaps[name] = Gap(
            error=error / best,
            mask_error=_least_error(w, h, solution.mask) / best,
            agreement=float((~solution.mask & ~exact).sum() / (~exact).sum()),
            relative_error=error / _error(w, h),
        )
    return gaps


def _damped(gram: Tensor, factor: ObsFactor) -> Tensor:
    mean = gram.diagonal().masked_fill(factor.dead, 1).mean()
    return gram + torch.diag(factor.dead + factor.damping * mean)


def _error(change: Tensor, h: Tensor) -> float:
    return float(((change @ h) * change).sum())


def _least_error(w: Tensor, h: Tensor, mask: Tensor) -> float:
    """Of the best weights for the mask, by Cholesky of every row's kept part."""
    total = 0.0
    for row, kept in zip(w, mask, strict=True):
        change = torch.where(kept, 0, -row)
        lower = torch.linalg.cholesky(h[kept][:, kept])
        pull = (h @ change)[kept, None]
        change[kept] = -torch.cholesky_solve(pull, lower)[:, 0]
        total += float(change @ h @ change)
    return total
