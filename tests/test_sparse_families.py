"""Layers that are no plain `nn.Linear`: GPT-2's Conv1D, Falcon's own class, mixtures of experts."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_checkpoints import pruned_checkpoint, tensors_of
from tiny_models import MOE_FAMILIES, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM, Conv1D

import pyprune
from pyprune.errors import UserError
from pyprune.sparse import SparseLinear, compress_model
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
from pyprune.sparse.experts import SparseExperts

EXPERTS = re.compile(r"\.experts\.\d+\.")


def same_logits(dense, small, within=1e-4):
    ids = tiny_tokens()
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
        got = pyprune.load(small, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(got, want, rtol=within, atol=within)


@pytest.fixture
def gpt2(tmp_path):
    """Pruned 2:4 along inputs, as pyprune does; Conv1D holds inputs by outputs."""
    dense = pruned_checkpoint(tmp_path / "dense", "gpt2", "random")
    file = dense / "model.safetensors"
    state = load_file(file)
    for name, w in state.items():
        if w.dim() == 2 and ".h." in f".{name}":
            state[name] = torch.ones_like(w)
            w.normal_(generator=torch.Generator().manual_seed(w.numel()))
            w[0::4] = w[3::4] = 0
            state[name] = w
    save_file(state, file, {"format": "pt"})
    return dense


def test_conv1d(gpt2, tmp_path):
    report = compress_checkpoint(gpt2, tmp_path / "small")
    layer = next(layer for name, layer in report.layers.items() if name.endswith("h.0.mlp.c_fc"))
    assert layer.format == "sparse24" and layer.shape == (64, 32)
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert all(value["transposed"] for value in config["layers"].values())
    same_logits(gpt2, tmp_path / "small")
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    one, other = tensors_of(gpt2), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    model = pyprune.load(tmp_path / "small")
    model.save_pretrained(tmp_path / "again")
    same_logits(gpt2, tmp_path / "again")


def test_conv1d_must_be_called_transposed(gpt2, tmp_path):
    compress_checkpoint(gpt2, tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    raw = json.loads(file.read_text())
    layers = raw["quantization_config"]["layers"]
    name = next(iter(layers))
    del layers[name]["transposed"]
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=rf"tensor {name}\.values: the model lacks a linear layer"):
        pyprune.load(tmp_path / "small")


def test_compress_model_takes_them():
    for family, kind in (("gpt2", Conv1D), ("falcon", nn.Linear)):
        model = tiny_model(family)
        for name, p in model.named_parameters():
            if p.dim() == 2 and ".h." in name:
                p.data[::2] = 0
        modules = dict(model.named_modules())
        with torch.no_grad():
            want = model(tiny_tokens()).logits
        chosen = compress_model(model)
        changed = [name for name, format in chosen.items() if format != "dense"]
        assert len(changed) == 8 and all(isinstance(modules[n], kind) for n in changed)
        with torch.no_grad():
            torch.testing.assert_close(model(tiny_tokens()).logits, want, rtol=1e-4, atol=1e-4)


def test_other_subclasses_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(8, 8))
    model[0].weight.data[:] = 0
    assert compress_model(model) == {} and type(model[0]) is Doubled
    with pytest.raises(UserError, match="expected a linear layer, got Doubled"):
        SparseLinear.from_dense(model[0], "bitmap")


def expert_names(report):
    return [name for name in report.layers if EXPERTS.search(f"{name}.")]


def pruned_experts(folder, family):
    """Pruned as transformers saves them: one tensor for each projection of each expert."""
    dense = pruned_checkpoint(folder, family, "2:4")
    file = dense / "model.safetensors"
    state = load_file(file)
    for name, w in state.items():
        if EXPERTS.search(name):
            w[:, 1::2] = 0
    save_file(state, file, {"format": "pt"})
    return dense


# In int8 every kind of mixture is in test_mixtures.
@pytest.mark.parametrize(
    ("family", "int8"), [*((family, False) for family in MOE_FAMILIES), (MOE_FAMILIES[0], True)]
)
def test_mixtures(family, int8, tmp_path):
    dense = pruned_experts(tmp_path / "dense", family)
    report = compress_checkpoint(dense, tmp_path / "small", int8=int8)
    names = expert_names(report)
    assert len(names) == 4 * 3 * (1 if family == "qwen3_moe" else 2)
    assert {report.formats[name] for name in names} == {"sparse24"}
    model = pyprune.load(tmp_path / "small")
    mixtures = [m for m in model.modules() if isinstance(m, SparseExperts)]
    assert len(mixtures) == len(names) // 12
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    one, other = tensors_of(dense), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys()
    if int8:  # what comes back is what the compressed model computes with, rounded to bf16
        same_logits(tmp_path / "back", tmp_path / "small", 0.05)
        for name, w in one.items():
            assert float((w - other[name]).float().norm()) <= 0.01 * float(w.float().norm())
    else:
        assert all(torch.equal(one[n], other[n]) for n in one)
        same_logits(dense, tmp_path / "small")
        model.save_pretrained(tmp_path / "again")
        same_logits(dense, tmp_path / "again")


def test_a_mixture_is_compressed_whole_or_not_at_all(tmp_path):
    dense = pruned_experts(tmp_path / "dense", "mixtral")
    file = dense / "model.safetensors"
    state = load_file(file)
    one = next(name for name in state if ".layers.1." in name and EXPERTS.search(name))
    state[one] += 1
    save_file(state, file, {"format": "pt"})
    report = compress_checkpoint(dense, tmp_path / "small", int8=True)
    for name in expert_names(report):
        layer = report.layers[name]
        whole = ".layers.0." in name
        assert layer.format == ("sparse24" if whole else "dense")
        assert layer.values == ("int8" if whole else "bfloat16") and (layer.error is None) != whole
    model = pyprune.load(tmp_path / "small")
    kinds = [isinstance(model.model.layers[i].mlp.experts, SparseExperts) for i in (0, 1)]
    assert kinds == [True, False]


def test_mixtures_that_do_not_fit(tmp_path):
    dense = pruned_experts(tmp_path / "dense", "qwen2_moe")
    compress_checkpoint(dense, tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    raw = json.loads(file.read_text())
    raw["num_experts"] = 5
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"the model lacks gate_proj, up_proj, down_proj of 5 exp"):
        pyprune.load(tmp_path / "small")
