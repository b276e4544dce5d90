"""vLLM with compressed mixtures of experts, on the CPU: whole models by its engine, and its layer
of experts alone, loaded by its own loader."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig

from pyprune.errors import UserError
from pyprune.models.experts import sorted_by_expert
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.layout import LayerFormat
from pyprune.sparse.weight import pack

pytest.importorskip("vllm", reason="vLLM is not installed")

from integrations.test_vllm import compare, quick_start, served  # noqa: F401 (a fixture)
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import (
    ExpertMapManager,
)

from pyprune.integrations.vllm import PyPruneVLLMConfig, experts

HIDDEN, CHANNELS, EXPERTS = 64, 32, 4
PREFIX = "model.layers.0.mlp.experts"
PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
MODEL = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def kept(shape, pattern):
    if pattern == "2:4":
        return (torch.rand(*shape[:-1], shape[-1] // 4, 4).argsort(-1) < 2).view(shape)
    return torch.rand(shape) < 0.5


def checkpoint(folder, config, pattern_of):
    """A compressed random model; `pattern_of(name, expert, half)` says how matrices are pruned."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data.uniform_(0.5, 1.5)
        elif p.dim() == 3:
            for e in range(len(p)):
                for half, w in enumerate(p.data[e].chunk(2) if "gate_up" in name else [p.data[e]]):
                    w[~kept(w.shape, pattern_of(name, e, half))] = 0
        elif ".layers." in name and "gate." not in name:
            p.data[~kept(p.shape, pattern_of(name, None, 0))] = 0
    model.save_pretrained(folder / "dense")
    compress_checkpoint(folder / "dense", folder / "small")
    return folder / "small"


def make_dense(folder, out, names):
    """A copy in which the layers `names` are stored as plain weights."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    dense = load_file(folder.parent / "dense" / "model.safetensors")
    for name in names:
        del config["quantization_config"]["layers"][name]
        state = {key: t for key, t in state.items() if key.rpartition(".")[0] != name}
        state[f"{name}.weight"] = dense[f"{name}.weight"]
    (out / "config.json").write_text(json.dumps(config))
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return out


def test_mixtral_of_all_formats_is_served(tmp_path):
    # Expert 2 has a 2:4 gate and a bitmap above it: two products.
    config = MixtralConfig(**MODEL, intermediate_size=48, num_local_experts=4)
    small = checkpoint(
        tmp_path, config, lambda name, e, half: "50 %" if (e, half) in ((1, 0), (2, 1)) else "2:4"
    )
    stem = "model.layers.{}.block_sparse_moe.experts.{}.{}"
    layers = json.loads((small / "config.json").read_text())["quantization_config"]["layers"]
    found = [layers[stem.format(0, 2, name)]["format"] for name in ("w1", "w3")]
    assert found == ["sparse24", "bitmap"]
    dense = [stem.format(0, 3, name) for name in ("w1", "w2", "w3")] + [stem.format(1, 0, "w1")]
    results, (modules,) = served(make_dense(small, tmp_path / "some", dense))
    # Of q, k and v, and o; of experts 0, 1, 2 and 3.
    assert len(modules) == (2 + 2 + 3 + 3 + 0) + (2 + 2 + 3 + 3 + 2)
    compare(small, results)


# Whole experts in the one or the other process, half of the shared one in each.
@pytest.mark.parametrize("processes", [1, 2])
def test_qwen2_moe_with_a_shared_expert_is_served(tmp_path, monkeypatch, processes):
    config = Qwen2MoeConfig(
        **MODEL, intermediate_size=96, moe_intermediate_size=CHANNELS, num_experts=EXPERTS,
        shared_expert_intermediate_size=48, mlp_only_layers=[0],
    )  # fmt: skip
    small = checkpoint(tmp_path, config, lambda *_: "50 %")
    options = {}
    if processes == 2:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    results, found = served(small, **options)
    assert [len(modules) for modules in found] == [4 + 4 + 2 * EXPERTS // processes] * processes
    compare(small, results)


# The layer alone.


def weights_of(formats):
    """Each expert's matrices, sparse where `formats(expert, name)` is not None; and how they are
    stored, with the tensors of their files, by the checkpoint's names."""
    torch.manual_seed(11)
    dense, stored, tensors = {}, {}, {}
    for e in range(EXPERTS):
        for name in PARTS:
            shape = (HIDDEN, CHANNELS) if name == "down_proj" else (CHANNELS, HIDDEN)
            w, kind = torch.randn(shape) / 8, formats(e, name)
            stem = f"{PREFIX}.{e}.{name}"
            if kind is None:
                tensors[f"{stem}.weight"] = w
            else:
                keep = kept(shape, "2:4" if kind == "sparse24" else "50 %")
                w = w * keep
                layer = LayerFormat(kind, shape, False)
                stored[stem] = layer
                for part, t in zip(layer.parts, pack(w, layer, keep), strict=True):
                    tensors[f"{stem}.{part}"] = t
            dense[e, name] = w
    return dense, stored, tensors


