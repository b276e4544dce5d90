"""The searches against the naive loop, and what a decision records."""

import json
import math

import pytest
import torch
from depth_searches import close, config, model_of, search, tokens
from tiny_models import FAMILIES, tiny_tokens
from torch.nn import functional as F

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import Batch
from pyprune.config import CalibrationConfig
from pyprune.depth.config import StructureConfig
from pyprune.depth.criteria import token_losses
from pyprune.depth.decision import DepthDecision
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.greedy import in_parts
from pyprune.depth.registry import DEPTH_METHODS, run_search
from pyprune.depth.score import Scorer
from pyprune.errors import UserError
from pyprune.models import running
from pyprune.models.adapter import Adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_naive(family):
    model = model_of(family)
    naive = search(model, config(mode="naive"))
    close(search(model, config()), naive)
    assert naive.evaluations == 6 + 5 + 4
    assert [len(s.candidates) for s in naive.steps] == [6, 5, 4]


@pytest.mark.parametrize("method", ["blockpruner", "sleb"])
@pytest.mark.parametrize("objective", ["perplexity", "kl"])
def test_exact_is_naive_by_objective(method, objective):
    model = model_of("llama", 5)
    options = {"objective": objective, "every": 2}
    naive = search(model, config(method, mode="naive", **options))
    close(search(model, config(method, **options)), naive)
    if objective == "kl":
        assert naive.dense == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("objective", ["perplexity", "kl"])
def test_logits_a_few_positions_at_a_time_change_nothing(objective, monkeypatch):
    model = model_of("llama", 4)
    graph, removed = ResidualGraph.of(model), [Branch("mlp", 1)]
    batches = [Batch(tiny_tokens(2, 11)), Batch(tiny_tokens(1, 6))]
    expected = Scorer(graph, batches, objective, 2).score_naive(removed)
    losses = token_losses(graph, graph.start(batches[0])[0].total, batches[0])
    monkeypatch.setattr(running, "LOGITS_BYTES", 4 * 64 * 2 * 3)  # 3 positions of 2 sequences
    sizes = []
    model.lm_head.register_forward_hook(lambda _m, _i, logits: sizes.append(logits.shape[:2]))
    assert Scorer(graph, batches, objective, 2).score(removed) == pytest.approx(expected, rel=1e-5)
    assert {(2, 3), (2, 2), (1, 3)} == set(sizes)
    sizes.clear()
    pieces = token_losses(graph, graph.start(batches[0])[0].total, batches[0])
    torch.testing.assert_close(pieces, losses)
    assert sizes == [(2, 3), (2, 3), (2, 3), (2, 1)]


def test_padding_ragged_batches_and_parallel_layers():
    model = model_of("phi", 4)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:], mask[2, 1:] = 0, 0  # the last row has no target at all
    data = as_token_set(
        [Batch(tiny_tokens(3, 12), mask), Batch(tiny_tokens(1, 9))], vocabulary=None, positions=None
    )
    naive = search(model, config(mode="naive"), data)
    close(search(model, config(), data), naive)
    # The padding's tokens do not matter.
    data.batches[0].input_ids[mask == 0] = 5
    close(search(model, config(), data), naive)


@pytest.mark.parametrize("width", [1, 3, 64])
def test_little_memory_changes_nothing(width, monkeypatch):
    from pyprune.depth import greedy

    model = model_of("mistral", 4)
    roomy = search(model, config(count=4))

    class Tight(greedy.WalkDown):
        def __init__(self, graph, scorer, memory, width, units):
            super().__init__(graph, scorer, 20_000, width, units)
            assert self.stride > 2 and self._room[0] == 3 and self.checkpoints == 0

    monkeypatch.setattr(greedy, "WalkDown", Tight)
    close(search(model, config(count=4, width=width)), roomy)


def _ignore(*_args):
    """Takes what the class would set."""


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("method, mode", [("blockpruner", "exact"), ("sleb", "exact"),
                                          ("blockpruner", "fast")])  # fmt: skip
