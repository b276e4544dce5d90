"""Width units: what is zeroed, what is cut, and what plain transformers makes of the result."""

import pytest
import torch
from saved_models import reloaded, save_model
from tiny_models import FAMILIES, MOE_FAMILIES, logits, tiny_model, tiny_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune.errors import UserError
from pyprune.models.stock import InexpressibleError
from pyprune.width.cut import cut, enable_biases, fitting_sizes, padded
from pyprune.width.structure import Slice, Widths

# Families whose heads have no size of their own in the configuration, or a single KV head.
HEADS_STAY = ("opt", "gpt2", "gpt_neox", "bloom", "falcon")
CHANNELS_STAY = ("bloom",)
GQA = {"num_attention_heads": 8, "num_key_value_heads": 4}


def model_of(family, **overrides):
    if family == "phi3":
        config = AutoConfig.for_model(
            "phi3", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            pad_token_id=0, max_position_embeddings=128, original_max_position_embeddings=128,
            num_attention_heads=8, num_key_value_heads=4,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for p in model.parameters():
            p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
        return model
    if family == "falcon_grouped":
        more = {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
        return tiny_model("falcon", **more, **overrides)
    if family == "falcon_heads":
        return tiny_model("falcon", multi_query=False, **overrides)
    if hasattr(AutoConfig.for_model(family), "num_key_value_heads") and family != "phi":
        overrides = {**GQA, **overrides}
    return tiny_model(family, **overrides)


ALL = (*FAMILIES, "phi3", "falcon_grouped", "falcon_heads")


def assert_same(family, got, expected):
    """Bit for bit, but for grouped products of experts, whose order depends on where they lie."""
    if family in MOE_FAMILIES:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(got, expected)


def some_units(widths, share=0.5, seed=0, uniform=True):
    """A random choice of units of every group."""
    gen = torch.Generator().manual_seed(seed)
    kept = {}
    for i, group in enumerate(widths.groups):
        left = max(1, int(group.units * share) - (0 if uniform else i))
        if group.step > 1:
            left = left if not uniform else left // group.step * group.step
        kept[group.name] = torch.randperm(group.units, generator=gen)[:left].sort().values
    return kept


@pytest.mark.parametrize("family", ALL)
def test_reading_parts_and_writing_part_agree(family):
    """The units own what the description says: without their inputs they write nothing, and
    without their outputs they need no inputs."""
    model = model_of(family)
    widths = Widths.of(model)
    ids = tiny_tokens(2, 9)
    kept = some_units(widths)
    originals = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for pick in (slice(None, -1), slice(-1, None), slice(None)):
        for group, units in widths.removed(kept):
            for part in group.slices[pick]:
                part.zero(units)
        results.append(logits(model, ids))
        model.load_state_dict(originals)
    dense = logits(model, ids)
    assert not torch.allclose(results[0], dense, atol=1e-3)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_uniform_cut_reloads(family, tmp_path):
    model = model_of(family)
    ids = tiny_tokens(2, 9)
    widths = Widths.of(model)
    kept = some_units(widths)
    before = sum(p.numel() for p in model.parameters())
    lost = widths.removed_parameters(kept)
    heads_stay = family.split("_")[0] in HEADS_STAY or family in HEADS_STAY
    stays = {
        g.name
        for g in widths.groups
        if (g.kind == "heads" and heads_stay) or (g.kind == "mlp" and family in CHANNELS_STAY)
    }
    still = sum(
        g.unit_parameters * (g.units - len(kept[g.name])) for g in widths.groups if g.name in stays
    )
    report = cut(widths, kept)
    memory = logits(model, ids)
    assert report.parameters == (before, before - lost + still)
    assert report.wanted == before - lost
    assert sum(p.numel() for p in model.parameters()) == before - lost + still
    assert set(report.zeroed) == stays and bool(report.reasons) == bool(stays)
    if family not in CHANNELS_STAY:
        assert any(
            name in report.sizes
            for name in (
                "intermediate_size",
                "ffn_dim",
                "n_inner",
                "ffn_hidden_size",
                "moe_intermediate_size",
            )
        )
    # against the masked model
    masked = model_of(family)
    Widths.of(masked).mask(kept)
    torch.testing.assert_close(memory, logits(masked, ids), rtol=1e-4, atol=2e-5)
    # against transformers
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    assert_same(family, logits(loaded, ids), memory)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for candidate in (model, loaded):
        cached = candidate.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, candidate.generate(ids, use_cache=False, **options))
    if not heads_stay:
        again = {g.kind: g.units for g in Widths.of(loaded).groups}
        assert again["heads"] == len(kept[widths.of_kind("heads")[0].name])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "mixtral"])
