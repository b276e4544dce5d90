"""A model that stops being finite is refused, and where it does is said."""

import math

import pytest
import torch
from depth_searches import config, model_of, search, tokens
from tiny_models import tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth import criteria, finite
from pyprune.depth.finite import first_not_finite
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.registry import DEPTH_METHODS
from pyprune.errors import UserError
from pyprune.models import running
from pyprune.width.config import WidthConfig
from pyprune.width.registry import run_width

# With 3 layers: all that look at the text.
RUNS = {
    "blockpruner": {},
    "blockpruner, naive": {"mode": "naive"},
    "blockpruner, fast": {"mode": "fast"},
    "blockpruner, kl": {"objective": "kl"},
    "sleb": {},
    "llm-drop": {},
    "shortgpt": {},
    "angular": {},
    "shortened-llama": {},
    "shortened-llama, taylor": {"criterion": "taylor"},
    "segments": {"tokens": 8},
    "laco": {"fold": 2},
    "llm-streamline": {},
}


def test_every_method_that_looks_at_text_is_here():
    assert {run.partition(",")[0] for run in RUNS} == set(DEPTH_METHODS.load()) - {"reverse"}


@pytest.mark.parametrize("run", RUNS)
def test_the_first_module_is_named(run):
    method = run.partition(",")[0]
    model = model_of("llama", 3)
    model.model.layers[1].self_attn.o_proj.weight.data[2, 3] = math.nan
    after = r"begins after model\.layers\.1\.self_attn, in batch 1 of 2"
    with pytest.raises(UserError, match=after):
        search(model, config(method, count=1, **RUNS[run]))


@pytest.mark.parametrize("method", ["shortgpt", "slicegpt", "disp-llm", "multipruner"])
def test_an_overflow_in_fp16_says_what_to_do(method):
    """Of widths too, which say where it begins as well."""
    model = model_of("llama", 3).half()
    model.model.layers[1].mlp.down_proj.bias.data[3] = 6e4
    model.model.embed_tokens.weight.data[:, 3] = 6e4
    after = r"begins after model\.layers\.1\.mlp, in batch 1 of 2 \(a 16-bit overflow\? try --dtype"
    with pytest.raises(UserError, match=after):
        if method == "shortgpt":
            search(model, config(method, count=1))
        else:
            run_width(model, tokens(), WidthConfig(method, ratio=0.1))


@pytest.mark.parametrize("family", ["gpt2", "phi", "opt"])
def test_modules_by_family_and_the_batch_of_the_first_real_token(family):
    model = model_of(family, 3)
    graph = ResidualGraph.of(model)
    last = graph.adapter.blocks[2].get_submodule(graph.layouts[2].mlp[-1])
    forward, bad = last.forward, torch.zeros(6, 1, dtype=torch.bool)
    last.forward = lambda *args: forward(*args).masked_fill(bad, math.inf)
    whole = [Batch(tiny_tokens(1, 6)), Batch(tiny_tokens(1, 6, seed=1))]
    padded = Batch(tiny_tokens(1, 6), torch.tensor([[1, 1, 1, 1, 1, 0]]))
    assert first_not_finite(graph, [padded, *whole]) is None
    bad[5] = True
    name = f"{graph.adapter.block_names[2]}.{graph.layouts[2].mlp[-1]}"
    assert first_not_finite(graph, [padded]) is None
    assert first_not_finite(graph, [padded, *whole]) == f"after {name}, in batch 2 of 3"


def test_the_head_is_looked_at_a_few_positions_at_a_time(monkeypatch):
    model = model_of("llama", 3)
    graph = ResidualGraph.of(model)
    batch = Batch(tiny_tokens(2, 7), (torch.arange(7) < 6).long().expand(2, 7))
    monkeypatch.setattr(running, "LOGITS_BYTES", 4 * 64 * 2 * 3)  # 3 positions of 2 sequences
    seen, bad = [], torch.zeros(7, dtype=torch.bool)

    def spoilt(_module, _args, logits):
        here = slice(sum(seen), sum(seen) + logits.shape[1])
        seen.append(logits.shape[1])
        return logits.masked_fill(bad[here, None], math.inf)

    model.lm_head.register_forward_hook(spoilt)
    bad[6] = True  # padding
    assert first_not_finite(graph, [batch]) is None and seen == [3, 3, 1]
    bad[5] = True
    seen.clear()
    assert first_not_finite(graph, [batch]) == "after the head, in batch 1 of 1" and seen == [3, 3]


@pytest.mark.parametrize(
    "module, words",
    [("model.embed_tokens", "the embeddings"), ("model.norm", "the final norm"),
     ("lm_head", "the head"), ("model.layers.2.mlp.up_proj", r"model\.layers\.2\.mlp")],
)  # fmt: skip
def test_what_is_not_a_branch_has_a_name_too(module, words):
    model = model_of("llama", 3)
    model.get_submodule(module).weight.data.fill_(math.inf)
    for method in ("blockpruner", "shortened-llama"):
        with pytest.raises(UserError, match=f"begins after {words}, in batch 1"):
            search(model, config(method, count=1))


def test_a_removal_that_overflows_is_not_blamed_on_the_model(monkeypatch):
    losses, calls = criteria.token_losses, []

    def of_layer_1(*args):
        calls.append(args)
        return losses(*args) * (math.inf if len(calls) == 2 else 1.0)

    monkeypatch.setattr(criteria, "token_losses", of_layer_1)
    with pytest.raises(UserError, match=r"loss without layer 1 is NaN or infinite on this text$"):
        search(model_of("llama", 3), config("shortened-llama", count=1))


def test_a_gradient_that_is_no_number_is_named_from_the_end():
    model = model_of("llama", 4)
    model.model.layers[2].mlp.register_full_backward_hook(
        lambda _m, grads, _out: tuple(g * math.inf for g in grads)
    )
    with pytest.raises(UserError, match=r"model\.layers\.2 and of 2 layers before it$"):
        search(model, config("shortened-llama", count=1, criterion="taylor"))


def test_weights_alone_name_their_layer():
    model = model_of("llama", 3)
    model.model.layers[1].self_attn.o_proj.weight.data[2, 3] = math.nan
    with pytest.raises(UserError, match="importance: expected finite numbers, got nan of layer 1"):
        search(model, config("shortened-llama", count=1, criterion="magnitude"))


def test_nothing_is_looked_for_while_all_is_well(monkeypatch):
    monkeypatch.setattr(finite, "first_not_finite", lambda *_: pytest.fail("it looks"))
    search(model_of("llama", 3), config("shortgpt", count=1))