def test_streams_go_on_where_they_were(family, method, mode, monkeypatch):
    """The same scores for less work: sweeps after the first do not begin at the candidates."""
    from pyprune.depth import walkdown

    model, ran = model_of(family, 8), []
    step = walkdown.WalkDown._step

    def counted(self, i, branch, streams, removed):
        ran[-1] += len(streams) * (branch not in removed)
        return step(self, i, branch, streams, removed)

    monkeypatch.setattr(walkdown.WalkDown, "_step", counted)
    found = []
    for checkpoints, room in ((0, 99), (5, 99), (5, 3)):  # room: streams that live at once
        monkeypatch.setattr(walkdown, "CHECKPOINTS", checkpoints)
        monkeypatch.setattr(
            walkdown.WalkDown, "_room", property(lambda _, n=room: [n] * 4, _ignore), raising=False
        )
        ran.append(0)
        found.append(search(model, config(method, count=5, mode=mode)))
    close(found[1], found[0])
    close(found[2], found[0])
    assert max(ran[1:]) < 0.95 * ran[0]


def test_perplexity_is_the_mean_of_row_means():
    model = model_of("llama")
    data = tokens((3,))
    ids = data.batches[0].input_ids
    graph = ResidualGraph.of(model)
    found = search(model, config(count=1), data)
    for name, branch in (("A1", Branch("attention", 1)), ("M2", Branch("mlp", 2))):
        with torch.no_grad(), graph.skipping([branch]):
            logits = model(input_ids=ids, use_cache=False).logits
        rows = [F.cross_entropy(x[:-1].double(), y[1:]) for x, y in zip(logits, ids, strict=True)]
        expected = math.exp(sum(rows) / len(rows))
        assert found.steps[0].candidates[name] == pytest.approx(expected, rel=1e-5)


def test_ties_go_to_attention_then_to_the_lower_layer():
    model = model_of("llama", 4)
    with torch.no_grad():
        for layer in model.model.layers:  # nothing adds anything: all scores are equal
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.zero_()
                linear.bias.zero_()
    for mode in ("exact", "naive"):
        found = search(model, config(count=5, mode=mode))
        assert [str(b) for b in found.removed] == ["A0", "A1", "A2", "A3", "M0"]


def test_lists_are_prefixes_and_independent_of_the_batch_split():
    model = model_of("qwen3", 4)
    long = search(model, config(count=5))
    assert search(model, config(count=3)).removed == long.removed[:3]
    whole = tiny_tokens(4, 12)
    split = as_token_set([whole[:1], whole[1:]], vocabulary=None, positions=None)
    one = as_token_set([whole], vocabulary=None, positions=None)
    close(search(model, config(), split), search(model, config(), one))


def test_fast_audited_every_round_is_exact_and_lazy_looks_at_less():
    model = model_of("llama", 6)
    data = tokens((2, 2, 2, 2))
    exact = search(model, config(count=5), data)
    audited = search(model, config(count=5, mode="fast", audit_every=1), data)
    assert audited.removed == exact.removed
    lazy = search(model, config(count=5, mode="fast", audit_every=0, looks=2), data)
    assert len(set(lazy.removed)) == 5
    assert sum(s.evaluations for s in lazy.steps[1:]) < sum(s.evaluations for s in exact.steps[1:])
    # All are drawn: those that halving dropped as what they seemed to cost.
    assert lazy.importance.keys() == exact.importance.keys()
    kept = [
        name
        for name, score in exact.importance.items()
        if lazy.importance[name] == pytest.approx(score, rel=1e-5)
    ]
    assert str(lazy.removed[0]) in kept and 1 <= len(kept) < len(exact.importance)
    # Every accepted score is a true one: that of the model after the removal.
    graph = ResidualGraph.of(model)
    for k, step in enumerate(lazy.steps):
        with graph.skipping(lazy.removed[: k + 1]), torch.no_grad():
            rows = [
                F.cross_entropy(model(input_ids=r[None], use_cache=False).logits[0, :-1], r[1:])
                for b in data.batches
                for r in b.input_ids
            ]
        assert step.score == pytest.approx(math.exp(sum(rows) / len(rows)), rel=1e-4)


def test_halving_has_parts_to_halve_however_the_batches_are():
    masks = torch.ones(8, 12, dtype=torch.int64)
    for sizes, parts in (((8,), [2, 2, 2, 2]), ((3, 2), [2, 1, 1, 1]), ((1,), [1]),
                         ((2, 2, 1, 1, 1), [2, 2, 1, 1, 1])):  # fmt: skip
        data = [Batch(tiny_tokens(n, 12), masks[:n]) for n in sizes]
        cut = in_parts(data)
        assert [len(b.input_ids) for b in cut] == parts
        assert [b.attention_mask.shape for b in cut] == [b.input_ids.shape for b in cut]
        whole = [torch.cat([b.input_ids for b in of]) for of in (data, cut)]
        assert torch.equal(*whole)
    assert all(b.attention_mask is None for b in in_parts([Batch(tiny_tokens(8, 12))]))
    model = model_of("llama", 6)
    ids = tiny_tokens(8, 12)
    one, four = (
        search(model, config(count=1, mode="fast"), as_token_set(
            list(ids.split(rows)), vocabulary=None, positions=None
        ))
        for rows in (8, 2)
    )  # fmt: skip
    assert one.evaluations == four.evaluations == 12 + 6 + 3
    close(one, four)


