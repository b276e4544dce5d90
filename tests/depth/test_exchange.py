"""Exchanges after a greedy list, against the best of all sets, and what is recorded of them."""

import io
import json
import math
from itertools import combinations

import pytest
import torch
from depth_searches import tokens
from matplotlib.image import imread
from rich.console import Console
from tiny_models import tiny_model, tiny_tokens

from pyprune.depth import budget, exchange
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import DepthDecision, Step
from pyprune.depth.exchange import meets
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.greedy import Greedy
from pyprune.depth.plot import draw
from pyprune.depth.registry import DepthTask, run_search
from pyprune.depth.run import prune_structure
from pyprune.depth.score import Scorer
from pyprune.depth.walkdown import WalkDown
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter


def search(model, ratio=0.35, data=None, by="params", **options):
    options = {"objective": "perplexity", "margin": 0.0, **options}
    config = StructureConfig(ratio=ratio, by=by, method_options=options)
    return run_search(model, Adapter.of(model), data or tokens(), config)


def model_of(family, layers, seed=0):
    """Grouped queries where the family has them; MLPs of three attentions."""
    more = {"num_key_value_heads": 1, "intermediate_size": 80} if family == "llama" else {}
    if family == "gemma2":
        more["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    return tiny_model(family, seed, num_hidden_layers=layers, **more)


def score_of(model, data, gone):
    return Scorer(ResidualGraph.of(model), data.batches).score_naive(gone)


def budget_of(model, ratio, data):
    graph = ResidualGraph.of(model)
    units = budget.units_of(graph.branches, layers=False)
    return budget.Budget.of(graph, StructureConfig(ratio=ratio), units, data.batches[0])


def of_list(decision):
    return decision.refinement.starts[decision.refinement.start]


def test_no_worse_than_both_lists_and_mostly_the_best_of_all_sets():
    data, best, better, worse_list = tokens((2,)), 0, 0, 0
    cases = [(seed, ratio) for seed in range(3) for ratio in (0.2, 0.35)]
    for seed, ratio in cases:
        model = model_of("llama", 4, seed)
        asked, branches = budget_of(model, ratio, data), ResidualGraph.of(model).branches
        sets = [frozenset(s) for n in range(1, 8) for s in combinations(branches, n)]
        possible = [s for s in sets if meets(asked, s, len(branches))]
        least = min(score_of(model, data, s) for s in possible)
        found = search(model, ratio, data)
        lists = [search(model, ratio, data, refine="none")]
        config = StructureConfig("sleb", ratio=ratio, method_options={
            "protect_first": 0, "protect_last": 0})  # fmt: skip
        lists.append(run_search(model, Adapter.of(model), data, config))
        ends = [one.steps[-1].score for one in lists]
        score = found.steps[-1].score
        assert list(found.refinement.starts.values()) == pytest.approx(ends, rel=1e-5)
        assert score <= min(found.refinement.starts.values())
        assert found.refinement.start == ("layers" if ends[1] < ends[0] else "branches")
        assert asked.reached(found.removed)
        assert score == pytest.approx(score_of(model, data, found.removed), rel=1e-5)
        if found.refinement.exchanges:
            assert meets(asked, frozenset(found.removed), len(branches)) or not (
                found.refinement.exchanges[-1].out
            )
        best += score <= least * (1 + 1e-6)
        better += score < of_list(found)
        worse_list += min(ends) > least * (1 + 1e-6)
    assert best == len(cases) and better == worse_list >= 3


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])  # parallel; shared norms
@pytest.mark.parametrize("objective", ["perplexity", "kl"])
def test_exact_is_naive(family, objective):
    model, data = model_of(family, 4), tokens((2, 1))
    options = {"objective": objective, "exchange_limit": 60}
    exact = search(model, 0.3, data, **options)
    naive = search(model, 0.3, data, mode="naive", **options)
    assert exact.removed == naive.removed and exact.evaluations == naive.evaluations
    assert exact.refinement.start == naive.refinement.start
    assert [(e.back, e.out) for e in exact.refinement.exchanges] == [
        (e.back, e.out) for e in naive.refinement.exchanges
    ]
    for a, b in zip(exact.steps, naive.steps, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-4)
    little = search(model, 0.3, data, memory_mb=1, width=3, **options)
    assert little.removed == exact.removed


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("checkpoints", [0, 16])
def test_any_branches_go_or_come_back_in_a_sweep(family, checkpoints, monkeypatch):
    from pyprune.depth import walkdown

    monkeypatch.setattr(walkdown, "CHECKPOINTS", checkpoints)
    model, data = model_of(family, 5), tokens((2, 1))
    graph = ResidualGraph.of(model)
    scorer = Scorer(graph, data.batches)
    walk = WalkDown(graph, scorer, 8 << 20, 3)
    draw_from = torch.Generator().manual_seed(1)
    base = set()
    for _ in range(4):
        units = [(b,) for b in graph.branches]
        for _ in range(4):
            chosen = torch.randperm(10, generator=draw_from)[:3].sort().values.tolist()
            units.append(tuple(graph.branches[k] for k in chosen))
        for some, keep in ((units[:10], True), (units[10:], False)):
            expected = [scorer.score_naive(base ^ set(unit)) for unit in some]
            assert scorer.total(walk.rows(some, base, keep=keep)) == pytest.approx(
                expected, rel=1e-5
            )
        assert walk.reference(base) == pytest.approx(scorer.score_naive(base), rel=1e-5)
        flipped = units[10]
        walk.forget_after(flipped[0].position)
        base ^= set(flipped)


