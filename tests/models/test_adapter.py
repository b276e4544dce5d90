import pytest
import torch
from tiny_models import BLOCKS, FAMILIES, MIXTURES, tiny_model
from torch import nn
from torch.nn.utils import prune
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
)

from pyprune.errors import UserError
from pyprune.models import adapter as adapter_module
from pyprune.models.adapter import Adapter

# Leaf names of block 1's matrices in definition order, experts once per projection.
EXPECTED = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "mistral": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "qwen2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "qwen3": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "gemma2": "gate_proj up_proj down_proj q_proj k_proj v_proj o_proj",
    "gemma3_text": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "phi": "q_proj k_proj v_proj dense fc1 fc2",
    "opt": "k_proj v_proj q_proj out_proj fc1 fc2",
    "gpt2": "c_attn c_proj c_fc c_proj",
    "gpt_neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "bloom": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "falcon": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "mixtral": "q_proj k_proj v_proj o_proj gate_up_proj down_proj",
    "qwen2_moe": "q_proj k_proj v_proj o_proj gate_up_proj down_proj gate_proj up_proj down_proj",
    "qwen3_moe": "q_proj k_proj v_proj o_proj gate_up_proj down_proj",
}


def leaves(refs):
    names = (ref.parameter if ref.index is not None else ref.name.split(".")[-1] for ref in refs)
    experts_seen = set()
    for ref, name in zip(refs, names, strict=True):
        if ref.index is None or ref.parameter_name not in experts_seen:
            experts_seen.add(ref.parameter_name)
            yield name


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_matrices_of_every_family(family):
    model = tiny_model(family)
    adapter = Adapter.of(model)
    assert len(adapter.blocks) == BLOCKS
    assert sorted(leaves(adapter.linears(1))) == sorted(EXPECTED[family].split())
    for name, block in zip(adapter.block_names, adapter.blocks, strict=True):
        assert model.get_submodule(name) is block


def test_a_gate_beside_no_experts_is_no_router():
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate = nn.Linear(32, 32)
    names = [ref.name for ref in Adapter.of(model).linears(0)]
    assert "model.layers.0.mlp.gate" in names


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_in_the_blocks_is_found_or_is_a_router(family):
    model = tiny_model(family)
    adapter = Adapter.of(model)
    found = {ref.parameter_name for i in range(BLOCKS) for ref in adapter.linears(i)}
    in_blocks = {
        f"{name}.{key}"
        for name, block in zip(adapter.block_names, adapter.blocks, strict=True)
        for key, p in block.named_parameters()
        if p.dim() > 1
    }
    left = {key.split(".mlp.")[1] for key in in_blocks - found}
    assert left <= {"gate.weight", "shared_expert_gate.weight"}
    assert found <= in_blocks  # nothing outside the blocks: no head, no OPT project_in


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_is_a_live_view_with_inputs_in_columns(family):
    model = tiny_model(family)
    parameters = dict(model.named_parameters())
    for ref in Adapter.of(model).linears(1):
        owner = parameters[ref.parameter_name]
        w = ref.weight()
        assert w.data_ptr() == (owner if ref.index is None else owner[ref.index]).data_ptr()
        if ref.index is None and not ref.transposed:
            x = torch.randn(3, w.shape[1])
            bias = ref.module.bias if ref.module.bias is not None else 0
            torch.testing.assert_close(ref.module(x), x @ w.T + bias)
        new = torch.randn(w.shape, dtype=torch.float64)
        ref.write(new)
        assert torch.equal(ref.weight(), new.float())
        assert owner.requires_grad and not ref.weight().requires_grad


