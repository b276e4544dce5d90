"""A rotated and sliced residual stream, against projections and in fp64."""

import pytest
import torch
from bench_width_quality import basis_per_branch
from saved_models import reloaded, save_model
from tiny_models import MIXTURES, MOE_FAMILIES, logits, tiny_model, tiny_tokens, tokens_of

from pyprune.calibration.tokens import Batch
from pyprune.depth.graph import ResidualGraph
from pyprune.errors import UserError
from pyprune.width.config import WidthConfig
from pyprune.width.registry import run_width
from pyprune.width.stream import (
    Stream,
    StreamGram,
    complement,
    one_basis,
    principal_basis,
    projected_states,
)

STACKED = ("granitemoe", "gpt_oss", "llama4_text")
FUSED = (*MOE_FAMILIES, *(family for family in STACKED if family in MIXTURES))
RMS = ("llama", "mistral", "qwen2", "qwen3", *FUSED, "gemma", "granite", "glm", "phi3", "smollm3")
CENTRED = ("phi", "cohere", "cohere2", "starcoder2", "nemotron", "olmo")
# Their heads are as wide as the stream is.
WHOLE: tuple[tuple[str, dict], ...] = (
    ("gpt2", {}),
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 32, "layer_norm_elementwise_affine": False}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("stablelm", {"qk_layernorm": True}),
    ("gptj", {}),
    ("codegen", {}),
    ("falcon", {}),
    ("falcon", {"parallel_attn": False, "alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
)
SLICED = [*((family, {}) for family in RMS + CENTRED), *WHOLE]
# Their norms are computed in fp32 whatever the model's dtype.
ROUNDED = (*RMS, "cohere", "cohere2", "olmo")


def orthogonal(d, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=gen, dtype=torch.float64)).Q


def directions(stream, count, seed=0):
    """Orthonormal, perpendicular to ones where the stream's norms are LayerNorms."""
    if not stream.centred:
        return orthogonal(stream.width, seed)[:, :count]
    return complement(stream.width) @ orthogonal(stream.width - 1, seed)[:, :count]


@pytest.mark.parametrize(("family", "changes"), SLICED)
def test_rotation_alone_changes_nothing(family, changes):
    model = tiny_model(family, **changes)
    model = model if family in FUSED else model.double()
    ids = tiny_tokens(2, 9)
    before = logits(model, ids)
    stream = Stream.of(model)
    stream.slice(directions(stream, stream.directions(32)))
    off = (logits(model, ids) - before).abs().max() / before.abs().max()
    assert off < (5e-6 if family in ROUNDED else 1e-13)


@pytest.mark.parametrize(("family", "changes"), SLICED)
def test_slicing_is_projecting(family, changes, tmp_path):
    model = tiny_model(family, **changes)
    ids, width = tiny_tokens(2, 9), 24
    stream = Stream.of(model)
    graph, batch = stream.graph, Batch(ids)
    basis = directions(stream, stream.directions(width), seed=1)
    states = projected_states(graph, batch, [basis] * (len(graph.branches) + 1))
    expected = graph.logits(graph.finish(states, batch), ids).detach()
    numel, whole = stream.numel(width), (family, changes) in WHOLE
    assert bool(stream.obstacle) == whole
    stream.slice(basis)
    left = [int((p != 0).sum()) if whole else p.numel() for p in model.parameters()]
    assert sum(left) == numel
    got = logits(model, ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    assert loaded.config.hidden_size == (32 if whole else width)
    exact = {} if family in FUSED else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(loaded.eval(), ids), got, **exact)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = loaded.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_the_head_stays_tied_where_it_does_not_read_the_stream():
    untied, tied = tiny_model("gpt2"), tiny_model("opt")
    for model in (untied, tied):
        stream = Stream.of(model)
        stream.slice(directions(stream, 23))
    assert not untied.config.tie_word_embeddings and tied.config.tie_word_embeddings
    assert tied.lm_head.weight is tied.model.decoder.embed_tokens.weight


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma2", "Gemma2DecoderLayer: .* input_layernorm and post_attention_layernorm at its at"),
        ("gemma3_text", "Gemma3DecoderLayer: .* a norm behind a branch scales what it writes"),
        ("olmo2", "Olmo2DecoderLayer: .* got post_attention_layernorm at its attention"),
        ("bloom", "BloomModel: .* got word_embeddings_layernorm, ln_f besides .a norm behind the"),
    ],
)
def test_norms_that_write_to_the_stream_are_refused(family, why):
    with pytest.raises(UserError, match=why):
        Stream.of(tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "gemma", "phi", "cohere", "nemotron", "olmo"])
def test_norms_are_read_as_they_compute(family):
    """Both kinds, scales of two kinds, with a bias and without."""
    for norm in Stream.of(tiny_model(family)).norms:
        x = torch.randn(5, 32, dtype=torch.float64)
        y = x - x.mean(1, keepdim=True) if norm.centred else x
        y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.scale()
        y = y if norm.shift() is None else y + norm.shift()
        torch.testing.assert_close(norm.module(x.float()).double(), y, rtol=1e-4, atol=1e-4)
    kind = (norm.centred, norm.offset, norm.parameters())
    assert (
        kind
        == {
            "llama": (False, 0, ["weight"]),
            "gemma": (False, 1, ["weight"]),
            "phi": (True, 0, ["weight", "bias"]),
            "cohere": (True, 0, ["weight"]),
            "nemotron": (True, 1, ["weight", "bias"]),
            "olmo": (True, 0, []),
        }[family]
    )


