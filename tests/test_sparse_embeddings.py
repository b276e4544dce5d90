"""int8 and coded embeddings and heads: in checkpoints, through transformers, tied and not."""

import copy
import json

import pytest
import torch
from embedding_checkpoints import (
    EMBEDDING,
    EXACT,
    HEAD,
    PARTS,
    ROUNDED,
    changed_embedding,
    compressed,
)
from safetensors.torch import load_file, save_file
from sparse_checkpoints import bits_equal, prune_in_place, pruned_checkpoint, tensors_of
from tiny_models import VOCAB, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM

import pyprune
from pyprune import cli
from pyprune.errors import UserError
from pyprune.evaluate import perplexity
from pyprune.sparse import SparseLinear
from pyprune.sparse import format as formats
from pyprune.sparse.bench import densified, weight_bytes
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
from pyprune.sparse.embedding import StoredEmbedding
from pyprune.sparse.layout import LayerFormat

# (family, tied): with scaled embeddings and capped logits (Gemma 2), a head of another width than
# the model (OPT), a head with a bias (Phi), experts, and names without the base model's prefix.
FAMILIES = [
    ("llama", False), ("llama", True), ("gemma2", True), ("gemma3_text", True), ("gpt2", True),
    ("opt", True), ("bloom", True), ("falcon", True), ("phi", False), ("mixtral", False),
]  # fmt: skip
IDS = [f"{family}-{'tied' if tied else 'untied'}" for family, tied in FAMILIES]
VERSION = {"int8": 3, "coded": 5}


@pytest.fixture(scope="module", params=PARTS)
def kind(request):
    return request.param


