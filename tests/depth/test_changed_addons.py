"""Add-ons of methods that change the weights that stay: LaCo's folds, LLM-Streamline's layer."""

import copy
import json

import pytest
import torch
from depth_streams import fitted, model_of, scaled_input, states_of
from saved_models import reloaded, save_model
from tiny_models import tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth.compensate import compensate
from pyprune.depth.config import StructureConfig
from pyprune.depth.given import Given
from pyprune.depth.graph import KINDS, Branch, ResidualGraph
from pyprune.depth.laco import LacoOptions, collapse, laco
from pyprune.depth.layers import LayerTask
from pyprune.depth.refit import refit
from pyprune.depth.run import prune_structure
from pyprune.depth.save import drop_layers
from pyprune.depth.streamline import StreamlineOptions, streamline
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter

IDS = tiny_tokens(6, 32)
BATCHES = [Batch(IDS[:2]), Batch(IDS[2:])]
RIDGE = 1e-2
LAYERS = 6
# A gap after a layer that was merged into one before it, and two gaps.
INTERVALS = {1: [(3, 6)], 2: [(2, 4), (4, 6)]}
REFITTED = ["llama", "gpt2", "qwen2_moe"]
COMPENSATED = [*REFITTED, "gemma2"]


def two_layers(gone):
    return len(gone) >= 2


def folded(family, interval=2, **add_ons):
    """A model after LaCo, before layers go, and what was done besides."""
    model = model_of(family, LAYERS)
    options = LacoOptions(fold=2, threshold=-1.0, interval=interval, **add_ons)
    choice = laco(LayerTask(ResidualGraph.of(model), BATCHES, options, two_layers))
    assert [t["kind"] for t in choice.transforms[:2]] == ["fold", "fold"]
    return model, choice.removed, choice.transforms[2:]


def without(model, removed):
    kept = [i for i in range(LAYERS) if i not in removed]
    model = copy.deepcopy(model)
    drop_layers(model, kept)
    return model


def test_given_is_what_it_was_whatever_happens():
    parameter = torch.nn.Parameter(torch.zeros(2))
    given = Given()
    assert not given
    given.hold([parameter])
    with torch.no_grad():
        parameter.fill_(1)
        given.hold([parameter], [torch.full((2,), 5.0)])  # held already
        with pytest.raises(RuntimeError), given.back():
            assert given and parameter.eq(0).all()
            raise RuntimeError
        assert parameter.eq(1).all()


def test_folds_tell_what_was_given():
    """Of a layer that is merged into another one too, and of none that was tried in vain."""
    dense, model, given = model_of("llama", LAYERS), model_of("llama", LAYERS), Given()
    graph = ResidualGraph.of(model)
    collapse(graph, BATCHES, LacoOptions(fold=2, threshold=-1), two_layers, given)
    changed = [
        any(not torch.equal(a, b) for a, b in zip(x.parameters(), y.parameters(), strict=True))
        for x, y in zip(dense.model.layers, model.model.layers, strict=True)
    ]
    assert changed == [False, False, False, True, True, False]
    with given.back():
        assert all(map(torch.equal, dense.state_dict().values(), model.state_dict().values()))
    unchanged = Given()
    collapse(graph, BATCHES, LacoOptions(fold=2, threshold=2), given=unchanged)
    assert not unchanged


@torch.no_grad()
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("family", REFITTED)
def test_the_merged_layer_is_fitted_to_the_layers_it_stands_for(family, interval):
    targets = states_of(model_of(family, LAYERS), IDS)
    plain, removed, none = folded(family, interval)
    model, same, fits = folded(family, interval, refit=True, ridge=RIDGE)
    assert none == () and same == removed and len(fits) == len(INTERVALS[interval])
    got = states_of(without(model, removed), IDS)
    for fit, (layer, end) in zip(fits, INTERVALS[interval], strict=True):
        assert (fit["kind"], fit["branch"]) == ("refit", f"M{layer}")
        gone = [f"{kind}{i}" for i in range(layer + 1, end) for kind in "AM"]
        assert fit["removed"] == "+".join(gone)
        # What the layer as merged adds, after layers that are refitted already.
        small, at = without(plain, removed), layer - sum(i < layer for i in removed)
        seen = []
        block = Adapter.of(small).blocks[at]
        block.mlp.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        after = states_of(small, IDS)[at + 1].flatten(0, 1).double()
        out = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
        m = out.reshape(-1, after.shape[1]).double()
        target = targets[end].flatten(0, 1).double()
        expected = after - m + m @ fitted(m, target - after, RIDGE)
        result = got[at + 1].flatten(0, 1).double()
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
        for name, stream in (("before", after), ("after", expected)):
            error = (stream - target).square().sum() / target.square().sum()
            assert fit[name] == pytest.approx(float(error), rel=1e-3)
        assert fit["after"] < fit["before"]
        values = Adapter.of(model).blocks[layer].state_dict()
        Adapter.of(plain).blocks[layer].load_state_dict(values)


