"""Sweeps: what is carried over from one to the next, and candidates that change a branch."""

from contextlib import contextmanager

import pytest
import torch
from depth_searches import model_of, tokens

from pyprune.depth.budget import units_of
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.score import Scorer
from pyprune.depth.walkdown import WalkDown


def walk_of(family, layers=6, **more):
    graph = ResidualGraph.of(model_of(family, layers))
    return WalkDown(graph, Scorer(graph, tokens().batches), 1 << 24, 4, **more)


def counted(walk, monkeypatch):
    """Branches that ran, times streams."""
    ran, each = [], walk._ran

    def spy(i, branch, streams):
        ran.extend([branch] * len(streams))
        return each(i, branch, streams)

    monkeypatch.setattr(walk, "_ran", spy)
    return ran


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_an_accepted_candidate_becomes_the_reference(family, layers, monkeypatch):
    work = []
    for accepts in (True, False):
        walk = walk_of(family)
        units = units_of(walk.graph.branches, layers=layers)
        ran, removed = counted(walk, monkeypatch), set()
        walk.reference(removed)
        for at in (2, 1):  # the second before the first
            left = [unit for unit in units if not removed & set(unit)]
            scores = walk.score(left, removed)
            removed |= set(units[at])
            if accepts:
                walk.accept(units[at])
            else:
                walk.forget_after(units[at][0].position)
            assert walk.reference(removed) == pytest.approx(scores[left.index(units[at])], rel=1e-5)
        left = [unit for unit in units if not removed & set(unit)]
        for unit, score in zip(left, walk.score(left, removed), strict=True):
            expected = walk.scorer.score_naive(removed | set(unit))
            assert score == pytest.approx(expected, rel=1e-4)
        work.append(len(ran))
    assert work[0] < work[1]


def test_few_candidates_keep_their_streams_at_more_places():
    graph = ResidualGraph.of(model_of("llama", 6))
    scorer = Scorer(graph, tokens().batches)
    found = [
        WalkDown(graph, scorer, memory, 4, units).checkpoints
        for memory, units in ((1 << 24, None), (240_000, 3), (240_000, None), (240_000, 12))
    ]
    roomy, few, some, many = found
    assert roomy == 11 > few > some == many > 0


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_candidate_may_change_its_branch_instead(family):
    """Here by halving its last matrix."""

    def last(branch):
        block = walk.graph.adapter.blocks[branch.layer]
        layout = walk.graph.layouts[branch.layer]
        module = block.get_submodule(layout.inner(branch.kind)[-1])
        (name,) = (n for n in ("o_proj", "dense", "down_proj", "fc2") if hasattr(module, n))
        return getattr(module, name).weight

    @contextmanager
    def halved(branch):
        weight = last(branch)
        held = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(0.5)
        try:
            yield
        finally:
            with torch.no_grad():
                weight.copy_(held)

    walk = walk_of(family, change=halved)
    units = units_of(walk.graph.branches, layers=False)
    removed = {units[5][0]}
    for _ in range(2):  # the second time from where the first one's streams were kept
        left = [unit for unit in units if unit[0] not in removed]
        for unit, score in zip(left, walk.score(left, removed), strict=True):
            with halved(unit[0]):
                expected = walk.scorer.score_naive(removed)
            assert score == pytest.approx(expected, rel=1e-4)
