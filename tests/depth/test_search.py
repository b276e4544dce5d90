"""The searches against the naive loop, and what a decision records."""

import json
import math
from itertools import pairwise

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokens
from torch.nn import functional as F

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import Batch
from pyprune.config import CalibrationConfig
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import Decision, load_decision
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.greedy import rate
from pyprune.depth.registry import DEPTH_METHODS, run_search
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter


def model_of(family, layers=3):
    more = {"n_layer": layers} if family in ("gpt2", "bloom") else {"num_hidden_layers": layers}
    if "gemma" in family:
        kinds = ["sliding_attention", "full_attention"]
        more["layer_types"] = [kinds[i % 2] for i in range(layers)]
    return tiny_model(family, **more)


def tokens(rows=(2, 2), length=12):
    data = [tiny_tokens(r, length, seed=k) for k, r in enumerate(rows)]
    return as_token_set(data, vocabulary=None, positions=None)


def search(model, config, data=None):
    return run_search(model, Adapter.of(model), data or tokens(), config)


def config(method="blockpruner", count=3, **options):
    return StructureConfig(method, count=count, method_options=options)


def close(a, b):
    assert a.removed == b.removed
    for x, y in zip(a.steps, b.steps, strict=True):
        assert x.candidates.keys() == y.candidates.keys()
        for name, score in x.candidates.items():
            assert score == pytest.approx(y.candidates[name], rel=1e-4)


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
        def __init__(self, graph, scorer, memory, width):
            super().__init__(graph, scorer, 20_000, width)
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
            walkdown.WalkDown, "_room", property(lambda _, n=room: [n, n], _ignore), raising=False
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


def of_share(ratio, by="params", method="blockpruner", **options):
    """The greedy list alone: exchanges have tests of their own."""
    alone = {"refine": "none"} if method == "blockpruner" else {}
    return StructureConfig(method, ratio=ratio, by=by, method_options=alone | options)


def seconds_of(graph, _batch):
    """Instead of timing: attention twice an MLP, later layers a little longer."""
    seconds = {b: (2.0 if b.kind == "attention" else 1.0) + b.layer / 100 for b in graph.branches}
    return seconds, sum(seconds.values()) + 3.0


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
    from pyprune.depth import budget

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
    with pytest.raises(UserError, match="blocks=pairs: expected a share"):
        search(model, config(count=2, blocks="pairs"))


def test_ties_by_rate_go_to_the_first():
    model = model_of("llama", 4)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
    for mode in ("naive", "exact"):
        found = search(model, of_share(0.3, mode=mode))
        assert [str(b) for b in found.removed][:3] == ["A0", "A1", "A2"]


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


def test_continues_from_its_state_file(tmp_path, monkeypatch):
    from pyprune.depth import walkdown

    file = str(tmp_path / "state.json")
    model = model_of("llama", 4)
    for mode in ("exact", "fast"):
        options = {"mode": mode, "audit_every": 3}
        whole = search(model, config(count=5, **options))
        search(model, config(count=3, state=file, **options))
        scored = []
        original = walkdown.WalkDown.score

        def counted(self, units, *args, _of=original, _to=scored):
            _to.append(len(units))
            return _of(self, units, *args)

        monkeypatch.setattr(walkdown.WalkDown, "score", counted)
        close(search(model, config(count=5, state=file, **options)), whole)
        assert sum(scored) == whole.steps[3].evaluations + whole.steps[4].evaluations
        monkeypatch.setattr(walkdown.WalkDown, "score", original)
        (tmp_path / "state.json").unlink()
    search(model, config(count=2, state=file))
    with pytest.raises(UserError, match="of another configuration"):
        search(model, config(count=2, state=file, objective="kl"))
    with pytest.raises(UserError, match="of another calibration text"):
        search(model, config(count=2, state=file), tokens((2, 3)))
    with pytest.raises(UserError, match="of another model"):
        search(tiny_model("llama", 1, num_hidden_layers=4), config(count=2, state=file))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot continue"):
        search(model, config(count=2, state=file))


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("by", ["params", "latency"])
def test_a_state_file_serves_any_share(mode, by, tmp_path, monkeypatch):
    """Also where the target had cut off what the last removals count for."""
    from pyprune.depth import budget

    model, data = model_of("llama", 6), tokens((2, 2, 2, 2))
    ratios = (0.25, 0.5, 0.1, 0.4, 0.25)
    options = {"mode": mode, "audit_every": 3, "blocks": "pairs"}
    monkeypatch.setattr(budget, "branch_seconds", seconds_of)
    fresh = {ratio: search(model, of_share(ratio, by, **options), data) for ratio in set(ratios)}
    lists = [fresh[ratio].removed for ratio in sorted(fresh)]
    assert any(b[: len(a)] != a for a, b in pairwise(lists))  # worth a test
    times = 1.0
    for ratio in ratios:
        monkeypatch.setattr(
            budget, "branch_seconds",
            lambda graph, batch, t=times: tuple(
                {b: s * t for b, s in x.items()} if isinstance(x, dict) else x * t
                for x in seconds_of(graph, batch)
            ),
        )  # fmt: skip
        times *= 1.5  # what was measured first stays what counts
        state = str(tmp_path / "state.json")
        close(search(model, of_share(ratio, by, state=state, **options), data), fresh[ratio])
    with pytest.raises(UserError, match="of another configuration"):
        search(model, of_share(0.3, by, state=state, compare="score", **options), data)
    other = "latency" if by == "params" else "params"
    with pytest.raises(UserError, match="of another configuration"):
        search(model, of_share(0.3, other, state=state, **options), data)


