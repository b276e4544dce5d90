"""A rotated and sliced residual stream, against projections and in fp64."""

import pytest
import torch
from tiny_models import MOE_FAMILIES, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import Batch
from pyprune.checkpoint.output import save_model
from pyprune.depth.graph import ResidualGraph
from pyprune.errors import UserError
from pyprune.width.config import WidthConfig
from pyprune.width.registry import run_width
from pyprune.width.stream import (
    Stream,
    StreamGram,
    basis_per_branch,
    one_basis,
    principal_basis,
    projected_states,
)

FITTING = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
OTHERS = ("gemma2", "gemma3_text", "phi", "opt", "gpt2", "gpt_neox", "bloom", "falcon")


def orthogonal(d, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=gen, dtype=torch.float64)).Q


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def tokens_of(rows=4, length=12):
    return as_token_set(list(tiny_tokens(rows, length).split(2)), vocabulary=64, positions=128)


@pytest.mark.parametrize("family", FITTING)
def test_rotation_alone_changes_nothing(family):
    """Up to fp32, in which transformers computes norms whatever the model's dtype."""
    model = tiny_model(family)
    model = model if family in MOE_FAMILIES else model.double()
    ids = tiny_tokens(2, 9)
    before = logits(model, ids)
    Stream.of(model).slice(orthogonal(32))
    assert (logits(model, ids) - before).abs().max() < 5e-6 * before.abs().max()
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("family", FITTING)
def test_slicing_is_projecting(family, tmp_path):
    model = tiny_model(family)
    ids, width = tiny_tokens(2, 9), 24
    graph = ResidualGraph.of(model)
    basis = orthogonal(32, seed=1)[:, :width]
    batch = Batch(ids)
    states = projected_states(graph, batch, [basis] * (len(graph.branches) + 1))
    expected = graph.logits(graph.finish(states, batch), ids).detach()
    stream = Stream.of(model)
    numel = stream.numel(width)
    stream.slice(basis)
    assert sum(p.numel() for p in model.parameters()) == numel
    got = logits(model, ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    save_model(model, None, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert loaded.config.hidden_size == width
    exact = {} if family in MOE_FAMILIES else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(loaded.eval(), ids), got, **exact)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = loaded.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", OTHERS)
def test_other_norms_are_refused(family):
    with pytest.raises(UserError, match=r"expected (one norm before|RMSNorm|embeddings, layers)"):
        Stream.of(tiny_model(family))


def test_norms_with_an_offset_are_refused():
    model = tiny_model("llama")
    norm = model.model.layers[0].input_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x) + x * 1e-3
    with pytest.raises(UserError, match="does not commute with rotations"):
        Stream.of(model)


def test_bases_are_principal():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = (x * torch.tensor([3.0, 1, 2, 0.5, 0.1, 4])).T @ (
        x * torch.tensor([3.0, 1, 2, 0.5, 0.1, 4])
    )
    basis = principal_basis(gram, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    energy = torch.linalg.eigvalsh(gram)[-3:].sum()
    torch.testing.assert_close((basis.T @ gram @ basis).trace(), energy)


def test_gram_is_of_real_normed_tokens():
    state = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    padded = state.clone()
    padded[1, 3:] = torch.inf
    batch = Batch(torch.zeros(2, 5, dtype=torch.int64), mask)
    for normalised in (True, False):
        found = StreamGram(4, normalised)
        found.add(padded, batch)
        x = state.double()[mask.bool()]
        if normalised:
            x = x / x.square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="NaN or infinite"):
        found.add(padded, Batch(batch.input_ids))


def test_one_basis_sees_every_norm():
    """The Gram matrix is that of the inputs of all norms, taken by hooks."""
    model = tiny_model("llama")
    graph, batch = ResidualGraph.of(model), Batch(tiny_tokens(2, 12))
    seen = []
    norms = [m for n, m in model.named_modules() if n.endswith("norm")]
    handles = [m.register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for m in norms]
    logits(model, batch.input_ids)
    for handle in handles:
        handle.remove()
    assert len(seen) == 5
    x = torch.cat([s.flatten(0, 1) for s in seen]).double()
    x = x / x.square().mean(1, keepdim=True).sqrt()
    expected = principal_basis(x.T @ x, 8)
    got = one_basis(graph, [batch], 8)
    torch.testing.assert_close(got @ got.T, expected @ expected.T, rtol=1e-3, atol=1e-4)


def test_basis_per_branch():
    model = tiny_model("llama")
    graph, batch = ResidualGraph.of(model), Batch(tiny_tokens(2, 12))
    full = basis_per_branch(graph, [batch], 32)
    assert len(full) == 5
    same = graph.logits(graph.finish(projected_states(graph, batch, full), batch), batch.input_ids)
    torch.testing.assert_close(same, logits(model, batch.input_ids), rtol=1e-3, atol=1e-3)
    # The first is that of the embeddings, whatever comes later.
    embedded = StreamGram(32, True)
    embedded.add(graph.start(batch)[0].total, batch)
    first = basis_per_branch(graph, [batch], 8)[0]
    torch.testing.assert_close(first, principal_basis(embedded.gram, 8))


def test_slicegpt_meets_the_ratio(tmp_path):
    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    before = sum(p.numel() for p in model.parameters())
    config = WidthConfig("slicegpt", ratio=0.25, method_options={"multiple": 4})
    decision = run_width(model, tokens_of(), config)
    after = sum(p.numel() for p in model.parameters())
    assert decision.parameters == (before, after) and after <= 0.75 * before
    old, new = decision.sizes["hidden_size"]
    assert old == 64 and new == model.config.hidden_size and new % 4 == 0
    wider = Stream.of(tiny_model("llama", hidden_size=64, intermediate_size=96)).numel(new + 4)
    assert wider > 0.75 * before
    assert not any("narrower than asked" in note for note in decision.notes)
    tied = tiny_model("qwen2", hidden_size=64)
    decision = run_width(tied, tokens_of(), config)
    assert any("no longer tied" in note for note in decision.notes)
    # Llama's width has to be a multiple of its 4 heads.
    odd = WidthConfig("slicegpt", ratio=0.25, method_options={"multiple": 3})
    decision = run_width(
        tiny_model("llama", hidden_size=64, intermediate_size=96), tokens_of(), odd
    )
    assert decision.sizes["hidden_size"][1] % 12 == 0
    assert any("LlamaConfig does not take" in note for note in decision.notes)
    narrow = r"ratio: expected at most 0\.\d+ .*at least 8 wide\), got 0.990"
    with pytest.raises(UserError, match=narrow):
        run_width(tiny_model("llama"), tokens_of(), WidthConfig("slicegpt", ratio=0.99))
