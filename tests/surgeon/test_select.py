"""One threshold across matrices: exact counts, whole groups, the cap."""

import pytest
import torch

from pyprune.patterns import NM
from pyprune.surgeon.select import Weights, group_costs, lowest


def scores(shapes=((4, 8), (3, 12), (5, 4)), seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=gen) for shape in shapes]


def weights(keep_zeros=False, seed=0):
    found = Weights(keep_zeros)
    gen = torch.Generator().manual_seed(seed)
    for rows, columns in ((4, 8), (3, 12), (5, 4)):
        w = torch.randn(rows, columns, generator=gen)
        found.add(w, torch.rand(rows, generator=gen), torch.rand(columns, generator=gen))
    return found


def walked(ws, pruned, cap):
    """The cheapest first; one whose tensor is at its cap is passed over."""
    items = sorted((float(x), t, i) for t, w in enumerate(ws) for i, x in enumerate(w.flatten()))
    masks, gone = [torch.ones_like(w, dtype=torch.bool) for w in ws], [0] * len(ws)
    for _, t, i in items:
        if sum(gone) < pruned and gone[t] + 1 <= cap * ws[t].numel() + 1e-9:
            masks[t].view(-1)[i] = False
            gone[t] += 1
    return masks


@pytest.mark.parametrize("pruned", [0, 1, 30, 60, 88])
@pytest.mark.parametrize("cap", [1.0, 0.6, 0.3])
def test_the_cap_passes_the_turn_to_the_others(pruned, cap):
    ws = scores()
    ws[0] *= 0.1  # would all go
    for got, want in zip(lowest(ws, pruned, cap), walked(ws, pruned, cap), strict=True):
        assert torch.equal(got, want)


def test_a_budget_below_zero_takes_nothing_and_one_beyond_all_takes_all():
    assert all(bool(mask.all()) for mask in lowest(scores(), -3, 1.0))
    assert not any(bool(mask.any()) for mask in lowest(scores(), 1000, 1.0))


def test_weights_go_by_cost():
    found = weights()
    costs = [
        (w * r[:, None] * c).square()
        for w, r, c in zip(found.ws, found.row_scales, found.column_scales, strict=True)
    ]
    for got, want in zip(found.masks(40, 1.0), lowest(costs, 40, 1.0), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4)], ids=str)
@pytest.mark.parametrize("groups", [0, 1, 9, 22])
def test_whole_groups_are_converted_the_cheapest_first(pattern, groups):
    found = weights()
    masks = found.group_masks(groups, 1.0, pattern)
    kept = torch.cat([mask.view(-1, 4).sum(1) for mask in masks])
    assert kept.tolist().count(pattern.n) == groups
    assert kept.tolist().count(4) == 22 - groups
    costs = [
        group_costs(w, r, c, pattern).flatten()
        for w, r, c in zip(found.ws, found.row_scales, found.column_scales, strict=True)
    ]
    cheap = torch.cat(costs)
    if 0 < groups < 22:
        assert cheap[kept < 4].max() <= cheap[kept == 4].min()
    w, r, c = found.ws[0], found.row_scales[0], found.column_scales[0]
    want = (w * r[:, None] * c).square().view(4, 2, 4).sort(-1).values
    torch.testing.assert_close(costs[0].view(4, 2), want[..., : 4 - pattern.n].sum(-1))


def test_ties_and_dead_weights_still_give_exact_groups():
    found = Weights(False)
    found.add(torch.ones(4, 8), torch.ones(4), torch.zeros(8))
    found.add(torch.ones(4, 8), torch.ones(4), torch.ones(8))
    dead, alive = found.group_masks(10, 1.0, NM(2, 4))
    assert dead.view(-1, 4).sum(1).tolist() == [2] * 8
    assert alive.view(-1, 4).tolist()[:2] == [[False, False, True, True]] * 2
    assert bool(alive.view(-1, 4)[2:].all())


def test_zeros_stay_if_asked_to():
    for keep in (False, True):
        found = weights(keep)
        found.ws[1][:, ::2] = 0  # 18 of 88
        for masks in (found.masks(5, 1.0), found.group_masks(2, 1.0, NM(2, 4))):
            zeros_kept = bool((masks[1] & (found.ws[1] == 0)).any())
            assert zeros_kept is not keep


def test_what_was_taken_goes_again():
    """The masks of a schedule are nested if nothing else changes."""
    found = weights()
    earlier = None
    for pruned in (20, 40, 60):
        masks = found.masks(pruned, 1.0)
        if earlier is not None:
            assert not any(
                bool((new & ~old).any()) for new, old in zip(masks, earlier, strict=True)
            )
        for w, mask in zip(found.ws, masks, strict=True):
            w.mul_(mask)
        earlier = masks


def test_what_is_zero_goes_before_what_is_dead():
    found = weights()
    found.column_scales[0][:4] = 0  # dead, with lower indices than the zeros
    found.ws[0][:, 6:] = 0
    masks = found.masks(12, 1.0)
    assert not bool(masks[0][:, 6:].any())
    assert int((~masks[0][:, :4]).sum()) == 4
    found.ws[0][0, :] = torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])
    found.ws[2][3, :2] = 0
    masks = found.group_masks(7, 1.0, NM(2, 4))
    zeros = torch.cat(
        [((w * m) == 0).view(-1, 4).sum(1) for w, m in zip(found.ws, masks, strict=True)]
    )
    assert set(zeros.tolist()) == {0, 2}
    assert zeros.tolist().count(2) == 7


def test_a_group_with_more_zeros_than_needed_may_get_some_back():
    found = Weights(False)
    found.add(torch.tensor([[0.0, 0, 0, 1]]), torch.ones(1), torch.ones(4))
    (mask,) = found.group_masks(1, 1.0, NM(2, 4))
    assert mask.tolist() == [[False, False, True, True]]
