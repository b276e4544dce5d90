"""Sums over the gradients of whole matrices: one number each, nothing of their size is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyprune import ops
from pyprune.calibration.backward import PLAIN, PassOptions, backward_pass
from pyprune.calibration.gradients import check_sums, sums_dtype
from pyprune.calibration.sample import Sample
from pyprune.calibration.tokens import Batch
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef


def gradient_sums(
    adapter: Adapter,
    batches: Sequence[Batch],
    options: PassOptions = PLAIN,
    *,
    power: int = 1,
    weighted: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """For every prunable matrix the mean over sequences n of `sum_ij |m_ij g_n[i, j]| ** power`,
    with g_n the gradient of the sequence's mean loss and m the weight (`weighted`) or one.

    One backward pass over the whole model; see `backward_pass` for `options`, `progress` and what
    it raises. A matrix that no token reached has 0.
    """
    refs = [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
    dtype = sums_dtype(adapter)
    # One gradient at a time is alive; matrices of one shape share its memory.
    scratch: dict[tuple[int, ...], Tensor] = {}
    sums = {ref.name: _Sum(ref, power, weighted, dtype, scratch) for ref in refs}
    visitors: Mapping[str, Callable[[Sample], None]] = {n: s.update for n, s in sums.items()}
    report = backward_pass(adapter, batches, visitors, options, progress)
    for name, total in sums.items():
        check_sums(name, bool(total.value.isfinite()))
    return {name: float(total.value) / report.sequences for name, total in sums.items()}


class _Sum:
    def __init__(
        self,
        ref: LinearRef,
        power: int,
        weighted: bool,
        dtype: torch.dtype,
        scratch: dict[tuple[int, ...], Tensor],
    ) -> None:
        self._ref, self._power, self._weighted = ref, power, weighted
        self._dtype, self._scratch = dtype, scratch
        self.value = torch.zeros((), dtype=torch.float64)

    def update(self, sample: Sample) -> None:
        w = self._ref.weight()
        shape = tuple(w.shape)
        if shape not in self._scratch:
            self._scratch[shape] = torch.zeros(shape, dtype=self._dtype, device=w.device)
        magnitude = self._scratch[shape].zero_()
        scale = 1 / sample.targets
        ops.fisher_accumulate(magnitude, sample.g, sample.x, power=self._power, scale=scale)
        if self._weighted:
            magnitude *= w.to(magnitude.dtype).abs().pow(self._power)
        self.value = self.value.to(w.device) + magnitude.sum(dtype=torch.float64)
