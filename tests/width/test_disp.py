"""DISP-LLM: gates, their training, and what is saved."""

import pytest
import torch
from saved_models import reloaded, save_model
from tiny_models import MOE_FAMILIES, logits, tiny_model, tiny_tokens, tokens_of
from transformers import AutoModelForCausalLM

from pyprune.calibration.tokens import Batch
from pyprune.errors import UserError
from pyprune.width import disp
from pyprune.width.config import WidthConfig
from pyprune.width.hypernet import (
    BASE,
    TEMPERATURE,
    HyperNet,
    Training,
    gated,
    gumbel_gates,
    next_token_loss,
    train,
)
from pyprune.width.registry import run_width
from pyprune.width.structure import Widths

FEW = {"iterations": 3, "multiple": 1}


def gates_of(model):
    widths = Widths.of(model)
    return widths, [disp._writer_gate(group) for group in widths.groups]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "gemma2", *MOE_FAMILIES])
def test_open_gates_do_nothing_and_closed_ones_are_the_cut(family):
    model, ids = tiny_model(family), tiny_tokens()
    dense = logits(model, ids)
    widths, gates = gates_of(model)
    values = [torch.ones(gate.size) for gate in gates]
    with gated(gates, values):
        # Gated experts run one after the other, not in a grouped product.
        exact = {} if family in MOE_FAMILIES else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(logits(model, ids), dense, **exact)
        for value in values:
            value[::2] = 0
        half = logits(model, ids)
    assert torch.equal(logits(model, ids), dense)
    widths.mask({g.name: torch.arange(1, g.units, 2) for g in widths.groups})
    torch.testing.assert_close(logits(model, ids), half, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_gradients_of_experts_gates(family):
    """Those of a model whose `down_proj` columns are multiplied by the gates."""
    model, batch = tiny_model(family), Batch(tiny_tokens())
    model.set_experts_implementation("eager")
    gen = torch.Generator().manual_seed(0)
    groups = [g for g in Widths.of(model).of_kind("mlp") if g.writer.index is not None]
    values = [torch.rand(g.units, generator=gen).requires_grad_() for g in groups]
    with gated([disp._writer_gate(group) for group in groups], values):
        got = next_token_loss(model, batch)
    grads = torch.autograd.grad(got, values)
    scaled = {}
    for group, value in zip(groups, values, strict=True):
        scaled.setdefault(group.writer.parameter_name, []).append(group.writer.weight() * value)
    weights = {name: torch.stack(parts) for name, parts in scaled.items()}

    def masked(**given):
        return torch.func.functional_call(model, weights, kwargs=given)

    expected = next_token_loss(Masked(model, masked), batch)
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, values), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    assert all(bool(grad.any()) for grad in grads)


class Masked(torch.nn.Module):
    def __init__(self, model, forward):
        super().__init__()
        self.model, self.forward = model, forward


def test_straight_through():
    logit = torch.tensor([-9.0, 0.0, 9.0], dtype=torch.float64, requires_grad=True)
    gen = torch.Generator().manual_seed(0)
    (gate,) = gumbel_gates([logit], gen)
    assert set(gate.round(decimals=9).tolist()) <= {0.0, 1.0} and float(gate[2].detach()) == 1
    gate.sum().backward()
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(0)).clamp(1e-9, 1 - 1e-7)
    noise = -(-uniform.log()).log()
    soft = torch.sigmoid((logit.detach() + noise + BASE) / TEMPERATURE)
    torch.testing.assert_close(logit.grad, soft * (1 - soft) / TEMPERATURE)


