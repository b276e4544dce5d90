"""Wanda-sp and FLAP against computations spelled out here."""

import itertools
import math

import pytest
import torch
from saved_models import reloaded, save_model
from tiny_models import MOE_FAMILIES, logits, tiny_model, tiny_tokens

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.stats import MomentStatistic
from pyprune.calibration.tokens import Batch
from pyprune.errors import UserError
from pyprune.width.config import WidthConfig
from pyprune.width.flap import compensate, flap_scores, give_biases
from pyprune.width.registry import WIDTH_METHODS, run_width
from pyprune.width.select import best, globally, prunable, uniform_sizes
from pyprune.width.structure import Widths
from pyprune.width.wanda_sp import wanda_sp_scores

GQA = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}


def llama(**more):
    return tiny_model("llama", **{**GQA, "intermediate_size": 48, **more})


def token_set(rows=4, length=12, padded=False):
    ids = tiny_tokens(rows, length)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 8:] = 0
        mask[3, 5:] = 0
    batches = [Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])]
    return as_token_set(batches, vocabulary=64, positions=128)


def writer_inputs(model, tokens):
    """Name of a writer -> [tokens, C] fp64, from hooks and whole forwards."""
    widths = Widths.of(model)
    seen = {g.name: [] for g in widths.groups}
    handles = []
    for group in widths.groups:
        module = model.get_submodule(group.name)
        handles.append(
            module.register_forward_pre_hook(lambda _m, a, n=group.name: seen[n].append(a[0]))
        )
    found = {name: [] for name in seen}
    with torch.no_grad():
        for batch in tokens.batches:
            for held in seen.values():
                held.clear()
            model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            real = batch.attention_mask.bool()
            for name, held in seen.items():
                found[name].append(held[0][real].double())
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_moments_equal_two_passes_however_they_are_split():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=gen, dtype=torch.float64) + 1e4
    whole, parts = MomentStatistic(7), MomentStatistic(7)
    whole.update(x)
    for start in range(0, 50, 9):
        parts.update(x[start : start + 9])
        parts.update(x[:0])
    for moments in (whole, parts):
        assert moments.tokens == 50 and moments.finite()
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(moments.variance(), x.var(0, correction=0), rtol=1e-9, atol=0)
    single = MomentStatistic(7)
    single.update((x - 1e4 + 30).float())
    torch.testing.assert_close(single.mean, x.mean(0) - 1e4 + 30, rtol=1e-6, atol=0)
    torch.testing.assert_close(single.variance(), x.var(0, correction=0), rtol=1e-5, atol=0)
    whole.update(torch.full((1, 7), math.nan))
    assert not whole.finite()


