"""int8 values: in layers, in checkpoints and through transformers."""

import copy
import json

import pytest
import torch
from ops.compressed import random_24_mask
from safetensors.torch import load_file, save_file
from sparse_checkpoints import bits_equal, pruned_checkpoint, tensors_of
from tiny_models import tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM

import pyprune
from pyprune import cli
from pyprune.errors import UserError
from pyprune.sparse import SparseLinear, compress_model
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
from pyprune.sparse.direct import is_plain

LAYER = "model.layers.0.mlp.up_proj"
FORMATS = ["sparse24", "bitmap"]


def pruned(dtype=torch.bfloat16, rows=24, cols=40):
    gen = torch.Generator().manual_seed(0)
    linear = nn.Linear(cols, rows, dtype=dtype)
    linear.weight.data = torch.randn(rows, cols, generator=gen).to(dtype)
    linear.weight.data *= random_24_mask(rows, cols, gen)
    return linear


def half_scales(weight):
    return weight.double().abs().amax(1, keepdim=True) / 127 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_layer_is_near_the_dense_one(format, dtype, monkeypatch):
    linear = pruned(dtype)
    sparse = SparseLinear.from_dense(linear, format, int8=True)
    assert sparse.values.dtype == torch.int8 and sparse.scales.dtype == dtype
    weight, rounding = sparse.decompress(), 2**-8 if dtype != torch.float32 else 1e-6
    off = (weight.double() - linear.weight.double()).abs()
    assert (off <= half_scales(linear.weight) * 1.01 + rounding * weight.double().abs()).all()
    assert bool((weight[linear.weight == 0] == 0).all())
    for shape in ((40,), (1, 40), (2, 3, 40), (0, 40)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        assert is_plain(x)
        direct = sparse(x)
        want = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        torch.testing.assert_close(direct.double(), want, rtol=0.02, atol=0.1)
        monkeypatch.setenv("PYPRUNE_BACKEND", "native")
        assert not is_plain(x) and torch.equal(sparse(x), direct)
        monkeypatch.delenv("PYPRUNE_BACKEND")
    assert "dtype=int8" in repr(sparse)
    # 5 bits a weight and a scale a row, to at most 9 with the offsets of these short rows.
    assert sum(t.nbytes for t in sparse.buffers()) < linear.weight.nbytes


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_copies_and_casts(format):
    sparse = SparseLinear.from_dense(pruned(torch.float32), format, int8=True)
    other = SparseLinear(40, 24, format, int8=True)
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(3, 40)
    assert torch.equal(other(x), sparse(x)) and torch.equal(copy.deepcopy(other)(x), sparse(x))
    other.bfloat16()
    assert other.values.dtype == torch.int8 and other.scales.dtype == torch.bfloat16
    torch.testing.assert_close(other(x), sparse(x), rtol=0.02, atol=0.05)
    state = sparse.state_dict()
    state["scales"] = -state["scales"]
    with pytest.raises(RuntimeError, match="scales: expected finite numbers of at least 0"):
        other.load_state_dict(state)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), sparse(x))


def test_compress_model():
    model = nn.Sequential(pruned(), nn.ReLU(), nn.Linear(24, 40, dtype=torch.bfloat16))
    assert compress_model(model, int8=True) == {"0": "sparse24", "2": "dense"}
    assert model[0].int8 and type(model[2]) is nn.Linear
    bad = pruned()
    bad.weight.data[3, bad.weight[3] != 0] = float("nan")
    with pytest.raises(UserError, match="0: int8: w: expected finite weights"):
        compress_model(nn.Sequential(bad), int8=True)


