"""A checkpoint pruned through StreamingStore must be the in-memory edit, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_models import reloaded
from tiny_models import FAMILIES, MOE_FAMILIES, tiny_model, tiny_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pyprune.checkpoint import Checkpoint, StreamingStore, copy_auxiliary, output_directory
from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef

LAYOUTS = [
    pytest.param(torch.float32, True, id="fp32 sharded"),
    pytest.param(torch.bfloat16, True, id="bf16 sharded"),
    pytest.param(torch.float16, False, id="fp16 one file"),
]
WEIGHTS = "model.safetensors"
# Small enough that every tiny model takes several shards.
SHARD = "20KB"


def edit(w: Tensor) -> Tensor:
    """Removes the smaller half of a matrix and changes what stays, as an OBS update does."""
    kept = w.abs() >= w.abs().float().median()
    return torch.where(kept, w.float() * 1.25, 0.0)


def edit_in_place(ref: LinearRef) -> None:
    ref.write(edit(ref.weight()))


def stream(source: Path, out: Path, dtype: torch.dtype | None = torch.float32) -> StreamingStore:
    """Edits every linear of the checkpoint, one block at a time."""
    checkpoint = Checkpoint.open(source)
    adapter = Adapter.of(checkpoint.build_model("meta", dtype))
    with output_directory(out) as folder:
        store = StreamingStore(checkpoint, adapter, folder)
        for i, block in enumerate(adapter.blocks):
            store.load(i)
            assert not any(p.is_meta for p in block.parameters())
            for ref in adapter.linears(i):
                edit_in_place(ref)
            store.flush(i)
            assert not [n for n, p in adapter.model.named_parameters() if not p.is_meta]
        copy_auxiliary(checkpoint, folder)
    return store


def in_memory(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The same edit on the whole model in fp32, rounded to the dtype it is stored in."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    adapter = Adapter.of(model)
    for i in range(len(adapter.blocks)):
        for ref in adapter.linears(i):
            edit_in_place(ref)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    tiny_model(family).to(dtype).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("dtype, sharded", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_edit_is_the_in_memory_edit(tmp_path, family, dtype, sharded):
    source = saved(family, tmp_path / "in", dtype, **({"max_shard_size": SHARD} if sharded else {}))
    assert len(list(source.glob("*.safetensors"))) > 1 or not sharded
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    out = tmp_path / "out"
    store = stream(source, out)

    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    again = reloaded(out, dtype=torch.float32)
    ids = tiny_tokens()
    with torch.no_grad():
        expected = in_memory(source, dtype)(ids).logits
        assert torch.equal(again(ids).logits, expected)

    pruned = {
        piece.tensor
        for i in range(len(store.adapter.blocks))
        for ref in store.adapter.linears(i)
        for piece in store.checkpoint.names.pieces[ref.parameter_name]
    }
    old, new = tensors(source), tensors(out)
    assert list(old) == list(new) and pruned < set(old)
    for name, value in old.items():
        assert new[name].dtype == value.dtype
        assert torch.equal(new[name].view(torch.uint8), value.view(torch.uint8)) == (
            name not in pruned
        )
    for file in store.checkpoint.files:
        with safe_open(file, "pt") as a, safe_open(out / file.name, "pt") as b:
            assert a.metadata() == b.metadata()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_runs_on_streamed_blocks(tmp_path, family):
    """With every block loaded, the meta model computes what the whole model does: parameters
    outside the blocks and the buffers that no checkpoint holds are right."""
    source = saved(family, tmp_path / "in")
    whole = AutoModelForCausalLM.from_pretrained(source).eval()
    checkpoint = Checkpoint.open(source)
    adapter = Adapter.of(checkpoint.build_model())
    (tmp_path / "out").mkdir()
    store = StreamingStore(checkpoint, adapter, tmp_path / "out")
    store.load_rest()
    for i in range(len(adapter.blocks)):
        store.load(i)
    buffers = dict(adapter.model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, value in whole.named_buffers():
        assert torch.equal(buffers[name], value), name
    ids = tiny_tokens()
    with torch.no_grad():
        got = adapter.decoder(input_ids=ids, use_cache=False).last_hidden_state
        expected = Adapter.of(whole).decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "llama", "gpt_neox"])
def test_base_model_prefix_may_be_missing(tmp_path, family):
    """Published GPT-2 and BLOOM checkpoints come from the base model; names lack its prefix."""
    source = saved(family, tmp_path / "in")
    prefix = AutoModelForCausalLM.from_pretrained(source).base_model_prefix + "."
    bare = {name.removeprefix(prefix): v for name, v in load_file(source / WEIGHTS).items()}
    save_file(bare, source / WEIGHTS, {"format": "pt"})
    stream(source, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == bare.keys()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = in_memory(source, torch.float32)(tiny_tokens()).logits
        assert torch.equal(reloaded(tiny_tokens()).logits, expected)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_stored_fused(tmp_path, family):
    """The layout of the parameters themselves: one tensor for all experts."""
    source = saved(family, tmp_path / "in")
    assert any(".experts.0." in name for name in tensors(source))
    state = {k: v.clone() for k, v in tiny_model(family).state_dict().items()}
    save_file(state, source / WEIGHTS, {"format": "pt"})
    store = stream(source, tmp_path / "out")
    assert not any(
        p.expert is not None for ps in store.checkpoint.names.pieces.values() for p in ps
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = in_memory(source, torch.float32)(tiny_tokens()).logits
        assert torch.equal(reloaded(tiny_tokens()).logits, expected)


@pytest.mark.parametrize("tensor, family", [("0.w1", "mixtral"), ("3.up_proj", "qwen2_moe")])
def test_missing_expert_is_not_streamed(tmp_path, tensor, family):
    source = saved(family, tmp_path / "in")
    state = {k: v for k, v in load_file(source / WEIGHTS).items() if f"experts.{tensor}" not in k}
    save_file(state, source / WEIGHTS, {"format": "pt"})
    assert "do not make up" in Checkpoint.open(source).streaming_obstacle()


def test_an_expert_twice_does_not_make_up_for_another(tmp_path):
    source = saved("mixtral", tmp_path / "in")
    state = load_file(source / WEIGHTS)
    first, second = sorted(name for name in state if name.endswith("w1.weight"))[:2]
    assert "experts.0." in first and "experts.1." in second
    state[first.removeprefix("model.")] = state.pop(second)  # another name of the first
    save_file(state, source / WEIGHTS, {"format": "pt"})
    assert "do not make up" in Checkpoint.open(source).streaming_obstacle()


def test_unknown_layout_is_reported(tmp_path):
    source = saved("llama", tmp_path / "in")
    state = load_file(source / WEIGHTS)
    state["model.layers.0.mlp.up.weight"] = state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, source / WEIGHTS, {"format": "pt"})
    checkpoint = Checkpoint.open(source)
    reason = "no tensor of the checkpoint is model.layers.0.mlp.up_proj.weight"
    assert checkpoint.streaming_obstacle() == reason
    with pytest.raises(UserError, match="cannot be read block by block"):
        StreamingStore(checkpoint, Adapter.of(checkpoint.build_model()), tmp_path)
    with pytest.raises(UserError, match=r"1 tensors are missing.*up_proj"):
        checkpoint.load_model()


def test_wrong_shape_is_reported(tmp_path):
    source = saved("llama", tmp_path / "in")
    state = load_file(source / WEIGHTS)
    state["model.norm.weight"] = torch.ones(33)
    save_file(state, source / WEIGHTS, {"format": "pt"})
    assert "has shape [33]" in Checkpoint.open(source).streaming_obstacle()


def test_unused_tensors_stay(tmp_path):
    """Old GPT-2 files hold attention masks, others a multi-token head: bytes that nobody reads."""
    source = saved("gpt2", tmp_path / "in")
    state = load_file(source / WEIGHTS) | {"transformer.h.0.attn.bias": torch.ones(3, dtype=bool)}
    save_file(state, source / WEIGHTS, {"format": "pt"})
    store = stream(source, tmp_path / "out")
    assert store.checkpoint.names.unused == ["transformer.h.0.attn.bias"]
    assert tensors(tmp_path / "out")["transformer.h.0.attn.bias"].all()


def test_loading_after_flush_reads_the_pruned_block(tmp_path):
    source = saved("qwen3", tmp_path / "in")
    checkpoint = Checkpoint.open(source)
    adapter = Adapter.of(checkpoint.build_model())
    (tmp_path / "out").mkdir()
    store = StreamingStore(checkpoint, adapter, tmp_path / "out")
    ref = adapter.linears(1)[0]
    store.load(1)
    ref.write(torch.full_like(ref.weight(), 3.0))
    store.load(1)  # already there: nothing is read again
    assert (ref.weight() == 3).all()
    store.release(1)  # dropped, not written
    store.load(1)
    assert not (ref.weight() == 3).any()
    ref.write(torch.full_like(ref.weight(), 3.0))
    store.flush(1)
    store.load(1)
    assert (ref.weight() == 3).all()


def test_weight_too_large_for_the_stored_dtype(tmp_path):
    source = saved("llama", tmp_path / "in", torch.float16)
    checkpoint = Checkpoint.open(source)
    adapter = Adapter.of(checkpoint.build_model(dtype=torch.float32))
    (tmp_path / "out").mkdir()
    store = StreamingStore(checkpoint, adapter, tmp_path / "out")
    store.load(0)
    adapter.linears(0)[0].weight()[0, 0] = 1e6
    with pytest.raises(LayerError, match=r"q_proj.*do not fit into torch.float16"):
        store.flush(0)


def test_same_input_same_bytes(tmp_path):
    source = saved("mixtral", tmp_path / "in", torch.bfloat16, max_shard_size=SHARD)
    stream(source, tmp_path / "a")
    stream(source, tmp_path / "b")
    names = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {n for n in names if n.endswith(".safetensors")}