@pytest.mark.parametrize("padded", [False, True])
def test_flap_scores_follow_the_paper(padded):
    model, tokens = llama(), token_set(padded=padded)
    inputs = writer_inputs(model, tokens)
    for group in Widths.of(model).groups:
        x = inputs[group.name]
        w = model.get_submodule(group.name).weight.detach().double()
        metric = x.var(0, correction=0) * w.square().sum(0)
        if group.kind == "heads":
            metric = metric.square()
        standard = (metric - metric.mean()) / metric.std()
        expected = standard.view(group.units, -1).mean(1)
        moments = MomentStatistic(x.shape[1])
        moments.update(x)
        got = flap_scores(group, moments.variance())
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_flap_end_to_end_equals_the_oracle():
    """Adaptive structure with biases: units chosen, biases and logits from fp64 statistics."""
    model, tokens, ids = llama(), token_set(padded=True), tiny_tokens(2, 9)
    inputs = writer_inputs(model, tokens)
    oracle = llama()
    widths = Widths.of(oracle)
    scores = {}
    for group in widths.groups:
        metric = inputs[group.name].var(0, correction=0)
        metric = metric * group.writer.weight().double().square().sum(0)
        metric = metric.square() if group.kind == "heads" else metric
        standard = (metric - metric.mean()) / metric.std()
        scores[group.name] = standard[group.columns].mean(1)
    total = sum(p.numel() for p in oracle.parameters())
    order = sorted(
        (float(s), i, u) for i, g in enumerate(widths.groups) for u, s in enumerate(scores[g.name])
    )
    gone, cost = {g.name: [] for g in widths.groups}, 0
    for _, i, unit in order:
        if cost >= 0.3 * total:
            break
        group = widths.groups[i]
        if len(gone[group.name]) < group.units - 1:
            gone[group.name].append(unit)
            cost += group.unit_parameters
    with torch.no_grad():
        for group in widths.groups:
            module = oracle.get_submodule(group.name)
            columns = group.columns[gone[group.name]].flatten()
            mean = inputs[group.name].mean(0)
            module.bias += (module.weight[:, columns].double() @ mean[columns]).float()
            module.weight[:, columns] = 0
    config = WidthConfig("flap", ratio=0.3, method_options={"structure": "adaptive"})
    decision = run_width(model, tokens, config)
    assert decision.removed == {k: sorted(v) for k, v in gone.items() if v}
    torch.testing.assert_close(logits(model, ids), logits(oracle, ids), rtol=1e-4, atol=2e-5)
    assert decision.wanted == total - cost


def test_compensation_keeps_the_mean_output():
    """After it, the mean output of each writer on the calibration text is what it was."""
    model, tokens = llama(), token_set()
    inputs = writer_inputs(model, tokens)
    widths = Widths.of(model)
    kept = {g.name: torch.arange(0, g.units, 2) for g in widths.groups}
    before = {}
    for group in widths.groups:
        module = model.get_submodule(group.name)
        before[group.name] = (inputs[group.name].float() @ module.weight.T + module.bias).mean(0)
    means = {name: x.mean(0) for name, x in inputs.items()}
    with torch.no_grad():
        assert compensate(widths, kept, means) == [g.name for g in widths.groups]
    widths.mask(kept)
    for group in widths.groups:
        module = model.get_submodule(group.name)
        after = (inputs[group.name].float() @ module.weight.T + module.bias).mean(0)
        torch.testing.assert_close(after, before[group.name], rtol=1e-4, atol=1e-5)


def test_wanda_sp_equals_a_loop_over_layers():
    """Writer after writer, each scored on inputs from the model pruned so far."""
    model, tokens, ids = llama(), token_set(padded=True), tiny_tokens(2, 9)
    oracle = llama()
    widths = Widths.of(oracle)
    total = sum(p.numel() for p in oracle.parameters())
    sizes = uniform_sizes(widths, widths.groups, math.ceil(0.35 * total), 1)
    assert len({sizes[g.name] for g in widths.of_kind("heads")}) == 1
    gone = {}
    for group in widths.groups:
        x = writer_inputs(oracle, tokens)[group.name]
        w = group.writer.weight().double()
        per_column = w.abs().mean(0) * x.norm(dim=0)
        score = per_column[group.columns].sum(1)
        drop = score.sort(stable=True).indices[: group.units - sizes[group.name]]
        gone[group.name] = sorted(drop.tolist())
        with torch.no_grad():
            columns = group.columns[drop].flatten()
            oracle.get_submodule(group.name).weight[:, columns] = 0
    config = WidthConfig("wanda-sp", ratio=0.35, method_options={"multiple": 1})
    decision = run_width(model, tokens, config)
    assert decision.removed == {k: v for k, v in gone.items() if v}
    torch.testing.assert_close(logits(model, ids), logits(oracle, ids), rtol=1e-4, atol=2e-5)
    assert decision.parameters[1] == decision.wanted and not decision.zeroed
    step = sum(g.unit_parameters for g in widths.of_kind("mlp"))
    assert 0.35 * total <= decision.parameters[0] - decision.parameters[1] < 0.35 * total + step