@torch.no_grad()
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("family", COMPENSATED)
def test_a_merged_layer_gets_the_size_of_the_layers_it_stands_for(family, interval):
    targets = states_of(model_of(family, LAYERS), IDS)
    plain, removed, _ = folded(family, interval)
    model, _, (done,) = folded(family, interval, compensate=True)
    twin = without(plain, removed)
    for factor, (layer, end) in zip(done["factors"], INTERVALS[interval], strict=True):
        at = layer - sum(i < layer for i in removed)
        ratio = targets[end].norm(dim=-1) / states_of(twin, IDS)[at + 1].norm(dim=-1)
        assert factor == pytest.approx(float(ratio.mean()), rel=1e-4)
        blocks = Adapter.of(twin).blocks
        if at + 1 < len(blocks):  # after the last layer comes a norm
            hook = scaled_input(factor)
            blocks[at + 1].register_forward_pre_hook(hook, with_kwargs=True)
    wanted = twin(IDS, use_cache=False).logits
    got = without(model, removed)(IDS, use_cache=False).logits
    assert (got - wanted).norm() < 2e-3 * wanted.norm()


def streamlined(family, epochs, start="first", **add_ons):
    model = model_of(family, LAYERS)
    options = StreamlineOptions(epochs=epochs, learning_rate=5e-3, start=start, **add_ons)
    graph = ResidualGraph.of(model)
    choice = streamline(LayerTask(graph, BATCHES, options, two_layers))
    replacement, *done = choice.transforms
    return model, choice.removed, replacement, done


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_untrained_first_layer_is_plain_pruning(family):
    for name, add_on in (("refit", refit), ("compensate", compensate)):
        model, removed, _, done = streamlined(family, 0, **{name: True})
        plain = model_of(family, LAYERS)
        branches = [Branch(kind, i) for i in removed for kind in KINDS]
        wanted = add_on(ResidualGraph.of(plain), branches, BATCHES)
        if name == "refit":
            assert done == [{"kind": "refit", **fit} for fit in wanted]
        else:
            assert done[0]["factors"] == pytest.approx(wanted, rel=1e-6)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", REFITTED)
def test_a_trained_replacement_is_refitted(family):
    _, removed, trained, _ = streamlined(family, 3)
    model, same, again, (fit,) = streamlined(family, 3, refit=True)
    assert (same, again) == (removed, trained)
    target = states_of(model_of(family, LAYERS), IDS)[trained["end"]]
    assert fit["branch"] == f"M{trained['layer']}" and fit["after"] < fit["before"]
    error = trained["after"] * target.numel() / target.square().sum()
    assert fit["before"] == pytest.approx(float(error), rel=1e-3)
    got = states_of(without(model, removed), IDS)[trained["layer"] + 1]
    error = (got - target).square().sum() / target.square().sum()
    assert fit["after"] == pytest.approx(float(error), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", COMPENSATED)
def test_a_trained_replacement_is_compensated(family):
    plain, removed, trained, _ = streamlined(family, 3)
    model, _, _, (done,) = streamlined(family, 3, compensate=True)
    target = states_of(model_of(family, LAYERS), IDS)[trained["end"]]
    twin, at = without(plain, removed), trained["layer"] + 1
    ratio = (target.norm(dim=-1) / states_of(twin, IDS)[at].norm(dim=-1)).mean()
    assert done["factors"] == pytest.approx([float(ratio)], rel=1e-4)
    if at < len(Adapter.of(twin).blocks):
        hook = scaled_input(done["factors"][0])
        Adapter.of(twin).blocks[at].register_forward_pre_hook(hook, with_kwargs=True)
    wanted = twin(IDS, use_cache=False).logits
    got = without(model, removed)(IDS, use_cache=False).logits
    assert (got - wanted).norm() < 2e-3 * wanted.norm()


CHANGING = {"laco": {"fold": 2, "threshold": -1.0}, "llm-streamline": {"epochs": 1}}


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("family, add_on", [("llama", "refit"), ("gemma2", "compensate")])
def test_saved_is_what_is_in_memory(method, family, add_on, tmp_path):
    model = model_of(family)
    options = {**CHANGING[method], add_on: True}
    config = StructureConfig(method, count=1, method_options=options)
    report = prune_structure(model, [IDS[:3], IDS[3:]], config)
    written = json.loads(json.dumps(report.to_dict()))["decision"]["transforms"]
    assert [t["kind"] for t in written][1:] == [add_on]
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("method", CHANGING)
def test_refusals_come_first(method, monkeypatch):
    for name in ("laco.collapse", "streamline.window_similarity"):
        monkeypatch.setattr(f"pyprune.depth.{name}", lambda *_a, **_k: pytest.fail("it searches"))
    config = StructureConfig(method, count=1, method_options={"refit": True})
    with pytest.raises(UserError, match="end in a norm, not a linear map"):
        prune_structure(model_of("gemma2"), [IDS], config)
    with pytest.raises(UserError, match="compensate, refit: expected one of them, got both"):
        StructureConfig(method, count=1, method_options={"refit": True, "compensate": True})