def mixed(e, name):
    kinds = ("sparse24", "bitmap", "bitmap" if name == "up_proj" else "sparse24", None)
    return kinds[e]


def layer_of(stored, *, tp=(1, 0), ep=(1, 0), channels=CHANNELS, activation="silu", **extra):
    named = {
        name: extra.pop(name)
        for name in ("swiglu_limit", "apply_router_weight_on_input")
        if name in extra
    }
    parallel = FusedMoEParallelConfig(
        tp_size=tp[0], tp_rank=tp[1], ep_size=ep[0], ep_rank=ep[1], use_ep=ep[0] > 1,
        dp_size=1, dp_rank=0, pcp_size=1, pcp_rank=0, sp_size=1,
        all2all_backend="allgather_reducescatter", enable_eplb=extra.pop("enable_eplb", False),
    )  # fmt: skip
    manager = ExpertMapManager(
        max_num_batched_tokens=64, top_k=2, global_num_experts=EXPERTS, num_redundant_experts=0,
        num_expert_group=None, moe_parallel_config=parallel, placement_strategy="linear",
        enable_eplb=False, num_fused_shared_experts=0, rocm_aiter_enabled=False,
    )  # fmt: skip
    moe = FusedMoEConfig(
        num_experts=EXPERTS, experts_per_token=2, hidden_dim=HIDDEN, intermediate_size=channels,
        num_local_experts=manager.local_num_experts, num_logical_experts=EXPERTS,
        activation=MoEActivation(activation), device="cpu", in_dtype=torch.float32,
        routing_method=RoutingMethodType.Default, moe_parallel_config=parallel, **extra,
    )  # fmt: skip
    with set_current_vllm_config(VllmConfig()):
        return RoutedExperts(
            PREFIX, torch.float32, moe, PyPruneVLLMConfig(stored), manager, **named
        )


def load(layer, tensors):
    """What vLLM's loader says it loaded."""
    given = [(name.removeprefix(f"{PREFIX}."), t) for name, t in tensors.items()]
    loaded = list(layer.load_weights(given))
    layer.quant_method.process_weights_after_loading(layer)
    return loaded


def computed(layer, x, shares, ids):
    with torch.no_grad():
        return layer.forward_modular(x, shares, ids)


def wanted(dense, x, shares, ids):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for share, e in zip(shares[t], ids[t].tolist(), strict=True):
            hidden = F.silu(dense[e, "gate_proj"] @ x[t]) * (dense[e, "up_proj"] @ x[t])
            out[t] += share * (dense[e, "down_proj"] @ hidden)
    return out


def routed(tokens, k=2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, EXPERTS, generator=gen).argsort(1)[:, :k].to(torch.int32)
    shares = torch.rand(tokens, k, generator=gen)
    return torch.randn(tokens, HIDDEN, generator=gen), shares, ids


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_layer_computes_what_the_dense_one_does(tokens):
    dense, stored, tensors = weights_of(mixed)
    layer = layer_of(stored)
    assert len(load(layer, tensors)) == len(tensors)
    assert [len(expert.first) for expert in layer.stored] == [1, 1, 2, 1]
    assert not dict(layer.named_parameters()).keys() & {"w13_values", "w2_values", "w13_weight"}
    given = routed(tokens)
    torch.testing.assert_close(computed(layer, *given), wanted(dense, *given))


