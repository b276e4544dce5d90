"""Generic layer pruning: similarity of layers, segments of similar ones, choice within a segment.

Lu et al., arXiv 2406.07929 (signal models), and SGLP, arXiv 2410.14720 (language models). The
partition is the true optimum: the published back-tracking does not follow its own minima.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyprune.depth.addons import AddOns
from pyprune.depth.criteria import importance_by
from pyprune.depth.hidden import token_states
from pyprune.depth.layers import LayerChoice, LayerTask, layer_method
from pyprune.errors import UserError

GAIN = 0.05  # one more segment has to lower the loss by this share


@dataclass(frozen=True)
class SegmentOptions(AddOns):
    """segments: how many; none: as many as lower the loss by more than 5 % each. most: of them,
    with none. tokens: that the CKA looks at. criterion: within a segment: ppl, influence or taylor.
    And the add-ons."""

    segments: int | None = None
    most: int = 7
    tokens: int = 256
    criterion: Literal["ppl", "influence", "taylor"] = "ppl"


@layer_method(
    "segments",
    title="Generic layer pruning: CKA, Fisher partition, choice per segment",
    paper="arXiv 2406.07929",
    options=SegmentOptions,
)
def segments(task: LayerTask) -> LayerChoice:
    """Generic layer pruning: CKA between the layers' outputs, exact Fisher partition of its column
    sums, and the least important layers of each segment in turn."""
    options: SegmentOptions = task.options
    states = token_states(task.graph.adapter, task.batches, options.tokens)[1:]
    values = linear_cka(states).sum(0)
    if options.segments is None:
        most = min(max(1, options.most), len(values))
        count = group_count(fisher_partition(values, most)[1])
    else:
        count = options.segments
    starts, _ = fisher_partition(values, count)
    importance = importance_by(options.criterion, task.graph, task.batches)
    removed = task.first_enough(segment_order(importance, starts))
    found = {"kind": "segments", "starts": starts}
    return LayerChoice(removed, options.criterion, tuple(importance.tolist()), (found,))


def linear_cka(states: Tensor) -> Tensor:
    """Unbiased linear CKA between all pairs of representations; float64 [L, L], diagonal 1.

    states: [L, n, d], n >= 4 tokens each. HSIC as in Song et al. 2012, equation 5. Raises
    UserError where a representation is constant over the tokens.
    """
    n = states.shape[1]
    if n < 4:
        raise UserError(f"CKA: expected at least 4 tokens, got {n}")
    x = states.double()
    x = x - x.mean(1, keepdim=True)  # changes nothing but the rounding
    grams = x @ x.mT
    grams.diagonal(dim1=1, dim2=2).zero_()
    sums = grams.sum((1, 2))
    rows = grams.sum(2)
    cross = grams.flatten(1) @ grams.flatten(1).T
    hsic = cross + sums[:, None] * sums[None] / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
    own = hsic.diagonal()
    if not bool((own > 0).all()):
        raise UserError("CKA: the hidden states of a layer do not depend on the token")
    result: Tensor = hsic / (own[:, None] * own[None]).sqrt()
    return result.fill_diagonal_(1.0)


def fisher_partition(values: Tensor, groups: int) -> tuple[list[int], list[float]]:
    """Cuts a sequence into consecutive groups with the least sum of squared deviations from the
    groups' means (Fisher 1958), exactly, in O(groups L^2).

    Returns the starts of the groups (the first is 0) and the least losses for 1..groups groups.
    Ties go to the earlier cut. Raises UserError unless 1 <= groups <= len(values).
    """
    length = len(values)
    if not 1 <= groups <= length:
        raise UserError(f"groups: expected 1 to {length}, got {groups}")
    v = values.double() - values.double().mean()
    zero = torch.zeros(1, dtype=torch.float64)
    first, second = torch.cat([zero, v.cumsum(0)]), torch.cat([zero, (v * v).cumsum(0)])

    def spread(a: int, b: int) -> float:
        total = float(first[b] - first[a])
        return max(0.0, float(second[b] - second[a]) - total * total / (b - a))

    best = [[0.0] * (length + 1) for _ in range(groups + 1)]
    cut = [[0] * (length + 1) for _ in range(groups + 1)]
    for n in range(1, length + 1):
        best[1][n] = spread(0, n)
    for k in range(2, groups + 1):
        for n in range(k, length + 1):
            best[k][n], cut[k][n] = min((best[k - 1][j] + spread(j, n), j) for j in range(k - 1, n))
    starts, end = [], length
    for k in range(groups, 0, -1):
        end = cut[k][end]
        starts.append(end)
    return starts[::-1], [best[k][length] for k in range(1, groups + 1)]


def group_count(losses: list[float]) -> int:
    """The largest number of groups whose last one still lowers the loss by more than 5 %."""
    count = 1
    for k in range(2, len(losses) + 1):
        if losses[k - 2] > 0 and (losses[k - 2] - losses[k - 1]) / losses[k - 2] > GAIN:
            count = k
    return count


def segment_order(importance: Tensor, starts: list[int]) -> list[int]:
    """Layers in the order of removal: each time one of the segment that has kept the largest share
    of its layers, the least important one in it; a segment's last layer goes only after all others
    have one left. Of segments that have kept equal shares (at first: all of them) the one whose
    layer matters least; ties by the lower index. A permutation of 0..L-1."""
    layers = len(importance)
    ends = [*starts[1:], layers]
    sizes = [b - a for a, b in zip(starts, ends, strict=True)]
    left = [
        sorted(range(a, b), key=lambda i: (-float(importance[i]), -i))
        for a, b in zip(starts, ends, strict=True)
    ]
    order: list[int] = []
    while len(order) < layers:
        group = max(
            (g for g in range(len(left)) if left[g]),
            key=lambda g: (
                len(left[g]) > 1,
                len(left[g]) / sizes[g],
                -float(importance[left[g][-1]]),
                -g,
            ),
        )
        order.append(left[group].pop())
    return order
