"""Optimal brain surgeon on the language-model loss: the full inverse Fisher matrix of a layer.

Across rows too: R C by R C, never stored. K gradient samples make it a diagonal plus K outer
products, whose inverse on any set S of weights is a diagonal and a K x K matrix (Woodbury):

    F_SS^-1 = D^-1 - D^-1 s^T k^-1 s D^-1,    k = I + s D^-1 s^T    (s and D on S)

so that scores and the joint update cost K^2 multiply-adds a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution, given
from pyprune.methods.fisher import (
    LowRankFisher,
    SampleOptions,
    live_weight,
    sampled_gradients,
    with_dead,
)
from pyprune.methods.options import Count
from pyprune.methods.selection import select_mask
from pyprune.patterns import NM, Pattern, Unstructured, scope_of

# Weights whose leverages are computed at a time: few enough for the caches of a core.
AT_ONCE = 8192


@dataclass(frozen=True)
class ObsOptions(SampleOptions):
    """samples, shrinkage: of the Fisher matrix, see `SampleOptions`. rounds: how often scores are
    taken anew on the updated weights; N:M takes one weight of each group at a time instead."""

    rounds: Count = 16


class Survivors:
    """The weights of a layer under `F = diag(d) + s^T s` while some of them are taken away.

    x: `[R, C]`, the best weights so far; kept: bool `[R, C]`.
    """

    def __init__(self, w: Tensor, fisher: LowRankFisher) -> None:
        self.x = w.clone()
        self.kept = torch.ones_like(w, dtype=torch.bool)
        self._root: Tensor = fisher.d.sqrt()
        self._u = (fisher.s / self._root).flatten(1)  # [K, RC]
        self._k = self._inner(self._u)

    def _inner(self, u: Tensor) -> Tensor:
        k: Tensor = u @ u.T
        k.diagonal().add_(1)
        return k

    def inverse_diagonal(self) -> Tensor:
        """`[F_SS^-1]_jj` of the weights still there, `[R, C]`; of no meaning elsewhere."""
        lower, eye = torch.linalg.cholesky(self._k), torch.eye(len(self._k)).to(self._k)
        # No eigenvalue of k is below one: its root can be inverted without loss.
        root = torch.linalg.solve_triangular(lower, eye, upper=False)
        parts = torch.split(self._u, AT_ONCE, dim=1)
        leverage = torch.cat([(root @ part).square_().sum(0) for part in parts])
        # 1 - leverage is positive; what rounding leaves of it is not to be less than it can tell.
        free = (1 - leverage).clamp_min(torch.finfo(leverage.dtype).eps)
        diagonal: Tensor = free.view_as(self.x) / self._root.square()
        return diagonal

    def scores(self) -> Tensor:
        """`[R, C]`: the loss of removing one weight alone (Hassibi & Stork 1992, eq. 5)."""
        return self.x.square() / (2 * self.inverse_diagonal())

    def keep(self, mask: Tensor) -> None:
        """Removes what `mask` does not keep, all at once; the others take their best values."""
        gone = self.kept & ~mask
        if not bool(gone.any()):
            return
        flat = gone.flatten()
        taken = self._u[:, flat]
        pull = taken @ (self._root.flatten()[flat] * self.x.flatten()[flat])
        self._u[:, flat] = 0
        self._k = self._inner(self._u)
        change = torch.linalg.solve(self._k, pull) @ self._u
        self.kept &= mask
        self.x = torch.where(self.kept, self.x + change.view_as(self.x) / self._root, 0)


def column_scale(inputs: LayerInputs | None, options: MethodOptions) -> Tensor:
    """`[R, C]`: 1 / sqrt(diag(F^-1)) of the dense layer; 0 for inputs that were always zero."""
    inputs = given("obs", inputs)
    fisher = LowRankFisher.of("obs", inputs, options)
    diagonal = Survivors(torch.zeros_like(fisher.d), fisher).inverse_diagonal()
    return torch.where(inputs.dead, 0.0, diagonal.rsqrt())


def obs(
    w: Tensor,
    inputs: LayerInputs | None,
    pattern: Pattern,
    options: MethodOptions,
    preserve: Tensor | None,
    mask: Tensor | None,
) -> Solution:
    """The weights that cost the loss least go, some in each round, and all others of the layer take
    the values that are best without them (Hassibi & Stork 1992; weights of one round jointly).
    See `Solver`."""
    inputs, own = given("obs", inputs), options.own_as(ObsOptions)
    fisher = LowRankFisher.of("obs", inputs, options)
    survivors = Survivors(live_weight(w, inputs), fisher)
    if mask is not None:
        survivors.keep(mask)
    else:
        if preserve is not None:
            survivors.keep(preserve)
        scope = scope_of(pattern, METHOD.default_scope)
        for step in _rounds(pattern, own.rounds):
            scores = survivors.scores().to(w.dtype)
            survivors.keep(select_mask(scores, step, scope=scope, preserve=survivors.kept))
    weight = with_dead(w, survivors.x, survivors.kept, inputs)
    return Solution(weight=weight, mask=survivors.kept, damping=fisher.damping)


def _rounds(pattern: Pattern, rounds: int) -> Iterator[Pattern]:
    """The pattern by and by."""
    if isinstance(pattern, NM):
        yield from (NM(n, pattern.m) for n in range(pattern.m - 1, pattern.n - 1, -1))
        return
    yield from (Unstructured(pattern.sparsity * i / rounds) for i in range(1, rounds))
    yield pattern


METHOD = Method(
    name="obs",
    title="OBS by the full inverse Fisher matrix of the layer",
    paper="Hassibi & Stork 1992",
    statistic="norms",
    scopes=("layer", "row", "global"),
    updates_weights=True,
    solve=obs,
    column_scale=column_scale,
    gradient=sampled_gradients,
    options_type=ObsOptions,
)