LEFT = {
    "olmoe": {"mlp.gate.weight": 2},
    "phimoe": {"mlp.router.weight": 2},
    "granitemoe": {"block_sparse_moe.router.weight": 2},
    "gpt_oss": {"mlp.router.weight": 2},
    "llama4_text": {"feed_forward.router.weight": 2},
    "deepseek_v2": {"mlp.gate.weight": 1},
    "deepseek_v32": {
        "self_attn.indexer.wq_b.weight": 2,
        "self_attn.indexer.wk.weight": 2,
        "self_attn.indexer.weights_proj.weight": 2,
        "mlp.gate.weight": 1,
    },
    "qwen3_next": {
        "linear_attn.conv1d.weight": 1,
        "mlp.gate.weight": 2,
        "mlp.shared_expert_gate.weight": 2,
    },
    "nemotron_h": {"mixer.gate.weight": 1},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_leave_what_steers_tokens_alone(family):
    adapter = Adapter.of(tiny_model(family))
    assert adapter.left_alone() == LEFT[family]
    refs = [ref for i in range(BLOCKS) for ref in adapter.linears(i)]
    experts = [ref for ref in refs if ref.index is not None]
    sparse = 1 if family in ("deepseek_v2", "deepseek_v32", "nemotron_h") else 2
    assert len(experts) == sparse * 4 * 2
    assert {ref.weight().shape[1] for ref in experts} == {32, 32 if family in WIDE else 16}
    shared = [ref for ref in refs if "shared_expert" in ref.name]
    has_shared = {"deepseek_v2": 3, "deepseek_v32": 3, "qwen3_next": 6, "nemotron_h": 2}
    has_shared["llama4_text"] = 6
    assert len(shared) == has_shared.get(family, 0)


WIDE = ("olmoe", "phimoe", "granitemoe", "gpt_oss", "llama4_text")


def test_a_linear_map_for_each_part_of_its_input_is_left_alone():
    class Grouped(nn.Linear):
        def forward(self, x):
            return torch.cat([nn.functional.linear(part, self.weight) for part in x.chunk(2, -1)])

    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = Grouped(32, 32)
    adapter = Adapter.of(model)
    assert not any("1.mlp.down_proj" in ref.name for ref in adapter.linears(1))
    assert adapter.left_alone() == {"mlp.down_proj.weight": 1}


def test_the_step_sizes_of_a_state_space_are_left_alone():
    adapter = Adapter.of(tiny_model("jamba"))
    names = [ref.name for i in range(BLOCKS) for ref in adapter.linears(i)]
    assert not any("dt_proj" in name for name in names)
    assert any("mamba.x_proj" in name for name in names)
    assert "mamba.dt_proj.weight" in adapter.left_alone()


def test_a_list_without_parameters_is_no_list_of_blocks():
    model = tiny_model("llama")
    model.model.rotary_embs = nn.ModuleList(nn.Identity() for _ in range(BLOCKS))
    assert Adapter.of(model).block_names == ["model.layers.0", "model.layers.1"]


def test_the_decoder_of_a_model_that_names_itself():
    model = tiny_model("llama4_text")
    assert model.get_decoder() is model and adapter_module.decoder_of(model) is model.model
    bare = model.model
    assert adapter_module.decoder_of(bare) is bare
    assert adapter_module.decoder_of(tiny_model("llama")) is not None


def test_conv1d_is_transposed():
    model = tiny_model("gpt2")
    ref = Adapter.of(model).linears(0)[0]
    assert ref.transposed and ref.name == "transformer.h.0.attn.c_attn"
    assert ref.weight().shape == (96, 32) and ref.module.weight.shape == (32, 96)
    x = torch.randn(3, 32)
    torch.testing.assert_close(ref.module(x), x @ ref.weight().T + ref.module.bias)


def test_names_of_experts():
    refs = Adapter.of(tiny_model("mixtral")).linears(1)
    ref = next(r for r in refs if r.index == 3)
    assert ref.name == "model.layers.1.mlp.experts.gate_up_proj.3"
    assert ref.parameter_name == "model.layers.1.mlp.experts.gate_up_proj"
    assert ref.weight().shape == (64, 32)


def test_write_refuses_another_shape():
    ref = Adapter.of(tiny_model("llama")).linears(0)[0]
    with pytest.raises(ValueError, match=r"q_proj: expected a weight \(32, 32\), got \(1, 32\)"):
        ref.write(torch.zeros(1, 32))


def test_works_on_meta_and_on_a_model_without_head():
    config = tiny_model("qwen2").config
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    assert len(Adapter.of(meta).linears(0)) == 7
    assert Adapter.of(AutoModel.from_config(config)).block_names == ["layers.0", "layers.1"]


def test_parameters_tied_to_the_outside_are_left_out():
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 32))
    model.lm_head.weight = model.model.layers[1].mlp.up_proj.weight
    adapter = Adapter.of(model)
    assert len(adapter.linears(0)) == 7
    assert "up_proj" not in set(leaves(adapter.linears(1)))
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    assert "down_proj" not in set(leaves(Adapter.of(model).linears(0)))
    # Two matrices of one block that are one parameter.
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    assert not {"gate_proj", "up_proj"} & set(leaves(Adapter.of(model).linears(0)))