def test_modes_of_blocks_and_protection():
    model = model_of("llama", 4)
    only = search(model, config(blocks="attention", protect_first=1, protect_last=1, count=2))
    assert set(only.removed) == {Branch("attention", 1), Branch("attention", 2)}
    assert {b.kind for b in search(model, config(blocks="mlp")).removed} == {"mlp"}
    layers = search(model, config("sleb", count=2)).steps
    assert {step.unit[0].layer for step in layers} == {1, 2}
    assert all(len(step.unit) == 2 for step in layers)


@pytest.mark.parametrize("by", ["params", "count", "latency"])
def test_ratio_is_reached_by_one_unit(by):
    model = model_of("llama", 4)
    found = run_search(model, Adapter.of(model), tokens(), StructureConfig(ratio=0.3, by=by))
    graph = ResidualGraph.of(model)
    if by == "params":
        total = sum(p.numel() for p in model.parameters())
        shares = [graph.removed_parameters(found.removed[:k]) / total for k in range(8)]
        assert shares[len(found.removed) - 1] < 0.3 <= shares[len(found.removed)]
        assert found.steps[-1].parameters == total - graph.removed_parameters(found.removed)
    elif by == "count":
        assert len(found.removed) == 2  # of 8: 2.4 rounds to 2
    else:
        assert 1 <= len(found.removed) < 8


def test_llm_drop_against_hooks():
    model = model_of("gemma2", 4)
    data = tokens((2,))
    found = search(model, config("llm-drop", blocks="mixed"), data)
    with torch.no_grad():
        states = []
        hook = model.model.layers[-1].register_forward_hook(lambda m, i, o: states.append(o))
        graph = ResidualGraph.of(model)
        with graph.skipping([Branch("mlp", 3)]):
            states.clear()
            model(input_ids=data.batches[0].input_ids, use_cache=False)
            before = states[-1]
        model(input_ids=data.batches[0].input_ids, use_cache=False)
        hook.remove()
    cosine = torch.cosine_similarity(before.double(), states[-1].double(), dim=-1).mean()
    assert found.importance["M3"] == pytest.approx(1 - float(cosine), rel=1e-4)
    ranked = sorted(found.importance, key=lambda name: found.importance[name])
    assert [str(b) for b in found.removed] == ranked[:3]
    assert {b.kind for b in search(model, config("llm-drop", iterative=True)).removed} == {
        "attention"
    }


@pytest.mark.parametrize("method", ["blockpruner", "sleb", "llm-drop"])
def test_add_ons_leave_the_search_alone(method):
    plain = search(model_of("llama", 4), config(method, count=2))
    more = search(model_of("llama", 4), config(method, count=2, compensate=True, refit=True))
    assert more.steps == plain.steps and plain.transforms == ()
    assert {t["kind"] for t in more.transforms} <= {"compensate", "refit"} and more.transforms


def test_add_ons_that_a_model_cannot_have_are_refused_before_the_search(monkeypatch):
    from pyprune.depth.score import Scorer

    monkeypatch.setattr(Scorer, "rows", lambda *_: pytest.fail("it searches"))
    with pytest.raises(UserError, match="end in a norm, not a linear map"):
        search(model_of("gemma2"), config(refit=True))


def test_protection_that_leaves_too_few_is_refused_before_the_search(monkeypatch):
    model = model_of("llama", 4)
    monkeypatch.setattr(ResidualGraph, "check", lambda _: None)
    model.model.forward = lambda *_, **__: pytest.fail("it searches")
    with pytest.raises(UserError, match="within reach of the 1 of 4 layers that may go"):
        search(model, config("shortgpt", count=2, keep_first=2, keep_last=1))


@pytest.mark.parametrize("mode", ["exact", "fast", "naive"])
def test_progress_is_told(mode):
    told = []
    model = model_of("llama")
    run_search(
        model,
        Adapter.of(model),
        tokens(),
        config(mode=mode, count=2),
        lambda words, done, total: told.append((words, done, total)),
    )
    assert any(words.startswith("removal 1: ") for words, _, _ in told)
    assert [words.startswith("removed") for words, _, _ in told].count(True) == 2
    shares = [done for _, done, _ in told]
    assert shares == sorted(shares) and shares[-1] == 1.0 and {t for _, _, t in told} == {1.0}