def test_unequal_layers_are_cut_to_the_largest(family, tmp_path):
    model, ids = model_of(family), tiny_tokens(2, 9)
    widths = Widths.of(model)
    kept = some_units(widths, uniform=False)
    masked = model_of(family)
    Widths.of(masked).mask(kept)
    report = cut(widths, kept)
    for names, groups in widths.classes().items():
        step = groups[0].step
        most = -(-max(len(kept[g.name]) for g in groups) // step) * step
        for name in names:
            assert getattr(model.config, name) == groups[0].fields[name] * most
            assert report.sizes[name] == (
                groups[0].fields[name] * groups[0].units,
                getattr(model.config, name),
            )
        for group in groups:
            assert report.zeroed.get(group.name, 0) == most - len(kept[group.name])
    assert report.parameters[0] > report.parameters[1] > report.wanted
    torch.testing.assert_close(logits(model, ids), logits(masked, ids), rtol=1e-4, atol=2e-5)
    live = Widths.of(model).live()
    assert {k: len(v) for k, v in live.items()} == {k: len(v) for k, v in kept.items()}
    save_model(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_same(family, logits(loaded, ids), logits(model, ids))


def test_sizes_that_the_configuration_refuses_are_passed_over():
    """Llama's hidden size has to be a multiple of its heads: 12 heads of 48 do, 9 and 10 do not."""
    model = tiny_model(
        "llama", hidden_size=48, num_attention_heads=12, num_key_value_heads=12, head_dim=4
    )
    widths = Widths.of(model)
    groups = widths.of_kind("heads")
    assert fitting_sizes(widths, groups, range(1, 12)) == [1, 2, 3, 4, 6, 8]
    kept = {g.name: torch.arange(7) for g in groups}
    report = cut(widths, kept)
    assert model.config.num_attention_heads == 8 and model.config.head_dim == 4
    assert report.zeroed == {g.name: 1 for g in groups}
    assert "multiple" in report.reasons[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2"])
def test_zeroed_rows_or_columns_are_found(family):
    """Whatever zeroed them: a unit is dead by its columns, by its value rows, by one of its gates;
    not by half of these."""
    model = model_of(family)
    widths, ids = Widths.of(model), tiny_tokens(2, 9)
    assert all(len(units) == widths[name].units for name, units in widths.live().items())
    mlp, heads = widths.of_kind("mlp")[0], widths.of_kind("heads")[0]
    mlp.slices[-1].zero(torch.tensor([5]))
    for part in mlp.slices:
        if part.module is mlp.gates[-1]:
            part.zero(torch.tensor([7]))
    mlp.slices[0].tensor().index_fill_(mlp.slices[0].axis, torch.tensor([9]), 0.5)
    for part in heads.slices[:-1]:
        if part.module in heads.gates:
            part.zero(torch.tensor([1]))
    live = widths.live()
    assert sorted({*range(mlp.units)} - {*live[mlp.name].tolist()}) == [5, 7]
    assert len(live[heads.name]) == heads.units - bool(heads.gates)
    before = logits(model, ids)
    cut(widths, live)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=2e-5)


def test_everything_kept_changes_nothing():
    model = model_of("llama")
    before, config = logits(model, tiny_tokens()), model.config.to_dict()
    report = cut(Widths.of(model), {})
    assert torch.equal(logits(model, tiny_tokens()), before) and model.config.to_dict() == config
    assert report.parameters[0] == report.parameters[1] == report.wanted
    assert not report.sizes and not report.zeroed and not report.reasons


def test_a_group_may_lose_everything():
    model = model_of("llama")
    widths = Widths.of(model)
    empty = torch.empty(0, dtype=torch.int64)
    kept = {g.name: empty for g in widths.groups}
    report = cut(widths, kept)
    assert model.config.intermediate_size == 1 and model.config.num_key_value_heads == 1
    assert report.zeroed == {g.name: 1 for g in widths.groups}


def test_what_cannot_be_cut_says_why():
    widths = Widths.of(model_of("falcon"))
    assert {g.kind for g in widths.groups} == {"mlp"}
    assert all("single key-value head" in why for why in widths.refused.values())
    olmo = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "olmo2", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
        )
    )  # fmt: skip
    widths = Widths.of(olmo)
    assert {g.kind for g in widths.groups} == {"mlp"}
    (why,) = widths.refused.values()
    assert "spans the heads" in why


