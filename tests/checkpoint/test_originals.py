"""What is saved of a model that was held whole: the checkpoint's dtypes, and its numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM

from pyprune.checkpoint import Checkpoint, Originals
from pyprune.config import PruneConfig
from pyprune.depth.config import StructureConfig
from pyprune.depth.run import prune_structure_checkpoint
from pyprune.errors import UserError
from pyprune.prune import prune_checkpoint
from pyprune.width.config import WidthConfig
from pyprune.width.run import prune_width_checkpoint

TOKENS = [tiny_tokens(4, 24)]
THIRD = 1 / 3  # no 16-bit float has it


def saved(folder, family="llama", dtype=torch.bfloat16, wide=(), **config):
    """A checkpoint in `dtype`, but for tensors with a name that ends in one of `wide`: those are
    fp32, with numbers that 16 bits do not hold."""
    tiny_model(family, **config).to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(tuple(wide)):
            tensors[name] = tensor.float() + THIRD
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def config_dtype(folder):
    return json.loads((folder / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_layers_that_stay_keep_dtypes_and_numbers(family, tmp_path):
    wide = ("norm.weight", "ln_1.weight", "bias", "embed_tokens.weight", "wte.weight")
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4}
    source = saved(tmp_path / "in", family, wide=wide, **layers)
    config = StructureConfig("sleb", count=2)
    report = prune_structure_checkpoint(source, tmp_path / "out", config, batches=TOKENS)
    gone = {branch.layer for branch in report.decision.removed}
    stays = [i for i in range(4) if i not in gone]
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    part = ".h." if family == "gpt2" else ".layers."
    for name, tensor in after.items():
        old = name
        if part in name:
            start, _, rest = name.partition(part)
            number, _, rest = rest.partition(".")
            old = f"{start}{part}{stays[int(number)]}.{rest}"
        assert tensor.dtype == before[old].dtype and torch.equal(tensor, before[old]), name
    assert {t.dtype for t in after.values()} == {torch.bfloat16, torch.float32}
    # transformers alone would say the dtype of the first parameter, an embedding in fp32.
    assert config_dtype(tmp_path / "out") == config_dtype(source) == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["flap", "slicegpt"])
def test_parameters_that_are_cut_keep_their_dtype(method, tmp_path):
    wide = ("norm.weight", "bias", "lm_head.weight")
    source = saved(tmp_path / "in", wide=wide, hidden_size=64)
    config = WidthConfig(method, ratio=0.2)
    prune_width_checkpoint(source, tmp_path / "out", config, batches=TOKENS)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert {n: t.dtype for n, t in after.items()} == {n: before[n].dtype for n in after}
    narrow = [n for n, t in after.items() if t.shape != before[n].shape]
    assert any(after[n].dtype == torch.float32 for n in narrow)
    if method == "flap":
        assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize("stored, held", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_a_narrow_dtype_while_it_runs_rounds_nothing(stored, held, tmp_path):
    source = saved(tmp_path / "in", dtype=getattr(torch, stored), num_hidden_layers=3)
    config = StructureConfig("reverse", count=1, dtype=held)
    prune_structure_checkpoint(source, tmp_path / "out", config, batches=TOKENS)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert len(after) < len(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("stored, held", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_weights_that_are_kept_keep_their_numbers(stored, held, streamed, tmp_path, monkeypatch):
    """And those that go are zero, also if the narrow dtype has their numbers as zeros."""
    source = saved(tmp_path / "in", dtype=getattr(torch, stored))
    before = tensors_of(source)
    before["model.layers.0.mlp.up_proj.weight"][:, 1] = 1e-9
    save_file(before, source / "model.safetensors", {"format": "pt"})
    if not streamed:
        monkeypatch.setattr(Checkpoint, "streaming_obstacle", lambda self: "said the test")
    config = PruneConfig(method="magnitude", pattern="2:4", dtype=held)
    report = prune_checkpoint(source, tmp_path / "out", config)
    after = tensors_of(tmp_path / "out")
    assert report.sparsity == 0.5
    for layer in report.layers:
        old, new = before.pop(f"{layer.name}.weight"), after.pop(f"{layer.name}.weight")
        assert new.dtype == old.dtype and int((new == 0).sum()) == layer.zeros
        assert torch.equal(new, torch.where(new == 0, new, old))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "llm-surgeon"])
def test_a_checkpoint_that_is_not_streamed(method, tmp_path, monkeypatch):
    source = saved(tmp_path / "in", wide=("norm.weight", "embed_tokens.weight"))
    monkeypatch.setattr(Checkpoint, "streaming_obstacle", lambda self: "said the test")
    own = {"shots": 1} if method == "llm-surgeon" else {}
    config = PruneConfig(method=method, sparsity=0.5, method_options=own)
    report = prune_checkpoint(source, tmp_path / "out", config, batches=TOKENS)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    linears = tuple(f"{layer.name}." for layer in report.layers)  # biases too, by llm-surgeon
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert name.startswith(linears) or torch.equal(tensor, before[name]), name
    assert config_dtype(tmp_path / "out") == "bfloat16"


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    checkpoint = Checkpoint.open(saved(tmp_path / "in", dtype=torch.float16))
    model = checkpoint.load_model(dtype=torch.float32)
    originals = Originals(checkpoint, model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = 7e4
    words = r"^model.layers.1.mlp.up_proj.weight: its new values do not fit into torch.float16"
    with pytest.raises(UserError, match=words):
        originals.restore(model)


def test_changed_and_new_parameters(tmp_path):
    source = saved(tmp_path / "in", "gemma2", wide=("norm.weight", "embed_tokens.weight"))
    checkpoint = Checkpoint.open(source)
    model = checkpoint.load_model()
    originals, before = Originals(checkpoint, model), tensors_of(source)
    first, second = model.model.layers
    with torch.no_grad():
        first.input_layernorm.weight[3] = 2.0  # of an element only
        first.input_layernorm.weight[4] = 0.0
        model.model.norm.weight = nn.Parameter(model.model.norm.weight[:16] * 1)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight * 1)  # untied
        first.mlp.up_proj.bias = nn.Parameter(torch.ones(64))  # of a kind that was not there
        second.mlp.register_parameter("extra", nn.Parameter(torch.ones(2)))
    originals.restore(model)
    changed = before["model.layers.0.input_layernorm.weight"].clone()
    changed[3], changed[4] = 2.0, 0.0
    assert torch.equal(first.input_layernorm.weight, changed)
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert first.mlp.up_proj.bias.dtype == second.mlp.extra.dtype == torch.bfloat16
    assert torch.equal(second.mlp.up_proj.weight, before["model.layers.1.mlp.up_proj.weight"])
