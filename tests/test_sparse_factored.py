"""Linear layers stored as products of two thin matrices."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM

import pyprune
from pyprune.errors import UserError
from pyprune.sparse.convert import decompress_checkpoint, write_factored
from pyprune.sparse.factored import FactoredLinear

LAYER = "model.layers.1.mlp.down_proj"  # [32, 64], with a bias


def factored(tmp_path, shard="5GB"):
    """A checkpoint with one layer of rank 3, and its factors."""
    tiny_model("llama").save_pretrained(tmp_path / "dense", max_shard_size=shard)
    gen = torch.Generator().manual_seed(0)
    up, down = torch.randn(32, 3, generator=gen), torch.randn(3, 64, generator=gen)
    weights = {f"{LAYER}.weight": (up, down), "model.norm.weight": torch.full((32,), 0.5)}
    with write_factored(tmp_path / "dense", tmp_path / "small", weights) as folder:
        assert not (tmp_path / "small").exists()
        (folder / "README.md").write_text("card")
    return tmp_path / "small", up, down


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_is_the_product(bias, dtype):
    linear = nn.Linear(20, 12, bias=bias, dtype=dtype)
    gen = torch.Generator().manual_seed(1)
    up, down = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((12, 4), (4, 20)))
    thin = FactoredLinear.of(up, down, linear)
    assert (thin.in_features, thin.out_features, thin.rank) == (20, 12, 4)
    assert "rank=4" in repr(thin) and all(not p.requires_grad for p in thin.parameters())
    x = torch.randn(5, 20, generator=gen, dtype=torch.float64)
    want = x @ (up @ down).T + (linear.bias.double() if bias else 0)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    close = exact if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.3}
    for module in (thin, thin.to_dense()):
        got = module(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **close)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_is_written_and_read(shard, tmp_path):
    folder, up, down = factored(tmp_path, shard)
    assert len(list(folder.glob("*.safetensors"))) == (1 if shard == "5GB" else 6)
    assert (folder / "README.md").read_text() == "card"
    model = pyprune.load(folder)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, FactoredLinear)
    assert torch.equal(layer.up.weight, up) and torch.equal(layer.down.weight, down)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    dense.get_submodule(LAYER).weight.data = up @ down
    dense.model.norm.weight.data.fill_(0.5)
    assert torch.equal(layer.bias, dense.get_submodule(LAYER).bias)
    ids = tiny_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    # Saved again, it is the same; decompressed, the products.
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, model(ids).logits)
    decompress_checkpoint(folder, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back.get_submodule(LAYER)) is nn.Linear
    assert all(map(torch.equal, back.parameters(), dense.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.down.weight"), r"down_proj\.down\.weight is missing"),
        (
            lambda t: t.update({f"{LAYER}.up.weight": torch.zeros(32, 4)}),
            r"down_proj\.up\.weight: expected shape \[32, 3\], got \[32, 4\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.up.weight": torch.zeros(32, 3, dtype=torch.int8)}),
            r"down_proj\.up\.weight: expected torch\.bfloat16 or .*, got torch\.int8",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.zeros(32, 64)}),
            r"down_proj\.weight is there twice",
        ),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    folder, _, _ = factored(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        pyprune.load(folder)
    with pytest.raises(UserError, match=message):
        decompress_checkpoint(folder, tmp_path / "no")


def tampered(folder, change):
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_factors_that_no_layer_of_the_configuration_has_are_refused(tmp_path, family):
    """Nothing would be loaded in their place, and decompressing would leave the weight out."""
    layer = LAYER if family == "llama" else "model.layers.1.block_sparse_moe.experts.2.w2"
    tiny_model(family).save_pretrained(tmp_path / "dense")
    shape = load_file(tmp_path / "dense/model.safetensors")[f"{layer}.weight"].shape
    factors = torch.ones(shape[0], 3), torch.ones(3, shape[1])
    with write_factored(tmp_path / "dense", tmp_path / "small", {f"{layer}.weight": factors}):
        pass
    tampered(tmp_path / "small", lambda raw: raw["quantization_config"]["layers"].pop(layer))
    for call in (
        lambda: pyprune.load(tmp_path / "small"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "small"),
        lambda: decompress_checkpoint(tmp_path / "small", tmp_path / "no"),
    ):
        wanted = rf"model\.safetensors: tensor {layer}\.up\.weight: .*config\.json has no layer"
        with pytest.raises(UserError, match=f"{wanted} {layer}$"):
            call()
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("beside", [{}, {f"{LAYER}.weight": torch.ones(32, 64)}])
def test_parts_of_those_names_may_be_a_modules_own(tmp_path, beside):
    """They are factors where the model wants the weight and the file does not have it."""
    prefix = LAYER if beside else "model.layers.1.extra"
    folder = factored(tmp_path)[0]
    tensors = load_file(folder / "model.safetensors")
    up, down = (tensors.pop(f"{LAYER}.{part}.weight") for part in ("up", "down"))
    own = {f"{prefix}.up.weight": up, f"{prefix}.down.weight": down}
    dense = load_file(tmp_path / "dense/model.safetensors")
    weight = {f"{LAYER}.weight": dense[f"{LAYER}.weight"]}
    save_file({**tensors, **own, **weight, **beside}, folder / "model.safetensors")
    tampered(folder, lambda raw: raw["quantization_config"]["layers"].clear())
    report = decompress_checkpoint(folder, tmp_path / "back")
    assert not report.layers
    assert load_file(tmp_path / "back/model.safetensors").keys() >= own.keys()


def test_only_a_dense_checkpoint_gets_factors(tmp_path):
    folder, wanted = factored(tmp_path)[0], "expected a dense checkpoint, it is pyprune"
    with pytest.raises(UserError, match=wanted), write_factored(folder, tmp_path / "no", {}):
        pass
    assert not (tmp_path / "no").exists()


def test_factors_that_the_dtype_cannot_hold_are_refused(tmp_path):
    tiny_model("llama").half().save_pretrained(tmp_path / "dense")
    up, down = torch.ones(32, 1), torch.full((1, 64), 1e6)
    weights = {f"{LAYER}.weight": (up, down)}
    wanted = rf"dense: new {LAYER}.weight: expected numbers within torch.float16, got up to 1e\+06"
    with (
        pytest.raises(UserError, match=wanted),
        write_factored(tmp_path / "dense", tmp_path / "no", weights),
    ):
        pass
    assert not (tmp_path / "no").exists()