@pytest.mark.parametrize(
    "family, refused, units",
    [
        ("helium", "not made of heads of size 128", {"mlp"}),  # by default, whatever the width
        ("nemotron", None, {"heads", "mlp"}),  # up and down without a gate
        ("codegen", None, {"heads", "mlp"}),
    ],
)
def test_families_beyond_those_supported(family, refused, units):
    sizes = {"num_key_value_heads": 4, "num_attention_heads": 4, "hidden_size": 32}
    sizes |= {"intermediate_size": 64, "num_hidden_layers": 1}
    if family == "codegen":
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
    config = AutoConfig.for_model(family, vocab_size=64, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    widths = Widths.of(model)
    assert {g.kind for g in widths.groups} == units
    assert bool(refused) == bool(widths.refused)
    if refused:
        assert refused in next(iter(widths.refused.values()))
    if family == "codegen":  # it reuses a name for queries, keys and values in another order
        for p in model.parameters():
            p.data.normal_(float(p.dim() == 1), 0.2)
        with pytest.raises(UserError, match="unknown structure of attention or MLP"):
            cut(widths, some_units(widths))
    elif family == "nemotron":
        assert cut(widths, some_units(widths)).sizes["intermediate_size"] == (64, 32)


def test_bloom_is_masked_and_says_what_is_lost():
    model = model_of("bloom")
    widths = Widths.of(model)
    report = cut(widths, some_units(widths))
    assert report.parameters[0] == report.parameters[1] > report.wanted
    assert any("no field" in reason for reason in report.reasons)


@pytest.mark.parametrize("family", [*MOE_FAMILIES, "phimoe", "gpt_oss"])
def test_experts_keep_different_channels(family):
    model = model_of(family)
    widths = Widths.of(model)
    experts = [g for g in widths.groups if g.name.split(".")[-1].isdigit()]
    kept = some_units(widths, seed=3)
    assert len(experts) >= 4 and not torch.equal(*(kept[g.name] for g in experts[:2]))
    old = [g.writer.weight().clone() for g in experts]
    cut(widths, kept)
    for group, weight in zip(experts, old, strict=True):
        assert torch.equal(group.writer.weight(), weight[:, kept[group.name]])


def test_biases_are_switched_on_where_the_family_has_them():
    ids = tiny_tokens()
    model = tiny_model("llama", attention_bias=False, mlp_bias=False)
    before = logits(model, ids)
    enable_biases(model, "mlp_bias", [])
    assert torch.equal(logits(model, ids), before)
    names = [n for n, _ in model.named_parameters() if n.endswith("bias")]
    assert model.config.mlp_bias and len(names) == 2 * 3
    enable_biases(model, "attention_bias", [])
    assert model.model.layers[1].self_attn.o_proj.bias.abs().sum() == 0
    with pytest.raises(InexpressibleError, match="MistralConfig has no mlp_bias"):
        enable_biases(tiny_model("mistral"), "mlp_bias", [])


@pytest.mark.parametrize("bad", [[1, 0], [0, 0], [-1], [64]])
def test_bad_indices_are_refused(bad):
    widths = Widths.of(model_of("llama"))
    name = widths.of_kind("mlp")[0].name
    with pytest.raises(UserError, match="expected ascending indices"):
        widths.mask({name: torch.tensor(bad)})
    with pytest.raises(UserError, match="name of a group"):
        widths.mask({"nothing": torch.tensor([0])})


def test_a_wrong_description_is_refused():
    """Columns of other units than the rows: the cut model differs from the masked one."""
    model = model_of("llama")
    widths = Widths.of(model)
    group = widths.of_kind("mlp")[0]
    first = group.slices[0]
    wrong = Slice(first.module, first.parameter, first.axis, first.index.flip(0))
    object.__setattr__(group, "slices", (wrong, *group.slices[1:]))
    with pytest.raises(UserError, match="unknown structure of attention or MLP"):
        cut(widths, {group.name: torch.arange(32)})


def test_slices_share_the_axis():
    module = torch.nn.Linear(4, 6)
    with pytest.raises(ValueError, match="share its 6 entries"):
        Slice(module, "weight", 0, torch.arange(4)[:, None])


def test_padding():
    assert padded(torch.tensor([1, 4]), 4, 6).tolist() == [0, 1, 2, 4]
