"""int8 embeddings and heads: in checkpoints, through transformers, tied and not."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_checkpoints import bits_equal, prune_in_place, pruned_checkpoint, tensors_of
from tiny_models import tiny_model, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM

import pyprune
from pyprune import cli
from pyprune.errors import UserError
from pyprune.evaluate import perplexity
from pyprune.sparse import SparseLinear
from pyprune.sparse.bench import densified, weight_bytes
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
from pyprune.sparse.embedding import Int8Embedding

# (family, tied): with scaled embeddings and capped logits (Gemma 2), a head of another width than
# the model (OPT), a head with a bias (Phi), experts, and names without the base model's prefix.
FAMILIES = [
    ("llama", False), ("llama", True), ("gemma2", True), ("gemma3_text", True), ("gpt2", True),
    ("opt", True), ("bloom", True), ("falcon", True), ("phi", False), ("mixtral", False),
]  # fmt: skip
IDS = [f"{family}-{'tied' if tied else 'untied'}" for family, tied in FAMILIES]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def compressed(folder, family="llama", tied=True, **options):
    config = {"tie_word_embeddings": tied}
    if family == "gemma2":
        config["final_logit_softcapping"] = 3.0
    dense = pruned_checkpoint(folder / "dense", family, **config)
    report = compress_checkpoint(dense, folder / "small", int8_embeddings=True, **options)
    return dense, folder / "small", report


@pytest.mark.parametrize(("family", "tied"), FAMILIES, ids=IDS)
def test_families(family, tied, tmp_path):
    dense, small, report = compressed(tmp_path, family, tied)
    rows = {n: layer for n, layer in report.layers.items() if layer.values == "int8"}
    assert len(rows) == (1 if tied else 2)
    assert all(layer.format == "dense" and 0 < layer.error < 0.01 for layer in rows.values())
    model = pyprune.load(small, dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is Int8Embedding and type(head) is SparseLinear
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert head.tied_to is (embedding if tied else None)
    assert [n for n, _ in model.named_buffers() if n.startswith(HEAD)] == (
        [] if tied else [n for n in (f"{HEAD}.values", f"{HEAD}.scales", f"{HEAD}.bias")
                         if n != f"{HEAD}.bias" or family == "phi"]
    )  # fmt: skip
    # The model's own arithmetic, on the weights that were stored.
    decompress_checkpoint(small, tmp_path / "back")
    one, other = tensors_of(dense), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys()
    changed = {n for n in one if not torch.equal(one[n], other[n])}
    assert changed == {f"{name}.weight" for name in rows}
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    half = pyprune.load(small)
    ids = tiny_tokens()
    with torch.no_grad():
        got = half.get_input_embeddings()(ids)
        assert bits_equal(got, exact.get_input_embeddings()(ids))
        # In fp32 the products of number and scale are not rounded to bf16.
        want = densified(model)(ids).logits
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
        near = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
    assert (want - near).norm() / near.norm() < 0.1 and not torch.equal(want, near)
    assert half(ids).logits.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("untied"), tied=False)


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


def test_off_by_default_and_with_int8_values_and_shards(tied, tmp_path):
    report = compress_checkpoint(tied[0], tmp_path / "same")
    assert EMBEDDING not in report.layers
    sharded = pruned_checkpoint(tmp_path / "dense", shard="20KB", tie_word_embeddings=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    report = compress_checkpoint(sharded, tmp_path / "both", int8=True, int8_embeddings=True)
    assert all(layer.values == "int8" for layer in report.layers.values())
    one, other = tensors_of(tmp_path / "both"), tensors_of(tied[1])
    assert bits_equal(one[f"{EMBEDDING}.values"], other[f"{EMBEDDING}.values"])
    with torch.no_grad():
        assert pyprune.load(tmp_path / "both")(tiny_tokens()).logits.isfinite().all()


def test_compressed_again(tied, tmp_path):
    _, small, _ = tied
    report = compress_checkpoint(small, tmp_path / "again", int8_embeddings=True)
    assert report.layers[EMBEDDING].error == 0.0
    stored, again = tensors_of(small), tensors_of(tmp_path / "again")
    assert stored.keys() == again.keys() and all(bits_equal(again[n], stored[n]) for n in stored)
    compress_checkpoint(small, tmp_path / "same")
    decompress_checkpoint(small, tmp_path / "dense")
    one, other = tensors_of(tmp_path / "same"), tensors_of(tmp_path / "dense")
    assert bits_equal(one[f"{EMBEDDING}.weight"], other[f"{EMBEDDING}.weight"])


def test_a_pruned_head_keeps_its_format(tmp_path):
    model = tiny_model("llama").bfloat16()
    prune_in_place(model, "2:4")
    model.lm_head.weight.data[:, 1::2] = 0
    model.save_pretrained(tmp_path / "dense")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "small", int8_embeddings=True)
    assert report.formats[HEAD] == "sparse24" and report.layers[HEAD].values == "bfloat16"
    assert report.layers[EMBEDDING].values == "int8"
    loaded = pyprune.load(tmp_path / "small")
    assert loaded.lm_head.format == "sparse24"


def test_a_head_with_its_own_name_alone(tied, tmp_path):
    """Tied weights may be stored under either name."""
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text((tied[0] / "config.json").read_text())
    state = load_file(tied[0] / "model.safetensors")
    state[f"{HEAD}.weight"] = state.pop(f"{EMBEDDING}.weight")
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    compress_checkpoint(dense, tmp_path / "small", int8_embeddings=True)
    model = pyprune.load(tmp_path / "small")
    assert model.get_input_embeddings().tied_to is model.lm_head
    with torch.no_grad():
        want = pyprune.load(tied[1])(tiny_tokens()).logits
        assert torch.equal(model(tiny_tokens()).logits, want)


def test_both_names_of_a_tied_weight(tied, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text((tied[0] / "config.json").read_text())
    state = load_file(tied[0] / "model.safetensors")
    state[f"{HEAD}.weight"] = state[f"{EMBEDDING}.weight"].clone()
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    compress_checkpoint(dense, tmp_path / "small", int8_embeddings=True)
    with torch.no_grad():
        want = pyprune.load(tied[1])(tiny_tokens()).logits
        assert torch.equal(pyprune.load(tmp_path / "small")(tiny_tokens()).logits, want)


def test_one_storage_wherever_it_goes(tied):
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
        assert changed.lm_head._values.data_ptr() == owner.values.data_ptr()
        with torch.no_grad():
            got = changed(tiny_tokens()).logits
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)
    assert model.get_input_embeddings() is embedding and model.lm_head is head
    assert size < weight_bytes(model)  # scales and norms are wider now
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
    table = Int8Embedding(6, 8)
    state = {"values": torch.ones(6, 8, dtype=torch.int8), "scales": torch.ones(6)}
    table.load_state_dict(state)
    assert torch.equal(table(torch.tensor([[1, 5]])), torch.ones(1, 2, 8))
    with pytest.raises(RuntimeError, match=r"scales: expected finite .* in row 2"):
        table.load_state_dict({**state, "scales": torch.tensor([1.0, 1, -1, 1, 1, 1])})
    with pytest.raises(UserError, match=r"tied_to: expected \(5, 8, 'dense', True\)"):
        SparseLinear(8, 5, "dense", int8=True, tied_to=table)
    with pytest.raises(UserError, match="format: expected one of sparse24, bitmap, got 'dense'"):
        SparseLinear(8, 5, "dense")


SPOILT = {
    "scale": (lambda s: s[f"{EMBEDDING}.scales"].__setitem__(3, float("nan")), "scales: .*row 3"),
    "number": (lambda s: s[f"{EMBEDDING}.values"][4].fill_(-128), r"values: .*got -128"),
    "count": (
        lambda s: s.__setitem__(f"{EMBEDDING}.scales", s[f"{EMBEDDING}.scales"][:-1].clone()),
        "scales: expected shape",
    ),
    "shape": (
        lambda s: s.__setitem__(f"{EMBEDDING}.values", s[f"{EMBEDDING}.values"].T.contiguous()),
        "values: expected shape",
    ),
    "flat": (
        lambda s: s.__setitem__(f"{EMBEDDING}.values", s[f"{EMBEDDING}.values"].flatten()),
        "values: expected shape",
    ),
    "dtype": (
        lambda s: s.__setitem__(f"{EMBEDDING}.values", s[f"{EMBEDDING}.values"].bfloat16()),
        r"values: expected torch\.int8, got torch\.bfloat16",
    ),
    "missing": (lambda s: s.pop(f"{EMBEDDING}.values"), "values is missing"),
    "twice": (
        lambda s: s.__setitem__(f"{EMBEDDING}.weight", torch.ones(64, 32).bfloat16()),
        "there twice",
    ),
}


def spoil(source, folder, change=lambda state: None, **fields):
    """A copy of a one-file checkpoint with its tensors changed, and the embedding's entry."""
    raw = json.loads((source / "config.json").read_text())
    config = raw["quantization_config"]
    config["layers"][EMBEDDING] |= {n: v for n, v in fields.items() if n != "format_version"}
    config["format_version"] = fields.get("format_version", 3)
    state = load_file(source / "model.safetensors")
    change(state)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", SPOILT)
