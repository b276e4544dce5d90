"""What every pruning method is made of: its options, what it is told of a layer's inputs, what it
answers, and the row it has in the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from pyprune import ops
from pyprune.calibration.gradient_stats import GradientFactory, GradientStatistic
from pyprune.errors import UserError
from pyprune.ops.obs_factor import ObsFactor
from pyprune.patterns import NM, Pattern

StatisticKind = Literal["norms", "gram"]
Update = Literal["none", "sequential", "iterative"]
UPDATES: tuple[str, ...] = get_args(Update)
Own = TypeVar("Own")
Gradient = TypeVar("Gradient")


# Fewer tokens per input make least squares follow the calibration text more than the layer: on
# SmolLM2-135M reconstruction raised one text's perplexity by 3 % and lowered the other's as much at
# 1.3 to 3.6 tokens per input, and lowered both at 5 to 14 (by 5 %) and at 21 to 57 (by 10 and 6 %).
RECONSTRUCT_TOKENS = 4.0


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
    reconstruct_tokens: in layers that saw at least this many tokens per input.
    own: an instance of the method's `options_type`; None: the defaults.
    """

    damping: float = 0.01
    max_damping: float = 1.0
    block_size: int = 128
    update: Update = "none"
    score_mass: bool = False
    reference_count: bool = False
    reconstruct: bool = False
    reconstruct_tokens: float = 0.0
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

    def own_as(self, kind: type[Own]) -> Own:
        """`own`, or the defaults of `kind` if it is None; TypeError if it is another method's."""
        if self.own is None:
            return kind()
        if not isinstance(self.own, kind):
            raise TypeError(f"own: expected {kind.__name__}, got {type(self.own).__name__}")
        return self.own


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

    @property
    def factored(self) -> bool:
        return self._factor is not None

    def keep_factor(self, factor: ObsFactor) -> None:
        """Takes what `factor` would have made."""
        self._factor = factor

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


def given(name: str, inputs: LayerInputs | None) -> LayerInputs:
    """`inputs`; ValueError, with the method's name, if there are none."""
    if inputs is None:
        raise ValueError(f"{name}: expected calibration inputs, got none")
    return inputs


def given_gradient(name: str, inputs: LayerInputs | None, kind: type[Gradient]) -> Gradient:
    """The gradient statistic that came with `inputs`; ValueError if it is not of this kind."""
    found = given(name, inputs).gradient
    if not isinstance(found, kind):
        got = "none" if found is None else type(found).__name__
        raise ValueError(f"{name}: expected {kind.__name__} of the gradients, got {got}")
    return found


def factors_of(inputs: Sequence[LayerInputs], options: MethodOptions) -> ObsFactor:
    """The factors of several layers' inputs as a stack, of one if all are the same inputs. If there
    is none yet they are made in one call."""
    if all(some is inputs[0] for some in inputs):
        return ObsFactor(*(t[None] for t in inputs[0].factor(options)))
    grams = [some.gram for some in inputs if some.gram is not None and not some.factored]
    if len(grams) < len(inputs):
        factors = [some.factor(options) for some in inputs]
        return ObsFactor(*(torch.stack(parts) for parts in zip(*factors, strict=True)))
    made = ops.obs_factor(
        torch.stack(grams), damping=options.damping, max_damping=options.max_damping
    )
    for some, u, dead, damping in zip(inputs, *made, strict=True):
        some.keep_factor(ObsFactor(u, dead, damping))
    return made


@dataclass(frozen=True, eq=False)
class Solution:
    """A pruned matrix.

    weight: `[R, C]`, zero where pruned. mask: `[R, C]` bool, True = kept.
    damping: the one that made the Gram matrix positive definite; None where none was factored.
    loss: 1/2 tr(dW H dW^T) with the damped H = mean over tokens of x x^T; None without a sweep or
        a reconstruction. iterations: of a conjugate gradient update that ends by an estimate;
        gap: how far above the least one `loss` still is by it, relative to `loss`. None elsewhere.
    notes: what the user should know of it.
    """

    weight: Tensor
    mask: Tensor
    damping: float | None = None
    loss: float | None = None
    iterations: int | None = None
    gap: float | None = None
    notes: tuple[str, ...] = ()


# weight [R, C] fp32 or fp64, inputs, pattern, options, preserve [R, C] bool or None (False = must
# stay pruned and counts among the pruned), mask [R, C] bool or None (given: nothing is chosen).
Solver = Callable[
    [Tensor, LayerInputs | None, Pattern, MethodOptions, Tensor | None, Tensor | None], Solution
]

# The same for several matrices: weights [B, R, C], the inputs of each, pattern, options and
# preserve [B, R, C] or None. No mask is given.
StackSolver = Callable[
    [Tensor, Sequence[LayerInputs], Pattern, MethodOptions, Tensor | None], list[Solution]
]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    scopes: comparison groups of unstructured patterns, the default one first.
    column_scale: `[C]` (or `[R, C]`) factors; a weight's score is |w| * column_scale. None means
        ones.
    reconstructs: whether `MethodOptions.reconstruct` is on unless the user says otherwise, in
        layers that saw `RECONSTRUCT_TOKENS` per input. rounds: whether its own options make it
        round the kept weights, which a reconstruction would undo.
    gradient: makes the statistic that one backward pass over the dense model fills for each matrix
        before the walk; None: no gradient is needed.
    options_type: frozen dataclass of the options that only this method has.
    check_own: raises UserError for what these cannot be combined with.
    solve_stack: solves matrices of one shape in one go, each as `solve` would alone.
    most_columns: inputs of the widest layer that it takes; None: any.
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
    rounds: Callable[[MethodOptions], bool] | None = None
    gradient: Callable[[MethodOptions], GradientFactory] | None = None
    options_type: type | None = None
    check_own: Callable[[Pattern, MethodOptions], None] | None = None
    solve_stack: StackSolver | None = None
    most_columns: Callable[[MethodOptions], int] | None = None

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
        if options.reference_count and self.reference_scope is None:
            raise UserError(
                f"reference_count: {self.name} has no use for it: its count is exact in any case"
            )
        if options.reference_count and scope != self.reference_scope:
            raise UserError(
                f"reference_count: for {self.name} expected scope {self.reference_scope}, "
                f"got {scope}"
            )
        explicit = None if isinstance(pattern, NM) else pattern.scope
        if options.update == "iterative" and explicit not in (None, "row"):
            raise UserError(f"update: iterative compares within rows, got scope {explicit!r}")
        if self.check_own is not None:
            self.check_own(pattern, options)

    def _check_score_mass(self, scope: str, options: MethodOptions) -> None:
        if not self.score_mass:
            raise UserError(f"score_mass: a variant of wanda, got method {self.name}")
        if scope != self.default_scope:
            raise UserError(f"score_mass: expected unstructured scope row, got {scope}")
        if options.update == "iterative":
            raise UserError("score_mass: expected update none or sequential, got 'iterative'")
