"""ECoFLaP: its formula against rounds of sharing out, and what runs with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.allocation import sparsities_by_importance
from pyprune.config import PruneConfig
from pyprune.errors import UserError
from pyprune.prune import prune, prune_checkpoint


def by_rounds(scores, sizes, target, maximum):
    """Everyone has its minimum; the rest goes out in proportion to the scores, again and again to
    those that are not full."""
    keep = [n * (1 - maximum) for n in sizes]
    left = sum(sizes) * (1 - target) - sum(keep)
    open_ = set(range(len(sizes)))
    while left > 1e-9 * sum(sizes) and open_:
        total = sum(scores[k] for k in open_)
        given_out = 0.0
        for k in list(open_):
            more = left * scores[k] / total
            if keep[k] + more >= sizes[k]:
                more = sizes[k] - keep[k]
                open_.discard(k)
            keep[k] += more
            given_out += more
        left -= given_out
    return [1 - k / n for k, n in zip(keep, sizes, strict=True)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 10**6)), min_size=1, max_size=12),
    st.floats(0, 0.9),
    st.floats(0, 1),
)
def test_shares_out_as_rounds_do(groups, target, headroom):
    scores, sizes = [s for s, _ in groups], [n for _, n in groups]
    maximum = target + headroom * (0.99 - target)
    found = sparsities_by_importance(scores, sizes, target, maximum)
    mean = sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(target, abs=1e-9)
    assert all(-1e-12 <= s <= maximum + 1e-12 for s in found)
    assert found == pytest.approx(by_rounds(scores, sizes, target, maximum), abs=1e-6)


def test_larger_importance_loses_less_and_equal_ones_the_same():
    found = sparsities_by_importance([3.0, 1.0, 2.0], [100, 100, 100], 0.5, 0.6)
    assert found[0] < found[2] < found[1]
    assert found == pytest.approx([0.45, 0.55, 0.5])
    assert sparsities_by_importance([7.0] * 3, [10] * 3, 0.7, 0.9) == pytest.approx([0.7] * 3)
    assert sparsities_by_importance([7.0, 1.0], [10, 10], 0.7, 0.7) == pytest.approx([0.7] * 2)


def test_what_nothing_reached_keeps_what_others_cannot():
    found = sparsities_by_importance([1.0, 0.0], [100, 300], 0.3, 0.9)
    assert found == pytest.approx([0.0, 0.4])


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        ([0.0, 0.0], 0.5, "expected gradients, got zero for every group"),
        ([1.0, float("nan")], 0.5, "expected finite importances"),
        ([1.0, -1.0], 0.5, "expected finite importances"),
        ([1.0, 1.0], 0.7, "sparsity: expected at most 0.6, got 0.7"),
    ],
)
def test_what_cannot_be_shared_out(scores, target, message):
    with pytest.raises(UserError, match=message):
        sparsities_by_importance(scores, [10, 10], target, 0.6)


def tokens():
    return [tiny_tokens(4, 32, seed) for seed in range(2)]


def shares(report):
    """Sparsity of each of a Llama's blocks."""
    found = {}
    for layer in report.layers:
        found.setdefault(layer.name.split(".")[2], []).append((layer.zeros, layer.elements))
    return [sum(z for z, _ in block) / sum(n for _, n in block) for block in found.values()]


