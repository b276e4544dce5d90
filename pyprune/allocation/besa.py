"""BESA: how much of each row of a block's matrices goes, learned from the block's output.

Xu et al. 2024, arXiv 2402.16880. The weights of a row are ranked once by a method's score. How many
of the lowest go is the mean of a learnable distribution over candidate rates; the gradient of the
output's error reaches it through the mask as if the mask were the probability to stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pyprune.allocation.base import MAX_SPARSITY
from pyprune.calibration.loss_scale import LossScale, all_finite
from pyprune.errors import LayerError
from pyprune.methods.options import Count, NotNegative, Positive, at_least
from pyprune.progress import CountProgress

# A mean of rates that falls short of a whole weight by less than this share of it reaches it.
ROUNDING = 1e-6
_HALVINGS = 200
# The output of the block on batch k, real tokens only, `[t, d]`, with these weights by name.
Run = Callable[[int, Mapping[str, Tensor] | None], Tensor]


@dataclass(frozen=True)
class BesaOptions:
    """granularity: each `row` has a sparsity of its own, or all rows of a matrix (`layer`) have
    one. candidates: pruning rates from 0 to 1 in equal steps. steps: of the optimiser (Adam) in
    each block, a calibration batch each, in turn. learning_rate: of Adam. penalty: lambda, weight
    of the squared relative deviation from the target sparsity while it learns."""

    granularity: Literal["row", "layer"] = "row"
    candidates: Annotated[int, at_least(2)] = 101
    steps: Count = 32
    learning_rate: Positive = 0.1
    penalty: NotNegative = 5.0


@dataclass(frozen=True, eq=False)
class Ranked:
    """A matrix of the block. weight: `[R, C]`, live. ranks: `[R, C]`, place of each weight in its
    row by ascending score (of equal scores the lower column first). lowest: `[R]`, how many of each
    row must go in any case; they rank first."""

    name: str
    weight: Tensor
    ranks: Tensor
    lowest: Tensor

    @classmethod
    def of(cls, name: str, weight: Tensor, scores: Tensor, lowest: Tensor) -> Ranked:
        order = scores.argsort(dim=1, stable=True)
        columns = scores.shape[1]
        # Two bytes a weight where they will do: they stay for as long as the block is learned.
        kind = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
        places = torch.arange(columns, dtype=kind, device=scores.device).expand_as(order)
        ranks = torch.zeros(scores.shape, dtype=kind, device=scores.device)
        return cls(name, weight, ranks.scatter_(1, order, places), lowest)

    def mask(self, counts: Tensor) -> Tensor:
        """`[R, C]`, True = kept, with the `counts` `[R]` lowest of each row removed."""
        return self.ranks >= counts[:, None]


@dataclass(frozen=True, eq=False)
class Learned:
    """The outcome for a block. masks: by matrix, True = kept. uniform, learned: squared error of
    the block's output over all batches, pruned uniformly and as learned; the masks are of the
    smaller one. mean: sparsity that the learning ended with, before it was made exact."""

    masks: dict[str, Tensor]
    uniform: float
    learned: float
    mean: float

    @property
    def ratio(self) -> float:
        """Error of the masks over that of uniform pruning, at most 1."""
        return min(1.0, self.learned / self.uniform) if self.uniform else 1.0


def initial_logits(candidates: int, target: float) -> Tensor:
    """`[candidates]` fp64: logits of the distribution over rates from 0 to 1 that has mean `target`
    and the largest entropy, `tilt * rate`. At one half all are zero, which is where the released
    code starts whatever the target."""
    rates = torch.linspace(0, 1, candidates, dtype=torch.float64)
    low, high = -1e4, 1e4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mean = float((middle * rates).softmax(0) @ rates)
        low, high = (middle, high) if mean < target else (low, middle)
    return (low + high) / 2 * rates


class Masking(torch.autograd.Function):
    """`W * mask` as a function of the distributions over rates.

    beta: `[G, D]` with one row for each row of W, or one for all; matrix: W with its ranks; rates:
    `[D]` ascending. Forward: the `floor(C sum_d beta_d rate_d)` lowest of each row are zero.
    Backward: of the expected mask, where a weight of rank r goes with probability
    `sum_d beta_d [r < floor(C rate_d)]`, so that `dl/dbeta_d` is minus the sum of `w dl/d(Ww)`
    over the ranks below `floor(C rate_d)` (section 3): a running sum in sorted order.
    """

    @staticmethod
    def forward(ctx: Any, beta: Tensor, matrix: Ranked, rates: Tensor) -> Tensor:
        ctx.matrix, ctx.rates, ctx.groups = matrix, rates, len(beta)
        counts = whole(beta.double() @ rates, matrix.weight.shape[1])
        return torch.where(matrix.mask(counts), matrix.weight, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), matrix = gradients, ctx.matrix
        wide = torch.promote_types(gradient.dtype, torch.float32)
        product = gradient.to(wide) * matrix.weight.to(wide)
        rows, columns = product.shape
        running = product.new_zeros(rows, columns + 1)
        running[:, 1:].scatter_(1, matrix.ranks.long(), product)
        running = running.cumsum(1)
        below = running[:, whole(ctx.rates, columns)]
        if ctx.groups == 1:
            below = below.sum(0, keepdim=True)
        return -below, None, None


def whole(rates: Tensor, columns: int) -> Tensor:
    """`floor(rate * columns)`, int64."""
    return (rates * columns + ROUNDING).floor().long()


def exact_counts(
    wanted: Sequence[Tensor], columns: Sequence[int], lowest: Sequence[Tensor], count: int
) -> list[Tensor]:
    """Whole numbers of weights to remove from every row of every matrix, `count` in all.

    wanted: sparsity of each row, `[R]` a matrix; columns: of each matrix; lowest: at least as many,
    `[R]`. All sparsities move by one constant within `lowest` and 99 % of the row (or what `count`
    needs) until the sum is `count`; then they are rounded down, and the rows with the largest
    remainders lose one more (of equal ones the first).
    """
    widths = torch.cat([torch.full_like(w, c) for w, c in zip(wanted, columns, strict=True)])
    least = torch.cat(list(lowest)).to(widths)
    share = count / float(widths.sum())
    most = torch.maximum((MAX_SPARSITY * widths).floor(), (share * widths).ceil())
    most = torch.maximum(most, least)
    if count < float(least.sum()):
        return [rows.long() for rows in lowest]
    raw = torch.cat(list(wanted))
    low, high = -2.0, 2.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        moved = torch.minimum(torch.maximum((raw + middle) * widths, least), most)
        low, high = (middle, high) if float(moved.sum()) < count else (low, middle)
    moved = torch.minimum(torch.maximum((raw + low) * widths, least), most)
    counts = moved.floor()
    missing = count - int(counts.sum())
    room = torch.where(counts < most, moved - counts, float("-inf"))
    counts[room.argsort(descending=True, stable=True)[:missing]] += 1
    return list(torch.split(counts.long(), [len(rows) for rows in wanted]))


def learn_block(
    name: str,
    matrices: Sequence[Ranked],
    run: Run,
    batches: Sequence[int],
    count: int,
    options: BesaOptions,
    tell: CountProgress | None = None,
) -> Learned:
    """Which `count` weights of a block's `matrices` go.

    Minimises over the distributions `sum ||F(W, X) - F(M * W, X)||^2` for the block F, divided by
    what uniform pruning makes of it, plus `penalty ((s - target) / target)^2` with the mean
    sparsity s (the paper's loss, with a scale that does not depend on the model), by Adam from the
    uniform start. At the end the sparsities are made exact (`exact_counts`). If the masks do worse
    than uniform ones on the calibration batches, those are taken.

    Args:
        name: of the block. run: see `Run`; gradients must flow to the weights.
        batches: tokens of each batch, on which the block runs in this order.
        count: exact, unless the rows' `lowest` are more.

    Raises:
        LayerError: an error of the block or its gradient is NaN or infinite.
    """
    sizes = [m.weight.numel() for m in matrices]
    target = count / sum(sizes)
    with torch.no_grad():
        dense = [run(k, None) for k in range(len(batches))]
    problem = _Problem(name, matrices, run, dense)
    uniform = problem.exact(count, [target] * len(matrices))
    before = problem.errors(uniform)
    if not 0 < target < 1 or not sum(before):
        return Learned(uniform, sum(before), sum(before), target)
    learner = _Learner(matrices, target, options)
    scale = sum(before) / sum(batches)  # per token
    for step in range(options.steps):
        k = step % len(batches)
        if batches[k]:
            with torch.enable_grad():
                weights, soft = learner.weights()
                loss = problem.error(k, weights) / (scale * batches[k])
                loss = loss + options.penalty * ((soft - target) / target) ** 2
            learner.step(name, step, loss)
            del weights, soft, loss  # with all activations, before the next forward
        if tell is not None:
            tell(step + 1, options.steps)
    wanted, mean = learner.sparsities()
    masks = problem.exact(count, wanted)
    after = problem.errors(masks)
    better = sum(after) < sum(before)
    return Learned(masks if better else uniform, sum(before), sum(after), mean)


class _Problem:
    """The block's output with masks, against the dense one."""

    def __init__(
        self, name: str, matrices: Sequence[Ranked], run: Run, dense: list[Tensor]
    ) -> None:
        self._name, self._matrices, self._run, self._dense = name, matrices, run, dense

    def exact(self, count: int, wanted: Sequence[Tensor | float]) -> dict[str, Tensor]:
        """Masks that remove `count` weights, near the `wanted` sparsities: one, or `[R]`, each."""
        rows = [
            torch.zeros(len(m.weight), dtype=torch.float64, device=m.weight.device) + w
            for m, w in zip(self._matrices, wanted, strict=True)
        ]
        columns = [m.weight.shape[1] for m in self._matrices]
        counts = exact_counts(rows, columns, [m.lowest for m in self._matrices], count)
        return {m.name: m.mask(c) for m, c in zip(self._matrices, counts, strict=True)}

    def error(self, k: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Squared error of the output on batch `k`, summed over tokens and features."""
        output, dense = self._run(k, weights), self._dense[k]
        wide = torch.promote_types(output.dtype, torch.float32)
        return (output.to(wide) - dense.to(wide)).square().sum()

    @torch.no_grad()
    def errors(self, masks: Mapping[str, Tensor]) -> list[float]:
        """Of every batch."""
        weights = {m.name: torch.where(masks[m.name], m.weight, 0) for m in self._matrices}
        found = [float(self.error(k, weights)) for k in range(len(self._dense))]
        for k, error in enumerate(found):
            if not math.isfinite(error):
                raise LayerError(
                    self._name, f"expected a finite error of its output, got {error} in batch {k}"
                )
        return found


class _Learner:
    """The distributions of a block's matrices, and the optimiser that moves them."""

    def __init__(self, matrices: Sequence[Ranked], target: float, options: BesaOptions) -> None:
        self._matrices = matrices
        device = matrices[0].weight.device
        start = initial_logits(options.candidates, target).to(device)
        self._rates = torch.linspace(0, 1, options.candidates, dtype=torch.float64, device=device)
        self._logits = []
        for m in matrices:
            groups = len(m.weight) if options.granularity == "row" else 1
            wide = torch.promote_types(m.weight.dtype, torch.float32)
            self._logits.append(start.to(wide).repeat(groups, 1).requires_grad_())
        self._adam = torch.optim.Adam(self._logits, lr=options.learning_rate)
        self._scale = LossScale(m.weight for m in matrices)
        self._total = sum(m.weight.numel() for m in matrices)

    def weights(self) -> tuple[dict[str, Tensor], Tensor]:
        """The masked matrices by name, and the mean sparsity, both differentiable."""
        betas = [logits.softmax(1) for logits in self._logits]
        masked = {
            m.name: Masking.apply(beta, m, self._rates)  # type: ignore[no-untyped-call]
            for m, beta in zip(self._matrices, betas, strict=True)
        }
        return masked, self._mean(betas)

    def _mean(self, betas: Sequence[Tensor]) -> Tensor:
        parts = [
            (beta @ self._rates.to(beta.dtype)).mean() * m.weight.numel()
            for m, beta in zip(self._matrices, betas, strict=True)
        ]
        return torch.stack(parts).sum() / self._total

    def step(self, name: str, number: int, loss: Tensor) -> None:
        """One step down; LayerError if it leads nowhere."""
        if not bool(loss.isfinite()):
            raise LayerError(
                name,
                f"expected a finite loss, got {float(loss.detach())} in step {number} of learning",
            )
        gradients = self._scale.gradients(loss, self._logits)
        if not all_finite(gradients):
            raise LayerError(
                name, f"expected finite gradients, got NaN or infinity in step {number} of learning"
            )
        for logits, gradient in zip(self._logits, gradients, strict=True):
            logits.grad = gradient
        self._adam.step()

    @torch.no_grad()
    def sparsities(self) -> tuple[list[Tensor], float]:
        """Of every row of every matrix, `[R]` or `[1]` fp64, and their mean."""
        betas = [logits.softmax(1) for logits in self._logits]
        return [beta.double() @ self._rates for beta in betas], float(self._mean(betas))
