"""What a round of greedy removal compares, and that it never takes what cannot go."""

import math
from itertools import pairwise

import pytest
import torch
from depth_searches import close, config, model_of, of_share, search, seconds_of, tokens
from torch.nn import functional as F

from pyprune.depth import budget, greedy, walkdown
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.greedy import rate
from pyprune.errors import UserError


def test_rates_compare_what_is_lost_with_what_is_saved():
    assert rate(0.2, 4.0) == 0.05 and rate(0.0, 4.0) == 0.0
    assert rate(0.1, 0.0) == math.inf and rate(math.inf, 3.0) == math.inf
    assert math.isnan(rate(math.nan, 3.0))
    # A lower rise and a larger saving are better, whatever the sign.
    rises, costs = [-2.0, -0.5, 0.5, 2.0], [0.5, 1.0, 4.0]
    for low, high in pairwise(rises):
        assert all(rate(low, cost) < rate(high, cost) for cost in costs)
    for small, large in pairwise(costs):
        assert all(rate(rise, large) < rate(rise, small) for rise in rises)


@pytest.mark.parametrize(("by", "blocks"), [("params", "pairs"), ("latency", "pairs"),
                                            ("params", "mixed")])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])  # one with shared norms
def test_exact_is_naive_by_rate_and_both_are_the_definition(family, by, blocks, monkeypatch):
    monkeypatch.setattr(budget, "branch_seconds", seconds_of)
    model, data = model_of(family, 4), tokens()
    graph = ResidualGraph.of(model)
    exact = search(model, of_share(0.45, by, blocks=blocks), data)
    close(exact, search(model, of_share(0.45, by, blocks=blocks, mode="naive"), data))
    fast = of_share(0.45, by, blocks=blocks, mode="fast", audit_every=1)
    audited = search(model, fast, data)
    assert audited.removed == exact.removed
    assert exact.compare == "rate"

    seconds, whole = seconds_of(graph, None)
    if by == "params":
        whole = sum(p.numel() for p in model.parameters())

    def saved(gone):
        return graph.removed_parameters(gone) if by == "params" else sum(seconds[b] for b in gone)

    @torch.no_grad()
    def loss(gone):
        with graph.skipping(gone):
            rows = [
                F.cross_entropy(model(r[None], use_cache=False).logits[0, :-1].double(), r[1:])
                for batch in data.batches
                for r in batch.input_ids
            ]
        return float(sum(rows) / len(rows))

    single = [(b,) for kind in ("attention", "mlp") for b in graph.branches if b.kind == kind]
    pairs = list(pairwise(graph.branches)) if blocks == "pairs" else []
    gone = []
    for step in exact.steps:
        missing, now = 0.45 * whole - saved(gone), loss(gone)
        assert missing > 0
        left = [u for u in single + pairs if not set(u) & set(gone)]
        assert len(step.candidates) == len(left)
        rates = []
        for unit in left:
            after = [*gone, *unit]
            rise, cost = loss(after) - now, min(saved(after) - saved(gone), missing)
            rates.append(rise / cost if rise > 0 else rise * cost)
        assert step.unit == left[rates.index(min(rates))]
        gone += step.unit
    assert saved(gone) >= 0.45 * whole


def test_what_is_compared_by_default_and_by_option():
    model = model_of("llama", 4)
    assert search(model, config(count=2)).compare == "score"
    assert search(model, of_share(0.3, "count")).compare == "score"
    assert search(model, of_share(0.3)).compare == "rate"
    published = search(model, of_share(0.3, compare="score"))
    assert published.compare == "score" and {len(s.unit) for s in published.steps} == {1}
    counted = search(model, config(count=len(published.steps)))
    assert published.removed == counted.removed
    # Where all units are alike it makes no difference.
    assert search(model, config(count=4, compare="rate")).removed == (
        search(model, config(count=4)).removed
    )
    layers = [search(model, of_share(0.3, method="sleb", compare=c)) for c in ("score", "rate")]
    close(*layers)
    assert search(model, of_share(0.3)).importance.keys() == counted.importance.keys()
    assert len(search(model, of_share(0.3, blocks="pairs")).importance) == 8 + 7
    with pytest.raises(UserError, match=r"blocks: expected a share .* with pairs"):
        search(model, config(count=2, blocks="pairs"))


def test_ties_by_rate_go_to_the_first():
    model = model_of("llama", 4)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
    for mode in ("naive", "exact"):
        found = search(model, of_share(0.3, mode=mode))
        assert [str(b) for b in found.removed][:3] == ["A0", "A1", "A2"]


def scored(monkeypatch, change):
    """Scores of candidates as `change(unit, removed, score)` gives them, in every mode."""
    swept, full = walkdown.WalkDown.score, greedy.Greedy._naive

    def score(self, units, removed, *more):
        found = swept(self, units, removed, *more)
        return [change(u, removed, s) for u, s in zip(units, found, strict=True)]

    def naive(self, left):
        found = full(self, left)
        return [change(u, self._branches, s) for u, s in zip(left, found, strict=True)]

    monkeypatch.setattr(walkdown.WalkDown, "score", score)
    monkeypatch.setattr(greedy.Greedy, "_naive", naive)


@pytest.mark.parametrize("mode", ["exact", "fast", "naive"])
@pytest.mark.parametrize("compare", ["score", "rate"])
@pytest.mark.parametrize("objective", ["perplexity", "kl"])
def test_a_candidate_without_a_score_never_goes(mode, compare, objective, monkeypatch):
    broken = Branch("mlp", 1)
    scored(monkeypatch, lambda unit, _, score: math.nan if broken in unit else score)
    options = {"mode": mode, "compare": compare, "objective": objective}
    assert broken not in search(model_of("llama", 4), of_share(0.3, **options)).removed


@pytest.mark.parametrize("compare", ["score", "rate"])
def test_one_branch_stays_however_good_the_last_pair_is(compare, monkeypatch):
    scored(monkeypatch, lambda unit, gone, _: 1 + len(gone) / 10 if len(unit) == 2 else 50.0)
    model = model_of("llama", 2)
    graph = ResidualGraph.of(model)
    three = graph.removed_parameters(graph.branches[:3])
    share = 0.99 * three / sum(p.numel() for p in model.parameters())
    found = search(model, of_share(share, blocks="pairs", compare=compare))
    assert len(found.steps[0].unit) == 2 and len(found.removed) == 3
