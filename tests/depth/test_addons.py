"""Magnitude compensation and least-squares refit: stock architecture, and what they promise."""

import pytest
import torch
from depth_streams import POST_NORM, model_of, scaled_input, states_of
from saved_models import reloaded, save_model
from tiny_models import FAMILIES, tiny_model, tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import AddOns, apply_add_ons
from pyprune.depth.compensate import compensate, size_ratios, streams
from pyprune.depth.config import StructureConfig
from pyprune.depth.graph import KINDS, Branch, ResidualGraph, gaps
from pyprune.depth.refit import refit
from pyprune.depth.repack import repack
from pyprune.depth.ridge import LADDER
from pyprune.depth.save import drop_layers
from pyprune.depth.writers import writers
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.width.stream import untie


def layers(*indices):
    return [Branch(kind, i) for i in indices for kind in KINDS]


def test_gaps():
    assert gaps(layers(5, 2, 1, 7), 9) == [(2, 6), (10, 12), (14, 16)]
    assert gaps([Branch("mlp", 1), Branch("attention", 2), Branch("mlp", 3)], 4) == [(3, 5), (7, 8)]
    assert gaps([], 3) == []
    for bad in (layers(0, 1, 2), layers(-1), layers(3)):
        with pytest.raises(UserError, match="removed: expected"):
            gaps(bad, 3)


def test_streams_and_sizes():
    model, ids = model_of("llama"), tiny_tokens(3, 9)
    graph = ResidualGraph.of(model)
    with torch.no_grad():
        found = list(streams(graph, Batch(ids)))
        for i, state in enumerate(states_of(model, ids)):
            torch.testing.assert_close(found[2 * i], state.flatten(0, 1), rtol=1e-5, atol=1e-6)
        ratios = size_ratios(graph, [(2, 6), (3, 4)], [Batch(ids[:2]), Batch(ids[2:])])
    norms = [x.double().norm(dim=-1) for x in found]
    expected = [float((norms[end] / norms[first]).mean()) for first, end in ((2, 6), (3, 4))]
    assert ratios == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_compensation_is_a_larger_stream_and_reloads(family, tmp_path):
    model, ids = model_of(family), tiny_tokens(2, 16)
    before = states_of(model, ids)
    ratio = float((before[2].norm(dim=-1) / before[1].norm(dim=-1)).mean())
    one, two = model_of(family), model_of(family)
    drop_layers(one, [0, 2, 3])
    Adapter.of(one).blocks[1].register_forward_pre_hook(scaled_input(ratio), with_kwargs=True)
    factors = compensate(ResidualGraph.of(model), layers(1), [Batch(ids)])
    assert factors == pytest.approx([ratio]) and abs(ratio - 1) > 1e-3
    drop_layers(model, [0, 2, 3])
    with torch.no_grad():
        wanted, got = one(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        assert (got - wanted).norm() < 2e-3 * wanted.norm()
        drop_layers(two, [0, 2, 3])
        plain = two(ids, use_cache=False).logits
        assert (plain - wanted).norm() > 2 * (got - wanted).norm()
    assert model.config.tie_word_embeddings == two.config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in two.parameters())
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_two_gaps_multiply():
    model, ids = tiny_model("llama", num_hidden_layers=6), tiny_tokens()
    twin = tiny_model("llama", num_hidden_layers=6)
    first, second = compensate(ResidualGraph.of(model), layers(1, 3), [Batch(ids)])
    drop_layers(model, [0, 2, 4, 5])
    drop_layers(twin, [0, 2, 4, 5])
    for at, factor in ((1, first), (2, second)):
        twin.model.layers[at].register_forward_pre_hook(scaled_input(factor), with_kwargs=True)
    with torch.no_grad():
        wanted, got = twin(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    assert (got - wanted).norm() < 2e-3 * wanted.norm()


def test_output_that_depends_on_the_scale_is_refused():
    model, ids = model_of("llama"), tiny_tokens()
    model.model.norm = torch.nn.Identity()
    with pytest.raises(UserError, match="depends on the scale of the residual stream"):
        compensate(ResidualGraph.of(model), layers(2), [Batch(ids)])


def test_untying_gives_the_head_its_own_copy():
    model = model_of("qwen2")
    head = model.lm_head.weight.detach().clone()
    for _ in range(2):  # once is enough
        untie(model)
        assert torch.equal(model.lm_head.weight, head) and not model.config.tie_word_embeddings
        assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in POST_NORM])