def test_every_exchange_lowers_the_objective_and_nothing_needless_goes():
    model, data = model_of("llama", 6), tokens()
    asked, graph = budget_of(model, 0.3, data), ResidualGraph.of(model)
    found = search(model, 0.3, data)
    refinement, total = found.refinement, sum(p.numel() for p in model.parameters())
    assert refinement.exchanges
    # Back from the set at the end.
    now, scores = set(found.removed), [of_list(found), *(e.score for e in refinement.exchanges)]
    for made, before in zip(reversed(refinement.exchanges), reversed(scores[:-1]), strict=True):
        assert made.score < before and meets(asked, frozenset(now), 12)
        assert made.score == pytest.approx(score_of(model, data, now), rel=1e-5)
        assert set(made.out) <= now and not set(made.back) & now
        now = (now - set(made.out)) | set(made.back)
    assert score_of(model, data, now) == pytest.approx(of_list(found), rel=1e-5)
    assert found.steps[-1].score == refinement.exchanges[-1].score
    for k, step in enumerate(found.steps):
        prefix = [b for s in found.steps[: k + 1] for b in s.unit]
        assert step.score == pytest.approx(score_of(model, data, prefix), rel=1e-5)
        assert step.parameters == total - graph.removed_parameters(prefix)
    greedy = search(model, 0.3, data, refine="none")
    assert found.importance == greedy.importance and greedy.refinement is None
    assert found.evaluations > greedy.evaluations


@pytest.mark.parametrize(("mode", "by"), [("exact", "params"), ("fast", "latency")])
def test_goes_on_from_its_files(mode, by, tmp_path, monkeypatch):
    def seconds_of(graph, _batch):
        seconds = {
            b: (1.0 if b.kind == "attention" else 2.0) + b.layer / 64 for b in graph.branches
        }
        return seconds, sum(seconds.values()) + 3.0

    monkeypatch.setattr(budget, "branch_seconds", seconds_of)
    model, state = model_of("llama", 6), str(tmp_path / "state.json")
    data = tokens()
    whole = search(model, 0.3, data, by, mode=mode)
    assert whole.refinement.exchanges
    original, left = WalkDown.rows, [0]

    def stops(self, units, *args, **more):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(self, units, *args, **more)

    monkeypatch.setattr(WalkDown, "rows", stops)
    interruptions = 0
    while interruptions < 100:  # a few sweeps at a time: a round of halving takes more than three
        left[0] = 3 if mode == "exact" else 6
        try:
            found = search(model, 0.3, data, by, mode=mode, state=state)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 2 and found == replaced(whole, found)
    left[0] = 0  # a second run, also with an add-on, has nothing left to score
    assert search(model, 0.3, data, by, mode=mode, state=state).steps == whole.steps
    copy = model_of("llama", 6)
    refitted = search(copy, 0.3, data, by, mode=mode, state=state, compensate=True)
    assert refitted.steps == whole.steps and refitted.transforms
    left[0] = -1
    other = search(model, 0.45, data, by, mode=mode, state=state)
    assert other.removed == search(model, 0.45, data, by, mode=mode).removed


