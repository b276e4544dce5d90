"""EigenDamage on whole tiny models, in memory and on disk."""

import json
from dataclasses import replace

import pytest
import torch
from methods.test_eigendamage import eigenbasis
from safetensors.torch import load_file
from saved_models import reloaded
from tiny_models import VOCAB, tiny_model, tiny_tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pyprune
from pyprune import cli
from pyprune.calibration.backward import backward_pass
from pyprune.calibration.batches import as_token_set
from pyprune.checkpoint import Checkpoint
from pyprune.config import CalibrationConfig
from pyprune.eigendamage import (
    EigenDamageConfig,
    damage,
    prune_eigendamage,
    prune_eigendamage_checkpoint,
)
from pyprune.errors import LayerError, UserError
from pyprune.inspection import inspect_checkpoint
from pyprune.methods import eigendamage as maths
from pyprune.models.adapter import Adapter
from pyprune.sparse.bench import densified
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
from pyprune.sparse.factored import FactoredLinear
from pyprune.sparse.stored import StoredCheckpoint


def config_of(sparsity, **own):
    return EigenDamageConfig(sparsity=sparsity, method_options=own)


def prepare(family="llama", double=True):
    model = tiny_model(family)
    model = model.double() if double else model
    adapter = Adapter.of(model)
    return model, adapter, as_token_set([tiny_tokens(6, 24)], vocabulary=64, positions=None)


def weights(adapter):
    return {
        ref.name: ref.weight().clone()
        for i in range(len(adapter.blocks))
        for ref in adapter.linears(i)
    }


@pytest.mark.parametrize("unit", ["directions", "elements"])
@pytest.mark.parametrize("reestimate", [False, True])
def test_removes_the_cheapest_of_all_layers_and_says_what_it_costs(reestimate, unit):
    _, adapter, tokens = prepare()
    dense = weights(adapter)
    moments = {name: [0.0, 0.0, 0.0] for name in dense}

    def visitor(name):
        def visit(sample):
            x, g = sample.x, sample.g
            outer = (g[:, :, None] * x[:, None, :]).flatten(1)
            for k, new in enumerate((x.T @ x, g.T @ g, outer.T @ outer)):
                moments[name][k] = moments[name][k] + new

        return visit

    small = "model.layers.0.self_attn.k_proj"  # [16, 32]: its whole Fisher matrix fits
    report = backward_pass(adapter, tokens.batches, {small: visitor(small)})
    config = config_of(0.3, unit=unit, reestimate=reestimate)
    layers = damage(adapter, tokens, config)
    after = weights(adapter)
    a, g, f = (t / n for t, n in zip(moments[small], (144, 138, 138), strict=True))
    assert (report.sequences, report.targets) == (6, 138)
    basis = eigenbasis(a, g)
    change = basis.rotate(after[small] - dense[small])
    curvature = basis.curvature()
    if reestimate:  # the diagonal of the Fisher matrix itself, tokens as samples
        q = torch.kron(basis.left, basis.right)
        curvature = (q.T @ f @ q).diagonal().view(16, 32)
    got = next(layer for layer in layers if layer.name == small)
    assert got.loss == pytest.approx(float(maths.element_costs(change, curvature).sum()), rel=1e-6)
    assert got.form == "dense" and got.parameters == 512
    removed = sum(lay.removed for lay in layers)
    total = sum(w.numel() for w in dense.values())
    if unit == "directions":
        assert 0.25 * total < removed <= 0.3 * total
        assert all(lay.removed == lay.shape[0] * lay.shape[1] - lay.rows * lay.columns
                   for lay in layers)  # fmt: skip
        assert int(torch.linalg.matrix_rank(after[small], rtol=1e-9)) <= min(got.rows, got.columns)
    else:
        assert removed == int(0.3 * total + 0.5) and (got.rows, got.columns) == (16, 32)