def test_refit_brings_the_stream_closer(family, tmp_path):
    model, ids = model_of(family), tiny_tokens(6, 32)
    target = states_of(model, ids)[3]
    bare = model_of(family)
    drop_layers(bare, [0, 1, 3])
    without = (states_of(bare, ids)[2] - target).square().sum()
    (gap,) = refit(ResidualGraph.of(model), layers(2), [Batch(ids[:2]), Batch(ids[2:])], 1e-3)
    drop_layers(model, [0, 1, 3])
    got = (states_of(model, ids)[2] - target).square().sum()
    assert got < without
    assert gap["after"] < gap["before"]
    assert (gap["branch"], gap["removed"]) == ("M1", "A2+M2")
    # The reported errors are those that the models have.
    scale = target.square().sum()
    assert float(got / scale) == pytest.approx(gap["after"], rel=1e-2, abs=1e-5)
    assert float(without / scale) == pytest.approx(gap["before"], rel=1e-2, abs=1e-5)


def test_a_ridge_is_chosen_or_given_or_too_much_of_a_change():
    ids = tiny_tokens(6, 32)
    (chosen,) = refit(ResidualGraph.of(model_of("llama")), layers(2), [Batch(ids)])
    without, held_out = chosen["held_out"]
    assert chosen["ridge"] in LADDER and 0 < held_out < without
    assert chosen["after"] < chosen["before"]
    (given,) = refit(ResidualGraph.of(model_of("llama")), layers(2), [Batch(ids)], 1e-4)
    assert given["ridge"] == 1e-4 and given["held_out"] is None
    assert given["after"] < given["before"]
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="ridge: expected a positive number"):
            refit(ResidualGraph.of(model_of("llama")), layers(2), [Batch(ids)], bad)
        for method in ("blockpruner", "shortgpt", "angular", "llm-drop"):  # before any search
            with pytest.raises(UserError, match="ridge: expected a positive number or none"):
                StructureConfig(method, count=1, method_options={"ridge": bad})
    # Too few tokens to say anything: the model stays as it was.
    model = model_of("llama")
    before = [p.clone() for p in model.parameters()]
    (fit,) = refit(ResidualGraph.of(model), layers(2), [Batch(ids[:1, :3])])
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert same == (fit["ridge"] is None)
    assert (fit["after"] == fit["before"]) == same


def test_refit_of_two_gaps_uses_the_refitted_stream():
    ids = tiny_tokens(6, 32)
    model = tiny_model("llama", num_hidden_layers=6)
    target = states_of(model, ids)[5]
    first, second = refit(ResidualGraph.of(model), layers(1, 4), [Batch(ids)])
    drop_layers(model, [0, 2, 3, 5])
    got = (states_of(model, ids)[3] - target).square().sum() / target.square().sum()
    assert float(got) == pytest.approx(second["after"], rel=1e-2)
    assert first["after"] < first["before"] and second["after"] < second["before"]


