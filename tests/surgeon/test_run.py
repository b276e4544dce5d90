"""LLM Surgeon on whole models: counts, optimality, and what it refuses or keeps."""

import json

import pytest
import torch
from calibration.test_backward import model64
from methods.test_surgeon import EXACT, brute_force
from surgeon_runs import loss, refs_of, same, surgeon, tokens
from tiny_models import FAMILIES, tiny_model, tiny_tokens

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.factors import collect_factors
from pyprune.calibration.tokens import Batch
from pyprune.config import PruneConfig
from pyprune.errors import LayerError, UserError
from pyprune.methods import kronecker
from pyprune.methods.kronecker import Curvature
from pyprune.models.adapter import Adapter
from pyprune.patterns import pruned_count
from pyprune.prune import prune
from pyprune.report import Report
from pyprune.surgeon import run as run_module
from pyprune.surgeon.run import STORED_AS_ZEROS


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_elements_of_every_family(family):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = surgeon(model, shots=2)
    refs = refs_of(model)
    elements = sum(ref.weight().numel() for ref in refs)
    zeros = sum(int((ref.weight() == 0).sum()) for ref in refs)
    assert zeros == pruned_count(elements, 0.5) and report.sparsity == zeros / elements
    assert [layer.name for layer in report.layers] == [ref.name for ref in refs]
    changed = {ref.parameter_name for ref in refs}
    changed |= {ref.bias_name for ref in refs if ref.bias() is not None}
    for name, value in model.state_dict().items():
        assert (name in changed) or torch.equal(value, before[name]), name
    for ref in refs:  # a bias is corrected with its weights
        if ref.bias() is not None:
            old = before[ref.bias_name]
            assert not torch.equal(ref.bias(), old if ref.index is None else old[ref.index])
    assert bool(model(tiny_tokens()).logits.isfinite().all())
    assert all(layer.loss > 0 and layer.damping == 0.01 for layer in report.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_two_of_four_everywhere(family):
    for target, own in (("2:4", {}), (0.5, {"structure": "2:4"})):
        model = tiny_model(family)
        surgeon(model, target, shots=2, **own)
        for ref in refs_of(model):
            groups = (ref.weight() == 0).reshape(-1, 4).sum(1)
            assert groups.unique().tolist() == [2], ref.name


def test_two_of_four_with_dead_inputs_and_ties():
    """Groups are those of the whole matrix, whatever is cut out of it to be solved."""
    for target, own in (("2:4", {}), (0.5, {"structure": "2:4"})):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[[3, 4, 10]] = 0
            model.model.layers[0].mlp.up_proj.weight[:8] = 0.1
        report = surgeon(model, target, shots=2, **own)
        dead = {layer.name: layer.dead_inputs for layer in report.layers if layer.dead_inputs}
        assert dead == {f"model.layers.1.self_attn.{name}_proj": 3 for name in "qkv"}
        for ref in refs_of(model):
            groups = (ref.weight() == 0).reshape(-1, 4).sum(1)
            assert groups.unique().tolist() == [2], ref.name


def test_part_of_the_groups():
    model = tiny_model("llama")
    report = surgeon(model, 0.25, structure="2:4", shots=2)
    zeros = torch.cat([(ref.weight() == 0).reshape(-1, 4).sum(1) for ref in refs_of(model)])
    assert zeros.unique().tolist() == [0, 2] and report.sparsity == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("structure", ["rows", "columns", "rows-columns"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_rows_and_columns_within_the_budget(family, structure):
    model = tiny_model(family)
    report = surgeon(model, 0.3, structure=structure, shots=3)
    refs = refs_of(model)
    elements, removed, smallest = 0, 0, []
    for ref in refs:
        alive = ref.weight() != 0
        rows, columns = alive.any(1), alive.any(0)
        if structure == "rows":
            assert bool(columns.all()) or not bool(rows.any())
        if structure == "columns":
            assert bool(rows.all()) or not bool(columns.any())
        # Nothing but whole rows and columns is gone.
        assert torch.equal(alive, rows[:, None] & columns)
        if ref.bias() is not None:
            assert not ref.bias()[~rows].any() and bool((ref.bias()[rows] != 0).all())
        elements += alive.numel()
        removed += int((~alive).sum())
        smallest.append(max(int(rows.sum()), int(columns.sum())))
    budget = int(0.3 * elements)
    assert budget - max(smallest) < removed <= budget
    assert STORED_AS_ZEROS in report.notes
    assert report.layers[0].pattern == f"30% {structure}"


@pytest.mark.parametrize("structure", ["element", "2:4", "rows-columns"])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.k_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj.1"),
    ],
)
def test_one_shot_is_constrained_least_squares(family, name, structure):
    """The whole way, on one matrix with a bias, against the Kronecker product itself."""
    model = model64(family)
    (ref,) = (ref for ref in refs_of(model) if ref.name == name)
    adapter = Adapter.of(model)
    given = as_token_set(tokens(), vocabulary=64, positions=None)
    a, g = collect_factors(adapter, given, [ref], biases={name})[name].normalised()
    w = torch.cat([ref.weight(), ref.bias()[:, None]], dim=1)
    own = {"shots": 1, "structure": structure, "gradient_damping": 0.05, **EXACT}
    report = surgeon(model, 0.4, config={"include": [name], "damping": 0.02}, **own)
    new = torch.cat([ref.weight(), ref.bias()[:, None]], dim=1)
    mask = new != 0
    there = Curvature.of(w, a, g, a_damping=0.02, g_damping=0.05, bias=True)
    want = brute_force(w, mask, *there.damped())
    torch.testing.assert_close(new, want, rtol=1e-5, atol=1e-6)
    assert report.layers[0].loss == pytest.approx(there.loss(want - w), rel=1e-5)
    if structure == "element":
        rows, columns = there.element_scales()
        costs = (w * rows[:, None] * columns)[:, :-1]
        order = costs.abs().flatten().sort().indices[: pruned_count(costs.numel(), 0.4)]
        assert sorted(order.tolist()) == (~mask[:, :-1]).flatten().nonzero()[:, 0].tolist()


def test_the_joint_update_costs_less_than_the_papers_and_that_less_than_none(monkeypatch):
    losses = {}
    monkeypatch.setattr(kronecker.remove_in_groups, "__defaults__", (64,))  # a few groups a matrix
    for structure in ("element", "rows-columns"):
        for update in ("joint", "grouped", "none"):
            own = {"structure": structure, "update": update, "shots": 1}
            report = surgeon(tiny_model("llama"), 0.3, **own)
            losses[structure, update] = sum(layer.loss for layer in report.layers)
        assert losses[structure, "joint"] < losses[structure, "grouped"]
        assert losses[structure, "joint"] < losses[structure, "none"]


def test_an_update_that_stops_early_is_reported():
    report = surgeon(tiny_model("llama"), shots=2, iterations=5, tolerance=1e-6)
    for layer in report.layers:
        assert layer.iterations == 5 and layer.gap > 1e-6
        (note,) = layer.notes
        assert note.startswith("joint update stopped after 5 iterations, about ")
        assert f"about {layer.gap:.1%} above the least loss instead of 0.0%" in note
    assert "stopped after 5 iterations" in str(report.table().caption)
    assert Report.from_json(report.to_json()).layers == report.layers
    report = surgeon(tiny_model("llama"), shots=1, iterations=3, tolerance=1e-6)
    assert {layer.gap for layer in report.layers} == {None}
    assert "too early to tell" in report.layers[0].notes[0]
    report = surgeon(tiny_model("llama"), shots=1)
    assert not report.noted
    assert all(0 < layer.iterations < 80 and layer.gap <= 0.02 for layer in report.layers)
    assert surgeon(tiny_model("llama"), shots=1, update="none").layers[0].iterations is None


def test_more_shots_are_not_one_shot_and_masks_grow():
    one, many = tiny_model("llama"), tiny_model("llama")
    surgeon(one, shots=1)
    surgeon(many, shots=4)
    assert not same(one, many)
    assert sum(int((ref.weight() == 0).sum()) for ref in refs_of(one)) == sum(
        int((ref.weight() == 0).sum()) for ref in refs_of(many)
    )


def test_linear_schedule(monkeypatch):
    seen = []
    real = run_module.Weights.masks

    def masks(self, pruned, cap):
        seen.append(pruned)
        return real(self, pruned, cap)

    monkeypatch.setattr(run_module.Weights, "masks", masks)
    model = tiny_model("llama")
    surgeon(model, 0.6, shots=3)
    elements = sum(ref.weight().numel() for ref in refs_of(model))
    assert seen == [pruned_count(elements, share) for share in (0.2, 0.4, 0.6)]


def test_the_cap_holds_for_every_matrix():
    free, capped = tiny_model("llama"), tiny_model("llama")
    for model in (free, capped):  # one matrix that would lose most of its weights
        refs_of(model)[0].weight().mul_(0.02)
    surgeon(free, 0.4, shots=1)
    report = surgeon(capped, 0.4, shots=1, cap=0.5)
    assert max(layer.sparsity for layer in report.layers) <= 0.5
    assert (refs_of(free)[0].weight() == 0).double().mean() > 0.9
    assert report.sparsity == pytest.approx(0.4, abs=1e-4)
    rows = surgeon(tiny_model("llama"), 0.4, shots=2, structure="rows", cap=0.5)
    assert max(layer.sparsity for layer in rows.layers) <= 0.5


@pytest.mark.parametrize("own", [{}, {"structure": "rows"}], ids=["element", "rows"])
def test_less_than_was_asked_for_is_said(own):
    report = surgeon(tiny_model("llama"), 0.4, shots=1, cap=0.2, **own)
    assert report.sparsity == pytest.approx(0.2, abs=0.02)
    assert any("40.0% were asked for: the cap" in note for note in report.notes)
    assert not surgeon(tiny_model("llama"), 0.4, shots=1).notes


def test_existing_zeros_stay_if_asked_to():
    model = tiny_model("llama")
    prune(model, None, "magnitude", 0.3)
    zeros = {ref.name: ref.weight() == 0 for ref in refs_of(model)}
    surgeon(model, 0.2, shots=2, config={"preserve_zeros": True})
    for ref in refs_of(model):
        assert torch.equal(ref.weight() == 0, zeros[ref.name])
    report = surgeon(model, 0.5, shots=2, config={"preserve_zeros": True})
    assert report.sparsity == pytest.approx(0.5, abs=1e-4)
    assert not any(bool((ref.weight()[zeros[ref.name]] != 0).any()) for ref in refs_of(model))


def test_factors_on_disk_change_nothing():
    memory, disk = tiny_model("llama"), tiny_model("llama")
    surgeon(memory, shots=2)
    surgeon(disk, shots=2, factor_memory=1e-9)  # one block at a time
    assert same(memory, disk)
    near, again = tiny_model("llama"), tiny_model("llama")
    surgeon(near, shots=1, kronecker="nearest")
    surgeon(again, shots=1, kronecker="nearest", factor_memory=1e-9)
    assert same(near, again) and not same(near, memory)


def test_drawn_labels_depend_on_the_seed_and_on_nothing_else():
    def run(seed=0, **own):
        model = tiny_model("llama")
        config = {"calibration": {"seed": seed}, "include": ["model.layers.*.mlp.*"]}
        report = surgeon(model, batches=[tiny_tokens(2, 12)], shots=1, config=config, **own)
        return model, report

    text, report = run()
    drawn, with_draws = run(fisher_samples=2)
    assert not same(text, drawn)
    assert [lay.tokens for lay in report.layers] == [lay.tokens for lay in with_draws.layers]
    again, _ = run(fisher_samples=2, factor_memory=1e-9)  # every group sees the same draws
    assert same(again, drawn)
    assert not same(run(seed=1, fisher_samples=2)[0], drawn)


def test_recomputed_activations_change_nothing():
    plain, again = tiny_model("llama"), tiny_model("llama")
    surgeon(plain, shots=1)
    surgeon(again, shots=1, config={"gradient_checkpointing": True})
    assert same(plain, again)


# Corrections.


def test_corrections_train_and_respect_the_masks():
    plain, corrected = tiny_model("llama"), tiny_model("llama")
    surgeon(plain, shots=2)
    own = {"shots": 2, "corrections": 20, "correction_rate": 1e-3}
    excluded = "model.layers.1.mlp.down_proj"
    before = corrected.get_submodule(excluded).weight.clone()
    report = surgeon(corrected, config={"exclude": [excluded]}, **own)
    assert torch.equal(corrected.get_submodule(excluded).weight, before)
    elements = sum(layer.elements for layer in report.layers)
    assert sum(layer.zeros for layer in report.layers) == pruned_count(elements, 0.5)
    notes = [note for note in report.notes if note.startswith("corrections after shot")]
    assert len(notes) == 2
    corrected = tiny_model("llama")
    surgeon(corrected, **own)
    assert loss(corrected, tokens()) < loss(plain, tokens())


def test_corrections_keep_rows_and_groups():
    model = tiny_model("llama")
    surgeon(model, "2:4", shots=1, corrections=3)
    for ref in refs_of(model):
        assert (ref.weight() == 0).reshape(-1, 4).sum(1).unique().tolist() == [2]
    model = tiny_model("llama")
    surgeon(model, 0.3, structure="rows", shots=1, corrections=3)
    for ref in refs_of(model):
        alive = ref.weight() != 0
        assert torch.equal(alive, alive.any(1)[:, None].expand_as(alive))


def test_corrections_need_a_batch_to_hold_out():
    with pytest.raises(UserError, match="corrections: expected two batches"):
        surgeon(tiny_model("llama"), batches=[tiny_tokens(4, 16)], corrections=2)


def test_corrections_leave_fused_experts_as_they_are():
    """Beside a dense MLP, whose names peft takes for those of experts."""
    plain, corrected = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    surgeon(plain, shots=1)
    surgeon(corrected, shots=1, corrections=3)
    for a, b in zip(refs_of(plain), refs_of(corrected), strict=True):
        assert torch.equal(a.weight(), b.weight()) == (a.index is not None), a.name
        assert torch.equal(a.weight() == 0, b.weight() == 0)
    with pytest.raises(UserError, match="corrections: expected a matrix that is not one of fused"):
        surgeon(tiny_model("mixtral"), config={"include": ["*experts*"]}, corrections=2)


# What it cannot judge, and refuses.


@pytest.mark.parametrize(
    ("zeroed", "kept"),
    [("down", {"gate": "gradient", "up": "gradient"}),
     ("up", {"gate": "gradient", "down": "input"}),
     ("gate", {"up": "gradient", "down": "input"})],
)  # fmt: skip
@pytest.mark.parametrize(
    "own", [{}, {"structure": "rows-columns"}, {"kronecker": "nearest"}],
    ids=["element", "rows", "nearest"],
)  # fmt: skip
def test_a_dead_layer_is_kept_and_named(own, zeroed, kept):
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for parameter in mlp.get_submodule(f"{zeroed}_proj").parameters():
            parameter.zero_()
    place = "model.layers.1.mlp"
    before = {name: mlp.get_submodule(f"{name}_proj").weight.clone() for name in kept}
    report = surgeon(model, 0.3, shots=2, **own)
    noted = {layer.name: layer for layer in report.layers if layer.notes}
    dead = {f"{place}.{name}_proj" for name in kept}
    assert dead == {n for n, layer in noted.items() if "kept as it was" in layer.notes[0]}
    for name, what in kept.items():
        layer = noted[f"{place}.{name}_proj"]
        # Its inputs are weighted by the gradients.
        what = "input or gradient" if "kronecker" in own and what == "gradient" else what
        assert f"no {what} but zero: kept as it was" in layer.notes[0]
        assert layer.loss is None and layer.zeros == 0
        assert torch.equal(mlp.get_submodule(f"{name}_proj").weight, before[name])
    # The others make up for it.
    elements = sum(layer.elements for layer in report.layers)
    if "structure" not in own:
        assert sum(layer.zeros for layer in report.layers) == round(0.3 * elements)
    assert report.sparsity == pytest.approx(0.3, abs=5e-3)


def test_damping_of_the_gradients_that_had_to_rise_is_said():
    name = "model.layers.1.mlp.down_proj"
    own = {"shots": 1, "gradient_damping": 0.0}
    # Two sequences give gradients of rank 2 x 4 < 32: no Cholesky without damping.
    report = surgeon(
        tiny_model("llama"), batches=[tiny_tokens(2, 4)], config={"include": [name]}, **own
    )
    assert "gradients' factor took damping 1e-06 instead of 0" in report.layers[0].notes[0]


@pytest.mark.parametrize("target", [0.05, "2:4"])
def test_an_idle_expert_is_kept_and_named(target):
    model = tiny_model("mixtral")
    before = {ref.name: ref.weight().clone() for ref in refs_of(model)}
    report = surgeon(model, target, batches=[tiny_tokens(1, 4)], shots=2)
    idle = {layer.name for layer in report.layers if layer.notes}
    assert idle and all("experts" in name for name in idle)
    for ref in refs_of(model):
        if ref.name in idle:
            assert torch.equal(ref.weight(), before[ref.name])
        elif target == "2:4":
            assert (ref.weight() == 0).reshape(-1, 4).sum(1).unique().tolist() == [2]
    if target != "2:4":
        assert report.sparsity == pytest.approx(target, abs=1e-4)


def test_a_matrix_whose_readers_are_gone_goes_for_nothing():
    """All of down_proj goes in the first shot, so that up_proj has no gradient in the second."""
    model = tiny_model("llama", mlp_bias=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    report = surgeon(model, 0.6, structure="rows", shots=3)
    gone = {layer.name for layer in report.layers if layer.sparsity == 1}
    assert {f"model.layers.1.mlp.{n}_proj" for n in ("down", "up", "gate")} <= gone
    assert not report.noted
    (note,) = (note for note in report.notes if "no weight left" in note)
    assert note.startswith(f"{len(gone)} of 14 matrices have no weight left, the first is model.l")


def test_a_sequence_of_one_token_is_refused():
    batch = Batch(tiny_tokens(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]))
    with pytest.raises(UserError, match="batch 1, sequence 1: expected at least two tokens"):
        surgeon(tiny_model("llama"), batches=[tiny_tokens(2, 4), batch])


def test_nan_gradients_name_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("nan")
    with pytest.raises(LayerError, match=r"model\.layers\.1\.\S+: expected finite"):
        surgeon(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "2:4", "method_options": {"structure": "rows"}}, "structure rows takes a sp"),
        ({"sparsity": 0.6, "method_options": {"structure": "2:4"}}, "2:4 expected at most 0.5"),
        ({"sparsity": 0.5, "scope": "row"}, "scope: llm-surgeon takes global, got 'row'"),
        ({"sparsity": 0.5, "allocation": "owl"}, "allocation: llm-surgeon takes all matrices at"),
        ({"sparsity": 0.5, "walk": "naive"}, "walk: llm-surgeon takes all matrices at once"),
        ({"sparsity": 0.5, "spill": "disk"}, "spill: llm-surgeon takes all matrices at once"),
        ({"sparsity": 0.5, "update": "sequential"}, "update: llm-surgeon takes none"),
        ({"sparsity": 0.5, "reconstruct": True}, "reconstruct: llm-surgeon has an update of its"),
        ({"sparsity": 0.5, "method_options": {"strucure": "rows"}}, "did you mean structure"),
        ({"sparsity": 0.5, "method_options": {"shots": 2.5}}, "shots: expected a whole number"),
        (
            {"sparsity": 0.5, "method_options": {"gradient_damping": "x"}},
            "gradient_damping: expected a number or none, got 'x'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        PruneConfig(method="llm-surgeon", **values)


def test_preserved_zeros_and_structures_do_not_go_together():
    with pytest.raises(UserError, match="preserve_zeros: expected structure element or 2:4"):
        surgeon(tiny_model("llama"), structure="rows", config={"preserve_zeros": True})


def test_rows_that_groups_do_not_divide_name_the_layer():
    model = tiny_model("llama", intermediate_size=66)
    with pytest.raises(LayerError, match=r"down_proj: expected a number of inputs that 4 divides"):
        surgeon(model, 0.3, structure="2:4")


def test_the_config_round_trips():
    own = {"structure": "2:4", "shots": 3, "gradient_damping": 0.2, "cap": 1}
    config = PruneConfig(method="llm-surgeon", sparsity=0.5, method_options=own)
    assert PruneConfig.from_yaml(config.to_yaml()) == config
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_tells_how_far_it_is():
    events = []
    prune(
        tiny_model("llama"), tokens(2, 8), "llm-surgeon", 0.5, progress=events.append,
        method_options={"shots": 2, "factor_memory": 1e-9},
    )  # fmt: skip
    told = [(e.name, e.done, e.total) for e in events]
    assert told == [(f"factors of shot {shot}/2", n, 8) for shot in (1, 2) for n in range(1, 9)]