def test_a_matrix_that_loses_nothing_is_not_rewritten():
    """Rotated there and back it would differ by rounding."""
    model, adapter, tokens = prepare()
    before = {n: p.clone() for n, p in model.named_parameters()}
    layers = damage(adapter, tokens, config_of(0.002))
    untouched = {layer.name for layer in layers if not layer.removed}
    assert 0 < len(untouched) < len(layers)
    for layer in layers:
        same = torch.equal(model.get_submodule(layer.name).weight, before[f"{layer.name}.weight"])
        assert same == (layer.name in untouched), layer.name
        assert (layer.form, layer.loss > 0) == ("dense", layer.name not in untouched)


def test_thin_factors_go_in_only_where_they_are_smaller_and_compute_the_same():
    model, adapter, tokens = prepare()
    dense_model, dense_adapter, _ = prepare()
    layers = damage(adapter, tokens, config_of(0.7, factored=True))
    dense = damage(dense_adapter, tokens, config_of(0.7))
    forms = {layer.form for layer in layers}
    assert forms == {"dense", "factored"}
    for layer, other in zip(layers, dense, strict=True):
        module = model.get_submodule(layer.name)
        size = layer.shape[0] * layer.shape[1]
        assert other.form == "dense" and other.factored_parameters == layer.factored_parameters
        if layer.form == "factored":
            assert isinstance(module, FactoredLinear)
            assert module.rank == min(layer.rows, layer.columns)
            parts = module.up.weight.numel(), module.down.weight.numel()
            assert sum(parts) == layer.parameters < size
        else:
            assert isinstance(module, nn.Linear) and layer.factored_parameters >= size
    ids = tiny_tokens(2, 16)
    torch.testing.assert_close(model(ids).logits, dense_model(ids).logits, rtol=1e-8, atol=1e-8)