def test_tampered_tensors_are_refused(case, tied, tmp_path):
    change, message = SPOILT[case]
    small = spoil(tied[1], tmp_path / "small", change)
    for read in (pyprune.load, lambda s: decompress_checkpoint(s, tmp_path / "back")):
        with pytest.raises(UserError, match=rf"small.*{EMBEDDING}.*{message}"):
            read(small)


def test_a_second_weight_beside_a_tied_one(tied, tmp_path):
    def change(state):
        state[f"{HEAD}.weight"] = torch.ones(64, 32).bfloat16()

    small = spoil(tied[1], tmp_path / "small", change)
    with pytest.raises(UserError, match=rf"tensor {HEAD}\.weight: expected none, it is tied to"):
        pyprune.load(small)


def test_truncated(tied, tmp_path):
    small = spoil(tied[1], tmp_path / "small")
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"small/model\.safetensors"):
        pyprune.load(small)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": None}, "values: expected int8 with format dense, got None"),
        ({"shape": [32, 64]}, r"values: expected shape \[32, 64\]"),
        ({"transposed": True}, rf"the model lacks a linear layer or embedding {EMBEDDING}"),
        ({"format": "bitmap"}, rf"tensor {EMBEDDING}\.bitmap is missing"),
        ({"format_version": 2}, "needs format_version 3, got 2"),
        ({"format_version": 5}, "expected a format_version among 1, 2, 3, 4, got 5"),
    ],
)
def test_configuration(fields, message, tied, tmp_path):
    with pytest.raises(UserError, match=message):
        pyprune.load(spoil(tied[1], tmp_path / "small", **fields))


