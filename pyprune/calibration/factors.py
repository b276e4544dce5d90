"""Kronecker factors of the empirical Fisher information, one matrix each: G (x) A from the inputs
and the outputs' gradients that the backward pass shows, without a weight gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops
from pyprune.calibration.backward import PLAIN, BackwardReport, PassOptions, Visitor, backward_pass
from pyprune.calibration.gradient_stats import KroneckerFactors
from pyprune.calibration.gradients import check_sums, sums_dtype
from pyprune.calibration.sample import Sample
from pyprune.calibration.tokens import TokenSet
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef
from pyprune.progress import CountProgress


@dataclass(eq=False)
class Refinement:
    """One half step of the power iteration towards the Kronecker product nearest to the Fisher
    information in the Frobenius norm (van der Ouderaa et al. 2024, arXiv 2312.17244, appendix):

        G <- sum_t (x_t^T A x_t / |A|) g_t g_t^T   or   A <- sum_t (g_t^T G g_t / |G|) x_t x_t^T

    Sums of outer products with non-negative weights: both stay positive semidefinite.
    """

    factors: KroneckerFactors
    of_inputs: bool

    def __post_init__(self) -> None:
        given = self.factors.g if self.of_inputs else self.factors.a
        self._unit = given / given.norm().clamp_min(torch.finfo(given.dtype).tiny)
        self._sum = torch.zeros_like(self.factors.a if self.of_inputs else self.factors.g)

    def update(self, sample: Sample) -> None:
        x, g, bias = sample.x, sample.g, self.factors.bias
        if self.of_inputs:
            weight = _token_weights(g, self._unit)
            ops.gram(x, weight=weight, out=self._sum, ones_column=bias)
        else:
            rows = torch.cat([x, x.new_ones(len(x), 1)], dim=1) if bias else x
            ops.gram(g, weight=_token_weights(rows, self._unit), out=self._sum)

    def finish(self) -> None:
        if self.of_inputs:
            self.factors.a, self.factors.g = self._sum, self._unit
            self.factors.weighted = True
        else:
            self.factors.g = self._sum


def _token_weights(x: Tensor, unit: Tensor) -> Tensor:
    """`[T]`: x_t^T U x_t, not negative. Rounding could make it so."""
    return ops.kron_quadratic(x.to(unit.dtype), unit).clamp_min_(0)


def collect_factors(
    adapter: Adapter,
    tokens: TokenSet,
    refs: Iterable[LinearRef],
    options: PassOptions = PLAIN,
    *,
    biases: Collection[str] = (),
    refinements: int = 0,
    progress: CountProgress | None = None,
) -> dict[str, KroneckerFactors]:
    """Factors of the matrices `refs`, by name, on `options.device`.

    One pass over the tokens, and two more for each of `refinements` steps to the nearest Kronecker
    product. Matrices that read one tensor share their A in memory, unless it is refined.

    Args:
        options: of every pass; all see the same draws.
        biases: names of the matrices whose bias counts as a last column.
        progress: called with sequences done and in all, over all passes.

    Raises:
        LayerError, UserError: see `backward_pass`; also a sum that overflowed.
    """
    device, dtype = torch.device(options.device), sums_dtype(adapter)
    refs = list(refs)
    passes, done = 1 + 2 * refinements, 0

    def through(visitors: dict[str, Visitor]) -> BackwardReport:
        nonlocal done
        told = None if progress is None else _part(progress, done, passes)
        report = backward_pass(adapter, tokens.batches, visitors, options, told)
        done += 1
        return report

    sums = _Independent(refs, biases, device, dtype)
    report = through({ref.name: sums.visitor(ref.name) for ref in refs})
    factors = sums.result(report)
    for step in range(2 * refinements):
        refined = {name: Refinement(f, of_inputs=step % 2 == 1) for name, f in factors.items()}
        through({name: refinement.update for name, refinement in refined.items()})
        for refinement in refined.values():
            refinement.finish()
    for name, factor in factors.items():
        check_sums(name, factor.finite())
    return factors


class _Independent:
    """The sums of one pass. A belongs to a tensor: the first of its readers that gets a gradient
    adds to it."""

    def __init__(
        self,
        refs: Iterable[LinearRef],
        biases: Collection[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._shapes = {ref.name: ref.weight().shape for ref in refs}
        self._biases, self._device, self._dtype = biases, device, dtype
        self._factors: dict[str, KroneckerFactors] = {}
        self._adding: dict[tuple[str, bool], KroneckerFactors] = {}

    def visitor(self, name: str) -> Visitor:
        def visit(sample: Sample) -> None:
            if name not in self._factors:
                self._factors[name] = made = self._made(name)
                first = self._adding.setdefault((sample.leader, made.bias), made)
                if first is not made:
                    made.borrow_inputs(first)
            self._factors[name].update(sample)

        return visit

    def _made(self, name: str) -> KroneckerFactors:
        rows, columns = self._shapes[name]
        return KroneckerFactors(rows, columns, self._device, self._dtype, bias=name in self._biases)

    def result(self, report: BackwardReport) -> dict[str, KroneckerFactors]:
        """Of every matrix; zeros for an expert that no token reached."""
        for name in self._shapes:
            factors = self._factors.setdefault(name, self._made(name))
            factors.sequences = report.sequences
            factors.targets = report.targets
        return {name: self._factors[name] for name in self._shapes}


def _part(progress: CountProgress, number: int, parts: int) -> CountProgress:
    return lambda done, total: progress(number * total + done, parts * total)