@pytest.fixture(scope="module", params=["2:4", "random"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    dense = pruned_checkpoint(folder / "dense", pattern=request.param)
    report = compress_checkpoint(dense, folder / "small", int8=True)
    return dense, folder / "small", report


def test_report_and_config(made):
    _, small, report = made
    layer = report.layers[LAYER]
    assert layer.values == "int8" and 0 < layer.error < 0.01
    assert layer.nbytes < 0.6 * layer.nbytes_dense and layer.shape == (64, 32)
    head = report.layers["lm_head"]
    assert (head.format, head.values, head.error) == ("dense", "bfloat16", None)
    assert report.nbytes_after < compress_size(made[0], small.parent / "same")
    parts = [t for n, t in tensors_of(small).items() if n.startswith(f"{LAYER}.")]
    assert layer.nbytes == sum(t.nbytes for t in parts) - 64 * 2  # less the bias
    config = json.loads((small / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2 and config["layers"][LAYER]["values"] == "int8"


def compress_size(dense, out):
    return compress_checkpoint(dense, out).nbytes_after


def test_values_survive_every_way(made, tmp_path):
    """From the file into the layer, through a second compression, and through decompression."""
    _, small, _ = made
    stored = tensors_of(small)
    layer = pyprune.load(small).get_submodule(LAYER)
    assert layer.int8
    for part in layer.weight_buffers:
        assert bits_equal(getattr(layer, part), stored[f"{LAYER}.{part}"])
    again = compress_checkpoint(small, tmp_path / "again", int8=True)
    assert again.layers[LAYER].error == 0.0
    assert all(bits_equal(t, stored[n]) for n, t in tensors_of(tmp_path / "again").items())
    decompress_checkpoint(small, tmp_path / "dense")
    dense = tensors_of(tmp_path / "dense")[f"{LAYER}.weight"]
    assert dense.dtype == torch.bfloat16 and torch.equal(dense, layer.decompress())
    nonzero = dense != 0
    q = (dense.double() / stored[f"{LAYER}.scales"].double()[:, None])[nonzero].round()
    wanted = stored[f"{LAYER}.values"].double().flatten()
    assert torch.equal(q, wanted[wanted != 0])
    report = compress_checkpoint(small, tmp_path / "same")
    assert report.layers[LAYER].values == "bfloat16"
    decompress_checkpoint(tmp_path / "same", tmp_path / "dense2")
    assert torch.equal(tensors_of(tmp_path / "dense2")[f"{LAYER}.weight"], dense)


def test_logits_are_those_of_the_decompressed_model(made, tmp_path):
    _, small, _ = made
    decompress_checkpoint(small, tmp_path / "dense")
    ids = tiny_tokens()
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(ids)
        got = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)(ids)
        # The decompressed weights were rounded to bf16 once more.
        torch.testing.assert_close(got.logits, want.logits, rtol=0.03, atol=0.03)
        half = pyprune.load(small)(ids)
    assert half.logits.dtype == torch.bfloat16
    torch.testing.assert_close(half.logits.float(), want.logits, rtol=0.1, atol=0.1)


def test_saved_again(made, tmp_path):
    pyprune.load(made[1]).save_pretrained(tmp_path / "again")
    stored, again = tensors_of(made[1]), tensors_of(tmp_path / "again")
    assert stored.keys() == again.keys() and all(bits_equal(again[n], stored[n]) for n in stored)
    assert pyprune.load(tmp_path / "again").get_submodule(LAYER).int8


SPOILT = {
    "scale": (lambda s: s[f"{LAYER}.scales"].__setitem__(3, float("nan")), "scales: .*in row 3"),
    "sign": (lambda s: s[f"{LAYER}.scales"].neg_(), "scales: expected finite"),
    "missing": (lambda s: s.pop(f"{LAYER}.scales"), "scales is missing"),
    "short": (
        lambda s: s.__setitem__(f"{LAYER}.scales", s[f"{LAYER}.scales"][:-1].clone()),
        "scales: expected shape",
    ),
    "dtype": (
        lambda s: s.__setitem__(f"{LAYER}.values", s[f"{LAYER}.values"].bfloat16()),
        r"values: expected torch\.int8, got torch\.bfloat16",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_tampered_tensors_are_refused(case, made, tmp_path):
    change, message = SPOILT[case]
    file = made[1] / "model.safetensors"
    state = load_file(file)
    change(state)
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text((made[1] / "config.json").read_text())
    save_file(state, small / "model.safetensors", {"format": "pt"})
    for read in (pyprune.load, lambda s: decompress_checkpoint(s, tmp_path / "back")):
        with pytest.raises(UserError, match=rf"small.*{LAYER}.*{message}"):
            read(small)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("values", "int4", r"values: expected int8 or nothing, got 'int4'"),
        ("values", None, "values: expected torch.bfloat16 or"),
        ("transposed", 1, "transposed: expected true or false, got 1"),
        ("rank", 2, r"rank: expected none with format \w+, got 2"),
        ("format", "factored", "rank: expected a positive integer, got None"),
        ("format_version", 1, "needs format_version 2, got 1"),
        ("format_version", 7, "expected a format_version among 1, 2, 3, 4, 5, 6, got 7"),
    ],
)
def test_configuration(field, value, message, made, tmp_path):
    raw = json.loads((made[1] / "config.json").read_text())
    config = raw["quantization_config"]
    (config if field == "format_version" else config["layers"][LAYER])[field] = value
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps(raw))
    (small / "model.safetensors").symlink_to(made[1] / "model.safetensors")
    with pytest.raises(UserError, match=message):
        pyprune.load(small)


def test_weights_that_cannot_be_rounded(tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense")
    state = load_file(dense / "model.safetensors")
    w = state[f"{LAYER}.weight"]
    w[5, w[5] != 0] = float("inf")
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{LAYER}\.weight: int8: .*finite.* in row 5"):
        compress_checkpoint(dense, tmp_path / "small", int8=True)
    assert not (tmp_path / "small").exists()


def test_command(made, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["compress", str(made[0]), "--out", out, "--values", "int8"]) == 0
    assert "int8" in capsys.readouterr().out
    assert cli.main(["inspect", out, "--json"]) == 0
    found = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert found[f"{LAYER}.weight"]["format"].endswith(" int8")
    assert cli.main(["compress", str(made[0]), "--out", out + "2", "--values", "int4"]) == 2
    assert "--values: expected same or int8" in capsys.readouterr().err
