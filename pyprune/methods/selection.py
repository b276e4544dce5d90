"""Masks from scores |w| * column_scale: every scope, with an existing mask preserved or not."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import ops
from pyprune.patterns import NM, Pattern, Unstructured, pruned_count


def select_mask(
    w: Tensor,
    pattern: Pattern,
    *,
    scale: Tensor | None = None,
    scope: str = "row",
    preserve: Tensor | None = None,
) -> Tensor:
    """The weights of one layer that stay.

    Args:
        w: `[R, C]`, fp32 or fp64.
        pattern: N:M, or unstructured with the comparison group `scope` ("row" or "layer").
        scale: `[C]` or `[R, C]`, non-negative (other scores: as `w`, with scale None); None means
            ones.
        preserve: `[R, C]` bool; False = must stay pruned, and counts among the pruned. A row,
            group or layer with more of them than the pattern removes keeps all of them pruned.

    Returns:
        mask `[R, C]` bool, True = kept. Exact counts; of equal scores the lower index goes first.
    """
    by_column = scale is not None and scale.dim() == 1
    column_scale, addend = (scale, None) if by_column else (None, scale)
    terms = {"column_scale": column_scale, "addend": addend, "preserve": preserve}
    if isinstance(pattern, NM):
        return ops.mask_nm(w, pattern.n, pattern.m, **terms)
    if scope == "row":
        return ops.mask_topk(w, pruned_count(w.shape[1], pattern.sparsity), **terms)
    if scope == "layer":
        lists = {f"{name}s": None if t is None else [t] for name, t in terms.items()}
        return ops.mask_global([w], pruned_count(w.numel(), pattern.sparsity), **lists)[0]
    raise ValueError(f"scope: expected row or layer, or a mask that was selected, got {scope!r}")


def forced_first(w: Tensor, scale: Tensor | None, preserve: Tensor) -> Tensor:
    """Scores in which what must stay pruned is 0 and nothing else is: all others move up by one
    representable number, which keeps their order and their ties (but for the largest finite
    number, which meets infinity)."""
    scores = w.abs() if scale is None else w.abs() * scale
    raised = torch.nextafter(scores, scores.new_tensor(float("inf")))
    return torch.where(preserve, raised, 0)


def reference_threshold_mask(w: Tensor, sparsity: float) -> Tensor:
    """The magnitude baseline of the SparseGPT and Wanda repositories: over the whole matrix prunes
    |w| <= sort(|w|)[int(n * sparsity)], that is one more than asked for and all ties."""
    magnitude = w.abs()
    threshold = magnitude.flatten().kthvalue(int(w.numel() * sparsity) + 1).values
    return magnitude > threshold


def score_mass_mask(
    w: Tensor, sparsity: float, *, scale: Tensor | None = None, preserve: Tensor | None = None
) -> Tensor:
    """Wanda's variant (Sun et al. 2023, appendix): each row loses its smallest scores while their
    running sum stays within a fraction alpha of the row's sum, one alpha for the layer.

    The weight at rank k of its row goes as soon as alpha reaches (sum of the k smallest scores) /
    (sum of the row). So the alpha that the paper bisects for is an order statistic of these
    fractions, and taking it as one gives the exact count, `sparsity` of the layer, where bisection
    stops within 0.1 %. A row whose smallest score is above alpha of its sum loses nothing; a row
    of zeros goes first.
    """
    scores = w.abs() if scale is None else w.abs() * scale
    if preserve is not None:
        scores = torch.where(preserve, scores, 0)
    order = scores.sort(dim=1, stable=True)
    running = order.values.double().cumsum(dim=1)
    tiny = torch.finfo(torch.float64).tiny
    fraction = running / running[:, -1:].clamp_min(tiny)
    mass = torch.empty_like(fraction).scatter_(1, order.indices, fraction)
    return select_mask(mass, Unstructured(sparsity), scope="layer", preserve=preserve)
