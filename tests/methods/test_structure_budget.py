import pytest
import torch

from pyprune.methods.structure_budget import select_structures

ROWS = torch.tensor([0.126570, 0.658937, 0.601419, 0.282059])
COLUMNS = torch.tensor(
    [0.009419, 0.004783, 0.013035, 0.085418, 0.007272, 0.009121, 0.027826, 0.003991]
)


def removed(selection, sizes):
    pairs = zip(selection, sizes, strict=True)
    return sum(len(r) * n + len(c) * m - len(r) * len(c) for (r, c), (m, n) in pairs)


def test_golden_threshold():
    """Columns 7 and 1 take 8 of the 9 parameters; the next would take four more."""
    ((rows, columns),) = select_structures([ROWS], [COLUMNS], 0.3)
    assert rows.tolist() == []
    assert columns.tolist() == [1, 7]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_equals_the_naive_running_total(sparsity):
    gen = torch.Generator().manual_seed(3)
    sizes = [(5, 9), (7, 4), (6, 6)]
    rows = [torch.rand(r, generator=gen) for r, _ in sizes]
    columns = [torch.rand(c, generator=gen) for _, c in sizes]
    got = select_structures(rows, columns, sparsity)
    budget = int(sparsity * sum(r * c for r, c in sizes) + 1e-9)
    best = [(r[:0].long(), c[:0].long()) for r, c in zip(rows, columns, strict=True)]
    for threshold in torch.cat([*rows, *columns]).sort().values:
        chosen = [
            ((r <= threshold).nonzero()[:, 0], (c <= threshold).nonzero()[:, 0])
            for r, c in zip(rows, columns, strict=True)
        ]
        if removed(chosen, sizes) > budget:
            break
        best = chosen
    for have, want in zip(got, best, strict=True):
        assert [t.tolist() for t in have] == [t.tolist() for t in want]


def test_dead_structures_go_first_and_count():
    rows, columns = torch.ones(4), torch.ones(4)
    rows[2] = 0
    ((gone, none),) = select_structures([rows], [columns], 0.25)
    assert gone.tolist() == [2]
    assert none.tolist() == []


def test_cap_sends_the_rest_to_other_layers():
    cheap, dear = torch.full((4,), 0.1), torch.full((4,), 5.0)
    free = select_structures([cheap, dear], [dear, dear], 0.5)
    assert len(free[0][0]) == 4
    capped = select_structures([cheap, dear], [dear, dear], 0.5, cap=0.5)
    assert all(len(t) <= 2 for pair in capped for t in pair)
    assert capped[0][0].tolist() == [0, 1]
    assert removed(capped, [(4, 4)] * 2) <= 16
    assert len(capped[0][1]) == 2


def test_nan_goes_last():
    rows = torch.tensor([float("nan"), 3.0])
    ((gone, _),) = select_structures([rows], [torch.full((2,), 9.0)], 0.5)
    assert gone.tolist() == [1]


def test_infinite_costs_never_go_and_negative_ones_go_first():
    rows, columns = torch.tensor([float("inf"), 1.0, -1.0]), torch.full((2,), float("inf"))
    for sparsity in (0.7, 1.0):
        ((gone, none),) = select_structures([rows], [columns], sparsity)
        assert gone.tolist() == [1, 2] and none.tolist() == []
    ((gone, _),) = select_structures([rows], [columns], 0.34)
    assert gone.tolist() == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([ROWS], [COLUMNS], 1.5), "sparsity: expected"),
        (([ROWS], [COLUMNS], 0.5, -1), "cap: expected"),
        (([ROWS], [], 0.5), "column_costs: expected 1 layers"),
    ],
    ids=["sparsity", "cap", "layers"],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_structures(*arguments)
