"""One backward pass over the dense model for the statistics that a gradient method asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyprune.calibration.backward import PLAIN, PassOptions, backward_pass
from pyprune.calibration.gradient_stats import GradientFactory, GradientStatistic
from pyprune.calibration.tokens import TokenSet
from pyprune.errors import LayerError, UserError
from pyprune.measure import available_bytes
from pyprune.models.adapter import Adapter
from pyprune.progress import CountProgress


def collect_gradients(
    adapter: Adapter,
    tokens: TokenSet,
    factory: GradientFactory,
    options: PassOptions = PLAIN,
    progress: CountProgress | None = None,
) -> dict[str, GradientStatistic]:
    """Statistics of every prunable matrix, by name, on the CPU.

    Beside the model the statistics are held (4 bytes a weight for `MagnitudeStatistic`), on
    `options.device` until the pass is over.

    Raises:
        LayerError, UserError: see `backward_pass`; also a sum that overflowed, and statistics that
            are larger than the memory that is free.
    """
    device, dtype = torch.device(options.device), sums_dtype(adapter)

    def make(place: torch.device) -> dict[str, GradientStatistic]:
        refs = [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
        shapes = {ref.name: ref.weight().shape for ref in refs}
        return {name: factory(r, c, place, dtype) for name, (r, c) in shapes.items()}

    _check_fits(make(torch.device("meta")), device)
    made = make(device)
    fill_statistics(adapter, tokens, made, options, progress)
    return made


def sums_dtype(adapter: Adapter) -> torch.dtype:
    """What statistics of this model are summed in: fp64 if it is, else fp32."""
    double = next(adapter.model.parameters()).dtype == torch.float64
    return torch.float64 if double else torch.float32


def fill_statistics(
    adapter: Adapter,
    tokens: TokenSet,
    statistics: Mapping[str, GradientStatistic],
    options: PassOptions,
    progress: CountProgress | None = None,
) -> None:
    """`collect_gradients` into statistics that are there, on `options.device`, by the name of the
    matrix; afterwards they are on the CPU."""
    visitors = {name: statistic.update for name, statistic in statistics.items()}
    report = backward_pass(adapter, tokens.batches, visitors, options, progress)
    for name, statistic in statistics.items():
        check_sums(name, statistic.finite())
        statistic.sequences = report.sequences
        statistic.targets = report.targets
        statistic.to("cpu")


def check_sums(name: str, finite: bool) -> None:
    """LayerError unless the sums of the matrix called `name` are finite."""
    if not finite:
        raise LayerError(name, "expected finite sums of gradients, got NaN or infinity")


def _check_fits(statistics: Mapping[str, GradientStatistic], device: torch.device) -> None:
    """UserError now rather than a killed process in the middle of the pass."""
    tensors = (t for s in statistics.values() for t in vars(s).values() if isinstance(t, Tensor))
    needed = sum(t.nbytes for t in tensors)
    free = available_bytes(device)
    if needed > free:
        raise UserError(
            f"gradient statistics: need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on "
            f"{device} (--include fewer layers, or fewer samples where the method has them)"
        )