def replaced(decision, other):
    """With the configuration of the other: it names the state file."""
    return DepthDecision.from_dict({**decision.to_dict(), "config": other.config})


def test_files_of_something_else(tmp_path):
    model, state = model_of("llama", 4), str(tmp_path / "state.json")
    search(model, state=state)
    layers, scores = (tmp_path / f"state.json.{name}" for name in ("layers", "exchanges"))
    good = json.loads(scores.read_text())
    scores.write_text(json.dumps({**good, "identity": {**good["identity"], "tokens": "x"}}))
    with pytest.raises(UserError, match=r"state.json.exchanges is of another calibration text"):
        search(model, state=state)
    for bad in ("{", "[]", '{"identity": {}, "losses": {"A1": "low"}}'):
        scores.write_text(bad)
        with pytest.raises(UserError, match=r"cannot continue from .*state.json.exchanges"):
            search(model, state=state)
    scores.unlink()
    layers.write_text("{")
    with pytest.raises(UserError, match=r"cannot continue from .*state.json.layers"):
        search(model, state=state)


def test_when_there_are_exchanges():
    model = model_of("llama", 4)

    def run(**given):
        options = given.pop("options", {})
        config = StructureConfig(method_options=options, **given)
        return run_search(model, Adapter.of(model), tokens(), config)

    found = run(ratio=0.3)
    assert found.refinement is not None and found.objective == "kl"
    assert run(ratio=0.3, options={"refine": "none"}).objective == "perplexity"
    assert run(ratio=0.3, by="count").refinement is None
    assert run(count=3).refinement is None
    published = run(ratio=0.3, options={"compare": "score"})
    assert published.refinement is None and published.objective == "perplexity"
    assert run(ratio=0.3, options={"compare": "score", "refine": "exchange"}).refinement
    with pytest.raises(UserError, match=r"refine: expected a share .* with exchange, got a count"):
        run(count=3, options={"refine": "exchange"})
    with pytest.raises(UserError, match="exchange_limit: expected at least 1, got 0"):
        run(ratio=0.3, options={"exchange_limit": 0})
    with pytest.raises(UserError, match="blockpruner margin: expected 0 or more, got -1"):
        run(ratio=0.3, options={"margin": -1.0})
    with pytest.raises(UserError, match="refine"):
        run(ratio=0.3, options={"refine": "swap"})
    # Attention alone has no whole layers.
    only = run(ratio=0.1, options={"blocks": "attention"})
    assert set(only.refinement.starts) == {"branches"}
    assert {b.kind for b in only.removed} == {"attention"}
    inner = run(ratio=0.2, options={"protect_first": 1, "protect_last": 1})
    assert {b.layer for b in inner.removed} <= {1, 2}
    few = run(ratio=0.3, options={"exchange_limit": 1})
    assert not few.refinement.exchanges


def test_a_gain_has_to_be_sure():
    model, data = model_of("llama", 6), tokens((4, 4))
    losses = {}

    def gains(before, after):
        for gone in (before, after):
            if gone not in losses:
                scorer = Scorer(ResidualGraph.of(model), data.batches)
                losses[gone] = scorer.counted(scorer.all_naive(gone))[0]
        return losses[before] - losses[after]

    made = {}
    for margin in (0.0, 1.0, 3.0, 1e9):
        found = search(model, 0.3, data, margin=margin).refinement
        made[margin] = len(found.exchanges)
        now = frozenset(search(model, 0.3, data, margin=margin).removed)
        for one in reversed(found.exchanges):
            before = (now - set(one.out)) | set(one.back)
            difference = gains(before, now)
            error = float(difference.std()) / math.sqrt(len(difference))
            assert float(difference.mean()) > margin * error
            now = before
    assert made[0.0] > 0 == made[1e9]


