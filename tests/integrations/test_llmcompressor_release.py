"""llm-compressor's own `oneshot`, with its functions and with ours, where it is installed."""

import copy
from functools import wraps

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune.integrations import llmcompressor as own

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")
datasets = pytest.importorskip("datasets", reason="llm-compressor needs datasets")

from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.pruning import (  # noqa: E402
    SparseGPTModifier,
    WandaPruningModifier,
    sparsegpt,
    wanda,
)

HALF, TWO_OF_FOUR = {"sparsity": 0.5}, {"sparsity": 0.5, "mask_structure": "2:4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of two blocks that has a directory: `oneshot` reads the configuration there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return LlamaForCausalLM.from_pretrained(path)


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (6, 48), generator=generator).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 48] * 6})


def pruned(model, dataset, recipe):
    model = copy.deepcopy(model)
    oneshot(model=model, dataset=dataset, recipe=recipe, processor=byte_tokenizer(pad=True))
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.fixture
def forbidden(monkeypatch):
    """Lets none of llm-compressor's functions that ours stand for run."""

    def forbid():
        for module, name in (
            (sparsegpt.base, "accumulate_hessian"), (sparsegpt.base, "sparsify_weight"),
            (wanda.base, "accumulate_row_scalars"), (wanda.base, "sparsify_weight"),
        ):  # fmt: skip

            @wraps(getattr(module, name))  # keeps the arguments, which are compared
            def never(*args, name=name, **kwargs):
                raise AssertionError(f"{name} was called")

            monkeypatch.setattr(module, name, never)

    return forbid


@pytest.mark.parametrize("rule", [TWO_OF_FOUR, HALF], ids=["2:4", "half"])
@pytest.mark.parametrize("modifier", [SparseGPTModifier, WandaPruningModifier])
def test_oneshot_gives_the_same_model(model, dataset, forbidden, modifier, rule):
    def recipe():
        return modifier(targets=["Linear"], ignore=["re:.*lm_head"], **rule)

    theirs = pruned(model, dataset, recipe())
    forbidden()
    with pytest.raises(AssertionError, match="was called"):
        pruned(model, dataset, recipe())
    with own.accelerated():
        ours = pruned(model, dataset, recipe())
    for name, before in model.named_parameters():
        if not name.endswith("proj.weight"):
            assert torch.equal(ours[name], before), name
        elif modifier is WandaPruningModifier:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            assert torch.equal(ours[name] == 0, theirs[name] == 0), name
            scale = float(before.detach().abs().max())
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4 * scale)
    zeros = sum(int((w == 0).sum()) for n, w in ours.items() if n.endswith("proj.weight"))
    weights = sum(w.numel() for n, w in ours.items() if n.endswith("proj.weight"))
    extra = 14 if modifier is SparseGPTModifier and rule is HALF else 0  # one a block of columns
    assert zeros == weights // 2 + extra


@pytest.mark.parametrize(
    "more",
    [{"offload_hessians": True}, {"preserve_sparsity_mask": True, "mask_structure": "2:4"}],
    ids=["offloaded", "preserved"],
)
def test_options_of_sparsegpt(model, dataset, forbidden, more):
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.data[:, ::4] = 0

    def recipe():
        options = {**HALF, **more}
        return SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **options)

    theirs = pruned(model, dataset, recipe())
    forbidden()
    with own.accelerated():
        ours = pruned(model, dataset, recipe())
    for name, before in model.named_parameters():
        if name.endswith("proj.weight"):
            assert torch.equal(ours[name] == 0, theirs[name] == 0), name
            scale = float(before.detach().abs().max())
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4 * scale)