def test_network_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (HyperNet([4, 7], seed)() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert [len(t) for t in one] == [4, 7]
    assert all(map(torch.equal, one, two)) and not torch.equal(one[0], other[0])


def test_loss_is_the_models_own():
    model, ids = tiny_model("llama"), tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    own = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    torch.testing.assert_close(next_token_loss(model, Batch(ids, mask)), own)


def test_training_finds_useless_channels_and_touches_nothing_else():
    model = tiny_model("llama", num_hidden_layers=1, intermediate_size=16)
    (group,) = Widths.of(model).of_kind("mlp")
    with torch.no_grad():
        group.writer.weight()[:, ::2] *= 1e-3
        group.writer.weight()[:, 1::2] *= 6
        model.lm_head.weight *= 4
    # Text that the model itself finds likely, so that its channels matter.
    torch.manual_seed(0)
    text = model.generate(tiny_tokens(16, 2), max_new_tokens=22, do_sample=True, eos_token_id=None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.lm_head.weight.requires_grad_(False)
    (logit,), losses = train(
        model,
        [Batch(text)],
        [disp._writer_gate(group)],
        lambda values: disp._log_ratio(values[0].mean(), 0.5),
        Training(iterations=100, rate=3e-2, decay=0.05, strength=2.0, seed=0),
    )
    assert (logit + BASE > 0).tolist() == [False, True] * 8
    assert len(losses) == 100 and losses[-1] < losses[0] + 1e-3
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    silent = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert silent == {"lm_head.weight"}


def test_gates_are_trained_in_fp16_too():
    """The loss hardly depends on the gates: each token's gradient is below the smallest of fp16."""
    logits = []
    for dtype in (torch.float16, torch.float32):
        model = tiny_model("llama", num_hidden_layers=1, intermediate_size=16).half()
        with torch.no_grad():
            model.lm_head.weight *= 1e-3
        (group,) = Widths.of(model).of_kind("mlp")
        (logit,), _ = train(
            model.to(dtype),
            [Batch(tiny_tokens(16, 64))],
            [disp._writer_gate(group)],
            lambda values: values[0].new_zeros(()),
            Training(iterations=20, rate=3e-2, decay=0.0, strength=1.0, seed=0),
        )
        logits.append(logit)
    half, single = logits
    (start,) = HyperNet([16], 0)()
    moved = (single - start.detach()).abs().max()
    assert moved > 0.1 and (half - single).abs().max() < 0.1 * moved


def test_penalty():
    assert float(disp._log_ratio(torch.tensor(0.3), 0.3)) == 0
    one, two = (float(disp._log_ratio(torch.tensor(x), 0.4)) for x in (0.2, 0.8))
    assert one == pytest.approx(two) and one > 0
    assert torch.isfinite(disp._log_ratio(torch.tensor(0.0), 0.4))


def test_hidden_gates_make_a_stock_model(tmp_path):
    ids = tiny_tokens()
    decisions = []
    for _ in range(2):
        model = tiny_model("llama")
        config = WidthConfig("disp-llm", ratio=0.15, method_options=FEW)
        decisions.append(run_width(model, tokens_of(), config))
    assert decisions[0] == decisions[1]
    decision = decisions[0]
    assert decision.parameters[1] <= 0.85 * decision.parameters[0] and not decision.zeroed
    assert decision.sizes["intermediate_size"][1] == model.config.intermediate_size
    save_model(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_keep_equally_many_channels_of_their_own(family, tmp_path):
    ids, dense = tiny_tokens(), tiny_model(family)
    model = tiny_model(family)
    config = WidthConfig("disp-llm", ratio=0.15, method_options=FEW)
    decision = run_width(model, tokens_of(), config)
    before, after = decision.parameters
    assert after == sum(p.numel() for p in model.parameters()) <= 0.85 * before
    assert not decision.zeroed and decision.wanted == after
    field = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    old, new = decision.sizes[field]
    assert new == getattr(model.config, field) < old and new % 8 == 0
    experts = {n: gone for n, gone in decision.removed.items() if "experts" in n}
    assert {len(gone) for gone in experts.values()} == {old - new}
    assert len(set(map(tuple, experts.values()))) > 1
    Widths.of(dense).mask(decision.kept())
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-5)
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = loaded.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, loaded.generate(ids, use_cache=False, **options))


def test_penalty_brings_every_expert_to_its_share():
    model = tiny_model("mixtral", num_hidden_layers=1)
    groups = [g for g in Widths.of(model).of_kind("mlp") if g.writer.index is not None]

    def penalty(values):
        return torch.stack([disp._log_ratio(v.mean(), 0.5) for v in values]).mean()

    gates = [disp._writer_gate(group) for group in groups]
    options = Training(iterations=40, rate=3e-2, decay=0.0, strength=16.0, seed=0)
    logits, _ = train(model, [Batch(tiny_tokens())], gates, penalty, options)
    shares = [float((logit + BASE > 0).double().mean()) for logit in logits]
    assert len(shares) == 4 and all(abs(share - 0.5) < 0.2 for share in shares), shares


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "qwen2_moe"])
def test_all_gates_are_saved_as_zeros(family):
    ids = tiny_tokens()
    model, dense = tiny_model(family), tiny_model(family)
    numel = sum(p.numel() for p in dense.parameters())
    config = WidthConfig("disp-llm", ratio=0.2, method_options={"gates": "all", **FEW})
    decision = run_width(model, tokens_of(), config)
    assert decision.wanted <= 0.8 * numel
    stream = decision.transforms[1]["stream"]
    # The same channels switched off in the dense model, in front of and behind its matrices.
    widths = Widths.of(dense)
    gates, values = [], []
    for group in widths.groups:
        readers = {s.module for s in group.slices[:-1] if s.tensor().dim() == 2}
        every = torch.arange(32)
        name = group.name.removesuffix(f".{group.writer.index}")
        for part, places in (
            ("reads", [disp.Place(m, "input", every) for m in readers]),
            ("writes", [disp.Place(group.writer.module, "output", every)]),
        ):
            gates.append(disp.Gate(part, 32, tuple(places)))
            value = torch.ones(32)
            value[stream[f"{name}:{part}"]] = 0
            values.append(value)
        gates.append(disp._writer_gate(group))
        value = torch.ones(group.units)
        value[decision.removed.get(group.name, [])] = 0
        values.append(value)
    with gated(gates, values):
        expected = logits(dense, ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=2e-5)
    assert sum(int((p != 0).sum()) for p in model.parameters()) <= decision.wanted
    assert disp.NOT_STOCK in decision.notes


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_counter_equals_the_weights(family):
    model = tiny_model(family)
    modules = disp._modules(Widths.of(model))
    full = {gate.name: torch.ones(gate.size) for gate in disp._stream_gates(modules, 32)}
    counted = sum(float(disp._kept(m, full)) for m in modules)
    layers = {
        n: p for n, p in model.model.layers.named_parameters() if not n.endswith("mlp.gate.weight")
    }
    assert counted == sum(p.numel() for p in layers.values() if p.dim() > 1)
    # Experts have gates of their own, and read and write the stream as one.
    names = [gate.name for gate in disp._stream_gates(modules, 32) if ".0.mlp" in gate.name]
    assert len(names) == (3 if family == "llama" else 2 + 4)


def test_threshold_moves_only_as_far_as_it_must():
    logits = [torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([5.0, 6.0])]
    masks, shift = disp._within(logits, lambda m: sum(t.sum() for t in m), 6)
    assert shift == 0 and all(m.all() for m in masks)
    masks, shift = disp._within(logits, lambda m: sum(t.sum() for t in m), 4)
    assert [m.tolist() for m in masks] == [[False, False, True, True], [True, True]]
    with pytest.raises(UserError, match="leaves one channel"):
        disp._within(logits, lambda m: sum(t.sum() for t in m), 1)


def test_what_cannot_be_gated():
    every = WidthConfig("disp-llm", ratio=0.1, method_options={"gates": "all", **FEW})
    with pytest.raises(UserError, match=r"have units: .*self_attention has a single key-value"):
        run_width(tiny_model("falcon"), tokens_of(), every)
    with pytest.raises(UserError, match="disp-llm iterations: expected at least 1, got 0"):
        WidthConfig("disp-llm", ratio=0.1, method_options={"iterations": 0})
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="finite loss"):
        run_width(model, tokens_of(), WidthConfig("disp-llm", ratio=0.1, method_options=FEW))