def test_notes_are_of_rounds_that_were_made(tmp_path):
    """Also when the state file is of a search that went further."""
    model, data = model_of("llama", 8), tokens((2, 2, 2, 2))
    options = {"mode": "fast", "audit_every": 1, "looks": 1, "state": str(tmp_path / "state.json")}
    long = search(model, config(count=8, **options), data)
    short = search(model, config(count=2, **options), data)
    rounds = [int(note.split(":")[0].removeprefix("round ")) for note in long.notes]
    assert rounds == sorted(rounds) and rounds[-1] > 2
    assert short.notes == tuple(n for n, r in zip(long.notes, rounds, strict=True) if r <= 2)
    assert search(model, config(count=8, **options), data).notes == long.notes


def test_states_that_were_cached_before_a_resumption_are_not_used(tmp_path):
    """A lazy round may begin deep down, at a state of the model without what a file named."""
    file, model = str(tmp_path / "state.json"), model_of("llama", 6)
    options = {"mode": "fast", "audit_every": 0, "looks": 2}
    whole = search(model, config(count=6, **options))
    for count in range(1, 6):
        search(model, config(count=count, state=file, **options))
    close(search(model, config(count=6, state=file, **options)), whole)


@pytest.mark.parametrize("method", ["blockpruner", "sleb", "llm-drop"])
def test_add_ons_leave_the_search_alone(method):
    plain = search(model_of("llama", 4), config(method, count=2))
    more = search(model_of("llama", 4), config(method, count=2, compensate=True, refit=True))
    assert more.steps == plain.steps and plain.transforms == ()
    assert {t["kind"] for t in more.transforms} <= {"compensate", "refit"} and more.transforms


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


def test_decision_round_trip(tmp_path):
    found = search(model_of("llama"), config())
    values = json.loads(json.dumps(found.to_dict()))
    assert Decision.from_dict(values) == found
    shared = {key: values.pop(key) for key in ("model", "config", "calibration")}
    (tmp_path / "pyprune.json").write_text(json.dumps({**shared, "decision": values}))
    assert load_decision(tmp_path) == load_decision(tmp_path / "pyprune.json") == found
    (tmp_path / "pyprune.json").write_text('{"schema": 1}')
    with pytest.raises(UserError, match="report of a structural run"):
        load_decision(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        load_decision(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="expected one, got something else"):
        Decision.from_dict({"steps": [{"unit": 3}]})
    with pytest.raises(UserError, match="got mlp of layer 9"):
        Decision(
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
    with pytest.raises(UserError, match="at most 0 layers"):
        search(model, config("sleb", count=1))  # both layers are protected
    one = model_of("llama", 1)
    with pytest.raises(UserError, match="at most 0 layers"):
        search(one, config("sleb", count=1, protect_first=0, protect_last=0))
    short = as_token_set([tiny_tokens(2, 1)], vocabulary=None, positions=None)
    with pytest.raises(UserError, match="sequences of 2 tokens or more"):
        search(model, config(count=1), short)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="the dense model scores nan"):
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
        ({"count": 1, "fill": "deci"}, "fill: expected one of"),
        ({"count": 1, "device": "tpu"}, "device: expected auto"),
        ({"count": 1, "method_options": {"mod": "fast"}}, "did you mean mode"),
        ({"count": 1, "method_options": {"mode": "slow"}}, "expected exact or fast or naive"),
        ({"count": 1, "method_options": {"every": "x"}}, "every: expected a whole number"),
        ({"count": 1, "method_options": {"every": 0}}, "every: expected at least 1"),
        ({"count": 1, "method_options": {"protect_first": -1}}, "protect_last: expected 0 or more"),
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
