"""LLM Surgeon for channels and heads: the writer's update, the choice, and that models shrink."""

import math
from dataclasses import replace

import pytest
import torch
from calibration.test_backward import model64
from methods.test_surgeon import brute_force
from tiny_models import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.factors import collect_factors
from pyprune.errors import UserError
from pyprune.methods.kronecker import Curvature
from pyprune.methods.options import build_options
from pyprune.surgeon.matrix import Matrix
from pyprune.width.config import WidthConfig
from pyprune.width.registry import run_width
from pyprune.width.run import prune_width, prune_width_checkpoint
from pyprune.width.structure import Widths
from pyprune.width.surgeon import SurgeonWidthOptions, _Shots

GQA = {"num_attention_heads": 8, "num_key_value_heads": 4}


def model_of(family="llama", **more):
    return tiny_model(family, **{**GQA, "num_hidden_layers": 2, **more})


def token_set(rows=4, length=16, seed=0):
    return as_token_set([tiny_tokens(rows, length, seed)], vocabulary=64, positions=128)


def prune(model, ratio=0.15, tokens=None, **own):
    options = {"multiple": 1, **own}
    config = WidthConfig("llm-surgeon-width", ratio=ratio, method_options=options)
    return run_width(model, tokens or token_set(), config)


def size(model):
    return sum(p.numel() for p in model.parameters())


def same(a, b):
    state = b.state_dict()
    return all(torch.equal(state[name], value) for name, value in a.state_dict().items())


@pytest.mark.parametrize("structure", ["uniform", "adaptive"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_one_shot_is_constrained_least_squares_on_every_writer(family, structure):
    dense = model64(family, **GQA)
    widths = Widths.of(dense)
    refs = [group.writer for group in widths.groups]
    biases = {ref.name for ref in refs if ref.bias() is not None}
    factors = collect_factors(widths.adapter, token_set(), refs, biases=biases)
    model = model64(family, **GQA)
    masked = Widths.of(model)
    decision = prune(model, shots=1, structure=structure)
    cut = Widths.of(model)
    kept = decision.kept()
    for group in widths.groups:
        w = Matrix(group.writer).read("cpu")
        a, g = factors[group.name].normalised()
        there = Curvature.of(w, a, g, bias=True)
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[kept[group.name]] = False
        mask = torch.ones_like(w, dtype=torch.bool)
        mask[:, group.columns[gone].flatten()] = False
        want = brute_force(w, mask, *there.damped())
        got = Matrix(cut[group.name].writer).read("cpu")
        # Ours may still have units as zeros that the cut could not take.
        alive = (got != 0).any(0)
        torch.testing.assert_close(got[:, alive], want[:, mask.any(0)], rtol=1e-5, atol=1e-7)
        # The cheapest per parameter went, or of each layer the cheapest.
        costs = there.unit_costs(w, group.columns)
        if gone.any() and structure == "uniform":
            assert costs[gone].max() <= costs[~gone].min()
    assert masked.groups and (size(model) < size(dense) or decision.zeroed)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "mixtral"])