def test_half_precision_is_summed_in_fp32():
    _, stored, tensors = weights_of(lambda e, name: "sparse24")
    layer = layer_of(stored)
    load(layer, tensors)
    layer.quant_method._one = lambda expert, x: torch.ones_like(x)
    x, shares, ids = routed(1, k=3)
    shares = torch.tensor([[256.0, 0.75, 0.75]])
    y = computed(layer, x.bfloat16(), shares, ids)
    assert y.dtype == torch.bfloat16 and y.unique().tolist() == [258.0]


def test_only_the_experts_of_a_token_are_touched():
    _, stored, tensors = weights_of(lambda e, name: "sparse24")
    layer = layer_of(stored)
    load(layer, tensors)
    ran = []
    for e, expert in enumerate(layer.stored):
        for module in expert.modules():
            module.register_forward_hook(lambda *_, e=e: ran.append(e))
    x, shares, _ = routed(1)
    computed(layer, x, shares, torch.tensor([[3, 1]]))
    assert sorted(set(ran)) == [1, 3] and len(ran) == 4  # gate with up, and down, of each


def test_tensor_parallel_parts_add_up():
    dense, stored, tensors = weights_of(mixed)
    given = routed(9)
    total = torch.zeros(9, HIDDEN)
    for rank in range(2):
        layer = layer_of(stored, tp=(2, rank))
        load(layer, tensors)
        assert layer.stored[0].first[0].out_features == CHANNELS
        assert layer.stored[0].last.in_features == CHANNELS // 2
        total += computed(layer, *given)
    torch.testing.assert_close(total, wanted(dense, *given))


def test_expert_parallel_parts_add_up():
    dense, stored, tensors = weights_of(mixed)
    x, shares, ids = routed(9)
    ids = ids.clone()
    ids[4, 1] = -1  # nobody's
    total = torch.zeros(9, HIDDEN)
    for rank in range(2):
        layer = layer_of(stored, ep=(2, rank))
        own = tuple(f"{PREFIX}.{e}." for e in (2 * rank, 2 * rank + 1))
        assert len(load(layer, tensors)) == sum(name.startswith(own) for name in tensors)
        assert len(layer.stored) == 2
        total += computed(layer, x, shares, ids)
    shares[4, 1] = 0
    torch.testing.assert_close(total, wanted(dense, x, shares, ids.clamp(min=0)))


def test_a_share_that_belongs_to_the_input():
    dense, stored, tensors = weights_of(mixed)
    layer = layer_of(stored, apply_router_weight_on_input=True)
    load(layer, tensors)
    x, shares, ids = routed(9, k=1)
    expected = wanted(dense, x * shares, torch.ones_like(shares), ids)
    torch.testing.assert_close(computed(layer, x, shares, ids), expected)
    with pytest.raises(UserError, match="expected one expert a token"):
        computed(layer, *routed(2))


def test_a_compiler_leaves_it_as_it_is(monkeypatch):
    dense, stored, tensors = weights_of(mixed)
    layer = layer_of(stored)
    load(layer, tensors)
    context = SimpleNamespace(no_compile_layers={PREFIX: SimpleNamespace(routed_experts=layer)})
    monkeypatch.setattr(experts, "get_forward_context", lambda: context)
    compiled = torch.compile(computed, backend="eager", fullgraph=True)
    given = routed(9)
    torch.testing.assert_close(compiled(layer, *given), wanted(dense, *given))


def test_sorted_by_expert_puts_numbers_below_zero_first_and_those_past_the_experts_last():
    order, starts = sorted_by_expert(torch.tensor([[2, 0], [-1, 9], [0, 2]]), 3)
    assert order.tolist() == [1, 2, 3, 0, 5, 4] and starts == [1, 3, 3, 5]