@pytest.mark.parametrize(("family", "tied"), FAMILIES, ids=IDS)
def test_families(family, tied, kind, tmp_path):
    dense, small, report = compressed(tmp_path, family, tied, kind)
    exact = kind == "coded"
    form = ("coded", "bfloat16") if exact else ("dense", "int8")
    rows = {n: x for n, x in report.layers.items() if (x.format, x.values) == form}
    assert len(rows) == (1 if tied else 2) and all(x.density == 1.0 for x in rows.values())
    assert all(layer.error is None if exact else 0 < layer.error < 0.01 for layer in rows.values())
    model = pyprune.load(small, dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is StoredEmbedding and type(head) is SparseLinear
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert head.tied_to is (embedding if tied else None)
    own = [n for n, _ in model.named_buffers() if n.startswith(HEAD) and not n.endswith("bias")]
    assert own == ([] if tied else [f"{HEAD}.{part}" for part in PARTS[kind]])
    # The model's own arithmetic, on the weights that were stored.
    decompress_checkpoint(small, tmp_path / "back")
    one, other = tensors_of(dense), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys()
    changed = {n for n in one if not bits_equal(one[n], other[n])}
    assert changed == (set() if exact else {f"{name}.weight" for name in rows})
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    half = pyprune.load(small)
    ids = tiny_tokens()
    with torch.no_grad():
        got = half.get_input_embeddings()(ids)
        assert bits_equal(got, restored.get_input_embeddings()(ids))
        # In fp32 the products of number and scale are not rounded to bf16.
        want = densified(model)(ids).logits
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
        near = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
    off = (want - near).norm() / near.norm()
    assert off == 0 if exact else 0 < off < 0.1
    assert half(ids).logits.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def tied(kind, tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("tied"), kind=kind)


@pytest.fixture(scope="module")
def untied(kind, tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("untied"), tied=False, kind=kind)


@EXACT
def test_report_and_config_of_coded_rows(tied, untied):
    for (_, small, report), names in ((tied, [EMBEDDING]), (untied, [EMBEDDING, HEAD])):
        config = json.loads((small / "config.json").read_text())["quantization_config"]
        assert config["format_version"] == 5
        stored = tensors_of(small)
        for name in names:
            layer = report.layers[name]
            assert layer.shape == (64, 32) and layer.density == 1.0 and layer.dtype == "bfloat16"
            assert config["layers"][name] == {"format": "coded", "shape": [64, 32]}
            assert layer.nbytes == sum(stored[f"{name}.{part}"].nbytes for part in PARTS["coded"])
            assert layer.nbytes <= 0.9 * layer.nbytes_dense
        assert report.nbytes_after == sum(t.nbytes for t in stored.values())
        card = (small / "README.md").read_text()
        assert f"coded exponents, every bit kept: {', '.join(sorted(names))}." in card
        assert "restores the dense checkpoint, bit for bit" in card


@ROUNDED
def test_report_and_config(tied, untied):
    for (dense, small, report), names in ((tied, [EMBEDDING]), (untied, [EMBEDDING, HEAD])):
        config = json.loads((small / "config.json").read_text())["quantization_config"]
        assert config["format_version"] == 3
        stored = tensors_of(small)
        for name in names:
            layer = report.layers[name]
            assert layer.shape == (64, 32) and layer.density == 1.0 and layer.dtype == "bfloat16"
            entry = {"format": "dense", "shape": [64, 32], "values": "int8"}
            assert config["layers"][name] == entry
            q, scales = stored[f"{name}.values"], stored[f"{name}.scales"]
            assert layer.nbytes == q.nbytes + scales.nbytes == 64 * 32 + 64 * 2
            weight = tensors_of(dense)[f"{name}.weight"].double()
            off = (weight - q.double() * scales.double()[:, None]).abs()
            assert (off <= scales.double()[:, None] / 2 * (1 + 1e-6)).all()
            assert layer.error == pytest.approx(float(off.norm() / weight.norm()))
        assert report.nbytes_after == sum(t.nbytes for t in stored.values())
        card = (small / "README.md").read_text()
        assert f"int8 with a scale a row, zeros and all: {', '.join(sorted(names))}." in card


def test_off_by_default_and_with_int8_values_and_shards(tied, kind, tmp_path):
    report = compress_checkpoint(tied[0], tmp_path / "same")
    assert EMBEDDING not in report.layers
    sharded = pruned_checkpoint(tmp_path / "dense", shard="20KB", tie_word_embeddings=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    report = compress_checkpoint(sharded, tmp_path / "both", int8=True, embeddings=kind)
    linears = [layer for name, layer in report.layers.items() if name != EMBEDDING]
    assert all(layer.values == "int8" for layer in linears)
    one, other = tensors_of(tmp_path / "both"), tensors_of(tied[1])
    for part in PARTS[kind]:
        assert bits_equal(one[f"{EMBEDDING}.{part}"], other[f"{EMBEDDING}.{part}"])
    with torch.no_grad():
        assert pyprune.load(tmp_path / "both")(tiny_tokens()).logits.isfinite().all()


def test_compressed_again(tied, kind, tmp_path):
    _, small, _ = tied
    report = compress_checkpoint(small, tmp_path / "again", embeddings=kind)
    assert not report.layers[EMBEDDING].error
    stored, again = tensors_of(small), tensors_of(tmp_path / "again")
    assert stored.keys() == again.keys() and all(bits_equal(again[n], stored[n]) for n in stored)
    compress_checkpoint(small, tmp_path / "same")
    decompress_checkpoint(small, tmp_path / "dense")
    one, other = tensors_of(tmp_path / "same"), tensors_of(tmp_path / "dense")
    assert bits_equal(one[f"{EMBEDDING}.weight"], other[f"{EMBEDDING}.weight"])


def test_a_pruned_head_keeps_its_format(kind, tmp_path):
    model = tiny_model("llama").bfloat16()
    prune_in_place(model, "2:4")
    model.lm_head.weight.data[:, 1::2] = 0
    model.save_pretrained(tmp_path / "dense")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "small", embeddings=kind)
    assert report.formats[HEAD] == "sparse24" and report.layers[HEAD].values == "bfloat16"
    assert "int8" in (kind, report.layers[EMBEDDING].values) or report.formats[EMBEDDING] == kind
    loaded = pyprune.load(tmp_path / "small")
    assert loaded.lm_head.format == "sparse24"


def test_a_head_with_its_own_name_alone(tied, kind, tmp_path):
    """Tied weights may be stored under either name."""
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text((tied[0] / "config.json").read_text())
    state = load_file(tied[0] / "model.safetensors")
    state[f"{HEAD}.weight"] = state.pop(f"{EMBEDDING}.weight")
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    compress_checkpoint(dense, tmp_path / "small", embeddings=kind)
    model = pyprune.load(tmp_path / "small")
    assert model.get_input_embeddings().tied_to is model.lm_head
    with torch.no_grad():
        want = pyprune.load(tied[1])(tiny_tokens()).logits
        assert torch.equal(model(tiny_tokens()).logits, want)


def test_both_names_of_a_tied_weight(tied, kind, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text((tied[0] / "config.json").read_text())
    state = load_file(tied[0] / "model.safetensors")
    state[f"{HEAD}.weight"] = state[f"{EMBEDDING}.weight"].clone()
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    compress_checkpoint(dense, tmp_path / "small", embeddings=kind)
    with torch.no_grad():
        want = pyprune.load(tied[1])(tiny_tokens()).logits
        assert torch.equal(pyprune.load(tmp_path / "small")(tiny_tokens()).logits, want)


def test_one_storage_wherever_it_goes(tied, kind):
    model = pyprune.load(tied[1])
    size = weight_bytes(model)
    embedding, head = model.get_input_embeddings(), model.lm_head
    with torch.no_grad():
        want = model(tiny_tokens()).logits
    # transformers refuses `.to(dtype)` of quantized models.
    for cast in (nn.Module.float, copy.deepcopy, nn.Module.bfloat16, nn.Module.float):
        changed = cast(model)
        assert changed.lm_head.tied_to is changed.get_input_embeddings()
        owner = changed.get_input_embeddings()
        first = PARTS[kind][0]
        assert changed.lm_head._values.data_ptr() == getattr(owner, first).data_ptr()
        with torch.no_grad():
            got = changed(tiny_tokens()).logits
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)
    assert model.get_input_embeddings() is embedding and model.lm_head is head
    assert size < weight_bytes(model)  # norms (and scales) are wider now
    assert changed is model and owner.dtype == owner.decompress().dtype == torch.float32
    model.tie_weights()  # must not look for parameters that are not there
    assert weight_bytes(densified(model)) > weight_bytes(model)
    dense = densified(model)
    assert dense.lm_head.weight is dense.get_input_embeddings().weight


def test_saved_again(tied, untied, tmp_path):
    for number, (_, small, _) in enumerate((tied, untied)):
        again = tmp_path / str(number)
        pyprune.load(small).save_pretrained(again)
        one, other = tensors_of(small), tensors_of(again)
        assert one.keys() == other.keys() and all(bits_equal(one[n], other[n]) for n in one)
        with torch.no_grad():
            want = pyprune.load(small)(tiny_tokens()).logits
            assert torch.equal(pyprune.load(again)(tiny_tokens()).logits, want)


@pytest.mark.parametrize("format", ["dense", "coded"])
def test_compiled_for_any_number_of_tokens(format):
    """One that fixes the number of rows would be compiled anew for each, and vLLM refuses it."""
    layer = LayerFormat(format, (VOCAB, 16), format == "dense")
    parts = formats.pack(torch.randn(VOCAB, 16).bfloat16(), layer)
    head = SparseLinear.of_parts(layer, parts, dtype=torch.bfloat16)
    embedding = StoredEmbedding(VOCAB, 16, format, dtype=torch.bfloat16, tied_to=head)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: head(embedding(ids)), fullgraph=True, backend="aot_eager")
    for n in (9, 300):
        ids = torch.arange(n) % VOCAB
        torch._dynamo.mark_dynamic(ids, 0)  # raises where it is fixed
        assert torch.equal(compiled(ids), head(embedding(ids)))


