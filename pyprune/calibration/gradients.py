"""One backward pass over the dense model for the statistics that a gradient method asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pyprune.calibration.backward import backward_pass, sequence_lengths
from pyprune.calibration.gradient_stats import GradientFactory, GradientStatistic
from pyprune.calibration.tokens import Batch, TokenSet
from pyprune.errors import LayerError
from pyprune.models.adapter import Adapter


def collect_gradients(
    adapter: Adapter,
    tokens: TokenSet,
    factory: GradientFactory,
    *,
    checkpointing: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, GradientStatistic]:
    """Statistics of every prunable matrix, by name, on the CPU.

    Sequences go through the model one at a time, whatever the batch size: the sums are the same,
    and the activations of one sequence are all that is held beside the model and the statistics
    (4 bytes a weight for `MagnitudeStatistic`), which stay on `device` until the pass is over.

    Raises:
        LayerError, UserError: see `backward_pass`; also a sum that overflowed.
    """
    for i, batch in enumerate(tokens.batches):
        sequence_lengths(i, batch)
    device = torch.device(device)
    single = next(adapter.model.parameters()).dtype != torch.float64
    dtype = torch.float32 if single else torch.float64
    statistics = {}
    for i in range(len(adapter.blocks)):
        for ref in adapter.linears(i):
            rows, columns = ref.weight().shape
            statistics[ref.name] = factory(rows, columns, device, dtype)
    visitors = {name: statistic.update for name, statistic in statistics.items()}
    report = backward_pass(
        adapter,
        list(one_by_one(tokens)),
        visitors,
        checkpointing=checkpointing,
        device=device,
        progress=progress,
    )
    for name, statistic in statistics.items():
        if not statistic.finite():
            raise LayerError(name, "expected finite sums of gradients, got NaN or infinity")
        statistic.sequences = report.sequences
        statistic.targets = report.tokens - report.sequences
        statistic.to("cpu")
    return statistics


def one_by_one(tokens: TokenSet) -> Iterator[Batch]:
    """Its sequences as batches of one."""
    for batch in tokens.batches:
        for n in range(len(batch.input_ids)):
            mask = batch.attention_mask
            yield Batch(batch.input_ids[n : n + 1], None if mask is None else mask[n : n + 1])
