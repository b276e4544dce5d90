"""Sums over the gradients of whole matrices: one number each, nothing of their size is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune import ops
from pyprune.calibration.backward import PLAIN, PassOptions, Visitor, backward_pass
from pyprune.calibration.gradients import check_sums, sums_dtype
from pyprune.calibration.sample import Sample
from pyprune.calibration.tokens import Batch
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef
from pyprune.progress import CountProgress


def gradient_sums(
    adapter: Adapter,
    batches: Sequence[Batch],
    options: PassOptions = PLAIN,
    *,
    power: int = 1,
    weighted: bool = False,
    progress: CountProgress | None = None,
) -> dict[str, float]:
    """For every prunable matrix the mean over sequences n of `sum_ij |m_ij g_n[i, j]| ** power`,
    with g_n the gradient of the sequence's mean loss and m the weight (`weighted`) or one.

    One backward pass over the whole model; see `backward_pass` for `options`, `progress` and what
    it raises. A matrix that no token reached has 0.
    """
    refs = [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
    dtype = sums_dtype(adapter)
    # One gradient at a time is alive; matrices of one shape share its memory.
    scratch: dict[torch.Size, Tensor] = {}
    sums = {ref.name: torch.zeros((), dtype=torch.float64) for ref in refs}

    def visitor(ref: LinearRef) -> Visitor:
        def visit(sample: Sample) -> None:
            w = ref.weight()
            if w.shape not in scratch:
                scratch[w.shape] = torch.zeros(w.shape, dtype=dtype, device=w.device)
            magnitude, scale = scratch[w.shape].zero_(), 1 / sample.targets
            ops.fisher_accumulate(magnitude, sample.g, sample.x, power=power, scale=scale)
            if weighted:
                magnitude *= w.to(dtype).abs().pow(power)
            sums[ref.name] = sums[ref.name].to(w.device) + magnitude.sum(dtype=torch.float64)

        return visit

    visitors = {ref.name: visitor(ref) for ref in refs}
    report = backward_pass(adapter, batches, visitors, options, progress)
    for name, total in sums.items():
        check_sums(name, bool(total.isfinite()))
    return {name: float(total) / report.sequences for name, total in sums.items()}