def test_generating_scoring_and_compiled(tied):
    model = AutoModelForCausalLM.from_pretrained(tied[1], dtype=torch.float32)
    ids = tiny_tokens(2, 5)
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 9)
    text = tiny_tokens(1, 64)[0]
    scores = [perplexity(m, text, seqlen=16).ppl for m in (model, densified(model))]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    table = model.get_input_embeddings()
    step = nn.Sequential(table, model.lm_head)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), step(ids))
    with pytest.raises(IndexError):
        table(torch.tensor([64]))


def test_state_dicts_are_checked():
    table = StoredEmbedding(6, 8, "dense")
    state = {"values": torch.ones(6, 8, dtype=torch.int8), "scales": torch.ones(6)}
    table.load_state_dict(state)
    assert torch.equal(table(torch.tensor([[1, 5]])), torch.ones(1, 2, 8))
    with pytest.raises(RuntimeError, match=r"scales: expected finite .* in row 2"):
        table.load_state_dict({**state, "scales": torch.tensor([1.0, 1, -1, 1, 1, 1])})
    with pytest.raises(UserError, match=r"tied_to: expected \(5, 8, 'dense', True\)"):
        SparseLinear(8, 5, "dense", int8=True, tied_to=table)
    with pytest.raises(UserError, match="bitmap int8, dense int8, coded, got 'dense'"):
        SparseLinear(8, 5, "dense")
    with pytest.raises(UserError, match="bitmap int8, dense int8, coded, got 'coded int8'"):
        SparseLinear(8, 5, "coded", int8=True)
    dense = nn.Linear(8, 6, bias=False).bfloat16()
    coded = SparseLinear.from_dense(dense, "coded")
    again = StoredEmbedding(6, 8, "coded")  # adopts the number of escapes
    again.load_state_dict(coded.state_dict())
    assert bits_equal(again.decompress().bfloat16(), dense.weight.data)
    state = coded.state_dict()
    with pytest.raises(RuntimeError, match=r"bases: expected at most 249, got 255 in row 1"):
        again.load_state_dict({**state, "bases": torch.tensor([1, 255, 1, 1, 1, 1]).byte()})
    with pytest.raises(UserError, match=r"coded: expected bfloat16 weights, got torch\.float32"):
        SparseLinear.from_dense(nn.Linear(8, 6), "coded")