def test_embeddings_of_another_kind(tmp_path, monkeypatch):
    dense = pruned_checkpoint(tmp_path / "dense")

    class Other(nn.Embedding):
        pass

    build = type(tiny_model("llama")).get_input_embeddings

    def other(self):
        made = build(self)
        made.__class__ = Other
        return made

    monkeypatch.setattr(type(tiny_model("llama")), "get_input_embeddings", other)
    with pytest.raises(UserError, match=r"dense: int8 embeddings: expected nn\.Embedding or"):
        compress_checkpoint(dense, tmp_path / "small", int8_embeddings=True)
    assert not (tmp_path / "small").exists()


def test_weights_that_cannot_be_rounded(tied, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text((tied[0] / "config.json").read_text())
    state = load_file(tied[0] / "model.safetensors")
    state[f"{EMBEDDING}.weight"][7, 1] = float("inf")
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{EMBEDDING}\.weight: int8: .*finite.* in row 7"):
        compress_checkpoint(dense, tmp_path / "small", int8_embeddings=True)


def test_commands(tied, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["compress", str(tied[0]), "--out", out, "--embeddings", "int8"]) == 0
    assert "int8" in capsys.readouterr().out
    assert cli.main(["inspect", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    outside = {layer["name"]: layer for layer in found["others"]}
    assert outside[f"{EMBEDDING}.weight"]["format"] == "dense int8"
    dense = sum(t.nbytes for t in tensors_of(tied[0]).values())
    assert found["nbytes_dense"] == dense
    assert found["nbytes"] == sum(t.nbytes for t in tensors_of(tied[1]).values())
    assert cli.main(["inspect", out]) == 0
    assert "dense int8" in capsys.readouterr().out
    assert cli.main(["compress", str(tied[0]), "--out", out + "2", "--embeddings", "int4"]) == 2
    assert "--embeddings: expected same or int8" in capsys.readouterr().err
