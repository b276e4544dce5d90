"""Removed branches: re-packed into fewer layers, what is saved is what plain transformers loads."""

from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from saved_models import reloaded, save_model
from tiny_models import CONFIGS, FAMILIES, HIDDEN, tiny_model, tiny_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune.data.gguf_llama import BLOCK_NAMES, TOP_NAMES, hugging_face_name
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.repack import pack, repack
from pyprune.depth.save import drop_layers
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter

PARALLEL = ("phi", "gpt_neox", "falcon")
LAYERS = 4
IDS = tiny_tokens(2, 16)
# Between them: a pair across layers, an empty layer, and both kinds of halves without a partner.
REMOVALS = ["M0 A1", "A0 M1 A2", "M1 A3", "A0", "M3 A1 M1"]


def model_of(family):
    more = {"n_layer": LAYERS} if family in ("gpt2", "bloom") else {"num_hidden_layers": LAYERS}
    if "gemma" in family:
        more["layer_types"] = [
            f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding")
        ]
    if family == "qwen3_moe":
        more["mlp_only_layers"] = [1]
        more["decoder_sparse_step"] = 2  # layers 0 and 2 are dense by the rule, 1 by the list
    if family == "olmo2":
        config = AutoConfig.for_model("olmo2", **CONFIGS["mistral"] | more)
        model = AutoModelForCausalLM.from_config(config)
        gen = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data.normal_(float(p.dim() == 1), 0.2, generator=gen)
        return model.float().eval()
    return tiny_model(family, **more)


def branches(text):
    kinds = {"A": "attention", "M": "mlp"}
    return [Branch(kinds[name[0]], int(name[1:])) for name in text.split()]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def fewest(kept):
    """By trying everything: the first layer takes one branch, or two if it can."""
    if not kept:
        return 0
    pair = len(kept) > 1 and (kept[0].kind, kept[1].kind) == ("attention", "mlp")
    return 1 + min(fewest(kept[n:]) for n in (1, 2)[: 1 + pair])


def test_packing_is_minimal_and_in_order():
    everything = branches("A0 M0 A1 M1 A2 M2 A3 M3 A4 M4 A5 M5")
    for size in range(1, 13):
        for kept in combinations(everything, size):
            pairs = pack(kept)
            assert len(pairs) == fewest(kept)
            flat = [
                Branch(kind, old)
                for pair in pairs
                for kind, old in zip(("attention", "mlp"), pair, strict=True)
                if old is not None
            ]
            assert flat == list(kept)


# What BlockPruner's repository removes from Llama-2-7B, calibrated on 64 samples.
RELEASED = "A25 A27 A24 A23 A28 A29 A8 M7 A19 A30 M22 A21 M27 A18 M21 M11 A12 A14 M14 M24"


@pytest.mark.parametrize("count, layers, zeros", [(8, 31, 6), (12, 30, 8), (17, 27, 7),
                                                  (20, 25, 6)])  # fmt: skip
def test_packing_of_a_released_order(count, layers, zeros):
    gone = branches(RELEASED)[:count]
    everything = [Branch(kind, i) for i in range(32) for kind in ("attention", "mlp")]
    pairs = pack([branch for branch in everything if branch not in gone])
    assert len(pairs) == layers
    assert sum(attention is None for attention, _ in pairs) == zeros
    assert all(mlp is not None for _, mlp in pairs)