def test_refit_refuses_and_skips():
    ids = tiny_tokens()
    with pytest.raises(UserError, match="end in a norm"):
        refit(ResidualGraph.of(model_of("gemma2")), layers(2), [Batch(ids)])
    model = model_of("llama")
    before = [p.clone() for p in model.parameters()]
    assert refit(ResidualGraph.of(model), layers(0, 1), [Batch(ids)]) == []
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_branch_that_adds_nothing_is_not_refitted():
    """As a model has them after re-packing: without it the equations are singular."""
    model, ids = model_of("llama"), tiny_tokens()
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            parameter.zero_()
    before = [p.clone() for p in model.parameters()]
    (fit,) = refit(ResidualGraph.of(model), layers(2), [Batch(ids)])
    assert fit["branch"] == "M1" and fit["before"] == fit["after"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


HALVES = [Branch("mlp", 1), Branch("attention", 2), Branch("attention", 3)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_single_branches_are_compensated(family):
    model, ids = model_of(family), tiny_tokens(2, 16)
    graph = ResidualGraph.of(model)
    found = gaps(HALVES, 4)
    assert found == [(3, 5), (6, 7)]
    expected = size_ratios(graph, found, [Batch(ids)])
    assert compensate(graph, HALVES, [Batch(ids)]) == pytest.approx(expected)
    with graph.skipping(HALVES):
        masked = model(ids, use_cache=False).logits
    repack(graph, HALVES)
    assert torch.equal(model(ids, use_cache=False).logits, masked)


@torch.no_grad()
@pytest.mark.parametrize("family", [*(f for f in FAMILIES if f not in POST_NORM), "gpt_oss"])
def test_single_branches_are_refitted(family):
    model, ids = model_of(family), tiny_tokens(6, 32)
    graph, batch = ResidualGraph.of(model), Batch(ids)
    target = list(streams(graph, batch))[7]

    def at_the_end():
        state, context = graph.start(batch)
        for branch in graph.branches[:7]:
            gone = branch in HALVES
            state = graph.skip(branch, state) if gone else graph.run(branch, state, context)
        return (state.total.flatten(0, 1) - target).square().sum() / target.square().sum()

    without = float(at_the_end())
    first, second = refit(graph, HALVES, [Batch(ids[:2]), Batch(ids[2:])], 1e-2)
    assert (first["branch"], first["removed"]) == ("A1", "M1+A2")
    assert (second["branch"], second["removed"]) == ("M2", "A3")
    assert all(gap["after"] < gap["before"] for gap in (first, second))
    assert float(at_the_end()) == pytest.approx(second["after"], rel=1e-2, abs=1e-5)
    assert second["after"] < without


def test_both_together():
    ids = tiny_tokens(4, 16)
    model = model_of("llama")
    both = AddOns(compensate=True, refit=True)
    removed = [Branch("attention", 0), Branch("mlp", 0), *HALVES]
    kinds = [t["kind"] for t in apply_add_ons(ResidualGraph.of(model), removed, [Batch(ids)], both)]
    assert kinds == ["compensate", "refit", "refit"]
    assert apply_add_ons(ResidualGraph.of(model), HALVES, [Batch(ids)], AddOns()) == ()


@torch.no_grad()
def test_a_compensated_beginning_is_what_the_fits_see():
    """The fits' targets and inputs have one scale: their errors are those that the model has."""
    ids = tiny_tokens(6, 32)
    model, removed = model_of("llama"), [*layers(0), *HALVES]
    targets = list(streams(ResidualGraph.of(model_of("llama")), Batch(ids)))
    graph = ResidualGraph.of(model)
    beginning, *fits = apply_add_ons(graph, removed, [Batch(ids)], AddOns(True, True))
    (factor,) = beginning["factors"]
    assert abs(factor - 1) > 0.1 and [fit["branch"] for fit in fits] == ["A1", "M2"]
    state, context = graph.start(Batch(ids))
    found = []
    for branch in graph.branches:
        gone = branch in removed
        state = graph.skip(branch, state) if gone else graph.run(branch, state, context)
        found.append(state.total.flatten(0, 1))
    for fit, end in zip(fits, (5, 7), strict=True):
        error = (factor * found[end - 1] - targets[end]).square().sum()
        assert fit["after"] < fit["before"]
        assert float(error / targets[end].square().sum()) == pytest.approx(fit["after"], rel=1e-2)


def test_a_ridge_without_refit_is_refused():
    for method in ("blockpruner", "shortgpt", "laco", "llm-drop"):
        with pytest.raises(UserError, match=r"ridge: expected none without refit, got 0\.01"):
            StructureConfig(method, count=1, method_options={"ridge": 0.01, "compensate": True})


def test_a_norm_within_the_mlp_is_no_place_for_a_factor():
    model = model_of("llama")
    mlp = model.model.layers[0].mlp
    mlp.norm = type(model.model.norm)(model.config.hidden_size)
    with pytest.raises(UserError, match="LlamaDecoderLayer: its MLPs hold a norm"):
        writers(ResidualGraph.of(model), Branch("mlp", 0))
