"""What a walk refuses, and that a failure leaves no trace."""

import pytest
import torch
from calibration.walks import (
    Batch,
    assert_same,
    batches,
    hook_count,
    run_walk,
    state,
    untouched,
    wanda_half,
)
from greenlet import greenlet
from tiny_models import tiny_model
from torch import nn

from pyprune.calibration.stats import NormStatistic
from pyprune.calibration.walk import InMemoryStore, walk
from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_inputs_name_the_layer(mode, bad):
    model, seen = tiny_model("llama"), []
    model.model.layers[1].post_attention_layernorm.weight.data[3] = bad
    with pytest.raises(LayerError, match=r"^model.layers.1.mlp.gate_proj: .*NaN or infinite"):
        run_walk(model, batches(), lambda g: seen.append(g.linears[0].name), mode=mode)
    assert "model.layers.1.mlp.gate_proj" not in seen and "model.layers.0.mlp.gate_proj" in seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflow_in_fp16_says_what_to_do(dtype):
    model = tiny_model("llama").to(dtype)
    model.model.layers[0].mlp.down_proj.bias.data[3] = 6e4
    model.model.embed_tokens.weight.data[:, 3] = 6e4
    if dtype == torch.bfloat16:
        run_walk(model, batches())
        return
    with pytest.raises(LayerError, match=r"layers.1.self_attn.q_proj: .*overflow\? try --dtype"):
        run_walk(model, batches())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_failure_leaves_no_trace(family, mode, error):
    model, given = tiny_model(family), batches()
    model.train()
    model.model.layers[0].eval() if family == "llama" else None
    want = state(model)
    seen = []

    def fail(group):
        seen.append(group)
        if len(seen) == 3:
            raise error("from prune_group")

    with untouched(model, given), pytest.raises(error, match="from prune_group"):
        run_walk(model, given, fail, mode=mode, spill="disk")
    assert_same(state(model), want)


def test_a_failure_inside_the_forward_leaves_no_trace():
    model, given = tiny_model("llama"), batches()

    def fail(module, args):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.act_fn.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run_walk(model, given)
    hook.remove()
    assert hook_count(model) == 0
    assert torch.is_grad_enabled()


def test_waiting_forwards_are_abandoned(monkeypatch):
    import pyprune.calibration.coroutine as coroutine

    made = []

    def counted(run):
        made.append(greenlet(run))
        return made[-1]

    monkeypatch.setattr(coroutine, "greenlet", counted)
    run_walk(tiny_model("llama"), batches())
    assert len(made) == 3 and all(g.dead for g in made)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "double"}, "mode: expected one of single, two-pass, naive, got 'double'"),
        ({"spill": "tape"}, "spill: expected one of none, host, disk, got 'tape'"),
        ({"spill": "host"}, "spill: host needs a GPU"),
        ({"given": []}, "expected at least one token"),
        ({"given": [Batch(torch.tensor([1, 2]))]}, r"batch 0: expected token ids \[B, T\]"),
        (
            {"given": [Batch(torch.ones(2, 3).long(), torch.ones(2, 2))]},
            r"batch 0: expected an attention mask of shape \(2, 3\), got \(2, 2\)",
        ),
        (
            {"given": [Batch(torch.ones(1, 3).long(), torch.zeros(1, 3))]},
            "expected at least one token",
        ),
    ],
)
def test_bad_arguments(kwargs, message):
    model = tiny_model("llama")
    with pytest.raises(UserError, match=message):
        run_walk(model, kwargs.pop("given", batches()), **kwargs)
    assert hook_count(model) == 0


class Detour(nn.Module):
    """An MLP that leaves out a matrix for short sequences, or runs one twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)
        self.skip = True
        self.stop = self.twice = False

    def forward(self, x):
        short = x.shape[1] < 12
        if self.stop or not (short and self.skip):
            x = self.first(x)
        if self.stop and short:
            return x
        if self.twice:
            x = self.first(x)
        return self.second(self.norm(x))


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
def test_forwards_must_not_depend_on_the_data(mode):
    model = tiny_model("llama")
    model.model.layers[0].mlp = Detour()
    with pytest.raises(UserError, match=r"batch 1 reached .*second where .*first was expected"):
        run_walk(model, batches(), mode=mode)
    model.model.layers[0].mlp.stop = True
    with pytest.raises(UserError, match=r"batch 1 reached .* where .*second was expected"):
        run_walk(model, batches(), mode=mode)
    model.model.layers[0].mlp.stop = False
    model.model.layers[0].mlp.skip = False
    run_walk(model, batches(), mode=mode)
    model.model.layers[0].mlp.twice = True
    with pytest.raises(LayerError, match=r"mlp.first: runs more than once"):
        run_walk(model, batches(), mode=mode)
    model.model.layers[0].mlp.twice = False
    model.model.layers[0].mlp.unused = nn.Linear(32, 32)
    with pytest.raises(LayerError, match=r"mlp.unused: expected to be called .*--exclude"):
        run_walk(model, batches(), mode=mode)
    assert hook_count(model) == 0


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
def test_a_tensor_shared_in_one_batch_only_is_an_error(mode):
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(
        lambda m, args: (args[0].clone(),) if args[0].shape[1] == 11 else None
    )
    with pytest.raises(LayerError, match=r"k_proj: reads another tensor than .*q_proj"):
        run_walk(model, batches(), mode=mode)


def test_a_decoder_that_skips_a_block_is_an_error():
    model = tiny_model("llama")
    decoder = model.model
    adapter = Adapter.of(model)
    run = type(decoder).forward
    decoder.forward = lambda **kwargs: (
        kwargs["input_ids"] if kwargs["input_ids"].shape[1] == 11 else run(decoder, **kwargs)
    )
    with pytest.raises(UserError, match=r"batch 1 reached the end .* model.layers.0 was expected"):
        walk(
            adapter, batches(), statistic=NormStatistic, prune_group=wanda_half,
            store=InMemoryStore(adapter, "cpu"),
        )  # fmt: skip
