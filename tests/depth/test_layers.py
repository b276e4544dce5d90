"""Every method that removes whole layers: counts, order, determinism, and what it leaves."""

from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import AddOns
from pyprune.depth.angular import angular
from pyprune.depth.config import StructureConfig
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.hidden import angular_distances, block_influence
from pyprune.depth.laco import LacoOptions, laco
from pyprune.depth.layers import LayerTask
from pyprune.depth.reverse import reverse
from pyprune.depth.save import drop_layers
from pyprune.depth.segments import SegmentOptions, segments
from pyprune.depth.shortened_llama import ShortenedOptions, shortened
from pyprune.depth.shortgpt import ShortGptOptions, shortgpt
from pyprune.depth.streamline import StreamlineOptions, streamline
from pyprune.errors import UserError

IDS = tiny_tokens(4, 16)
METHODS = {
    "shortgpt": (shortgpt, ShortGptOptions()),
    "angular": (angular, AddOns()),
    "ppl": (shortened, ShortenedOptions()),
    "taylor": (shortened, ShortenedOptions(criterion="taylor")),
    "magnitude": (shortened, ShortenedOptions(criterion="magnitude", plus=False)),
    "segments": (segments, SegmentOptions(tokens=32)),
    "reverse": (reverse, AddOns()),
    "laco": (laco, LacoOptions(fold=2, threshold=-1.0)),
    "streamline": (streamline, StreamlineOptions(epochs=2)),
}
WITH_ADD_ONS = ["shortgpt", "angular", "ppl", "segments", "reverse"]


def at_least(count):
    return lambda removed: len(removed) >= count


def choose(name, model, count=2, split=2, **more):
    method, options = METHODS[name]
    options = type(options)(**{**vars(options), **more})
    batches = [Batch(part) for part in IDS.split(split)]
    return method(LayerTask(ResidualGraph.of(model), batches, options, at_least(count)))


@pytest.mark.parametrize("name", METHODS)
def test_removes_what_was_asked_and_is_deterministic(name):
    model, again = (tiny_model("qwen2", num_hidden_layers=5) for _ in range(2))
    choice = choose(name, model)
    assert len(choice.removed) == len(set(choice.removed)) == 2
    assert all(0 <= i < 5 for i in choice.removed)
    assert len(choice.importance) in (0, 5)
    other = choose(name, again)
    assert other == choice
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    keep = [i for i in range(5) if i not in choice.removed]
    drop_layers(model, keep)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
        assert torch.equal(
            model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None),
            model.generate(
                IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False
            ),
        )


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("laco", "streamline")])
def test_independent_of_the_batch_split_and_nested(name):
    model = tiny_model("llama", num_hidden_layers=5)
    before = [p.detach().clone() for p in model.parameters()]
    choice = choose(name, model, 3, split=4)
    if name not in ("taylor", "segments"):  # gradients of batch means; tokens drawn by batch
        assert choose(name, model, 3, split=1).removed == choice.removed
    if name != "angular":
        assert choose(name, model, 2, split=4).removed == choice.removed[:2]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_too_much_is_refused(name):
    with pytest.raises(UserError, match="expected"):
        choose(name, tiny_model("llama", num_hidden_layers=3), 3)
    with pytest.raises(UserError, match="expected"):
        choose(name, tiny_model("llama", num_hidden_layers=1), 1)


def test_rankings_by_hand():
    model = tiny_model("llama", num_hidden_layers=5)
    adapter = ResidualGraph.of(model).adapter
    influence = block_influence(adapter, [Batch(IDS)])
    order = influence.argsort().tolist()
    assert list(choose("shortgpt", model, 3).removed) == order[:3]
    kept = choose("shortgpt", model, 3, keep_first=1, keep_last=1).removed
    with pytest.raises(UserError, match="shortgpt keep_last: expected 0 or more, got -1"):
        StructureConfig("shortgpt", count=3, method_options={"keep_last": -1})
    assert sorted(kept) == [1, 2, 3]
    assert choose("reverse", model, 3).removed == (4, 3, 2)
    start = int(angular_distances(adapter, [Batch(IDS)]).diagonal(3).argmin())
    assert choose("angular", model, 3).removed == tuple(range(start, start + 3))


@pytest.mark.parametrize("name, runs", [("angular", 1), ("streamline", 2)])
def test_windows_cost_one_sweep_however_wide(name, runs, monkeypatch):
    """Calls of the last MLP (twice where the halves of a layer run one by one)."""
    model = tiny_model("llama", num_hidden_layers=6)
    calls = []
    model.model.layers[5].mlp.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("pyprune.depth.streamline.replace_window", lambda *_a, **_k: Nothing())
    graph, counted = ResidualGraph.of(model), []
    method, options = METHODS[name]
    for count in (1, 4):
        calls.clear()
        removed = method(LayerTask(graph, [Batch(IDS)], options, at_least(count))).removed
        assert len(removed) == count
        counted.append(len(calls))
    assert counted == [runs, runs]


@dataclass
class Nothing:
    """What a window was replaced with."""


@pytest.mark.parametrize("name", WITH_ADD_ONS)
def test_add_ons(name):
    plain = choose(name, tiny_model("llama", num_hidden_layers=5))
    for more in ({"compensate": True}, {"refit": True}, {"compensate": True, "refit": True}):
        model = tiny_model("llama", num_hidden_layers=5)
        choice = choose(name, model, **more)
        assert choice.removed == plain.removed
        kinds = {t["kind"] for t in choice.transforms}
        inner = any(i > 0 and i - 1 not in choice.removed for i in choice.removed)
        assert ("refit" in kinds) == ("refit" in more and inner)
        if "refit" not in more:
            assert "compensate" in kinds
        drop_layers(model, [i for i in range(5) if i not in choice.removed])
        with torch.no_grad():
            assert model(IDS).logits.isfinite().all()


def test_laco_stops_at_its_threshold():
    with pytest.raises(UserError, match="lower threshold"):
        choose("laco", tiny_model("llama", num_hidden_layers=4), threshold=1.0)
