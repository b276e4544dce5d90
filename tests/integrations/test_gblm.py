"""What stands for GBLM-Pruner's gradient_computation, against the gradients of a backward pass."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens
from torch import nn

from pyprune import ops
from pyprune.errors import UserError
from pyprune.integrations.gblm import gradient_computation
from pyprune.integrations.wanda import WrappedGPT

SCALE = 100
BATCHES = [tiny_tokens(1, 12, 0), tiny_tokens(1, 9, 1), tiny_tokens(2, 12, 2)]


def small(**overrides):
    """As in the script: in training mode, without biases."""
    return tiny_model("llama", attention_bias=False, mlp_bias=False, **overrides).train()


def linears(model):
    """In the order and with the names of the script."""
    return {
        f"{name}_layer_{i}": layer
        for i, block in enumerate(model.model.layers)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }


def passes(model, batches=BATCHES, **kwargs):
    """The script's loop."""
    grad_up = gradient_computation(model, SCALE, **kwargs)
    for nsample, ids in enumerate(batches, 1):
        model(input_ids=ids, labels=ids).loss.backward()
        grad_up.update_gradient(model, nsample)
        model.zero_grad()
    return grad_up


def gradients(model, batches=BATCHES):
    found = []
    for ids in batches:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: layer.weight.grad * SCALE for name, layer in linears(model).items()})
    return found


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_norms_are_those_of_the_gradients(checkpointing):
    model = small()
    want = gradients(model)
    model.zero_grad()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    found = passes(model)
    assert found.nsample == 3
    assert list(found.gradients_l1) == list(found.gradients_l2) == list(want[0])
    for name in want[0]:
        each = [w[name] for w in want]
        torch.testing.assert_close(found.gradients_l1[name], sum(g.abs() for g in each))
        torch.testing.assert_close(found.gradients_l2[name], sum(g.square() for g in each))
        assert found.gradients_l1[name].dtype == torch.float32


def test_only_what_lies_below_and_between_gets_a_gradient():
    model = small()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    grad_up = gradient_computation(model, SCALE)
    model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    assert all(layer.weight.grad is None for layer in linears(model).values())
    assert model.model.embed_tokens.weight.grad is not None
    grad_up.free()
    asked = {name: layer.weight.requires_grad for name, layer in linears(model).items()}
    assert [name for name, asks in asked.items() if not asks] == ["mlp.up_proj_layer_1"]
    sums = grad_up.gradients_l1["self_attn.q_proj_layer_0"].clone()
    model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    assert torch.equal(grad_up.gradients_l1["self_attn.q_proj_layer_0"], sums)


def test_one_norm_alone():
    both, one = passes(small()), passes(small(), norms=("l2",))
    assert one.gradients_l1 == {}
    for name, want in both.gradients_l2.items():
        assert torch.equal(one.gradients_l2[name], want)
    for norms in ((), ("l3",), "l1"):
        with pytest.raises(UserError, match="norms: expected l1, l2 or both"):
            gradient_computation(small(), SCALE, norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = small()
    want = passes(model)
    model = small().to(dtype)
    found = passes(model)
    for name, sums in want.gradients_l2.items():
        mine = found.gradients_l2[name]
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        error = (mine.float() - sums).norm() / sums.norm()
        assert error < (1e-4 if dtype == torch.float64 else 0.2), name


def test_autocast_computes_as_autograd_does():
    found = []
    for model in (small(), small()):
        grad_up = None if found else gradient_computation(model, SCALE)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=BATCHES[0], labels=BATCHES[0]).loss
        loss.backward()
        found.append(grad_up or linears(model))
    for name, layer in found[1].items():
        want = (layer.weight.grad * SCALE).abs()
        error = (found[0].gradients_l1[name] - want).norm() / want.norm()
        assert error < 0.02, name


def test_passes_that_do_not_fit_are_refused():
    ids = BATCHES[0]
    model = small()
    grad_up = gradient_computation(model, SCALE)
    with pytest.raises(UserError, match="nsample: expected 1, got 2"):
        grad_up.update_gradient(model, 2)
    with pytest.raises(UserError, match=r"q_proj_layer_0: expected one backward pass .* got 0"):
        grad_up.update_gradient(model, 1)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(UserError, match="got 2"):
        grad_up.update_gradient(model, 1)
    frozen = small()
    frozen.model.embed_tokens.requires_grad_(False)
    frozen.model.layers[0].input_layernorm.requires_grad_(False)
    grad_up = gradient_computation(frozen, SCALE)
    frozen(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(UserError, match=r"q_proj_layer_0: .* got 0 .*embeddings ask for no"):
        grad_up.update_gradient(frozen, 1)


def test_a_layer_that_the_loss_does_not_depend_on_is_named():
    model = small()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    grad_up = gradient_computation(model, SCALE)
    model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    with pytest.raises(UserError, match=r"mlp\.gate_proj_layer_1: expected a gradient that is not"):
        grad_up.update_gradient(model, 1)


def test_an_input_that_is_written_to_is_refused():
    model = small()
    gradient_computation(model, SCALE)

    def write(_, args, __):
        args[0].detach().mul_(2)

    model.model.layers[0].mlp.down_proj.register_forward_hook(write)
    with pytest.raises(UserError, match="down_proj_layer_0: expected an input that is not written"):
        model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()


@pytest.mark.parametrize("rule", ["row", "2:4"])
def test_its_score_with_the_two_statistics(rule):
    """As `prune_gblm` uses both: |w| sqrt(scaler_row) + |w| gradient, the lowest of a row gone."""
    model = small()
    grad_up = passes(model)
    layer = model.model.layers[0].mlp.down_proj
    gradient = grad_up.gradients_l2["mlp.down_proj_layer_0"].sqrt()
    wrapped = WrappedGPT(layer)
    handle = layer.register_forward_hook(lambda _, args, out: wrapped.add_batch(args[0].data, out))
    with torch.no_grad():
        for ids in BATCHES:
            model(ids)
    handle.remove()
    w, terms = layer.weight.detach(), {"column_scale": wrapped.scaler_row.sqrt()}
    scores = w.abs() * terms["column_scale"] + w.abs() * gradient
    if rule == "row":
        kept = ops.mask_topk(w, w.shape[1] // 2, **terms, addend=gradient)
        groups = scores
    else:
        kept = ops.mask_nm(w, 2, 4, **terms, addend=gradient)
        groups = scores.reshape(-1, 4)
    cut = groups.sort(dim=1).values[:, groups.shape[1] // 2]
    assert torch.equal(kept.view_as(groups), groups >= cut[:, None])
