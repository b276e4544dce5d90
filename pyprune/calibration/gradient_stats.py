"""What is accumulated from the gradients of one matrix: sums over sequences or tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pyprune import ops
from pyprune.calibration.sample import Sample


class GradientStatistic(ABC):
    """Sums over whole sequences of something about the gradients of a matrix `[R, C]`; its tensors
    are attributes.

    sequences: of the whole calibration, those included that no token of reached this matrix; set
    when the pass is over. tokens: that reached it. targets: predicted tokens of the whole
    calibration, likewise.
    """

    def __init__(self) -> None:
        self.sequences = self.targets = self.tokens = 0

    def update(self, sample: Sample) -> None:
        """Adds the sequence of one visit."""
        self.add(sample)
        self.tokens += sample.new_tokens

    @abstractmethod
    def add(self, sample: Sample) -> None:
        """Adds it to the sums."""

    @abstractmethod
    def sums(self) -> Tensor:
        """Those that are zero where all gradients are, and else are not."""

    def finite(self) -> bool:
        """Whether no NaN and no infinity came of it (sums overflow where gradients need not)."""
        # `isfinite` makes several passes, over tensors as large as the model.
        least, most = torch.aminmax(self.sums())
        return bool(least.isfinite() and most.isfinite())

    def dead(self) -> bool:
        """Whether every gradient was zero."""
        return not bool(self.sums().any())

    def to(self, device: torch.device | str) -> None:
        """Moves the tensors."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))


# Rows, columns, device, dtype of the sums (fp32, or fp64 for fp64 models).
GradientFactory = Callable[[int, int, torch.device, torch.dtype], GradientStatistic]


class MagnitudeStatistic(GradientStatistic):
    """`total[i, j] = sum over sequences n of |g_n[i, j]| ** power`, `[R, C]`.

    g_n is the gradient of sequence n: of its mean loss (`per_token`), as GBLM-Pruner takes it, or
    of its summed loss, the log-likelihood that the empirical Fisher information is made of.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        power: int,
        per_token: bool,
    ) -> None:
        super().__init__()
        self.total = torch.zeros(rows, columns, device=device, dtype=dtype)
        self.power, self.per_token = power, per_token

    def add(self, sample: Sample) -> None:
        scale = 1 / sample.targets if self.per_token else 1.0
        ops.fisher_accumulate(self.total, sample.g, sample.x, power=self.power, scale=scale)

    def sums(self) -> Tensor:
        return self.total


class DiagonalFactors(GradientStatistic):
    """Diagonals of the Kronecker factors: `a[j] = sum_t x[t, j]**2` of the inputs, `[C]`, and
    `g[i] = sum_t g[t, i]**2` of the outputs' gradients, `[R]`, over all tokens."""

    def __init__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = torch.zeros(columns, device=device, dtype=dtype)
        self.g = torch.zeros(rows, device=device, dtype=dtype)

    def add(self, sample: Sample) -> None:
        if not sample.draw:
            ops.column_norms(sample.x, out=self.a)
        ops.column_norms(sample.g, out=self.g)

    def sums(self) -> Tensor:
        return self.g

    def finite(self) -> bool:
        return super().finite() and bool(self.a.isfinite().all())


class GradientSamples(GradientStatistic):
    """`samples[k] = sum over sequences n with n mod K = k of g_n`, `[K, R, C]`: the gradients of
    the summed losses themselves, from which any block of the empirical Fisher information
    `sum_k samples[k] samples[k]^T / targets` can be made.

    With no more sequences than K it has one sample each. Sums of the log-likelihood gradients of
    several sequences are samples of the same Fisher matrix, only fewer.
    """

    def __init__(
        self, rows: int, columns: int, device: torch.device, dtype: torch.dtype, *, samples: int
    ) -> None:
        super().__init__()
        self.samples = torch.zeros(samples, rows, columns, device=device, dtype=dtype)
        self._visits = 0

    def add(self, sample: Sample) -> None:
        into = self.samples[self._visits % len(self.samples)]
        into.addmm_(sample.g.T.to(into.dtype), sample.x.to(into.dtype))
        self._visits += 1

    def sums(self) -> Tensor:
        return self.samples

    def per_token(self) -> Tensor:
        """`[K, R, C]`: scaled so that the sum of their outer products is the empirical Fisher
        information per predicted token."""
        return self.samples.div(max(self.targets, 1) ** 0.5)


class KroneckerFactors(GradientStatistic):
    """What one matrix `[R, C]` has of them: `a = sum_t x_t x_t^T` and `g = sum_t g_t g_t^T` over
    tokens, `[C', C']` and `[R, R]`, fp32 (fp64 for fp64 models).

    With a bias C' = C + 1: the bias is a last column of the weight whose input is one. Inputs and
    gradients, and different tokens, are taken as independent (Martens and Grosse 2015, arXiv
    1503.05671) unless `weighted` says otherwise.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        side = columns + int(bias)
        self.bias = bias
        self.a = torch.zeros(side, side, device=device, dtype=dtype)
        self.g = torch.zeros(rows, rows, device=device, dtype=dtype)
        # Whether a `Refinement` made them: a is then a sum over tokens for a g of norm one.
        self.weighted = False
        # Whether a is that of another matrix, which adds to it.
        self.borrowed = False

    def borrow_inputs(self, other: KroneckerFactors) -> None:
        """Takes the a of another matrix that reads the same tensor for its own."""
        self.a, self.borrowed = other.a, True

    def add(self, sample: Sample) -> None:
        if not sample.draw and not self.borrowed:  # inputs of all draws are those of the first
            ops.gram(sample.x, out=self.a, ones_column=self.bias)
        ops.gram(sample.g, out=self.g)

    def normalised(self) -> tuple[Tensor, Tensor]:
        """A and G such that G (x) A estimates the Fisher information per predicted token.

        Of an expert one factor is a mean over its own tokens and the other a sum over them divided
        by all targets: how often it is used then counts once.
        """
        if self.weighted:
            return self.a / max(self.targets, 1), self.g
        return self.a / max(self.tokens, 1), self.g / max(self.targets, 1)

    def sums(self) -> Tensor:
        # |h_ij| <= (h_ii + h_jj) / 2, and what is not finite reaches its diagonal entry.
        return self.g.diagonal()

    def finite(self) -> bool:
        return super().finite() and bool(self.a.diagonal().isfinite().all())

    def silent(self) -> str:
        """What was zero throughout: "input", "gradient", "input or gradient" for both, "" for
        neither. G (x) A is then zero, and the text says nothing about the matrix (but for the
        bias, whose input is one). Of `weighted` factors both are zero where the gradients were."""
        inputs = self.a.diagonal()[: len(self.a) - int(self.bias)]
        zero = [("input", not bool(inputs.any())), ("gradient", self.dead())]
        return " or ".join(name for name, silent in zero if silent)


class EigenDiagonal(GradientStatistic):
    """`total[i, j] = sum_t (Q_G^T g_t)_i^2 (Q_A^T x_t)_j^2`, `[R, C]`: the diagonal of the
    empirical Fisher matrix in the basis `Q_G (x) Q_A` (EK-FAC, George et al. 2018, eq. 9), tokens
    taken as independent.

    left: Q_G `[R, R]`; right: Q_A `[C, C]`; on the device and in the dtype of the sums.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.total = left.new_zeros(len(left), len(right))

    def add(self, sample: Sample) -> None:
        dtype = self.total.dtype
        g = (sample.g.to(dtype) @ self.left).square_()
        x = (sample.x.to(dtype) @ self.right).square_()
        self.total.addmm_(g.T, x)

    def sums(self) -> Tensor:
        return self.total