def test_what_need_not_go_comes_back():
    """Of a start that is larger than it has to be, at any margin, if that lowers the objective."""
    model, data = model_of("llama", 4), tokens()
    options = {"objective": "perplexity"}
    config = StructureConfig(ratio=0.3, method_options=options)
    graph, asked = ResidualGraph.of(model), budget_of(model, 0.3, data)
    units = budget.units_of(graph.branches, layers=False)
    scores = {}

    def score(removed):
        if removed not in scores:
            scores[removed] = Scorer(graph, data.batches).score_naive(removed)
        return scores[removed]

    cases = {True: 0, False: 0}
    for start in map(frozenset, combinations(graph.branches, 3)):
        less = [start - {b} for b in sorted(start) if meets(asked, start - {b}, 8)]
        best = min(less, key=score, default=None)
        if best is None or cases[score(best) < score(start)] == 2:
            continue
        greedy = Greedy(DepthTask(graph, data, config), config.own_options(), units)
        known = exchange.Known(greedy, frozenset(), None)
        step = Step(tuple(start), score(start))
        local = exchange.LocalSearch(greedy, graph.branches, known, [step], 100, 1e9)
        local.run()
        lower = score(best) < score(start)
        cases[lower] += 1
        assert [made.out for made in local.exchanges] == [()] * lower
        assert {b for s in local.steps() for b in s.unit} == (best if lower else start)
    assert cases == {True: 2, False: 2}


def test_progress_is_told():
    told = []
    config = StructureConfig(ratio=0.3, method_options={"mode": "fast", "exchange_limit": 40})
    model = model_of("llama", 5)
    run_search(model, Adapter.of(model), tokens(), config, lambda *of: told.append(of))
    mine = [(done, total) for words, done, total in told if "exchanges, score" in words]
    assert any("exchanges, score" in w and w.endswith("batch 4/4") for w, _, _ in told)
    assert mine == sorted(mine) and 0 < mine[-1][0] <= 40 and {t for _, t in mine} == {40}


def test_the_limit_holds():
    model = model_of("llama", 6)
    lists = search(model, exchange_limit=1)
    for limit in (20, 40):
        found = search(model, exchange_limit=limit)
        assert found.steps[-1].score <= lists.steps[-1].score
        # Scores of the steps at the end come on top.
        assert found.evaluations - lists.evaluations <= limit + len(found.steps)


def test_scores_that_are_no_numbers_never_win(monkeypatch):
    """Here of every second set that is asked for, NaN or infinite."""
    model, data = model_of("llama", 6), tokens()
    known, asked = exchange.Known._found, []

    def poisoned(self, sets, base):
        found = known(self, sets, base)
        for losses in found:
            asked.append(losses)
            if len(asked) > 1 and len(asked) % 2:
                losses[0] = (math.nan, math.inf)[len(asked) % 4 == 1]
        return found

    monkeypatch.setattr(exchange.Known, "_found", poisoned)
    for made in (found := search(model, 0.3, data)).refinement.exchanges:
        assert math.isfinite(made.score)
    assert len(asked) > 15 and found.refinement.starts


def test_the_record_and_its_pictures(tmp_path):
    model = model_of("llama", 6)
    config = StructureConfig(ratio=0.3, method_options={"objective": "perplexity", "margin": 0.0})
    report = prune_structure(model, [tiny_tokens(2, 16)], config, curve=True)
    decision = report.decision
    assert decision.refinement.exchanges
    assert DepthDecision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    shown = console.export_text()
    for words in (shown, report.card()):
        for made in decision.refinement.exchanges:
            for branch in (*made.back, *made.out):
                assert str(branch) in words
    assert len(report.curve) == len(decision.steps) + 1
    files = {file.stem: file for file in draw(decision, report.curve, tmp_path / "pictures")}
    assert set(files) == {"order", "importance", "exchanges", "perplexity"}
    picture = imread(files["exchanges"])
    assert picture.shape[1] > 600 and picture[..., :3].std() > 0.05
