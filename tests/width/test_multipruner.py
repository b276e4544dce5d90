"""MultiPruner: the search against a naive loop, and what is saved."""

import math

import pytest
import torch
from saved_models import reloaded, save_model
from tiny_models import logits, tiny_model, tiny_tokens, tokens_of

from pyprune.calibration.batches import as_token_set
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.score import Scorer
from pyprune.errors import UserError
from pyprune.width.config import WidthConfig
from pyprune.width.multipruner import PAPER_SHARES, MultiPrunerOptions, WidthSearch, _by_norm
from pyprune.width.registry import run_width
from pyprune.width.structure import Widths

GQA = {"num_attention_heads": 8, "num_key_value_heads": 4}


def model_of(family="llama", layers=4):
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_model(family, **{depth: layers}, **(GQA if family == "llama" else {}))


def perplexity(model, tokens, removed=()):
    graph = ResidualGraph.of(model)
    scorer = Scorer(graph, tokens.batches)
    return scorer.total([scorer.rows_naive(i, removed) for i in range(len(tokens.batches))])[0]


@torch.no_grad()
def naive(model, tokens, removed, kind, parameters, steps):
    """Every candidate by whole forwards of a model whose units are masked."""
    widths = Widths.of(model)
    groups = {
        g.name: g
        for g in widths.of_kind(kind)
        if Branch("mlp" if kind == "mlp" else "attention", g.layer) not in removed
    }
    left = {name: g.units for name, g in groups.items()}
    step = {name: 1 if kind == "heads" else -(-g.units // steps) for name, g in groups.items()}
    original = {k: v.clone() for k, v in model.state_dict().items()}
    log, gone = [], 0
    while gone < parameters:
        scores = {}
        for name in groups:
            if left[name] - step[name] < 1:
                continue
            tried = left | {name: left[name] - step[name]}
            order = {n: _by_norm(g) for n, g in groups.items()}
            widths.mask({n: order[n][: tried[n]].sort().values for n in groups})
            scores[name] = perplexity(model, tokens, removed)
            model.load_state_dict(original)
        best = min(scores, key=scores.get)
        left[best] -= step[best]
        gone += step[best] * groups[best].unit_parameters
        log.append((best, left[best], scores[best]))
    return log


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "heads"])
def test_exact_equals_a_naive_loop(kind, stride, monkeypatch):
    tokens, removed = tokens_of(), [Branch("attention", 1), Branch("mlp", 2)]
    parameters = 9000 if kind == "mlp" else 4000
    expected = naive(model_of(), tokens, removed, kind, parameters, steps=4)
    model = model_of()
    graph = ResidualGraph.of(model)
    widths = Widths(model, graph.adapter, Widths.of(model).groups, {})
    options = MultiPrunerOptions(steps=4, mode="exact", memory_mb=1, every=1)
    if stride > 1:  # half of the memory is for cached states
        whole = len(graph.branches) * tokens.tokens * 32 * 4
        monkeypatch.setattr("pyprune.width.multipruner.MEGABYTE", 2 * whole // stride)
    search = WidthSearch(graph, widths, tokens, removed, options)
    gone = search.remove(kind, parameters)
    assert search._walk.stride == stride and bool(search._walk.checkpoints) == (stride == 1)
    names = {g.name: str(b) for b, module in search._modules.items() for g in module}
    assert [(a, b) for a, b, _ in search.log] == [(names[a], b) for a, b, _ in expected]
    for (_, _, got), (_, _, want) in zip(search.log, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    assert gone >= parameters


def searched(model, tokens, removed=(), kind="mlp", parameters=12000, **options):
    graph = ResidualGraph.of(model)
    widths = Widths(model, graph.adapter, Widths.of(model).groups, {})
    search = WidthSearch(
        graph, widths, tokens, removed, MultiPrunerOptions(**{"every": 1, **options})
    )
    search.remove(kind, parameters)
    return search


def test_fast_scores_less_and_agrees_at_first():
    tokens = as_token_set([tiny_tokens(4, 12)], vocabulary=64, positions=128)
    exact = searched(model_of(), tokens, mode="exact")
    fast = searched(model_of(), tokens, mode="fast")
    assert fast.log[0][:2] == exact.log[0][:2] and len(fast.log) == len(exact.log)
    assert fast.evaluations < 0.7 * exact.evaluations
    assert exact.evaluations == 4 * len(exact.log)  # no module has come to its end
    # Estimates of all four, and at least a look at the best.
    assert searched(model_of(), tokens, mode="fast", parameters=1).evaluations in (5, 6, 7, 8)


def test_audits_look_at_what_was_not_looked_at(monkeypatch):
    looked = []
    scores = WidthSearch._scores

    def seen(self, branches, before, batches=None):
        looked.append((len(self.log), {str(b) for b in branches}, batches))
        return scores(self, branches, before, batches)

    monkeypatch.setattr(WidthSearch, "_scores", seen)
    searches = {}
    for every in (0, 1):
        looked.clear()
        found = searched(model_of(layers=6), tokens_of(), mode="fast", audit_every=every)
        everything = {str(branch) for branch in found._modules if branch.kind == "mlp"}
        assert looked[0] == (0, everything, 1)  # the first costs are of a part of the batches
        assert all(len(of) == 1 and batches is None for _, of, batches in looked[1:])
        searches[every] = [set().union(*(of for at, of, _ in looked[1:] if at < 8))]
        assert len(found.log) > 8
    # Six modules, the longest unseen one first: after six steps nothing is older than that.
    assert searches[1] == [everything] and searches[0] != [everything]


@pytest.mark.parametrize("layers", [4, 6])
def test_fast_is_about_as_good_as_exact(layers):
    tokens = as_token_set([tiny_tokens(32, 32)], vocabulary=64, positions=128)
    exact, fast = (
        searched(model_of(layers=layers), tokens, parameters=20000, mode=mode)
        for mode in ("exact", "fast")
    )
    assert len(fast.log) == len(exact.log) and fast.evaluations < 0.5 * exact.evaluations
    assert fast.perplexity <= 1.02 * exact.perplexity


@pytest.mark.parametrize("kind, parameters", [("mlp", 12000), ("heads", 4000)])
def test_every_accepted_score_is_that_of_the_narrowed_model(kind, parameters):
    """Also where streams go on from earlier sweeps, and a module loses several steps."""
    tokens, removed = tokens_of(), [Branch("attention", 1), Branch("mlp", 2)]
    found = searched(model_of(), tokens, removed, kind, parameters, steps=8)
    taken = {}
    for n, (name, left, score) in enumerate(found.log):
        taken[name] = left
        model = model_of()
        widths = Widths.of(model)
        modules = {str(b): module for b, module in found._modules.items()}
        groups = {group.name: at for at, of in modules.items() for group in of if at in taken}
        widths.mask({
            g.name: _by_norm(g)[: taken[groups[g.name]]].sort().values
            for g in widths.groups if g.name in groups
        })  # fmt: skip
        assert score == pytest.approx(perplexity(model, tokens, removed), rel=1e-4), n
    assert len(taken) < len(found.log)


def test_scores_that_are_no_numbers_never_win(monkeypatch):
    from pyprune.depth import walkdown

    def broken(self, units, removed, batches=None):
        return [math.nan if unit[0].layer != 2 else 5.0 for unit in units]

    monkeypatch.setattr(walkdown.WalkDown, "score", broken)
    for mode in ("exact", "fast"):
        found = searched(model_of(), tokens_of(), mode=mode, parameters=3000)
        assert {name for name, _, _ in found.log} == {"M2"}
        with pytest.raises(UserError, match="every step gives NaN"):
            searched(model_of(), tokens_of(), [Branch("mlp", 2)], mode=mode, parameters=1)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt2"])
@pytest.mark.parametrize("blocks", [0.5, 0.0])
def test_saved_is_the_masked_model(family, blocks, tmp_path):
    ids, model = tiny_tokens(2, 9), model_of(family)
    options = {"blocks": blocks, "steps": 8, "heads": 0.1, "every": 1}
    decision = run_width(
        model, tokens_of(), WidthConfig("multipruner", ratio=0.3, method_options=options)
    )
    before, after = decision.parameters
    assert after == sum(p.numel() for p in model.parameters())
    assert decision.wanted <= 0.7 * before and decision.wanted < after <= before
    assert any("a stock model has one size" in note for note in decision.notes)
    dense = model_of(family)
    names = decision.branches
    assert bool(names) == (blocks > 0)
    # What the search saw is what is there in the end.
    went = [name for name, _, _ in decision.curve]
    assert went[0] == "dense" and tuple(went[1 : 1 + len(names)]) == names
    assert decision.curve[0][1:] == (
        before,
        pytest.approx(perplexity(model_of(family), tokens_of())),
    )
    assert decision.curve[-1][1] == decision.wanted
    assert decision.curve[-1][2] == pytest.approx(perplexity(model, tokens_of()), rel=1e-4)
    sizes = [size for _, size, _ in decision.curve]
    assert sizes == sorted(sizes, reverse=True)
    removed = [Branch("attention" if n[0] == "A" else "mlp", int(n[1:])) for n in names]
    Widths.of(dense).mask(decision.kept())
    with ResidualGraph.of(dense).skipping(removed):
        expected = logits(dense, ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=2e-5)
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))


