"""Training that is merged: zeros stay, the saved model is the trained one, only matrices change."""

import json
import sys

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from saved_models import reloaded, save_model
from tiny_models import tiny_model, tiny_tokens

from pyprune import heal
from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import Batch
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


@pytest.mark.parametrize("train", ["lora", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_zeros_stay_and_loss_falls(family, train):
    model = half_pruned(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    report = heal_model(model, tokens(), config(train=train))
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


@pytest.mark.parametrize("train", ["lora", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_model_is_the_trained_one(family, train, monkeypatch):
    """The logits just before merging are those of the result."""
    model, ids = half_pruned(family), tiny_tokens(2, 10, seed=5)
    trained = []
    whole = heal._train

    def spy(wrapped, *args):
        seen = whole(wrapped, *args)
        with torch.no_grad():
            trained.append(wrapped.eval()(ids, use_cache=False).logits)
        return seen

    monkeypatch.setattr(heal, "_train", spy)
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        heal_model(model, tokens(), config(train=train))
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


def test_bf16_weights_move_by_less_than_their_rounding():
    """Each step is below it: without wider copies to add them up in, no weight would move."""
    model, wide = half_pruned("llama").bfloat16(), half_pruned("llama")
    wide.load_state_dict(model.state_dict())
    before = {n: p.detach().clone() for n, p in wide.named_parameters()}
    for healed in (model, wide):
        heal_model(healed, tokens(), config(train="all", steps=100, learning_rate=1e-4))
    changes = [
        torch.cat([(p.detach().float() - before[n]).flatten() for n, p in m.named_parameters()])
        for m in (model, wide)
    ]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.8
    assert changes[0].norm() == pytest.approx(float(changes[1].norm()), rel=0.2)


def mean_divergence(teacher, model, ids):
    with torch.no_grad():
        p, q = (m(ids, use_cache=False).logits.log_softmax(-1) for m in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("train", ["lora", "all"])
def test_a_teacher_is_followed(train):
    """On text that neither model has seen: it is learnt from its predictions, not by heart."""
    teacher, seen = tiny_model("llama").train(), [tiny_tokens(4, 32, seed) for seed in range(40)]
    state = {n: t.clone() for n, t in teacher.state_dict().items()}
    batches, unseen = as_token_set(seen, vocabulary=64, positions=128), tiny_tokens(4, 32, 99)
    found = {}
    for given in (None, teacher):
        model = half_pruned("llama")
        started = mean_divergence(teacher.eval(), model, unseen)
        teacher.train()
        report = heal_model(
            model, batches, config(train=train, steps=40, learning_rate=2e-3), teacher=given
        )
        assert report.teacher == (None if given is None else "LlamaForCausalLM")
        assert all(m.training for m in teacher.modules())
        found[given is None] = mean_divergence(teacher.eval(), model, unseen) / started
    assert found[False] < 0.8 and found[False] < 0.8 * found[True]
    assert all(torch.equal(t, state[n]) for n, t in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_divergences_are_those_of_real_tokens():
    teacher, model, ids = tiny_model("llama"), half_pruned("llama"), tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        losses = heal._divergences(teacher, model, Batch(ids, mask))
        alone = heal._divergences(teacher, model, Batch(ids[:1], None))
        itself = heal._divergences(model, model, Batch(ids, None))
    assert losses.shape == (8 + 4,)
    torch.testing.assert_close(losses[:8], alone)
    assert losses.mean() > 1e-4 and itself.abs().max() < 1e-6
    expected = mean_divergence(teacher, model, ids[:1, :-1])
    assert float(alone.mean()) == pytest.approx(expected, rel=1e-4)


def test_teachers_that_cannot_teach(tmp_path):
    model = half_pruned("llama")
    before = [p.detach().clone() for p in model.parameters()]
    other = tiny_model("llama", vocab_size=80)
    with pytest.raises(UserError, match="teacher: expected logits of 64 tokens, got 80"):
        heal_model(model, tokens(), config(), teacher=other)
    with pytest.raises(UserError, match="teacher: expected another model"):
        heal_model(model, tokens(), config(), teacher=model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


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
    "wrong",
    [
        {"rank": 0},
        {"steps": 1.5},
        {"dropout": 1.0},
        {"learning_rate": -1},
        {"dtype": "x"},
        {"train": "some"},
    ],
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


def test_command_with_a_teacher(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # not needed where no LoRA is
    for name, model in {
        "dense": tiny_model("llama", vocab_size=258),
        "pruned": half_pruned("llama", vocab_size=258),
    }.items():
        save_model(model, byte_tokenizer(), tmp_path / name, report={})
    (tmp_path / "text.txt").write_text("A stitch in time saves nine. " * 200)
    arguments = ["heal", str(tmp_path / "pruned"), "--teacher", str(tmp_path / "dense")]
    arguments += ["--text", str(tmp_path / "text.txt"), "--steps", "2", "--nsamples", "4"]
    arguments += ["--seqlen", "16", "--batch-size", "1", "--json", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2 and "LoRA needs peft" in capsys.readouterr().err
    assert main([*arguments, "--train", "all"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["teacher"], report["config"]["train"]) == ("dense", "all")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "All kept weights trained" in card and "taught by dense" in card
    itself = ["--teacher", str(tmp_path / "pruned"), "--out", str(tmp_path / "again")]
    assert main([*arguments, "--train", "all", *itself]) == 2
    assert "another model than pruned itself" in capsys.readouterr().err
    # Another tokenizer with as many tokens would teach nonsense.
    vocabulary = tmp_path / "dense" / "tokenizer.json"
    tokenizer = json.loads(vocabulary.read_text())
    entries = tokenizer["model"]["vocab"]
    first, second = list(entries)[100:102]
    entries[first], entries[second] = entries[second], entries[first]
    vocabulary.write_text(json.dumps(tokenizer))
    arguments[-1] = str(tmp_path / "again")
    assert main([*arguments, "--train", "all"]) == 2
    assert "dense has other tokens" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


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