def test_linear_subclasses_are_found_and_routers_are_not():
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.gate = nn.Linear(32, 4)  # as in early versions of transformers 5
    assert all("gate." not in f"{r.name}." for r in Adapter.of(model).linears(0))
    assert type(tiny_model("falcon").transformer.h[0].mlp.dense_h_to_4h) is not nn.Linear


def test_several_candidate_lists_need_an_entry(monkeypatch):
    model = tiny_model("llama")
    model.model.adapters = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(UserError, match=r"LlamaForCausalLM: expected one list of 2 .*BLOCK_PATHS"):
        Adapter.of(model)
    monkeypatch.setitem(adapter_module.BLOCK_PATHS, "llama", "layers")
    assert Adapter.of(model).blocks == list(model.model.layers)


def test_unknown_architectures_are_named():
    with pytest.raises(UserError, match="Linear: expected a transformers decoder"):
        Adapter.of(nn.Linear(2, 2))
    t5 = AutoConfig.for_model("t5", vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1)
    with torch.device("meta"):
        t5_model = AutoModel.from_config(t5)
    with pytest.raises(UserError, match="T5Model: expected a decoder-only"):
        Adapter.of(t5_model)
    shared = tiny_model("llama")
    shared.model.layers[1] = shared.model.layers[0]
    with pytest.raises(UserError, match="blocks share weights"):
        Adapter.of(shared)
    bare = tiny_model("llama")
    bare.model.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(UserError, match="no linear maps"):
        Adapter.of(bare)
    shorter = tiny_model("llama")
    shorter.config.num_hidden_layers = 0
    with pytest.raises(UserError, match="no num_hidden_layers"):
        Adapter.of(shorter)


def test_quantised_weights_are_refused():
    model = tiny_model("llama")
    packed = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = packed
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj: .* got torch.uint8"):
        Adapter.of(model)


def test_unknown_expert_layouts_are_refused():
    class OddExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(4, 8, 32))

    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts = OddExperts()
    with pytest.raises(UserError, match=r"mlp.experts: unknown layout .* OddExperts .*up_proj\)"):
        Adapter.of(model)
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(UserError, match="one module per expert"):
        Adapter.of(model)


@pytest.mark.parametrize("how", ["weight_norm", "masked", "spectral_norm"])
def test_weights_that_are_computed_are_refused(how):
    """What was written to them was lost, and the report said that half was zero."""
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp.up_proj
    if how == "weight_norm":
        nn.utils.parametrizations.weight_norm(layer)
    elif how == "masked":
        prune.random_unstructured(layer, "weight", 0.1)
    else:
        nn.utils.spectral_norm(layer)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: expected a weight that is"):
        Adapter.of(model)
    if how == "masked":
        prune.remove(layer, "weight")
        Adapter.of(model)


def test_encoders_are_refused():
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"BertForMaskedLM: expected a decoder-only .* encoder"):
        Adapter.of(BertForMaskedLM(config))
    config.is_decoder = True
    assert len(Adapter.of(BertLMHeadModel(config)).linears(0)) == 6
