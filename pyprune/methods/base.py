"""What every pruning method is made of: its options, what it is told of a layer's inputs, what it
answers, and the row it has in the table of methods."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from pyprune import ops
from pyprune.calibration.gradient_stats import GradientFactory, GradientStatistic
from pyprune.errors import UserError
from pyprune.ops.obs_factor import ObsFactor
from pyprune.patterns import NM, Pattern

StatisticKind = Literal["norms", "gram"]
Update = Literal["none", "sequential", "iterative"]
UPDATES: tuple[str, ...] = get_args(Update)


@dataclass(frozen=True)
class MethodOptions:
    """How a method goes about it; the defaults are those of the papers.

    damping: fraction of the mean of diag(H) that is added to it (dampening of SparseGPT and OBC).
    max_damping: where the damping ladder (times ten after each failed Cholesky) ends.
    block_size: columns that are updated together before the rest of the row.
    update: what the kept weights of a score method do: `none` stays; `sequential` runs the OBS
        sweep with the finished mask; `iterative` scores each block of columns (or N:M group)
        again, on the weights as the blocks before it left them.
    score_mass: cut every row at one fraction of its summed score instead of at one count.
    reference_count: prune all scores <= sort(scores)[int(n * sparsity)] as the SparseGPT and Wanda
        repositories do (one more than asked for, and all ties) instead of exactly the count.
    reconstruct: afterwards give the kept weights the values that change the layer's outputs least
        (`ops.obs_reconstruct`), whatever chose them.
    own: an instance of the method's `options_type`; None: the defaults.
    """

    damping: float = 0.01
    max_damping: float = 1.0
    block_size: int = 128
    update: Update = "none"
    score_mass: bool = False
    reference_count: bool = False
    reconstruct: bool = False
    own: object | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= self.max_damping:
            raise UserError(
                f"damping: expected a number in [0, {self.max_damping}], got {self.damping}"
            )
        if self.block_size < 1:
            raise UserError(f"block_size: expected at least 1 column, got {self.block_size}")
        if self.update not in UPDATES:
            raise UserError(f"update: expected one of {', '.join(UPDATES)}, got {self.update!r}")

    def aligned_block_size(self, m: int) -> int:
        """`block_size` rounded down to whole N:M groups (at least one): a group never straddles two
        blocks. Block sizes change rounding, not the result."""
        return max(self.block_size - self.block_size % m, m)


class LayerInputs:
    """What calibration saw of the inputs of the linears that read one tensor.

    Args:
        squared_norms: `[C]`, sum over tokens of the squared input, fp32 or fp64.
        tokens: how many tokens that sum is over (padding excluded).
        gram: `[C, C]`, sum over tokens of x x^T; None when the method did not ask for it.

    gradient: what the backward pass accumulated for one of these linears, see `with_gradient`.

    The factorisation is made on first use and kept, so linears that share inputs share it.
    """

    def __init__(
        self, squared_norms: Tensor, tokens: float = 1.0, gram: Tensor | None = None
    ) -> None:
        self.squared_norms = squared_norms
        self.tokens = tokens
        self.gram = gram
        self.gradient: GradientStatistic | None = None
        self._factor: ObsFactor | None = None
        self._shared: LayerInputs | None = None

    def with_gradient(self, gradient: GradientStatistic) -> LayerInputs:
        """These inputs and the gradient statistic of one linear that reads them. The factorisation
        remains shared."""
        own = copy(self)
        own.gradient, own._shared = gradient, self
        return own

    @property
    def dead(self) -> Tensor:
        """`[C]` bool: inputs that were zero for every token."""
        return self.squared_norms == 0

    def factor(self, options: MethodOptions) -> ObsFactor:
        """Damped inverse factor of the Gram matrix; see `ops.obs_factor` for what it raises."""
        if self.gram is None:
            raise ValueError("factor: this method was given column norms, it needs the Gram matrix")
        if self._shared is not None:
            return self._shared.factor(options)
        if self._factor is None:
            self._factor = ops.obs_factor(
                self.gram, damping=options.damping, max_damping=options.max_damping
            )
        return self._factor


@dataclass(frozen=True, eq=False)
class Solution:
    """A pruned matrix.

    weight: `[R, C]`, zero where pruned. mask: `[R, C]` bool, True = kept.
    damping: the one that made the Gram matrix positive definite; None where none was factored.
    loss: 1/2 tr(dW H dW^T) with the damped H = mean over tokens of x x^T; None without a sweep or
        a reconstruction. notes: what the user should know of it.
    """

    weight: Tensor
    mask: Tensor
    damping: float | None = None
    loss: float | None = None
    notes: tuple[str, ...] = ()


# weight [R, C] fp32 or fp64, inputs, pattern, options, preserve [R, C] bool or None (False = must
# stay pruned and counts among the pruned), mask [R, C] bool or None (given: nothing is chosen).
Solver = Callable[
    [Tensor, LayerInputs | None, Pattern, MethodOptions, Tensor | None, Tensor | None], Solution
]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    scopes: comparison groups of unstructured patterns, the default one first.
    column_scale: `[C]` (or `[R, C]`) factors; a weight's score is |w| * column_scale. None means
        ones.
    reconstructs: whether `MethodOptions.reconstruct` is on unless the user says otherwise.
    gradient: makes the statistic that one backward pass over the dense model fills for each matrix
        before the walk; None: no gradient is needed.
    options_type: frozen dataclass of the options that only this method has.
    most_columns: inputs of the widest layer that it takes; None: any.
    also: raises UserError for a pattern that does not go with these.
    """

    name: str
    title: str
    paper: str
    statistic: StatisticKind | None
    scopes: tuple[str, ...]
    updates_weights: bool
    solve: Solver
    column_scale: Callable[[LayerInputs | None, MethodOptions], Tensor | None]
    updates: tuple[str, ...] = ("none",)
    score_mass: bool = False
    reference_scope: str | None = None
    nm: bool = True
    reconstructs: bool = False
    gradient: Callable[[MethodOptions], GradientFactory] | None = None
    options_type: type | None = None
    most_columns: Callable[[MethodOptions], int] | None = None
    also: Callable[[Pattern, MethodOptions], None] | None = None

    @property
    def default_scope(self) -> str:
        return self.scopes[0]

    def needs(self, options: MethodOptions) -> StatisticKind | None:
        """The statistic that calibration has to collect."""
        gram = options.update != "none" or options.reconstruct
        return "gram" if gram else self.statistic

    def check(self, pattern: Pattern, options: MethodOptions) -> None:
        """Raises UserError for what this method cannot combine."""
        if options.update not in self.updates:
            reason = " (it updates the weights itself)" if self.updates_weights else ""
            raise UserError(
                f"update: {self.name} takes {', '.join(self.updates)}{reason}, "
                f"got {options.update!r}"
            )
        scope = "N:M" if isinstance(pattern, NM) else pattern.scope or self.default_scope
        if isinstance(pattern, NM):
            if not self.nm:
                raise UserError(f"pattern: {self.name} has no N:M, got {pattern}")
        elif scope not in self.scopes:
            raise UserError(f"scope: {self.name} takes {', '.join(self.scopes)}, got {scope!r}")
        if options.score_mass:
            self._check_score_mass(scope, options)
        if options.reference_count and scope != self.reference_scope:
            expected = self.reference_scope or "no scope: its count is exact there too"
            raise UserError(
                f"reference_count: for {self.name} expected scope {expected}, got {scope}"
            )
        explicit = None if isinstance(pattern, NM) else pattern.scope
        if options.update == "iterative" and explicit not in (None, "row"):
            raise UserError(f"update: iterative compares within rows, got scope {explicit!r}")
        if self.also is not None:
            self.also(pattern, options)

    def _check_score_mass(self, scope: str, options: MethodOptions) -> None:
        if not self.score_mass:
            raise UserError(f"score_mass: a variant of wanda, got method {self.name}")
        if scope != self.default_scope:
            raise UserError(f"score_mass: expected unstructured scope row, got {scope}")
        if options.update == "iterative":
            raise UserError("score_mass: expected update none or sequential, got 'iterative'")