def test_layers_that_vllm_does_not_name_are_found():
    # Qwen3-MoE says nothing of gate_up_proj.
    kind = LayerFormat("sparse24", (CHANNELS, HIDDEN), False)
    config = PyPruneVLLMConfig({"model.layers.0.mlp.up_proj": kind})
    assert config.sources("model.layers.0.mlp.gate_up_proj") == {
        "model.layers.0.mlp.gate_proj": None,
        "model.layers.0.mlp.up_proj": kind,
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"has_bias": True}, "without biases"),
        ({"enable_eplb": True}, "EPLB"),
        ({"activation": "swigluoai"}, "activation swigluoai of 32 channels"),
        ({"activation": "situ"}, "activation situ of 32 channels"),
        ({"activation": "swiglustep"}, "activation swiglustep of 32 channels"),
        ({"activation": "relu2"}, "activation relu2 of 32 channels"),
        ({"swiglu_limit": 7.0}, "activation silu of 32 channels"),  # the CPU has no clamped one
        ({"channels": 12}, "activation silu of 12 channels"),
    ],
)
def test_what_is_not_done_is_refused_by_name(changes, message):
    _, stored, _ = weights_of(lambda e, name: "sparse24")
    with pytest.raises(UserError, match=f"{PREFIX}: .*{message}"):
        layer_of(stored, **changes)


def test_names_of_no_expert_are_refused():
    _, stored, _ = weights_of(lambda e, name: "sparse24")
    extra = {**stored, f"{PREFIX}.{EXPERTS}.up_proj": stored[f"{PREFIX}.0.up_proj"]}
    with pytest.raises(UserError, match="layers of 4 experts called gate_proj, up_proj, down_proj"):
        layer_of(extra)


def test_names_that_the_layer_was_not_told_are_known():
    dense, stored, tensors = weights_of(mixed)

    def renamed(values):
        return {
            f"{head.rpartition('.')[0]}.{PARTS[head.rpartition('.')[2]]}{tail}": value
            for name, value in values.items()
            for head, tail in ([(name, "")] if name in stored else [split(name)])
        }

    def split(name):
        head, _, part = name.rpartition(".")
        return head, f".{part}"

    layer = layer_of(renamed(stored))
    for name, value in renamed(tensors).items():
        expert, shard, part = name.removeprefix(f"{PREFIX}.").split(".")
        parameter = layer.get_parameter(f"{'w2' if shard == 'w2' else 'w13'}_{part}")
        parameter.weight_loader(
            parameter, value, name, shard_id=shard, expert_id=int(expert), return_success=True
        )
    layer.quant_method.process_weights_after_loading(layer)
    given = routed(9)
    torch.testing.assert_close(computed(layer, *given), wanted(dense, *given))


def test_a_missing_tensor_is_named():
    _, stored, tensors = weights_of(mixed)
    del tensors[f"{PREFIX}.2.up_proj.bitmap"]
    with pytest.raises(UserError, match=r"experts\.2\.up_proj\.bitmap: is missing"):
        load(layer_of(stored), tensors)


def test_columns_of_24_that_cannot_be_taken_are_named(monkeypatch):
    # On the CPU vLLM's activation would refuse so few.
    monkeypatch.setattr(experts.StoredExpertsMethod, "_try_activation", lambda self: None)
    _, stored, tensors = weights_of(lambda e, name: "sparse24")
    layer = layer_of(stored, tp=(8, 1))
    with pytest.raises(UserError, match=r"experts\.0\.down_proj: tensor parallelism: sparse24"):
        load(layer, tensors)


def test_cuda_graphs_are_refused(monkeypatch):
    platform = SimpleNamespace(is_cuda_alike=lambda: True)
    monkeypatch.setattr(experts, "current_platform", platform)
    config = SimpleNamespace(compilation_config=SimpleNamespace())
    monkeypatch.setattr(experts, "get_current_vllm_config", lambda: config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(UserError, match=r"^experts: .*; pass --enforce-eager$"):
        experts.refuse_graphs("experts")
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    experts.refuse_graphs("experts")