@pytest.mark.parametrize("removed, share", [
    (RELEASED.split()[:17], 0.21989),
    ([f"{kind}{i}" for i in range(7) for kind in "AM"], 0.2102),
])  # fmt: skip
def test_shares_of_llama_2_7b(removed, share):
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config = AutoConfig.for_model("llama", vocab_size=32000, num_attention_heads=32, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    graph = ResidualGraph(model, Adapter.of(model))
    total = sum(p.numel() for p in model.parameters())
    assert total == 6_738_415_616
    assert graph.parameters(Branch("attention", 3)) == 67_112_960
    assert graph.parameters(Branch("mlp", 3)) == 135_270_400
    gone = branches(" ".join(removed))
    assert graph.removed_parameters(gone) / total == pytest.approx(share, abs=5e-5)


def test_packing_where_only_one_layer_can_be_shared():
    kept = branches("A0 M1 A2 M2 M3 A3")
    assert pack(kept) == [(0, 1), (2, 2), (None, 3), (3, None)]
    own = [(0, None), (None, 1), (2, 2), (None, 3), (3, None)]
    assert pack(kept, lambda a, m: a == m) == own
    assert pack([]) == []


@pytest.mark.parametrize("removed", REMOVALS)
@pytest.mark.parametrize("family", [*FAMILIES, "olmo2"])
def test_saved_is_the_masked_model(family, removed, tmp_path):
    model, gone = model_of(family), branches(removed)
    graph = ResidualGraph.of(model)
    with graph.skipping(gone):
        masked = logits(model)
    packing = repack(graph, gone)
    assert torch.equal(logits(model), masked)
    assert len(Adapter.of(model).blocks) == len(packing.pairs) == model.config.num_hidden_layers
    kept = [b for b in graph.branches if b not in gone]
    if family not in PARALLEL:
        assert len(packing.pairs) == fewest(kept) and packing.reason == ""
    assert sorted(packing.zeros) == [
        Branch(kind, i)
        for kind in ("attention", "mlp")
        for i, pair in enumerate(packing.pairs)
        if pair[kind == "mlp"] is None
    ]
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(loaded), masked)
    for new, block in enumerate(Adapter.of(loaded).blocks):
        assert {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")} <= {new}
    held, tied = ResidualGraph.of(loaded), tiny_model("llama" if family == "olmo2" else family)
    assert loaded.config.tie_word_embeddings == tied.config.tie_word_embeddings
    for branch in packing.zeros:
        block, layout = held.adapter.blocks[branch.layer], held.layouts[branch.layer]
        for name in layout.inner(branch.kind):
            assert not any(p.any() for p in block.get_submodule(name).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(family, tmp_path):
    model = model_of(family)
    repack(ResidualGraph.of(model), branches("M0 A1 M3"))
    save_model(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :5], mask[1, :5] = 0, 0  # padding on the left
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    cached = loaded.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert cached.shape == (2, 32)
    assert torch.equal(
        cached, loaded.generate(ids, attention_mask=mask, use_cache=False, **options)
    )


@pytest.mark.parametrize("removed", REMOVALS)
def test_all_layers_have_what_ggufs_llama_has(removed, tmp_path):
    """Its layers have one size, given once, and all of their tensors: halves of zeros as well."""
    model = tiny_model("llama", num_hidden_layers=4, attention_bias=False, mlp_bias=False)
    packing = repack(ResidualGraph.of(model), branches(removed))
    save_model(model, None, tmp_path / "out")
    shapes = {n: t.shape for n, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    names = [f"blk.{i}.{kind}.weight" for i in range(len(packing.pairs)) for kind in BLOCK_NAMES]
    assert shapes.keys() == {hugging_face_name(name) for name in (*TOP_NAMES, *names)}
    for name in names:
        first = "blk.0." + name.partition(".")[2].partition(".")[2]
        assert shapes[hugging_face_name(name)] == shapes[hugging_face_name(first)]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_removed_changes_nothing(family):
    model = model_of(family)
    before, config = logits(model), model.config.to_dict()
    blocks = list(Adapter.of(model).blocks)
    packing = repack(ResidualGraph.of(model), [])
    assert packing.pairs == tuple((i, i) for i in range(LAYERS)) and not packing.zeros
    assert torch.equal(logits(model), before) and model.config.to_dict() == config
    assert list(Adapter.of(model).blocks) == blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_layers_are_dropped(family):
    one, other = model_of(family), model_of(family)
    packing = repack(ResidualGraph.of(one), branches("A0 M0 A2 M2"))
    drop_layers(other, [1, 3])
    assert packing.pairs == ((1, 1), (3, 3)) and packing.reason == ""
    assert one.config.to_dict() == other.config.to_dict()
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_keep_every_layer(family):
    model, gone = model_of(family), branches("M0 A1 A2 M2")
    graph = ResidualGraph.of(model)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with graph.skipping(gone):
        masked = logits(model)
    packing = repack(graph, gone, fill="zeros")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before
    assert set(packing.zeros) == set(gone) and packing.reason == ""
    assert torch.equal(logits(model), masked)


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_layers_are_not_mixed(family):
    model = model_of(family)
    packing = repack(ResidualGraph.of(model), branches("M0 A1 A2 M2"))
    assert packing.pairs == ((0, None), (None, 1), (3, 3))
    assert "read the same state" in packing.reason


def test_what_the_configuration_cannot_say_stays():
    """Re-packing falls back, by name, to whole layers or to zeros."""
    model = tiny_model("gpt2", n_layer=LAYERS, scale_attn_by_inverse_layer_idx=True)
    graph, gone = ResidualGraph.of(model), branches("A1 M1")
    with graph.skipping(gone):
        masked = logits(model)
    packing = repack(graph, gone)
    assert len(packing.pairs) == LAYERS and set(packing.zeros) == set(gone)
    assert "scale_attn_by_inverse_layer_idx scales attention" in packing.reason
    assert torch.equal(logits(model), masked)
    model = model_of("llama")  # with a layer unlike what any configuration of a Llama says
    model.model.layers[1].self_attn.scaling = 0.25
    graph = ResidualGraph.of(model)
    packing = repack(graph, branches("A2 M2"))
    assert packing.reason.startswith("all layers stay: ") and "self_attn:scaling" in packing.reason


@pytest.mark.parametrize("removed", ["M1 A2", "A1 M1"])
def test_a_layer_that_knows_its_place_keeps_it(removed, tmp_path):
    """DiffLlama weighs its two attentions by the layer's index, which no field of a configuration
    says: what is saved must still be the masked model."""
    config = AutoConfig.for_model("diffllama", **CONFIGS["mistral"] | {"num_hidden_layers": LAYERS})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    graph, gone = ResidualGraph.of(model), branches(removed)
    with graph.skipping(gone):
        masked = logits(model)
    packing = repack(graph, gone)
    assert "self_attn:lambda_init" in packing.reason and len(packing.pairs) == LAYERS
    save_model(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), masked)


def test_kinds_of_layers_follow_their_branch():
    model = model_of("gemma3_text")  # sliding, full, sliding, sliding
    repack(ResidualGraph.of(model), branches("A0 M1"))
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert model.config.layer_types == kinds  # M0 alone, A1 alone
    model = model_of("gemma3_text")
    repack(ResidualGraph.of(model), branches("M0 A1"))  # A0 with M1
    assert model.config.layer_types == ["sliding_attention"] * 3
    model = model_of("qwen3_moe")  # dense, dense, dense, sparse
    repack(ResidualGraph.of(model), branches("M2 A3"))  # A2 with M3
    assert model.config.mlp_only_layers == [0, 1] and model.config.decoder_sparse_step == 1
    assert [hasattr(b.mlp, "experts") for b in Adapter.of(model).blocks] == [False, False, True]


def test_parameters_by_formula():
    """Grouped queries, biases, untied head: Llama with 4 heads of 8, 2 of them for keys."""
    model = model_of("llama")
    before = sum(p.numel() for p in model.parameters())
    d, kv, f = HIDDEN, 16, 64
    attention = 2 * (d * d + d) + 2 * (d * kv + kv) + d
    mlp = 3 * d * f + 2 * f + d + d
    graph = ResidualGraph.of(model)
    assert graph.removed_parameters(branches("A1 M2")) == attention + mlp
    repack(graph, branches("M0 A1"))
    assert sum(p.numel() for p in model.parameters()) == before - attention - mlp


def test_bad_requests():
    graph = ResidualGraph.of(tiny_model("llama"))
    with pytest.raises(UserError, match="expected a branch to stay"):
        repack(graph, graph.branches)
    with pytest.raises(UserError, match=r"expected branches of the model, got .*A7"):
        repack(graph, branches("A7"))
