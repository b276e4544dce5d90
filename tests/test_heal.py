"""LoRA that is merged: zeros stay, the saved model is the trained one, only matrices change."""

import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from saved_models import reloaded
from tiny_models import tiny_model, tiny_tokens

from pyprune import heal
from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import Batch
from pyprune.checkpoint.output import save_model
from pyprune.cli import main
from pyprune.config import CalibrationConfig
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.repack import repack
from pyprune.depth.save import drop_layers
from pyprune.errors import UserError
from pyprune.heal import HealConfig, heal_model


def tokens():
    ids = tiny_tokens(1, 16).repeat(8, 1)  # one sequence: it can be learnt
    return as_token_set([ids[:2], ids[2:4], ids[4:6], ids[6:]], vocabulary=64, positions=128)


def half_pruned(family, **more):
    model = tiny_model(family, **more)
    gen = torch.Generator().manual_seed(3)
    for name, module in model.named_modules():
        last = name.endswith(("o_proj", "c_proj", "up_proj"))  # some matrices dense, some not
        if hasattr(module, "weight") and module.weight.dim() == 2 and last:
            module.weight.data[torch.rand(module.weight.shape, generator=gen) < 0.5] = 0
    return model


def config(**more):
    return HealConfig(**{"steps": 12, "learning_rate": 5e-3, "rank": 4, **more})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_zeros_stay_and_loss_falls(family):
    model = half_pruned(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    report = heal_model(model, tokens(), config())
    assert report.loss_after < report.loss_before - 0.05
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert [n for n, _ in model.named_parameters()] == list(before)
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == report.matrices > report.masked > 0
    for name, p in model.named_parameters():
        assert not p[before[name] == 0].any(), name
        if name in changed:
            kept = before[name] != 0
            assert (p[kept] != before[name][kept]).float().mean() > 0.9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_model_is_the_trained_one(family, monkeypatch):
    """The logits just before merging, with LoRA beside the matrices, are those of the result."""
    model, ids = half_pruned(family), tiny_tokens(2, 10, seed=5)
    trained = []
    train = heal._train

    def spy(wrapped, *args):
        seen = train(wrapped, *args)
        with torch.no_grad():
            trained.append(wrapped.eval()(ids, use_cache=False).logits)
        return seen

    monkeypatch.setattr(heal, "_train", spy)
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        heal_model(model, tokens(), config())
        merged = model(ids, use_cache=False).logits
    torch.testing.assert_close(merged, trained[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, dense, atol=1e-2)


def test_padding_neither_predicts_nor_is_predicted():
    model, ids = tiny_model("llama"), tiny_tokens(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = mask[1, 6:] = 0
    with torch.no_grad():
        losses = heal._token_losses(model, Batch(ids, mask))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    rows = [logits[0, 3:7], logits[1, :5]]
    labels = torch.cat([ids[0, 4:], ids[1, 1:6]])
    want = torch.nn.functional.cross_entropy(torch.cat(rows), labels, reduction="none")
    torch.testing.assert_close(losses, want)


def test_batches_that_accumulate_count_as_their_mean(monkeypatch):
    """AdamW hardly tells a gradient from twice of it; what it is cut off at does."""
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def spy(parameters, most):
        norms.append(float(clip(parameters, most)))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    for accumulate in (1, 2):
        given = config(steps=1, accumulate=accumulate, dropout=0.0)
        report = heal_model(half_pruned("llama"), tokens(), given)  # its batches are alike
        assert report.tokens == accumulate * 2 * 15
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_the_rate_rises_from_the_first_step_and_falls_to_zero(monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def spy(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    heal_model(tiny_model("llama"), tokens(), config(steps=6, warmup=0.5, learning_rate=6e-3))
    assert rates == pytest.approx([2e-3, 4e-3, 6e-3, 6e-3, 4e-3, 2e-3])


def test_fp16_is_trained_like_fp32():
    """The loss hardly depends on the weights: its gradients are below the smallest of fp16."""
    moved = []
    for dtype in (torch.float16, torch.float32):
        model = half_pruned("llama").half()
        model.lm_head.weight.data *= 1e-4
        model.to(dtype)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        batches = [tiny_tokens(4, 64, seed) for seed in range(3)]
        heal_model(model, as_token_set(batches, vocabulary=64, positions=128), config())
        moved.append({n: (p - before[n]).detach().float() for n, p in model.named_parameters()})
    half, single = moved
    for name, change in single.items():
        if change.any():
            off = float((half[name] - change).norm() / change.norm())
            assert off < 0.1, (name, off)


def test_same_seed_same_weights():
    models = [half_pruned("llama"), half_pruned("llama")]
    for model in models:
        heal_model(model, tokens(), config(steps=3))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_failure_leaves_the_model_alone():
    model = half_pruned("llama")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match="NaN or infinite"):
        heal_model(model, tokens(), config(learning_rate=1e30, clip=1e30))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"steps": 1.5}, {"dropout": 1.0}, {"learning_rate": -1}, {"dtype": "x"}]
)
def test_bad_options(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: expected"):
        HealConfig(**wrong)
    with pytest.raises(UserError, match="held-out"):
        heal_model(tiny_model("llama"), tokens(), config(held_out=4))


def test_command_heals_a_model_with_fewer_layers(tmp_path, capsys):
    model = half_pruned("llama", num_hidden_layers=4, vocab_size=258).to(torch.bfloat16)
    drop_layers(model, [0, 2, 3])
    save_model(model, byte_tokenizer(), tmp_path / "pruned", report={"method": "x"})
    (tmp_path / "pruned" / "LICENSE").write_text("Do as you like.\n")
    text = tmp_path / "text.txt"
    text.write_text("A stitch in time saves nine. " * 200)
    arguments = ["heal", str(tmp_path / "pruned"), "--out", str(tmp_path / "healed"), "--json"]
    arguments += ["--text", str(text), "--steps", "8", "--learning-rate", "5e-3"]
    arguments += ["--nsamples", "8", "--seqlen", "32", "--batch-size", "2"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss_after"] < report["loss_before"]
    loaded = reloaded(tmp_path / "healed")
    assert loaded.dtype == torch.bfloat16 and loaded.config.num_hidden_layers == 3
    for name, p in loaded.named_parameters():
        assert not p[model.get_parameter(name) == 0].any()
    saved = json.loads((tmp_path / "healed" / "pyprune.json").read_text())
    assert saved["method"] == "x" and saved["heal"]["zeros"] == report["zeros"] > 0
    assert main(arguments) == 2 and "not empty" in capsys.readouterr().err
    # What else a checkpoint consists of comes along; healed again, both records are there.
    assert (tmp_path / "healed" / "LICENSE").read_text() == "Do as you like.\n"
    again = [str(tmp_path / "healed"), "--out", str(tmp_path / "twice")]
    assert main(["heal", *again, *arguments[4:]]) == 0
    twice = json.loads((tmp_path / "twice" / "pyprune.json").read_text())
    assert twice["earlier"] == saved and twice["heal"]["loss_before"] == pytest.approx(
        report["loss_after"], abs=0.05
    )


def test_halves_that_are_zero_stay_so():
    model = tiny_model("llama", num_hidden_layers=3)
    graph = ResidualGraph.of(model)
    packing = repack(graph, [Branch("mlp", 0), Branch("attention", 2), Branch("mlp", 1)])
    assert [str(branch) for branch in packing.zeros] == ["M0"]
    dead = dict(model.model.layers[0].mlp.named_parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = heal_model(model, tokens(), config())
    assert report.matrices == 2 * 7 - len(dead) // 2  # weights and biases
    assert not any(p.any() for p in dead.values())
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def test_default_training_text():
    assert HealConfig().training == CalibrationConfig(nsamples=512, seqlen=512, batch_size=4)


def test_what_is_held_out_is_not_trained_on():
    train, held_out = heal._split(list("abcde"), config(held_out=2))
    assert train == list("cde") and held_out == list("ab")
