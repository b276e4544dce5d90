"""LaCo's folds and LLM-Streamline's replacement: in place, over whole layers."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.hidden import visit_states
from pyprune.depth.laco import LacoOptions, collapse, merged
from pyprune.depth.save import drop_layers
from pyprune.depth.streamline import StreamlineOptions, replace_window, window_similarity
from pyprune.errors import UserError

IDS = tiny_tokens(4, 16)
BATCHES = [Batch(IDS[:2]), Batch(IDS[2:])]


def weights(model, layer):
    return {n: p.detach().clone() for n, p in model.model.layers[layer].named_parameters()}


def states_of(model):
    found = []
    visit_states(ResidualGraph.of(model).adapter, Batch(IDS), lambda _, h: found.append(h.clone()))
    return found


def test_merging_matrices():
    a, b, c = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(merged(a, [b, c], "rdsc"), a + (b - a) + (c - a))
    torch.testing.assert_close(merged(a, [b, c], "mean"), (a + b + c) / 3)
    torch.testing.assert_close(merged(a, [b], "rdsc"), b)
    # What the published code does: subtract the matrix that is being changed.
    telescoped = a.clone()
    for later in (b, c):
        telescoped += later - telescoped
    torch.testing.assert_close(merged(a, [b, c], "last"), telescoped)


@pytest.mark.parametrize("merge", ["rdsc", "last", "mean"])
def test_accepted_fold(merge):
    model = tiny_model("llama", num_hidden_layers=4)
    before = [weights(model, i) for i in range(4)]
    folds = collapse(
        ResidualGraph.of(model),
        BATCHES,
        LacoOptions(fold=3, threshold=-1, merge=merge),
        enough=lambda removed: len(removed) >= 2,
    )
    assert [(f.layer, f.removed) for f in folds] == [(1, (2, 3))]
    for name, value in weights(model, 1).items():
        if "layernorm" in name:
            assert torch.equal(value, before[1][name])
        else:
            expected = merged(before[1][name], [before[2][name], before[3][name]], merge)
            assert torch.equal(value, expected)
    dense = tiny_model("llama", num_hidden_layers=4)
    drop_layers(model, [0, 1])
    with torch.no_grad():
        ours = model.model(IDS, use_cache=False).last_hidden_state.flatten(1)
        theirs = dense.model(IDS, use_cache=False).last_hidden_state.flatten(1)
    assert folds[0].similarity == pytest.approx(
        float(F.cosine_similarity(ours, theirs).mean()), rel=1e-4, abs=1e-6
    )


def test_threshold_above_one_changes_nothing():
    model = tiny_model("llama", num_hidden_layers=4)
    before = [weights(model, i) for i in range(4)]
    assert collapse(ResidualGraph.of(model), BATCHES, LacoOptions(fold=2, threshold=2)) == []
    for i in range(4):
        assert all(torch.equal(v, before[i][n]) for n, v in weights(model, i).items())
    with pytest.raises(UserError, match="LaCo: expected"):
        collapse(ResidualGraph.of(model), BATCHES, LacoOptions(fold=1))


def test_all_accepted_leaves_at_least_one_layer():
    model = tiny_model("llama", num_hidden_layers=6)
    folds = collapse(ResidualGraph.of(model), BATCHES, LacoOptions(fold=2, threshold=-1))
    removed = [i for f in folds for i in f.removed]
    assert len(set(removed)) == len(removed) == 5 and 0 not in removed
    assert not {f.layer for f in folds[-1:]} & set(removed)


def test_window_similarity_by_hand():
    model = tiny_model("llama", num_hidden_layers=4)
    states = [h.flatten(0, 1).double() for h in states_of(model)]
    for width in (1, 3, 4):
        expected = [
            (0.5 + 0.5 * F.cosine_similarity(states[j], states[j + width])).mean()
            for j in range(5 - width)
        ]
        got = window_similarity(ResidualGraph.of(model), BATCHES, width)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("start", ["first", "last", "best"])
def test_replacement_is_trained_for_the_window(start):
    model = tiny_model("llama", num_hidden_layers=4)
    before = [weights(model, i) for i in range(4)]
    target = states_of(model)[3]
    options = StreamlineOptions(epochs=20, learning_rate=5e-3, start=start)
    result = replace_window(ResidualGraph.of(model), BATCHES, 1, 3, options)
    assert result.after < 0.9 * result.before
    assert result.start in (("first", "last") if start == "best" else (start,))
    for i in (0, 2, 3):
        assert all(torch.equal(v, before[i][n]) for n, v in weights(model, i).items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    drop_layers(model, [0, 1, 3])
    error = (states_of(model)[2] - target).square().mean()
    assert float(error) == pytest.approx(result.after, rel=1e-4)


def test_small_steps_count_in_16_bits():
    """Weights near 0.2 are 1e-3 apart in bfloat16: steps of 1e-4 only add up in more bits."""
    model = tiny_model("llama", num_hidden_layers=4).bfloat16()
    before = weights(model, 1)
    options = StreamlineOptions(epochs=30, learning_rate=1e-4, start="first")
    result = replace_window(ResidualGraph.of(model), BATCHES, 1, 3, options)
    assert result.after < result.before
    after = weights(model, 1)
    moved = [float((after[n] != v).float().mean()) for n, v in before.items() if v.dim() > 1]
    assert min(moved) > 0.2 and all(v.dtype == torch.bfloat16 for v in after.values())


def small_states(dtype):
    """A model whose stream is so small that gradients of a mean over 131,072 numbers are far below
    the smallest in fp16."""
    model = tiny_model("llama", num_hidden_layers=4, attention_bias=False, mlp_bias=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                p *= 0.01
    return model.half().to(dtype)


def test_replacement_is_trained_in_fp16_too():
    batches = [Batch(tiny_tokens(64, 64, seed)) for seed in range(2)]
    results = []
    for dtype in (torch.float16, torch.float32):
        graph = ResidualGraph.of(small_states(dtype))
        options = StreamlineOptions(epochs=10, learning_rate=2e-4, start="first")
        results.append(replace_window(graph, batches, 1, 3, options))
    half, single = results
    assert single.after < 0.9 * single.before
    assert half.before == pytest.approx(single.before, rel=1e-2)
    assert half.after == pytest.approx(single.after, rel=2e-2)


def test_untrained_replacement_is_the_layer_itself():
    model = tiny_model("llama", num_hidden_layers=4)
    before = weights(model, 0)
    untrained = StreamlineOptions(epochs=0, start="first")
    result = replace_window(ResidualGraph.of(model), BATCHES, 0, 2, untrained)
    assert result.before == result.after
    assert all(torch.equal(v, before[n]) for n, v in weights(model, 0).items())
    with pytest.raises(UserError, match="window: expected"):
        replace_window(ResidualGraph.of(model), BATCHES, 3, 4, untrained)