@EXACT
def test_rounded_to_bf16_first(tied, tmp_path, capsys):
    """An fp32 checkpoint whose numbers are bf16 but for the embedding's, which are between them; a
    tensor of another dtype than the others' stays as it is."""
    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(tied[0], dtype=torch.float32).save_pretrained(wide)
    state = load_file(wide / "model.safetensors")
    state[f"{EMBEDDING}.weight"] *= 1 + 2.0**-12
    norm = "model.norm.weight"
    state[norm] = state[norm].half()
    save_file(state, wide / "model.safetensors", {"format": "pt"})
    out = str(tmp_path / "small")
    options = ["--embeddings", "coded", "--dtype", "bfloat16"]
    assert cli.main(["compress", str(wide), "--out", out, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["formats"][EMBEDDING] == "coded"
    assert report["nbytes_before"] == sum(t.nbytes for t in state.values())
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} == {"bfloat16", None}
    decompress_checkpoint(out, tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert report["nbytes_dense"] == sum(t.nbytes for t in back.values())
    assert back.keys() == state.keys()
    for name, t in state.items():
        assert bits_equal(back[name], t if name == norm else t.bfloat16())
    assert pyprune.load(out).lm_head.format == "coded"
    assert cli.main(["compress", out, "--out", out + "2", "--dtype", "bfloat16"]) == 2
    assert "expected a dense checkpoint to be rounded to bfloat16" in capsys.readouterr().err
    assert cli.main(["compress", str(wide), "--out", out + "2", "--dtype", "float16"]) == 2
    assert "--dtype: expected same or bfloat16, got 'float16'" in capsys.readouterr().err


@EXACT
def test_what_would_not_shrink_stays_dense(tied, tmp_path):
    """Every pattern alike: infinities, NaNs and subnormals are stored as they are."""
    gen = torch.Generator().manual_seed(0)

    def noise(w):
        return torch.randint(-(2**15), 2**15, w.shape, generator=gen).short().view(torch.bfloat16)

    dense = changed_embedding(tied[0], tmp_path / "dense", noise)
    report = compress_checkpoint(dense, tmp_path / "small", embeddings="coded")
    assert report.formats[EMBEDDING] == "dense" and report.layers[EMBEDDING].values == "bfloat16"
    one, other = tensors_of(dense), tensors_of(tmp_path / "small")
    assert bits_equal(one[f"{EMBEDDING}.weight"], other[f"{EMBEDDING}.weight"])


@EXACT
def test_odd_patterns_are_coded_bit_for_bit(tied, tmp_path):
    odd = torch.tensor([0, -0x8000, 0x7F80, -0x80, 0x7FC1, 1, -0x7FFF]).short()

    def some(w):
        bits = w.view(torch.int16).clone()
        bits[5, :7] = odd
        return bits.view(torch.bfloat16)

    dense = changed_embedding(tied[0], tmp_path / "dense", some)
    report = compress_checkpoint(dense, tmp_path / "small", embeddings="coded")
    assert report.formats[EMBEDDING] == "coded"
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    one, other = tensors_of(dense), tensors_of(tmp_path / "back")
    assert all(bits_equal(one[n], other[n]) for n in one)
    rows = pyprune.load(tmp_path / "small").get_input_embeddings()(torch.tensor([5]))
    assert torch.equal(rows[0, :7].view(torch.int16), odd)


def test_commands(tied, kind, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["compress", str(tied[0]), "--out", out, "--embeddings", kind]) == 0
    assert kind in capsys.readouterr().out
    assert cli.main(["inspect", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    outside = {layer["name"]: layer for layer in found["others"]}
    label = {"int8": "dense int8", "coded": "coded"}[kind]
    assert outside[f"{EMBEDDING}.weight"]["format"] == label
    dense = sum(t.nbytes for t in tensors_of(tied[0]).values())
    assert found["nbytes_dense"] == dense
    assert found["nbytes"] == sum(t.nbytes for t in tensors_of(tied[1]).values())
    assert cli.main(["inspect", out]) == 0
    assert label in capsys.readouterr().out
    assert cli.main(["compress", str(tied[0]), "--out", out + "2", "--embeddings", "int4"]) == 2
    assert "--embeddings: expected same, int8, coded, got 'int4'" in capsys.readouterr().err


@pytest.mark.parametrize("dense", [False, True])
def test_a_scale_is_not_copied_from_the_host(dense, monkeypatch):
    """A CUDA graph would refuse it: the number has to be made where the rows are."""
    table = StoredEmbedding(6, 8, "dense", scale=3.3, dtype=torch.bfloat16)
    q = torch.arange(48).view(6, 8).to(torch.int8)
    table.load_state_dict({"values": q, "scales": torch.full((6,), 0.5).bfloat16()})
    module = table.to_dense() if dense else table
    want = (q * 0.5).bfloat16() * torch.tensor(3.3).bfloat16()

    def copied(*_, **__):
        raise AssertionError("a number from the host")

    monkeypatch.setattr(torch, "tensor", copied)
    assert torch.equal(module(torch.arange(6)), want)
