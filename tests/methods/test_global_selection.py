import pytest
import torch

from pyprune import ops
from pyprune.methods.global_selection import GlobalSelection
from pyprune.patterns import pruned_count

SHAPES = [(20, 30), (1, 1), (7, 9), (40, 64)]


def layers(dtype, seed=0):
    gen = torch.Generator().manual_seed(seed)
    ws = [torch.randn(shape, generator=gen).to(dtype) for shape in SHAPES]
    return ws, [torch.rand(w.shape[1], generator=gen) for w in ws]


def select(ws, sparsity, scales=None, preserves=None):
    selection = GlobalSelection(sparsity)
    scales = scales or [None] * len(ws)
    preserves = preserves or [None] * len(ws)
    for i, (w, scale, preserve) in enumerate(zip(ws, scales, preserves, strict=True)):
        selection.count(str(i), w, scale, preserve)
    for i in reversed(range(len(ws))):
        selection.refine(str(i), ws[i], preserves[i])
    return [
        selection.mask(str(i), w, p) for i, (w, p) in enumerate(zip(ws, preserves, strict=True))
    ]


@pytest.mark.parametrize("sparsity", [0, 0.01, 0.5, 0.73, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_is_the_selection_of_mask_global(sparsity, dtype, scaled):
    ws, scales = layers(dtype)
    scales = scales if scaled else None
    count = pruned_count(sum(w.numel() for w in ws), sparsity)
    got = select(ws, sparsity, scales)
    assert sum(int((~mask).sum()) for mask in got) == count
    want = ops.mask_global([w.float() for w in ws], count, column_scales=scales)
    for mask, expected in zip(got, want, strict=True):
        assert torch.equal(mask, expected)


def test_ties_go_by_layer_then_by_index():
    masks = select([torch.ones(2, 3), torch.ones(2, 2)], 0.75)
    assert [mask.tolist() for mask in masks] == [[[False] * 3] * 2, [[False, False], [True, True]]]


def test_preserved_zeros_count():
    ws, scales = layers(torch.float32)
    gen = torch.Generator().manual_seed(3)
    preserves = [torch.rand(w.shape, generator=gen) > 0.3 for w in ws]
    masks = select(ws, 0.5, scales, preserves)
    assert sum(int((~mask).sum()) for mask in masks) == pruned_count(
        sum(w.numel() for w in ws), 0.5
    )
    for mask, preserve in zip(masks, preserves, strict=True):
        assert not bool((mask & ~preserve).any())
    free = [torch.where(p, w, 0) for w, p in zip(ws, preserves, strict=True)]
    for mask, expected in zip(masks, select(free, 0.5, scales), strict=True):
        assert torch.equal(mask, expected)


def test_more_forced_than_asked_for():
    ws, _ = layers(torch.float32)
    preserves = [torch.zeros(w.shape, dtype=torch.bool) for w in ws]
    preserves[3][:] = True
    masks = select(ws, 0.001, None, preserves)
    assert bool(masks[3].all()) and not any(bool(mask.any()) for mask in masks[:3])


def test_nan_and_infinity_are_kept():
    w = torch.tensor([[float("nan"), 1, float("inf"), 2, 3]])
    assert select([w], 0.6)[0].tolist() == [[True, False, True, False, False]]


def test_asks_for_both_passes():
    selection = GlobalSelection(0.5)
    w = torch.ones(2, 2)
    selection.count("a", w, None, None)
    with pytest.raises(RuntimeError, match="expected refine to have seen every layer"):
        selection.mask("a", w, None)
