"""Magnitude compensation and least-squares refit: stock architecture, and what they promise."""

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.calibration.tokens import Batch
from pyprune.checkpoint.output import save_model
from pyprune.depth.addons import compensate, gaps, refit, untie
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.hidden import magnitudes, visit_states
from pyprune.depth.save import drop_layers
from pyprune.errors import UserError

POST_NORM = ("gemma2", "gemma3_text")


def model_of(family):
    name = "n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers"
    more = {name: 4}
    if family in POST_NORM:
        more["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return tiny_model(family, **more)


def states_of(model, ids):
    found = []
    visit_states(ResidualGraph.of(model).adapter, Batch(ids), lambda _, h: found.append(h.clone()))
    return found


def test_gaps():
    assert gaps([5, 2, 1, 7], 9) == [(1, 3), (5, 6), (7, 8)]
    assert gaps([], 3) == []
    for bad in ([0, 1, 2], [-1], [3]):
        with pytest.raises(UserError, match="removed: expected"):
            gaps(bad, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_compensation_scales_the_stream_and_reloads(family, tmp_path):
    model, ids = model_of(family), tiny_tokens(2, 16)
    before = states_of(model, ids)
    ratio = float(magnitudes(ResidualGraph.of(model).adapter, [Batch(ids)])[1, 3])
    factors = compensate(ResidualGraph.of(model), [1, 2], [Batch(ids)])
    assert factors == pytest.approx([ratio]) and abs(ratio - 1) > 1e-3
    drop_layers(model, [0, 3])
    after = states_of(model, ids)
    # Norms have an epsilon, so the scale is not exact to the last bit.
    torch.testing.assert_close(after[0], before[0] * ratio, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[1], before[1] * ratio, rtol=2e-3, atol=2e-3)
    sizes = [h.norm(dim=-1).mean() for h in (after[1], before[3])]
    assert abs(sizes[0] / sizes[1] - 1) < 0.3
    save_model(model, None, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_untied_head_is_not_scaled():
    model, ids = model_of("qwen2"), tiny_tokens()
    head = model.lm_head.weight.detach().clone()
    compensate(ResidualGraph.of(model), [2], [Batch(ids)])
    assert torch.equal(model.lm_head.weight, head) and not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    untie(model)  # once is enough
    assert torch.equal(model.lm_head.weight, head)


def test_two_gaps_multiply():
    model, ids = model_of("llama"), tiny_tokens()
    before = states_of(model, ids)
    one, two = compensate(ResidualGraph.of(model), [1, 3], [Batch(ids)])
    torch.testing.assert_close(states_of(model, ids)[0], before[0] * one * two)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in POST_NORM])
def test_refit_brings_the_stream_closer(family, tmp_path):
    model, ids = model_of(family), tiny_tokens(6, 32)
    target = states_of(model, ids)[3]
    bare = model_of(family)
    drop_layers(bare, [0, 1, 3])
    without = (states_of(bare, ids)[2] - target).square().sum()
    (gap,) = refit(ResidualGraph.of(model), [2], [Batch(ids[:2]), Batch(ids[2:])])
    drop_layers(model, [0, 1, 3])
    got = (states_of(model, ids)[2] - target).square().sum()
    assert got < without
    assert gap["after"] < gap["before"]
    # The reported errors are those that the models have.
    scale = target.square().sum()
    assert float(got / scale) == pytest.approx(gap["after"], rel=1e-2, abs=1e-5)
    assert float(without / scale) == pytest.approx(gap["before"], rel=1e-2, abs=1e-5)


def test_refit_of_two_gaps_uses_the_refitted_stream():
    ids = tiny_tokens(6, 32)
    model = tiny_model("llama", num_hidden_layers=6)
    target = states_of(model, ids)[5]
    first, second = refit(ResidualGraph.of(model), [1, 4], [Batch(ids)])
    drop_layers(model, [0, 2, 3, 5])
    got = (states_of(model, ids)[3] - target).square().sum() / target.square().sum()
    assert float(got) == pytest.approx(second["after"], rel=1e-2)
    assert first["after"] < first["before"] and second["after"] < second["before"]


def test_refit_refuses_and_skips():
    ids = tiny_tokens()
    with pytest.raises(UserError, match="end in a norm"):
        refit(ResidualGraph.of(model_of("gemma2")), [2], [Batch(ids)])
    model = model_of("llama")
    before = [p.clone() for p in model.parameters()]
    assert refit(ResidualGraph.of(model), [0, 1], [Batch(ids)]) == []
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
