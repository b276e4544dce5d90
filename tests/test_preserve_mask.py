"""Masks of an earlier pruning, given to a new one."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.config import PruneConfig
from pyprune.errors import LayerError, UserError
from pyprune.methods import METHODS
from pyprune.models.adapter import Adapter
from pyprune.patterns import pruned_count
from pyprune.prune import prune, prune_checkpoint


def tokens():
    return [tiny_tokens(8, 32)]


def refs_of(model):
    adapter = Adapter.of(model)
    return [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]


def masks_of(model, share=0.2):
    gen = torch.Generator().manual_seed(3)
    return {r.name: torch.rand(r.weight().shape, generator=gen) >= share for r in refs_of(model)}


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"},
                                     {"sparsity": 0.5, "scope": "global"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", list(METHODS))
def test_what_a_mask_removes_goes_and_counts(method, options):
    model = tiny_model("llama")
    masks = masks_of(model)
    dense = {ref.name: ref.weight().clone() for ref in refs_of(model)}
    report = prune(model, tokens(), method, preserve_mask=masks, **options)
    zeros = total = 0
    for ref in refs_of(model):
        w, mask = ref.weight(), masks[ref.name]
        assert bool((dense[ref.name][~mask] != 0).any()) and not bool(w[~mask].any())
        zeros, total = zeros + int((w == 0).sum()), total + w.numel()
        if "pattern" in options:
            gone = (~mask).view(len(w), -1, 4).sum(2)
            assert torch.equal((w == 0).view(len(w), -1, 4).sum(2), gone.clamp_min(2))
    if "pattern" not in options:
        assert zeros == pruned_count(total, 0.5)
    closed = sum(int((~mask).sum()) for mask in masks.values())
    assert report.notes[-1].startswith(f"preserve_mask: {closed} of {total} weights in 14 layers")


def test_layers_without_a_mask_are_free():
    model, free = tiny_model("llama"), tiny_model("llama")
    name = "model.layers.1.mlp.down_proj"
    prune(model, tokens(), "magnitude", 0.5, preserve_mask={name: masks_of(model)[name]})
    prune(free, tokens(), "magnitude", 0.5)
    for a, b in zip(refs_of(model), refs_of(free), strict=True):
        assert torch.equal(a.weight(), b.weight()) == (a.name != name)


def test_pruning_in_two_steps_keeps_the_first_mask(tmp_path):
    model = tiny_model("llama")
    prune(model, tokens(), "wanda", pattern="2:4")
    first = {ref.name: ref.weight() != 0 for ref in refs_of(model)}
    save_file(first, tmp_path / "masks.safetensors")
    dense = tiny_model("llama")
    prune(dense, tokens(), "sparsegpt", 0.6, preserve_mask=str(tmp_path / "masks.safetensors"))
    for ref in refs_of(dense):
        assert not bool(ref.weight()[~first[ref.name]].any())


def test_a_streamed_checkpoint_takes_masks_too(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "in")
    masks = masks_of(model)
    config = PruneConfig(method="sparsegpt", pattern="2:4")
    report = prune_checkpoint(
        tmp_path / "in", tmp_path / "out", config, batches=tokens(), preserve_mask=masks
    )
    prune(model, tokens(), config=config, preserve_mask=masks)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for a, b in zip(refs_of(model), refs_of(got), strict=True):
        assert torch.equal(a.weight(), b.weight())
    assert "preserve_mask" in report.notes[-1]


def test_says_what_is_wrong(tmp_path):
    model, name = tiny_model("llama"), "model.layers.0.mlp.up_proj"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no")
    cases = [
        ({"model.layers.0.mlp.up_prj": torch.ones(2, 2, dtype=torch.bool)}, UserError,
         rf"'model.layers.0.mlp.up_prj' is no layer that is pruned \(did you mean {name}\?\)"),
        ({name: torch.ones(64, 32)}, LayerError, "expected a bool tensor, got torch.float32"),
        ({name: [True]}, LayerError, "expected a bool tensor, got list"),
        ({name: torch.ones(32, 64, dtype=torch.bool)}, LayerError,
         r"expected shape \(64, 32\), got \(32, 64\)"),
        (tmp_path / "missing.safetensors", UserError, "preserve_mask: cannot read"),
        (broken, UserError, "preserve_mask: cannot read"),
        (tmp_path, UserError, "preserve_mask: expected a safetensors file, .* is a directory"),
    ]  # fmt: skip
    before = refs_of(model)[0].weight().clone()
    for masks, kind, message in cases:
        with pytest.raises(kind, match=message):
            prune(model, tokens(), "magnitude", 0.5, preserve_mask=masks)
    assert torch.equal(refs_of(model)[0].weight(), before)


def test_a_method_in_shots_refuses_a_mask():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="preserve_mask: expected none for llm-surgeon, got one"):
        prune(model, tokens(), "llm-surgeon", 0.5, preserve_mask=masks_of(model))