def test_uniform_sizes_meet_the_target_within_one_step():
    model = llama()
    widths = Widths.of(model)
    total = sum(p.numel() for p in model.parameters())
    step = sum(g.unit_parameters for g in widths.of_kind("mlp"))
    for percent in range(2, 70, 3):
        target = total * percent // 100
        sizes = uniform_sizes(widths, widths.groups, target)
        removed = sum(g.unit_parameters * (g.units - sizes[g.name]) for g in widths.groups)
        assert target <= removed
        # A KV group everywhere is the coarser step; it is taken only as the share demands it.
        heads = widths.of_kind("heads")
        share = max((g.units - sizes[g.name]) / g.units for g in widths.of_kind("mlp"))
        assert removed < target + step or sizes[heads[0].name] < heads[0].units
        assert all(sizes[h.name] == sizes[heads[0].name] for h in heads), share
    for multiple in (8, 16):
        sizes = uniform_sizes(widths, widths.of_kind("mlp"), total // 10, multiple)
        assert all(size % multiple == 0 for size in sizes.values())


def test_choices():
    scores = {"a": torch.tensor([3.0, 1.0, 1.0, 2.0])}
    assert best(scores, {"a": 2})["a"].tolist() == [0, 3]
    assert best(scores, {"a": 3})["a"].tolist() == [0, 2, 3]  # the lower index went first
    model = llama()
    widths = Widths.of(model)
    groups = widths.of_kind("mlp")
    flat = {g.name: torch.full((g.units,), float(i)) for i, g in enumerate(groups)}
    target = groups[0].unit_parameters * (groups[0].units + 3)
    kept = globally(widths, groups, flat, target)
    assert [len(kept[g.name]) for g in groups] == [1, groups[1].units - 4, groups[2].units]
    with pytest.raises(UserError, match="ratio: expected at most"):
        globally(widths, groups, flat, sum(g.unit_parameters * g.units for g in groups))
    with pytest.raises(UserError, match="ratio: expected at most"):
        uniform_sizes(widths, groups, sum(g.unit_parameters * g.units for g in groups))


CASES = [
    ("llama", {"attention_bias": False, "mlp_bias": False}),
    ("mistral", {}),
    ("qwen3", {}),
    ("gemma3_text", {}),
    ("opt", {}),
    ("gpt2", {}),
    ("falcon", {}),
    ("mixtral", {}),
    ("qwen2_moe", {}),
]


@pytest.mark.parametrize("method", ["wanda-sp", "flap"])
@pytest.mark.parametrize(("family", "more"), CASES, ids=[c[0] for c in CASES])
def test_every_family_saves_and_reloads(method, family, more, tmp_path):
    ids, tokens = tiny_tokens(2, 9), token_set(padded=True)
    model = tiny_model(family, **more)
    before = sum(p.numel() for p in model.parameters())
    decision = run_width(
        model, tokens, WidthConfig(method, ratio=0.1, method_options={"multiple": 1})
    )
    after = sum(p.numel() for p in model.parameters())
    assert decision.parameters == (before, after) and after < before and not decision.zeroed
    weights = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("bias"))
    assert after == decision.wanted and weights <= 0.9 * before  # FLAP may have added biases
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    exact = {} if family in MOE_FAMILIES else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **exact)
    if method == "wanda-sp":  # nothing but the removal: it can be repeated on the dense model
        dense = tiny_model(family, **more)
        Widths.of(dense).mask(decision.kept())
        torch.testing.assert_close(logits(dense, ids), logits(model, ids), rtol=1e-4, atol=2e-5)