def test_stock_models_are_smaller_by_what_was_asked_for(family, tmp_path):
    model = tiny_model(family, num_hidden_layers=2)
    before = size(model)
    decision = prune(model, ratio=0.1, shots=2, tokens=token_set(8, 16))
    assert size(model) <= before - math.ceil(0.1 * before) and not decision.zeroed
    assert decision.parameters == (before, size(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny_tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_more_shots_reach_the_same_size_and_other_weights():
    one, many, none = model_of(), model_of(), model_of()
    first = prune(one, shots=1)
    second = prune(many, shots=3)
    prune(none, shots=3, update="none")
    assert size(one) == size(many) and first.sizes == second.sizes
    assert not same(one, many) and not same(many, none)
    ((_, losses),) = second.transforms[0].items()
    assert all(loss > 0 for loss in losses.values())


def test_factors_on_disk_change_nothing():
    memory, disk = model_of(), model_of()
    prune(memory, shots=2)
    prune(disk, shots=2, factor_memory=1e-9)
    assert same(memory, disk)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_interrupted_run_ends_with_the_same_bytes(family, tmp_path, monkeypatch):
    tiny_model(family).save_pretrained(tmp_path / "in")
    options = {"shots": 3, "multiple": 1, "factor_memory": 1e-9}
    config = WidthConfig("llm-surgeon-width", ratio=0.2, method_options=options)
    batches = [tiny_tokens(2, 16), tiny_tokens(2, 16, 1)]

    def run(out, state=None):
        report = prune_width_checkpoint(
            tmp_path / "in", tmp_path / out, config, batches=batches, state=state
        )
        return (tmp_path / out / "model.safetensors").read_bytes(), report.to_dict()

    whole, report = run("whole")
    shots, cuts, state = [], [], tmp_path / "state"
    real, cut = _Shots.shot, _Shots._remove

    def remove(self, *rest):
        cuts.append(self)
        if len(shots) == 2 and len(cuts) == len(self.groups) + 2:
            raise Interrupted
        cut(self, *rest)

    monkeypatch.setattr(_Shots, "shot", lambda self, *at: shots.append(at[0]) or real(self, *at))
    monkeypatch.setattr(_Shots, "_remove", remove)
    with pytest.raises(Interrupted):
        run("broken", state)
    assert not (tmp_path / "broken").exists()
    assert [p.name for p in state.glob("*.safetensors")] == ["shot-1.safetensors"]
    for out, left in (("resumed", [2, 3]), ("finished", [])):
        shots.clear()
        again, second = run(out, state)
        assert shots == left and again == whole
        assert {**second, "run": None} == {**report, "run": None}
    with pytest.raises(UserError, match=r"belongs to another configuration: ratio is 0\.3 here"):
        prune_width(tiny_model(family), batches, replace(config, ratio=0.3), state=state)
    with pytest.raises(UserError, match="state: flap is not pruned in shots, expected none"):
        prune_width(tiny_model(family), batches, WidthConfig("flap"), state=state)


def test_drawn_labels_give_another_curvature():
    text, drawn, again = model_of(), model_of(), model_of()
    prune(text, shots=1)
    prune(drawn, shots=1, fisher_samples=2)
    prune(again, shots=1, fisher_samples=2, factor_memory=1e-9)  # one writer at a time
    assert same(drawn, again) and size(text) == size(drawn)
    assert not all(map(torch.equal, text.parameters(), drawn.parameters()))


def test_adaptive_removes_the_cheapest_per_parameter():
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    decision = prune(model, structure="adaptive", shots=1, units="mlp")
    gone = {name: len(units) for name, units in decision.removed.items()}
    assert gone["model.layers.1.mlp.down_proj"] == max(gone.values())
    assert decision.zeroed  # a stock model has one width
    assert any("zeros" in note for note in decision.notes)


def test_idle_experts_and_dead_layers_are_named_and_not_corrected():
    model = tiny_model("mixtral", num_hidden_layers=2)
    decision = prune(model, ratio=0.05, shots=2, tokens=token_set(1, 3))
    assert any("experts" in note and "too few tokens" in note for note in decision.notes)
    # Where costs decide, what has none keeps all it has, however much the others lose for it.
    model = tiny_model("mixtral", num_hidden_layers=2)
    own = {"structure": "adaptive", "units": "all", "shots": 2}
    decision = prune(model, ratio=0.05, tokens=token_set(1, 8), **own)
    kept = {note.split(":")[0] for note in decision.notes if "tokens, kept as it was" in note}
    assert kept and not kept & set(decision.removed) and decision.removed
    with pytest.raises(UserError, match=r"structure: expected uniform where no module can be jud"):
        prune(model, ratio=0.05, tokens=token_set(1, 2), **{**own, "units": "mlp"})
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1
        model.model.layers[1].mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
    with pytest.raises(UserError, match="expected a gradient, got zero for every token"):
        prune(model)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"fisher_samples": -1}, "fisher_samples: expected 0 or more, got -1"),
        ({"shots": 0}, "shots: expected at least 1, got 0"),
        ({"damping": 2.0}, r"damping: expected a number in \[0, 1\], got 2.0"),
        ({"factor_memory": 0.0}, "factor_memory: expected a positive number, got 0.0"),
        ({"multiple": 0}, "multiple: expected at least 1, got 0"),
    ],
)
def test_options_are_checked(own, message):
    with pytest.raises(UserError, match=f"method_options: llm-surgeon-width {message}"):
        build_options("llm-surgeon-width", SurgeonWidthOptions, own)


@pytest.mark.parametrize("structure", ["uniform", "adaptive"])
def test_a_writer_without_input_or_gradient_is_named_and_not_corrected(structure):
    """Uniform: its units go by their weights. Adaptive: they stay, the others make up for it."""
    model = model_of()
    up = model.model.layers[1].mlp.up_proj
    for parameter in up.parameters():
        parameter.data.zero_()
    decision = prune(model, shots=2, structure=structure)
    name = "model.layers.1.mlp.down_proj"
    (note,) = (note for note in decision.notes if "but zero" in note)
    assert note.startswith(f"{name}: no input but zero, ")
    assert (name in decision.removed) is (structure == "uniform")
    assert all(name not in transform.get("columns of writers corrected", {})
               for transform in decision.transforms)  # fmt: skip


def test_what_is_out_of_reach_for_equal_layers_is_refused_before_the_first_shot(monkeypatch):
    """Each module may go down to one unit, but equal numbers of heads only to what divides them."""
    monkeypatch.setattr(_Shots, "shot", lambda *_: pytest.fail("it begins"))
    widths = Widths.of(model_of())
    most = sum(g.unit_parameters * (g.units - 1) for g in widths.groups) / size(model_of())
    with pytest.raises(UserError, match="ratio: expected at most"):
        prune(model_of(), ratio=most - 1e-3, multiple=64)