def test_the_table_has_a_row_a_kind_and_few_tokens_are_said_to_be_few():
    model = tiny_model("llama")
    report = prune_eigendamage(model, [tiny_tokens(1, 24)], config_of(0.4))
    (note,) = [note for note in report.notes if "calibration tokens" in note]
    assert note.startswith("24 calibration tokens for matrices of up to 64 inputs or outputs")
    table = report.table()
    assert table.row_count == 7 and note in str(table.caption)
    assert next(iter(table.columns[0].cells)) == "2 self_attn.q_proj"
    again = prune_eigendamage(tiny_model("llama"), [tiny_tokens(4, 32)], config_of(0.4))
    assert not any("calibration tokens" in note for note in again.notes)


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny Llama with a tokenizer of words, and a text of them beside it."""
    folder = tmp_path / "in"
    tiny_model("llama").save_pretrained(folder)
    words = [f"w{i}" for i in range(VOCAB)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    drawn = torch.randint(VOCAB, (800,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text.txt").write_text(" ".join(words[i] for i in drawn))
    return folder


def test_the_dense_result_is_a_stock_checkpoint(checkpoint, tmp_path, monkeypatch):
    text = str(tmp_path / "text.txt")
    calibration = CalibrationConfig(source=text, nsamples=4, seqlen=16)
    config = EigenDamageConfig(
        sparsity=0.3,
        include=("model.layers.0.*",),
        exclude=("*.q_proj",),
        calibration=calibration,
    )
    report = prune_eigendamage_checkpoint(checkpoint, tmp_path / "out", config)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = {layer.name for layer in report.layers}
    assert len(names) == 6 and 0.25 < report.sparsity <= 0.3
    for name, w in pruned.state_dict().items():
        assert torch.equal(w, dense.state_dict()[name]) == (name.removesuffix(".weight") not in
                                                            names)  # fmt: skip
    assert bool(pruned(tiny_tokens(2, 16)).logits.isfinite().all())
    stored = json.loads((tmp_path / "out" / "pyprune.json").read_text())
    assert stored["calibration"]["tokens"] == 64 and stored["run"]["peak_rss_bytes"] > 0
    assert EigenDamageConfig.from_dict(stored["config"]) == config
    assert stored["notes"] == list(report.notes) and "dense matrices" in report.notes[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in their Kronecker-factored eigenbases (directions)" in card
    # A text is named without the folders of the machine.
    assert "\n- Calibration: text.txt, 64 tokens" in card and text not in card
    in_memory = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    prune_eigendamage(in_memory, tokenizer, config)
    assert all(map(torch.equal, in_memory.parameters(), pruned.parameters()))
    # Where shards cannot be written in place they are made anew.
    monkeypatch.setattr(Checkpoint, "streaming_obstacle", lambda self: "said the test")
    prune_eigendamage_checkpoint(checkpoint, tmp_path / "anew", config)
    anew = AutoModelForCausalLM.from_pretrained(tmp_path / "anew")
    assert all(map(torch.equal, anew.parameters(), pruned.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thin_factors_are_a_smaller_checkpoint_that_loads(checkpoint, tmp_path, dtype):
    AutoModelForCausalLM.from_pretrained(checkpoint).to(getattr(torch, dtype)).save_pretrained(
        checkpoint
    )
    config = EigenDamageConfig(
        sparsity=0.7,
        method_options={"factored": True},
        calibration=CalibrationConfig(source=str(tmp_path / "text.txt"), nsamples=4, seqlen=16),
    )
    out, ids = tmp_path / "out", tiny_tokens(2, 16)
    report = prune_eigendamage_checkpoint(checkpoint, out, config)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    again = prune_eigendamage(model, tokenizer, config)
    assert again.layers == report.layers and 0 < report.factored < 14
    loaded = pyprune.load(out)
    layers = {layer.name: layer for layer in report.layers}
    for name, layer in layers.items():
        kind = FactoredLinear if layer.form == "factored" else nn.Linear
        assert isinstance(loaded.get_submodule(name), kind)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    # Smaller by what the factors lack, and the rest as it was.
    old, new = (load_file(at / "model.safetensors") for at in (checkpoint, out))
    saved = sum(lay.shape[0] * lay.shape[1] - lay.parameters for lay in layers.values())
    assert saved > 0
    assert sum(t.numel() for t in new.values()) == sum(t.numel() for t in old.values()) - saved
    assert {t.dtype for t in new.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(new[name], old[name]) for name in new if "proj" not in name)
    assert f"{report.factored} of 14 stored as products of two" in (out / "README.md").read_text()
    # The other commands read it; what has factors keeps them.
    seen = inspect_checkpoint(StoredCheckpoint.open(out))
    assert {layer.format for layer in seen.layers} == {"dense", "factored"}
    compress_checkpoint(out, tmp_path / "small")
    assert load_file(tmp_path / "small" / "model.safetensors").keys() >= {
        f"{name}.up.weight" for name, layer in layers.items() if layer.form == "factored"
    }
    decompress_checkpoint(out, tmp_path / "dense")
    dense = reloaded(tmp_path / "dense")
    tolerance = {"float32": 1e-4, "bfloat16": 0.15}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(
            dense(ids).logits, model(ids).logits, rtol=tolerance, atol=tolerance
        )
    copied = densified(loaded)
    assert all(type(copied.get_submodule(name)) is nn.Linear for name in layers)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "qwen3"])
def test_what_is_no_plain_linear_layer_stays_dense(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "in")
    config, batches, out = config_of(0.8, factored=True), [tiny_tokens(4, 24)], tmp_path / "out"
    report = prune_eigendamage_checkpoint(tmp_path / "in", out, config, batches=batches)
    thin = {layer.name for layer in report.layers if layer.form == "factored"}
    assert not any("experts" in name for name in thin) and bool(thin) is (family != "gpt2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    prune_eigendamage(model, batches, config)
    with torch.no_grad():
        want = model(tiny_tokens()).logits
        torch.testing.assert_close(pyprune.load(out)(tiny_tokens()).logits, want)


def test_where_no_factors_are_smaller_the_checkpoint_is_a_stock_one(checkpoint, tmp_path, capsys):
    arguments = [
        "prune", checkpoint, "-m", "eigendamage", "-s", "0.1", "--out", tmp_path / "out",
        "-O", "factored=true", "--calibration", tmp_path / "text.txt", "--nsamples", "4",
        "--seqlen", "16", "--json",
    ]  # fmt: skip
    assert cli.main([str(a) for a in arguments]) == 0
    note = json.loads(capsys.readouterr().out)["notes"][0]
    assert "no matrix is smaller as thin factors" in note and "nothing is smaller or faster" in note
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(model(tiny_tokens(2, 16)).logits.isfinite().all())
    assert "any loader reads" in (tmp_path / "out" / "README.md").read_text()


def test_is_a_method_of_the_one_command(checkpoint, tmp_path, capsys, monkeypatch):
    """`pyprune prune`, with options, in bf16: and nothing but the pruned matrices differs."""
    monkeypatch.setattr("pyprune.progress.LINE_INTERVAL", 0.0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).bfloat16()
    model.save_pretrained(checkpoint)
    arguments = [
        "prune", checkpoint, "-m", "eigendamage", "-s", "0.3", "--out", tmp_path / "cli",
        "-O", "unit=elements", "-O", "fisher_samples=1", "--dtype", "float32", "--json",
        "--calibration", tmp_path / "text.txt", "--nsamples", "4", "--seqlen", "16",
        "--include", "model.layers.0.*",
    ]  # fmt: skip
    assert cli.main([str(a) for a in arguments]) == 0
    out, said = capsys.readouterr()
    assert "factors 1/" in said
    report = json.loads(out)
    names = {layer["name"] for layer in report["layers"]}
    assert len(names) == 7 and report["sparsity"] == pytest.approx(0.3, abs=1e-3)
    old, new = (load_file(at / "model.safetensors") for at in (checkpoint, tmp_path / "cli"))
    assert old.keys() == new.keys()
    for name, w in new.items():
        assert w.dtype == torch.bfloat16
        assert torch.equal(w, old[name]) == (name.removesuffix(".weight") not in names)
    for wrong, message in (
        (["--pattern", "2:4"], "--pattern: not for eigendamage"),
        (["--scope", "row"], "--scope: not for eigendamage"),
        (["--state", tmp_path / "s"], "state: eigendamage has no use for it"),
        (["-O", "unti=elements"], "eigendamage has no option 'unti', did you mean unit"),
    ):
        assert cli.main([str(a) for a in [*arguments[:7], tmp_path / "no", *wrong]]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows["eigendamage"]["options"]) == {
        "unit", "reestimate", "factored", "cap", "fisher_samples", "factor_memory",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "own"),
    [("mixtral", {}), ("llama", {"unit": "elements", "reestimate": True})],
    ids=["mixtral", "llama"],
)
def test_one_block_at_a_time_on_disk_changes_nothing(family, own):
    results = []
    for memory in (8.0, 1e-9):
        model, adapter, tokens = prepare(family, double=False)
        told = []
        config = config_of(0.3, factor_memory=memory, fisher_samples=1, **own)
        layers = damage(adapter, tokens, config, progress=lambda *step, t=told: t.append(step))
        results.append((layers, list(model.parameters())))
        passes = 1 if memory == 8.0 else 2
        for phase in ("factors", "curvature") if own else ("factors",):
            steps = [(done, total) for said, done, total in told if said == phase]
            assert steps == [(n, 6 * passes) for n in range(1, 6 * passes + 1)]
    # But for rounding: experts of blocks that a pass is not about go through grouped products.
    (layers, weights), (others, their_weights) = results
    for layer, other in zip(layers, others, strict=True):
        assert replace(other, loss=layer.loss) == layer
        assert other.loss == pytest.approx(layer.loss, rel=1e-5)
    for weight, other_weight in zip(weights, their_weights, strict=True):
        torch.testing.assert_close(other_weight, weight, rtol=1e-4, atol=1e-5)


def test_what_is_not_known_is_kept_and_named():
    model, adapter, tokens = prepare("mixtral", double=False)
    tokens = as_token_set([tiny_tokens(1, 3)], vocabulary=64, positions=None)
    dense = weights(adapter)
    layers = {lay.name: lay for lay in damage(adapter, tokens, config_of(0.5))}
    after = weights(adapter)
    experts = [lay for name, lay in layers.items() if "experts" in name]
    assert experts
    for lay in experts:
        assert lay.form == "kept" and "tokens that it takes: kept" in lay.note
        assert torch.equal(after[lay.name], dense[lay.name])
    model, adapter, tokens = prepare()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    layers = {lay.name: lay for lay in damage(adapter, tokens, config_of(0.5))}
    for name in ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"):
        assert layers[name].note == "no gradient but zero: kept" and layers[name].rows == 64
    report = prune_eigendamage(model, tokens, config_of(0.5))
    assert report.sparsity < 0.45
    model, adapter, tokens = prepare()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.bias.zero_()
    layers = {lay.name: lay for lay in damage(adapter, tokens, config_of(0.5))}
    assert layers["model.layers.1.mlp.down_proj"].note == "no input but zero: kept"
    assert f"{report.sparsity:.1%} of the entries went, 50.0% were asked for" in report.notes[-1]


def test_bad_input_changes_nothing():
    model, adapter, tokens = prepare()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    dense = weights(adapter)
    with pytest.raises(LayerError, match=r"model\.layers\.\S+: expected finite gradients"):
        damage(adapter, tokens, config_of(0.5))
    assert all(torch.equal(w, dense[name]) for name, w in weights(adapter).items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: expected a fraction in \[0, 1\), got 1.0"),
        ({"sparsity": "x"}, "sparsity: expected a number, got 'x'"),
        ({"method": "wanda"}, "method: expected one of eigendamage, got 'wanda'"),
        ({"device": "tpu"}, "device: expected auto, cpu"),
        ({"method_options": {"unit": "rows"}}, "unit: expected directions or elements, got 'rows'"),
        ({"method_options": {"cap": 1.0}}, r"cap: expected a number in \(0, 1\), got 1.0"),
        ({"method_options": {"fisher_samples": -1}}, "fisher_samples: expected 0 or more, got -1"),
        ({"method_options": {"factor_memory": 0.0}}, "factor_memory: expected a positive number"),
    ],
)
def test_options_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        EigenDamageConfig(**values)


def test_factors_and_entries_or_a_dtype_in_memory_do_not_go_together():
    model, _, tokens = prepare()
    with pytest.raises(UserError, match="factored: expected unit directions, got elements"):
        config_of(0.3, unit="elements", factored=True)
    with pytest.raises(UserError, match="dtype: expected auto for a model in memory"):
        prune_eigendamage(model, tokens, EigenDamageConfig(dtype="float32"))
    report = prune_eigendamage(model, tokens, config_of(0.7, factored=True))
    (note,) = report.notes
    assert 0 < report.factored < 14
    assert note.startswith(f"factored: {report.factored} of 14 matrices are stored as thin factors")
    dense = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    left = sum(layer.parameters for layer in report.layers)
    assert note.endswith(f"with {left / dense:.1%} of their parameters")
    report = prune_eigendamage(tiny_model("llama"), tokens, config_of(0.1, factored=True))
    best = min(layer.factored_parameters / (32 * 64 if "mlp" in layer.name else 32 * layer.shape[0])
               for layer in report.layers)  # fmt: skip
    assert report.factored == 0 and f"the best has {best:.2f} times" in report.notes[0]
    report = prune_eigendamage(tiny_model("gpt2"), tokens, config_of(0.8, factored=True))
    assert "no plain linear layers: all are stored as dense" in report.notes[0]