@pytest.mark.parametrize(
    ("family", "weight", "bias"),
    [("llama", 0.05, 0), ("gemma", 3, 0), ("phi", 0.05, 0.01), ("nemotron", 2.5, 0.1)],
)
def test_norms_in_16_bits_are_read_as_they_compute(family, weight, bias):
    """Where a scale is much smaller than 1, or 1 beside it: as trained norms have them."""
    model, half = tiny_model(family), tiny_model(family).bfloat16()
    for norm in Stream.of(half).norms:
        norm.module.weight.data.fill_(weight)
        if norm.shift() is not None:
            norm.module.bias.data.fill_(bias)
    kinds = [[(n.centred, n.offset) for n in Stream.of(m).norms] for m in (model, half)]
    assert kinds[0] == kinds[1]


def test_a_bias_behind_rms_norm_is_refused():
    class Biased(torch.nn.RMSNorm):
        def __init__(self):
            super().__init__(32)
            self.bias = torch.nn.Parameter(torch.ones(32))

        def forward(self, x):
            return super().forward(x) + self.bias

    model = tiny_model("llama")
    model.model.norm = Biased()
    with pytest.raises(UserError, match="got Biased, which does not commute with rotations"):
        Stream.of(model)


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


def test_bases_for_layer_norm_are_principal_among_what_it_sees():
    gen = torch.Generator().manual_seed(0)
    state = torch.randn(1, 50, 6, generator=gen) * torch.tensor([3.0, 1, 2, 0.5, 0.1, 4]) + 5
    rest = complement(6)
    torch.testing.assert_close(rest.T @ rest, torch.eye(5, dtype=torch.float64))
    assert float(rest.sum(0).abs().max()) < 1e-12
    found = StreamGram(6, True, centred=True)
    found.add(state, Batch(torch.zeros(1, 50, dtype=torch.int64)))
    x = torch.nn.functional.layer_norm(state[0].double(), (6,), eps=0)
    torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-5, atol=1e-5)
    basis, vectors = found.basis(2), torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:]
    torch.testing.assert_close(basis @ basis.T, vectors @ vectors.T, rtol=1e-4, atol=1e-5)
    # All that is not ones, also where the text has no more of it.
    whole = principal_basis(torch.zeros(6, 6), 5, centred=True)
    torch.testing.assert_close(whole @ whole.T, rest @ rest.T)


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


def test_parallel_branches_have_one_basis():
    model = tiny_model("phi")
    graph, batch = ResidualGraph.of(model), Batch(tiny_tokens(2, 12))
    bases = basis_per_branch(graph, [batch], 31, centred=True)
    assert len(bases) == 5 and bases[0] is bases[1] and bases[2] is bases[3]
    same = graph.logits(graph.finish(projected_states(graph, batch, bases), batch), batch.input_ids)
    torch.testing.assert_close(same, logits(model, batch.input_ids), rtol=1e-3, atol=1e-3)
    # What attention adds is read with what the MLP adds: three norms read the stream here.
    seen = []
    norms = [layer.input_layernorm for layer in model.model.layers] + [model.model.final_layernorm]
    handles = [m.register_forward_pre_hook(lambda _m, a: seen.append(a[0])) for m in norms]
    logits(model, batch.input_ids)
    for handle in handles:
        handle.remove()
    found = StreamGram(32, True, centred=True)
    for x in seen:
        found.add(x, batch)
    expected, got = found.basis(8), one_basis(graph, [batch], 8, centred=True)
    assert len(seen) == 3
    torch.testing.assert_close(got @ got.T, expected @ expected.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["starcoder2", "gpt_neox", "gpt2"])
def test_slicegpt_of_layer_norms(family):
    model = tiny_model(family)
    before = sum(p.numel() for p in model.parameters())
    options = {"multiple": 1}
    config = WidthConfig("slicegpt", ratio=0.2, method_options=options)
    decision = run_width(model, tokens_of(), config)
    count = sum(int((p != 0).sum()) for p in model.parameters())
    assert decision.wanted == count and 0.75 * before < count <= 0.8 * before
    assert decision.parameters == (before, sum(p.numel() for p in model.parameters()))
    if family == "starcoder2":
        assert decision.sizes == {"hidden_size": (32, model.config.hidden_size)}
        assert not decision.zeroed and decision.wanted == decision.parameters[1]
    else:
        assert not decision.sizes and 0 < decision.zeroed["hidden_size"] < 32
        assert any("the others stay as zeros: GPT" in note for note in decision.notes)


def test_slices_of_experts_are_what_grouped_products_take():
    options = {"multiple": 1}
    config = WidthConfig("slicegpt", ratio=0.2, method_options=options)
    decision = run_width(tiny_model("qwen2_moe"), tokens_of(), config)
    assert decision.sizes["hidden_size"] == (32, 24)


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
    narrower = decision.sizes["hidden_size"][1]
    assert narrower % 12 == 0
    said = next(note for note in decision.notes if "LlamaConfig does not take" in note)
    any_width = WidthConfig("slicegpt", ratio=0.25, method_options={"multiple": 1})
    wider = run_width(
        tiny_model("llama", hidden_size=64, intermediate_size=96), tokens_of(), any_width
    ).sizes["hidden_size"][1]
    assert wider > narrower and said.endswith(f"(-O multiple=1: {wider})")
    narrow = r"ratio: expected at most 0\.\d+ .*at least 8 wide\), got 0.990"
    with pytest.raises(UserError, match=narrow):
        run_width(tiny_model("llama"), tokens_of(), WidthConfig("slicegpt", ratio=0.99))


def test_what_reads_the_stream_besides_is_noticed():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.clamp(min=0))
    with pytest.raises(UserError, match="something besides the norms reads the stream's coord"):
        run_width(model, tokens_of(), WidthConfig("slicegpt", ratio=0.2))