def test_order_is_by_norm():
    group = Widths.of(model_of()).of_kind("heads")[0]
    attention = group.writer.module
    assert attention is not None
    q, k, v = (part.module for part in group.slices[:6:2])
    rows = [m.weight.detach().view(4, -1).abs().sum(1) + m.bias.detach().view(4, -1).abs().sum(1)
            for m in (q, k, v)]  # fmt: skip
    expected = sum(rows).argsort(descending=True)
    assert torch.equal(_by_norm(group), expected)


def test_shares_are_the_papers_unless_given(monkeypatch):
    assert MultiPrunerOptions().shares(grouped=False) == (0.44, 0.04)
    assert MultiPrunerOptions().shares(grouped=True) == (0.3, 0.0)
    assert MultiPrunerOptions(heads=0.2).shares(grouped=True) == (0.3, 0.2)
    asked = []

    def remove(self, kind, parameters):
        asked.append((kind, parameters))
        return parameters

    monkeypatch.setattr(WidthSearch, "remove", remove)
    config = WidthConfig("multipruner", ratio=0.2)
    for family, kinds in (("llama", ["mlp"]), ("gpt2", ["mlp", "heads"])):
        model = model_of(family)
        target = 0.2 * sum(p.numel() for p in model.parameters())
        asked.clear()
        gone = run_width(model, tokens_of(), config).branches
        assert [kind for kind, _ in asked] == kinds and gone
        graph = ResidualGraph.of(model_of(family))
        sizes = [graph.parameters(Branch("attention" if n[0] == "A" else "mlp", int(n[1:])))
                 for n in gone]  # fmt: skip
        share = PAPER_SHARES[family == "llama"][0] * target
        assert sum(sizes) >= share > sum(sizes[:-1])


def test_bad_requests():
    for bad in ({"blocks": 0.9, "heads": 0.2}, {"heads": -0.1}, {"blocks": 0.98}):
        with pytest.raises(UserError, match="multipruner blocks, heads: expected shares"):
            WidthConfig("multipruner", ratio=0.1, method_options=bad)
    leasts = {"steps": 2, "audit_every": 0, "every": 1, "memory_mb": 1, "width": 1}
    for name, least in leasts.items():
        words = f"at least {least}" if least else "0 or more"
        with pytest.raises(UserError, match=f"{name}: expected {words}, got {least - 1}"):
            WidthConfig("multipruner", ratio=0.1, method_options={name: least - 1})
    config = WidthConfig("multipruner", ratio=0.9, method_options={"blocks": 1.0, "heads": 0.0})
    with pytest.raises(UserError, match=r"ratio 0\.9, of which blocks=1 as branches: expected"):
        run_width(model_of(), tokens_of(), config)
    config = WidthConfig("multipruner", ratio=0.6, method_options={"blocks": 0.0, "heads": 1.0})
    with pytest.raises(UserError, match=r"at most [\d,]+ parameters as KV groups"):
        run_width(model_of(), tokens_of(), config)
