"""One global threshold over the rows and columns of all layers (LLM Surgeon, arXiv 2312.17244,
section 3.2): which of them go for a budget of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_structures(
    row_costs: Sequence[Tensor],
    column_costs: Sequence[Tensor],
    sparsity: float,
    cap: float = 1.0,
) -> list[tuple[Tensor, Tensor]]:
    """Cheapest structures first until the next would exceed the budget.

    A row of a layer with c columns gone removes C - c parameters, a column R - r: sums are exact
    for any order. Equal costs go by layer, rows before columns, then by index. NaN costs go last.
    What costs infinity never goes: parts of a layer that are to be kept.

    Args:
        row_costs, column_costs: `[R_l]` and `[C_l]` of each layer; zero for dead ones, which count.
        sparsity: of all parameters together, in [0, 1]; never exceeded.
        cap: most of one layer's rows, and of its columns, that may go; others then take their turn.

    Returns:
        Per layer the ascending indices of its removed rows and of its removed columns.
    """
    for name, value in (("sparsity", sparsity), ("cap", cap)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    if len(row_costs) != len(column_costs):
        raise ValueError(
            f"column_costs: expected {len(row_costs)} layers as row_costs, got {len(column_costs)}"
        )
    sizes = [(len(r), len(c)) for r, c in zip(row_costs, column_costs, strict=True)]
    places = [
        (layer, kind, index)
        for layer, size in enumerate(sizes)
        for kind in (0, 1)
        for index in range(size[kind])
    ]
    pairs = zip(row_costs, column_costs, strict=True)
    given = [t.detach().double().cpu() for pair in pairs for t in pair]
    costs = torch.cat(given) if given else torch.ones(0)
    order = costs.sort(stable=True).indices
    finite = order[costs[order] != float("inf")]
    budget = int(sparsity * sum(r * c for r, c in sizes) + 1e-9)
    gone: list[tuple[list[int], list[int]]] = [([], []) for _ in sizes]
    removed = 0
    for at in finite.tolist():
        layer, kind, index = places[at]
        mine = gone[layer]
        if len(mine[kind]) + 1 > cap * sizes[layer][kind] + 1e-9:
            continue
        add = sizes[layer][1 - kind] - len(mine[1 - kind])
        if removed + add > budget:
            break
        removed += add
        mine[kind].append(index)
    return [
        (torch.tensor(sorted(r), dtype=torch.long), torch.tensor(sorted(c), dtype=torch.long))
        for r, c in gone
    ]