@pytest.mark.parametrize("order", ["zeroth", "first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, order):
    model = tiny_model(family)
    report = prune(
        model,
        [tiny_tokens(2, 16)],
        "magnitude",
        0.5,
        allocation="ecoflap",
        allocation_options={"order": order, "max_sparsity": 0.8},
    )
    # Counts are exact a matrix, sparsities are a block's: half a weight a matrix is rounded.
    elements = sum(layer.elements for layer in report.layers)
    zeros = sum(layer.zeros for layer in report.layers)
    assert abs(zeros - elements / 2) <= len(report.layers) / 2 + 1e-6
    patterns = {layer.pattern for layer in report.layers}
    assert len(patterns) == 2 and all(layer.sparsity < 0.81 for layer in report.layers)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gblm"])
def test_any_method_follows(method):
    model = tiny_model("llama")
    report = prune(
        model,
        tokens(),
        method,
        0.5,
        allocation="ecoflap",
        allocation_options={"order": "first", "max_sparsity": 0.9, "granularity": "layer"},
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert len({layer.pattern for layer in report.layers}) > 6
    bare = prune(tiny_model("llama"), tokens(), method, 0.5)
    assert {layer.name for layer in bare.layers} == {layer.name for layer in report.layers}
    assert report.run.seconds["allocation"] > 0


@pytest.mark.parametrize("score", ["gradient", "weight-gradient", "squared"])
def test_orders_agree_on_what_matters(score):
    """Queries, keys and values of block 1 barely matter to the loss: its output hardly counts."""
    found = {}
    for order in ("zeroth", "first"):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight.mul_(0.01)
        options = {"order": order, "score": score, "max_sparsity": 0.9, "noises": 8}
        report = prune(
            model,
            tokens(),
            "magnitude",
            0.5,
            allocation="ecoflap",
            allocation_options=options,
            include=["model.layers.*.self_attn.[qkv]_proj"],
        )
        found[order] = shares(report)
    assert found["first"][0] < found["first"][1] and found["zeroth"][0] < found["zeroth"][1]


@pytest.mark.parametrize("order", ["zeroth", "first"])
def test_a_streamed_checkpoint_is_the_model_pruned_in_memory(order, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "in")
    config = PruneConfig(
        method="wanda", sparsity=0.5, allocation="ecoflap", allocation_options={"order": order}
    )
    report = prune_checkpoint(tmp_path / "in", tmp_path / "out", config, batches=tokens())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    prune(model, tokens(), config=config)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(p, other[name]) for name, p in model.state_dict().items())
    assert f"allocation ecoflap, order {order}" in (tmp_path / "out" / "README.md").read_text()
    assert report.run.seconds["allocation"] > 0


def test_sixteen_bits_have_gradients_but_no_differences():
    model = tiny_model("llama").bfloat16()
    dense = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(UserError, match="-A order=first"):
        prune(model, tokens(), "wanda", 0.5, allocation="ecoflap")
    assert all(torch.equal(p, dense[name]) for name, p in model.state_dict().items())
    report = prune(
        model, tokens(), "wanda", 0.5, allocation="ecoflap", allocation_options={"order": "first"}
    )
    assert len({layer.pattern for layer in report.layers}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sparsity": 0.4}, "max_sparsity: expected at least the sparsity 0.5, got 0.4"),
        ({"max_sparsity": 1.0}, r"max_sparsity: expected a number in \[0, 0.99\] or none, got 1.0"),
        ({"order": "second"}, "ecoflap order: expected zeroth or first, got 'second'"),
        ({"samples": 0}, "samples: expected at least 1"),
        ({"noises": 0}, "noises: expected at least 1"),
        ({"epsilon": 0.0}, "epsilon: expected a positive number"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"ordr": "first"}, "allocation_options: ecoflap has no option 'ordr', did you mean order"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        PruneConfig(sparsity=0.5, allocation="ecoflap", allocation_options=options)


def test_text_is_asked_for_by_the_allocation():
    with pytest.raises(UserError, match="calibration: ecoflap expected a tokenizer or batches"):
        prune(tiny_model("llama"), None, "magnitude", 0.5, allocation="ecoflap")


def test_no_strength_and_no_pattern():
    with pytest.raises(UserError, match="allocation_strength: expected none for ecoflap"):
        PruneConfig(sparsity=0.5, allocation="ecoflap", allocation_strength=0.1)
    with pytest.raises(UserError, match="block by block, got pattern 2:4"):
        PruneConfig(pattern="2:4", allocation="ecoflap")
    with pytest.raises(UserError, match="uniform has no option 'order'"):
        PruneConfig(sparsity=0.5, allocation_options={"order": "first"})