def test_biases_appear_only_where_they_are_needed():
    tokens = token_set()
    model = llama(attention_bias=False, mlp_bias=False)
    decision = run_width(
        model,
        tokens,
        WidthConfig("flap", ratio=0.1, method_options={"units": "mlp", "multiple": 1}),
    )
    assert model.config.mlp_bias and not model.config.attention_bias
    assert model.model.layers[0].mlp.down_proj.bias.abs().sum() > 0
    assert any("mlp_bias was switched on" in note for note in decision.notes)
    assert decision.parameters[0] == sum(
        p.numel() for p in llama(attention_bias=False, mlp_bias=False).parameters()
    )
    mistral = tiny_model("mistral")
    decision = run_width(
        mistral, tokens, WidthConfig("flap", ratio=0.1, method_options={"multiple": 1})
    )
    assert any("MistralConfig has no mlp_bias" in note for note in decision.notes)
    without = llama(attention_bias=False, mlp_bias=False)
    decision = run_width(
        without, tokens, WidthConfig("flap", ratio=0.1, method_options={"bias": False})
    )
    assert not without.config.mlp_bias and not decision.transforms


def test_compensation_lowers_the_error():
    tokens = token_set()
    dense = logits(llama(), tiny_tokens(4, 12))
    errors = {}
    for bias in (True, False):
        model = llama()
        config = WidthConfig("flap", ratio=0.3, method_options={"bias": bias, "multiple": 1})
        run_width(model, tokens, config)
        errors[bias] = float((logits(model, tiny_tokens(4, 12)) - dense).square().mean())
    assert errors[True] < errors[False]


def test_experts_without_tokens_are_judged_by_their_weights():
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0  # never among the two best of positive logits
            layer.mlp.gate.weight[:3].abs_()
            layer.post_attention_layernorm.weight.abs_()
    tokens = as_token_set([tiny_tokens(1, 3)], vocabulary=64, positions=128)
    decision = run_width(
        model, tokens, WidthConfig("wanda-sp", ratio=0.1, method_options={"multiple": 1})
    )
    assert any("too few tokens" in note for note in decision.notes)