def test_decision_round_trip():
    found = search(model_of("llama"), config())
    values = json.loads(json.dumps(found.to_dict()))
    assert DepthDecision.from_dict(values) == found
    with pytest.raises(UserError, match="expected one, got something else"):
        DepthDecision.from_dict({"steps": [{"unit": 3}]})
    with pytest.raises(UserError, match="got mlp of layer 9"):
        DepthDecision(
            "x",
            "block",
            3,
            (
                found.steps[0],
                type(found.steps[0])((Branch("mlp", 9),)),
            ),
        )


def test_bad_requests():
    model = model_of("llama", 2)
    with pytest.raises(UserError, match=r"at most 3 branches .*got 4"):
        search(model, config(count=4))
    with pytest.raises(UserError, match=r"of the parameters .*got 0.99"):
        run_search(model, Adapter.of(model), tokens(), StructureConfig(ratio=0.99))
    with pytest.raises(UserError, match=r"at most 0 layers \(0 of 2 layers may go\), got 1"):
        search(model, config("sleb", count=1))  # both layers are protected
    one = model_of("llama", 1)
    with pytest.raises(UserError, match="at most 0 layers"):
        search(one, config("sleb", count=1, protect_first=0, protect_last=0))
    short = as_token_set([tiny_tokens(2, 1)], vocabulary=None, positions=None)
    with pytest.raises(UserError, match="sequences of 2 tokens or more"):
        search(model, config(count=1), short)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"dense model scores nan; .* begins after the final norm"):
        search(model, config(count=1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of ratio and count"),
        ({"ratio": 0.1, "count": 2}, "exactly one of ratio and count"),
        ({"ratio": 0.0}, "between 0 and 1, got 0.0"),
        ({"ratio": 1}, "between 0 and 1"),
        ({"ratio": float("nan")}, "ratio: expected a number"),
        ({"ratio": "half"}, "ratio: expected a number, got 'half'"),
        ({"count": 0}, "whole number from 1"),
        ({"count": True}, "count: expected a whole number"),
        ({"count": 1, "method": "blokpruner"}, "did you mean blockpruner"),
        ({"count": 1, "method": 3}, "method: expected text"),
        ({"count": 1, "by": "flops"}, "by: expected one of"),
        ({"count": 1, "fill": "none"}, "fill: expected one of"),
        ({"count": 1, "device": "tpu"}, "device: expected auto"),
        ({"count": 1, "method_options": {"mod": "fast"}}, "did you mean mode"),
        ({"count": 1, "method_options": {"mode": "slow"}}, "expected exact or fast or naive"),
        ({"count": 1, "method_options": {"every": "x"}}, "every: expected a whole number"),
        ({"count": 1, "method_options": {"every": 0}}, "every: expected at least 1"),
        (
            {"count": 1, "method_options": {"protect_first": -1}},
            "protect_first: expected 0 or more, got -1",
        ),
        ({"count": 1, "method_options": {"state": 1}}, "state: expected text or none"),
        ({"count": 1, "calibration": {"nsample": 1}}, "did you mean nsamples"),
        ({"count": 1, "raito": 1}, "did you mean ratio"),
    ],
)
def test_bad_configs(given, message):
    with pytest.raises(UserError, match=message):
        StructureConfig.from_dict(given)


def test_config_round_trips(tmp_path):
    given = {"mode": "fast", "looks": 3, "state": None, "blocks": "mlp"}
    shown = CalibrationConfig(nsamples=4, seqlen=64)
    built = StructureConfig(ratio=0.2, by="latency", method_options=given, calibration=shown)
    assert built.own_options().looks == 3 and built.own_options().state is None
    assert StructureConfig.from_yaml(built.to_yaml()) == built
    (tmp_path / "run.yaml").write_text(built.to_yaml())
    assert StructureConfig.load(tmp_path / "run.yaml") == built
    drop = StructureConfig("llm-drop", count=1, method_options={"iterative": True})
    assert drop.own_options().iterative is True
    assert StructureConfig.from_dict({"count": 1, "calibration": {"seed": 3}}).calibration == (
        CalibrationConfig(nsamples=32, seqlen=512, seed=3)
    )
    assert {"blockpruner", "sleb", "llm-drop"} <= set(DEPTH_METHODS.load())
