"""The residual graph against the models themselves, over all families."""

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune.calibration.tokens import Batch
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.errors import UserError

PARALLEL = {"phi", "gpt_neox", "falcon"}
# The last map of a branch: zeroed, the branch adds nothing.
LAST = ("o_proj", "dense", "c_proj", "out_proj", "down_proj", "fc2", "dense_4h_to_h")


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def zero_fill(graph, branch):
    """By hand, independently of the graph's own skipping."""
    block = graph.adapter.blocks[branch.layer]
    layout = graph.layouts[branch.layer]
    modules = [layout.attention] if branch.kind == "attention" else list(layout.mlp[-1:])
    for name in modules:
        module = block.get_submodule(name)
        last = [m for n, m in module.named_modules() if n.rpartition(".")[2] in LAST] or [module]
        for one in last:
            for p in one.parameters():
                p.data.zero_()
        for n, p in module.named_parameters():
            if n.endswith("down_proj") and p.dim() == 3:
                p.data.zero_()


@pytest.fixture(params=FAMILIES)
def graph(request):
    return ResidualGraph.of(tiny_model(request.param, num_hidden_layers=3, **more(request.param)))


def more(family):
    if "gemma" in family:
        return {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return {"n_layer": 3} if family in ("gpt2", "bloom") else {}


@torch.no_grad()
def test_order_and_parallel(graph):
    assert [str(b) for b in graph.branches] == ["A0", "M0", "A1", "M1", "A2", "M2"]
    assert [b.position for b in graph.branches] == list(range(6))
    family = graph.model.config.model_type
    assert all(layout.parallel == (family in PARALLEL) for layout in graph.layouts)


@torch.no_grad()
def test_from_any_position(graph):
    """Cached states give the model's logits, with and without skipped branches."""
    batch = Batch(tiny_tokens(2, 16))
    for skipped in ([], [Branch("attention", 1)], [Branch("mlp", 0), Branch("attention", 2)]):
        with graph.skipping(skipped):
            expected = logits(graph.model, batch.input_ids)
        state, context = graph.start(batch)
        for branch in graph.branches:
            rest = (branch.position, len(graph.branches))
            hidden = graph.advance(rest, state, context, skipped).total
            got = graph.logits(graph.finish(hidden, batch), batch.input_ids)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            if branch in skipped:
                state = graph.skip(branch, state)
            else:
                state = graph.run(branch, state, context)


@torch.no_grad()
def test_copies_are_independent_streams(graph):
    batch = Batch(tiny_tokens(2, 16), torch.ones(2, 16, dtype=torch.int64))
    batch.attention_mask[1, 11:] = 0
    one, context = graph.start(batch)
    three, wide = graph.start(batch, copies=3)
    whole = (0, len(graph.branches))
    a = graph.advance(whole, one, context).total
    b = graph.advance(whole, three, wide).total
    for k in range(3):
        torch.testing.assert_close(b[2 * k : 2 * k + 2], a, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_skipping_is_zero_filling_and_leaves_no_trace(graph):
    ids = tiny_tokens(2, 16)
    dense = logits(graph.model, ids)
    for branch in (Branch("attention", 1), Branch("mlp", 2)):
        with graph.skipping([branch]):
            skipped = logits(graph.model, ids)
        assert torch.equal(logits(graph.model, ids), dense)
        assert not torch.allclose(skipped, dense)
        held = {k: v.clone() for k, v in graph.model.state_dict().items()}
        zero_fill(graph, branch)
        torch.testing.assert_close(logits(graph.model, ids), skipped, rtol=0, atol=1e-6)
        graph.model.load_state_dict(held)


def test_parameters_add_up(graph):
    everything = graph.removed_parameters(graph.branches)
    blocks = sum(p.numel() for block in graph.adapter.blocks for p in block.parameters())
    assert everything == blocks
    one_layer = [Branch("attention", 0), Branch("mlp", 0)]
    assert graph.removed_parameters(one_layer) == sum(
        p.numel() for p in graph.adapter.blocks[0].parameters()
    )


def test_sequential_variants():
    """Falcon without parallel attention, the newer Falcon, and sequential GPT-NeoX."""
    for family, config in (
        ("falcon", {"parallel_attn": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ):
        ResidualGraph.of(tiny_model(family, **config))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_layers_that_return_tuples(family):
    """Parallel layers of families that are not among the tiny ones."""
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=64, **sizes)
    ).eval()
    graph, ids = ResidualGraph.of(model), tiny_tokens(2, 9)
    skipped = [Branch("attention", 0), Branch("mlp", 2)]
    state, context = graph.start(Batch(ids))
    hidden = graph.advance((0, len(graph.branches)), state, context, skipped).total
    with graph.skipping(skipped):
        expected = logits(model, ids)
    got = graph.logits(graph.finish(hidden, Batch(ids)), ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_unknown_structures_are_named():
    with pytest.raises(UserError, match="OPTDecoderLayer: unknown residual structure"):
        ResidualGraph.of(tiny_model("opt", do_layer_norm_before=False))
    model = tiny_model("llama")
    model.model.layers[1].extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"LlamaDecoderLayer: unknown .*pyprune\.depth\.layouts"):
        ResidualGraph.of(model)
    model = tiny_model("bloom", apply_residual_connection_post_layernorm=True)
    with pytest.raises(UserError, match="BloomBlock: unknown residual structure"):
        ResidualGraph.of(model)