@pytest.mark.parametrize("method", WIDTH_METHODS.load())
def test_bf16(method):
    model = llama(attention_bias=False, mlp_bias=False, hidden_size=64).bfloat16()
    options = {"iterations": 2} if method == "disp-llm" else {}
    config = WidthConfig(method, ratio=0.1, method_options=options)
    decision = run_width(model, token_set(padded=True), config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert decision.wanted < decision.parameters[0]
    assert logits(model, tiny_tokens()).isfinite().all()


SPLIT = {
    "wanda-sp": {"multiple": 1},
    "flap": {"multiple": 1},
    "multipruner": {},
    "llm-surgeon-width": {"multiple": 1, "shots": 2},
    "slicegpt": {"multiple": 4},
}


def test_of_all_methods_one_takes_a_step_a_batch():
    """DISP-LLM: how many sequences a step of its training sees is for the user to say."""
    assert set(WIDTH_METHODS.load()) - set(SPLIT) == {"disp-llm"}


@pytest.mark.parametrize("method", SPLIT)
def test_results_do_not_depend_on_the_batches(method):
    """Sequences of one length or, padded, of several: however they come together."""
    config = WidthConfig(method, ratio=0.2, method_options=SPLIT[method])
    ids, mask = tiny_tokens(6, 12), torch.ones(6, 12, dtype=torch.int64)
    mask[4:, 9:] = 0
    found = []
    for rows in ([6], [1] * 6, [1, 3, 2]):
        batches = [Batch(*some) for some in zip(ids.split(rows), mask.split(rows), strict=True)]
        model = llama(attention_bias=False, mlp_bias=False, num_hidden_layers=3)
        decision = run_width(model, as_token_set(batches, vocabulary=64, positions=128), config)
        found.append((decision.removed, decision.sizes, logits(model, tiny_tokens(2, 9, seed=7))))
    for removed, sizes, got in found[1:]:
        assert (removed, sizes) == found[0][:2] and (removed or method == "slicegpt")
        torch.testing.assert_close(got, found[0][2], rtol=1e-3, atol=1e-4)


def test_what_disp_llm_learns_does_not_depend_on_padding():
    config = WidthConfig("disp-llm", ratio=0.2, method_options={"multiple": 1, "iterations": 4})
    ids = tiny_tokens(4, 12)
    padded = torch.cat([ids, torch.full((4, 3), 5)], 1)
    mask = (torch.arange(15) < 12).long().expand(4, 15)
    found = []
    for batches in (
        [Batch(some) for some in ids.split(2)],
        [Batch(*some) for some in zip(padded.split(2), mask.split(2), strict=True)],
    ):
        model = llama()
        decision = run_width(model, as_token_set(batches, vocabulary=64, positions=128), config)
        found.append((decision.removed, decision.transforms[0]["losses"]))
    assert found[0][0] == found[1][0] and found[0][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_what_cannot_be_asked_for():
    with pytest.raises(UserError, match="did you mean flap"):
        WidthConfig("flapp", ratio=0.1)
    for bad in (0, 1, -0.1, "0.2", True):
        with pytest.raises(UserError, match="ratio: expected a number"):
            WidthConfig("flap", ratio=bad)
    with pytest.raises(UserError, match="multiple: expected at least 1"):
        WidthConfig("flap", ratio=0.1, method_options={"multiple": 0})
    with pytest.raises(UserError, match="no option 'strukture', did you mean structure"):
        WidthConfig("flap", ratio=0.1, method_options={"strukture": "uniform"})
    with pytest.raises(UserError, match="ratio: expected at most"):
        run_width(llama(), token_set(), WidthConfig("wanda-sp", ratio=0.95))
    # The whole request, not the first shot's share, and before the model runs for it.
    for structure, method in itertools.product(
        ("uniform", "adaptive"), ("llm-surgeon-width", "flap")
    ):
        config = WidthConfig(method, ratio=0.95, method_options={"structure": structure})
        model = llama()
        model.model.layers[0].forward = lambda *_, **__: pytest.fail("it runs")
        with pytest.raises(UserError, match=r"ratio: expected at most 0\..*, got 0.950"):
            run_width(model, token_set(), config)
    with pytest.raises(UserError, match="units=stock"):
        prunable(Widths.of(tiny_model("bloom")), "stock")


def test_weights_that_are_no_numbers_are_refused():
    for method, options in (("wanda-sp", {}), ("flap", {}), ("flap", {"structure": "adaptive"})):
        model = llama()
        # Of the last layer: no later statistic sees it.
        model.model.layers[-1].mlp.down_proj.weight.data[3, 5] = math.nan
        with pytest.raises(UserError, match=r"mlp\.down_proj: expected scores that are numbers"):
            run_width(model, token_set(), WidthConfig(method, ratio=0.2, method_options=options))


def test_scores_of_wanda_sp():
    model = llama()
    group = Widths.of(model).of_kind("heads")[0]
    norms = torch.rand(group.columns.numel())
    w = group.writer.weight()
    expected = [
        float(sum(w[:, c].abs().mean() * norms[c] for c in group.columns[u].tolist()))
        for u in range(group.units)
    ]
    torch.testing.assert_close(wanda_sp_scores(group, norms), torch.tensor(expected))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_biases_that_exist_are_used(family):
    model = tiny_model(family)
    widths = Widths.of(model)
    kept = {g.name: torch.arange(g.units // 2) for g in widths.groups if g.kind == "mlp"}
    assert give_biases(widths, kept) == []
    means = {g.name: torch.randn(g.columns.numel(), dtype=torch.float64) for g in widths.groups}
    before = {g.name: g.writer.bias().clone() for g in widths.groups}
    assert compensate(widths, kept, means) == list(kept)
    for group in widths.groups:
        w, gone = group.writer.weight(), slice(group.units // 2, None)
        added = w[:, gone].double() @ means[group.name][gone] if group.name in kept else 0
        torch.testing.assert_close(group.writer.bias(), (before[group.name] + added).float())
