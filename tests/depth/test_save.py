"""Dropping whole layers: what is saved is what plain transformers loads."""

import pytest
import torch
from saved_models import reloaded, save_model
from tiny_models import FAMILIES, tiny_model, tiny_tokens

from pyprune.depth.save import drop_layers
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter

MIXED = {"gemma2": "layer_types", "gemma3_text": "layer_types"}


def model_of(family):
    layers = {"gpt2": "n_layer", "bloom": "n_layer"}.get(family, "num_hidden_layers")
    more = {}
    if family in MIXED:
        more["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if family == "qwen3_moe":
        more["mlp_only_layers"] = [1]
        more["decoder_sparse_step"] = 2  # layers 0 and 2 are dense by the rule, 1 by the list
    return tiny_model(family, **{layers: 4}, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_reload_equals_memory(family, tmp_path):
    model = model_of(family)
    ids = tiny_tokens(2, 16)
    blocks = Adapter.of(model).blocks
    expected_blocks = [blocks[1], blocks[3]]
    # What the model computes with the layers 0 and 2 skipped, before anything is renumbered.
    handles = [
        blocks[i].register_forward_hook(
            lambda _m, a, k, o: (
                ((a[0] if a else k["hidden_states"]), *o[1:])
                if isinstance(o, tuple)
                else (a[0] if a else k["hidden_states"])
            ),
            with_kwargs=True,
        )
        for i in (0, 2)
    ]
    with torch.no_grad():
        skipped = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    drop_layers(model, [1, 3])
    assert Adapter.of(model).blocks == expected_blocks
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(ids, use_cache=False).logits
        assert torch.equal(logits, model(ids, use_cache=False).logits)
        assert torch.equal(logits, skipped)
    for new, block in enumerate(Adapter.of(loaded).blocks):
        indices = {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")}
        assert indices <= {new}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for candidate in (model, loaded):
        cached = candidate.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, candidate.generate(ids, use_cache=False, **options))


def test_everything_kept_changes_nothing():
    model = model_of("gemma2")
    before = model.config.to_dict()
    drop_layers(model, range(4))
    assert model.config.to_dict() == before and len(Adapter.of(model).blocks) == 4


def test_lists_and_rules_are_rewritten():
    model = model_of("qwen3_moe")
    sparse = [hasattr(b.mlp, "experts") for b in Adapter.of(model).blocks]
    assert sparse == [False, False, False, True]
    drop_layers(model, [2, 3])
    assert model.config.mlp_only_layers == [0] and model.config.decoder_sparse_step == 1
    gemma = model_of("gemma3_text")
    drop_layers(gemma, [0, 2, 3])
    assert gemma.config.layer_types == [
        f"{kind}_attention" for kind in ("sliding", "sliding", "full")
    ]


@pytest.mark.parametrize("keep", [[], [0, 0], [2, 1], [-1], [4]])
def test_bad_lists_are_refused(keep):
    model = model_of("llama")
    with pytest.raises(UserError, match="keep: expected"):
        drop_layers(model, keep)
    assert len(Adapter.of(model).blocks) == 4


def test_index_dependent_scaling_is_refused():
    model = tiny_model("gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx"):
        drop_layers(model, [0, 3])
