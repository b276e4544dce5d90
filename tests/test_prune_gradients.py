"""Gradient methods on whole models: options, checkpoints that stream, recomputed activations."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.config import PruneConfig
from pyprune.methods import METHODS
from pyprune.prune import prune, prune_checkpoint

GRADIENT = [name for name, row in METHODS.items() if row.gradient]


def tokens():
    return [tiny_tokens(4, 32, seed) for seed in range(2)]


def same(a, b):
    state = b.state_dict()
    return all(torch.equal(state[name], value) for name, value in a.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", GRADIENT)
def test_a_streamed_checkpoint_is_the_model_pruned_in_memory(method, family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "in")
    update = METHODS[method].updates[-1]
    config = PruneConfig(method=method, pattern="2:4", update=update)
    report = prune_checkpoint(tmp_path / "in", tmp_path / "out", config, batches=tokens())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    prune(model, tokens(), config=config)
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert report.run.seconds["gradients"] > 0


def test_recomputed_activations_change_nothing():
    plain, again = tiny_model("llama"), tiny_model("llama")
    prune(plain, tokens(), "obd", 0.5)
    prune(again, tokens(), "obd", 0.5, gradient_checkpointing=True)
    assert same(plain, again) and not same(plain, tiny_model("llama"))


def test_options_reach_the_method():
    models = {}
    for key, own in {
        "wanda": None,
        "no gradient": {"alpha": 0},
        "plain": {},
        "l2": {"norm": "l2"},
        "alone": {"gradient_only": True},
    }.items():
        models[key] = tiny_model("llama")
        if own is None:
            prune(models[key], tokens(), "wanda", 0.5)
        else:
            prune(models[key], tokens(), "gblm", 0.5, method_options=own)
    assert same(models["wanda"], models["no gradient"])
    names = ["wanda", "plain", "l2", "alone"]
    assert not any(same(models[a], models[b]) for a in names for b in names if a != b)


def test_tells_how_far_the_gradients_are():
    events = []
    prune(tiny_model("llama"), tokens(), "gblm", 0.5, progress=events.append)
    told = [(e.done, e.total) for e in events if e.name == "gradients"]
    assert told == [(n, 8) for n in range(1, 9)]
