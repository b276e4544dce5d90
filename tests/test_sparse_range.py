"""Numbers that the dtype a checkpoint is loaded in cannot hold are refused by name."""

import math

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from embedding_checkpoints import EMBEDDING
from safetensors.torch import load_file, save_file
from sparse_checkpoints import pruned_checkpoint
from tiny_models import tiny_tokens
from transformers import AutoModelForCausalLM

import pyprune
from pyprune import cli
from pyprune.errors import UserError
from pyprune.sparse.convert import compress_checkpoint

UP, NORM = "model.layers.1.mlp.up_proj", "model.norm"


def with_number(folder, name, number, family="llama", **config):
    """A pruned checkpoint whose tensor `name` has `number` in its first place that is not zero."""
    dense = pruned_checkpoint(folder, family, **config)
    state = load_file(dense / "model.safetensors")
    flat = state[name].view(-1)
    flat[flat.nonzero()[0]] = number
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    return dense


def refused(folder, tensor, upto, dtype="float16"):
    file = rf"{folder.name}/model\.safetensors: tensor {tensor}"
    return pytest.raises(UserError, match=rf"{file}: expected .* within {dtype}, .*{upto}")


@pytest.mark.parametrize("name", [f"{UP}.weight", f"{NORM}.weight", f"{EMBEDDING}.weight"])
def test_dense(name, tmp_path):
    dense = with_number(tmp_path / "dense", name, -1e5)
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float16)
    assert bool(plain.get_parameter(name).isinf().any())  # without a word
    for dtype in (torch.float16, "float16"):
        with refused(dense, name, "99840"):
            pyprune.load(dense, dtype=dtype)
    for dtype in (None, "float32", "bfloat16"):
        model = pyprune.load(dense, dtype=dtype)
        assert float(model.get_parameter(name).min()) == -99840


def test_dense_from_the_command_line(tmp_path, capsys):
    dense = with_number(tmp_path / "dense", f"{UP}.weight", 1e5, vocab_size=258)
    byte_tokenizer().save_pretrained(dense)
    (tmp_path / "a.txt").write_text("Once upon a time. " * 20)
    command = ["eval", str(dense), "--text", str(tmp_path / "a.txt"), "--dtype"]
    assert cli.main([*command, "float16"]) == 2
    assert f"tensor {UP}.weight: expected numbers within float16" in capsys.readouterr().err
    assert cli.main([*command, "float32"]) == 0


@pytest.mark.parametrize("pattern", ["2:4", "random"])
def test_compressed(pattern, tmp_path):
    dense = with_number(tmp_path / "dense", f"{UP}.weight", 1e5, pattern=pattern)
    compress_checkpoint(dense, tmp_path / "small")
    with refused(tmp_path / "small", rf"{UP}\.values", "99840"):
        pyprune.load(tmp_path / "small", dtype="float16")
    with refused(tmp_path / "small", rf"{UP}\.values", "99840"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float16)
    model = pyprune.load(tmp_path / "small", dtype="float32")
    assert float(model.get_submodule(UP).decompress().max()) == 99840


@pytest.mark.parametrize("number", [1e5, 1e8])
def test_int8_rows_stand_for_more_than_their_scales(number, tmp_path):
    """A scale of 1e5 / 127 is within float16, what it stands for is not."""
    dense = with_number(tmp_path / "dense", f"{UP}.weight", number)
    compress_checkpoint(dense, tmp_path / "small", int8=True)
    with refused(tmp_path / "small", rf"{UP}\.scales", r"\d"):
        pyprune.load(tmp_path / "small", dtype="float16")
    assert math.isfinite(float(pyprune.load(tmp_path / "small")(tiny_tokens()).logits.sum()))


@pytest.mark.parametrize(("kind", "part"), [("int8", "scales"), ("coded", "low")])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(kind, part, tied, tmp_path):
    config = {"tie_word_embeddings": tied}
    dense = with_number(tmp_path / "dense", f"{EMBEDDING}.weight", 1e5, **config)
    compress_checkpoint(dense, tmp_path / "small", embeddings=kind)
    with refused(tmp_path / "small", rf"{EMBEDDING}\.{part}", r"\d"):
        pyprune.load(tmp_path / "small", dtype="float16")
    pyprune.load(tmp_path / "small")


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "gpt_oss"])
def test_experts(family, tmp_path):
    """Whatever their tensors are called, and whether they are fused while loading."""
    dense = pruned_checkpoint(tmp_path / "dense", family)
    state = load_file(dense / "model.safetensors")
    experts = [n for n in state if ".1." in n and "experts" in n and "bias" not in n]
    for name in experts:
        state[name].view(-1, 4)[:, :2] = 0
        if family == "gpt_oss":  # stored inputs by outputs
            state[name].view(4, -1, 4, state[name].shape[-1])[:, :, :2] = 0
    name = experts[-1]
    state[name].view(-1)[-1] = 1e5
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    with refused(dense, name, "99840"):
        pyprune.load(dense, dtype="float16")
    report = compress_checkpoint(dense, tmp_path / "small")
    assert any("experts" in layer for layer, kind in report.formats.items() if kind != "dense")
    part = f"{name}.3" if family == "gpt_oss" else name.removesuffix(".weight")
    with refused(tmp_path / "small", rf"{part}\.values", "99840"):
        pyprune.load(tmp_path / "small", dtype="float16")
    pyprune.load(tmp_path / "small", dtype="float32")


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
def test_what_is_no_number_in_the_file_stays(number, tmp_path):
    dense = with_number(tmp_path / "dense", f"{UP}.weight", number)
    for folder in (dense, tmp_path / "small"):
        if folder != dense:
            compress_checkpoint(dense, folder)
        pyprune.load(folder, dtype="float16")


def test_what_rounds_to_the_largest_number_is_loaded(tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense")
    state = {n: w.float() for n, w in load_file(dense / "model.safetensors").items()}
    state[f"{UP}.weight"].view(-1)[:2] = torch.tensor([65519.0, 0.5])
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    model = pyprune.load(dense, dtype="float16")
    assert float(model.get_parameter(f"{UP}.weight").max()) == 65504
