"""Differences of losses along random directions: against whole forwards, and against gradients."""

import math

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokens
from torch.nn import functional as F
from transformers import AutoModel

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.importance import gradient_sums
from pyprune.calibration.tokens import Batch
from pyprune.calibration.zeroth import Perturbed, directional_differences
from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef


def losses_of(model, ids, mask=None):
    """`[B]`: mean cross entropy of the next tokens of each sequence, by one whole forward."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    found = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return found.view(len(ids), -1).mean(1)


def double(family):
    model = tiny_model(family).double()
    model.config._experts_implementation = "eager"  # the grouped product knows no fp64
    return model


def blocks_of(adapter):
    return [Perturbed(name, i, adapter.linears(i)) for i, name in enumerate(adapter.block_names)]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_whole_forwards_with_the_weights_that_were_written(family, monkeypatch):
    model = double(family)
    adapter = Adapter.of(model)
    groups = blocks_of(adapter)
    dense = {name: p.clone() for name, p in model.state_dict().items()}
    written, write = [], LinearRef.write

    def recording(ref, w):
        written.append((ref, w.clone()))
        write(ref, w)

    monkeypatch.setattr(LinearRef, "write", recording)
    ids, epsilon = tiny_tokens(3, 12), 0.05
    found = directional_differences(adapter, groups, [Batch(ids, None)], epsilon=epsilon)
    monkeypatch.undo()
    for group, difference in zip(groups, found, strict=True):
        several = len(group.linears)
        turns = [written[k * several : (k + 1) * several] for k in range(3)]
        del written[: 3 * several]
        sides = []
        for turn in turns[:2]:
            for ref, w in turn:
                ref.write(w)
            with torch.no_grad():
                sides.append(losses_of(model, ids))
        for ref, w in turns[2]:
            ref.write(w)
        expected = (sides[0] - sides[1]).abs().mean() / (2 * epsilon)
        assert difference == pytest.approx(float(expected), rel=1e-9)
        for (_, up), (_, down), (_, dense_w) in zip(*turns, strict=True):
            torch.testing.assert_close(up - dense_w, dense_w - down, atol=1e-14, rtol=0)
            assert float((up - dense_w).std()) == pytest.approx(epsilon, rel=0.3)
    assert not written
    assert all(torch.equal(p, dense[name]) for name, p in model.state_dict().items())


def gradient_of(model, ref, ids):
    weight = getattr(ref.module, ref.parameter)
    loss = losses_of(model, ids).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    return gradient.T if ref.transposed else gradient


def test_converges_to_the_norm_of_the_gradient():
    model = tiny_model("llama").double()
    adapter, ids = Adapter.of(model), tiny_tokens(1, 12)
    ref = next(r for r in adapter.linears(1) if r.name.endswith("k_proj"))
    group = Perturbed(ref.name, 1, [ref])
    expected = math.sqrt(2 / math.pi) * float(gradient_of(model, ref, ids).norm())
    errors = []
    for noises in (4, 256):
        (found,) = directional_differences(
            adapter, [group], [Batch(ids, None)], epsilon=1e-4, noises=noises
        )
        errors.append(abs(found / expected - 1))
    # One direction is off by 76 % (the relative deviation of |z|), n directions by 76 / sqrt(n).
    assert errors[1] < 3 * 0.76 / math.sqrt(256)
    assert errors[0] < 3 * 0.76 / math.sqrt(4)


def test_error_of_the_difference_is_quadratic_in_the_step(monkeypatch):
    model = double("gpt2")  # its norms compute in fp64 too
    adapter, ids = Adapter.of(model), tiny_tokens(1, 12)
    ref = next(r for r in adapter.linears(0) if r.name.endswith("attn.c_proj"))
    group, gradient = Perturbed(ref.name, 0, [ref]), gradient_of(model, ref, ids)
    dense, write = ref.weight().clone(), LinearRef.write
    errors = []
    for epsilon in (1e-2, 1e-3):
        written = []
        monkeypatch.setattr(
            LinearRef, "write", lambda r, w, to=written: (to.append(w.clone()), write(r, w))
        )
        (found,) = directional_differences(adapter, [group], [Batch(ids, None)], epsilon=epsilon)
        z = (written[0] - dense) / epsilon
        errors.append(abs(found - abs(float((z * gradient).sum()))))
    assert errors[1] < errors[0] / 50


def test_padding_has_no_part():
    model = double("llama")
    adapter = Adapter.of(model)
    ids = tiny_tokens(1, 10)
    plain = directional_differences(adapter, blocks_of(adapter), [Batch(ids, None)])
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=ids.dtype)], 1)
    mask = (torch.arange(15) < 10)[None].long()
    found = directional_differences(adapter, blocks_of(adapter), [Batch(padded, mask)])
    assert found == pytest.approx(plain, rel=1e-6)
    # Before the text neither: padding predicts nothing. Rotary positions are in fp32, hence 1e-4.
    shifted = Batch(padded.roll(5), mask.roll(5))
    found = directional_differences(adapter, blocks_of(adapter), [shifted])
    assert found == pytest.approx(plain, rel=1e-4)


def test_repeats_bit_for_bit_and_depends_on_the_seed():
    adapter = Adapter.of(tiny_model("llama"))
    batches = [Batch(tiny_tokens(2, 12, k), None) for k in range(2)]
    told = []
    first = directional_differences(
        adapter, blocks_of(adapter), batches, progress=lambda *at: told.append(at)
    )
    assert told == [(n, 4) for n in range(1, 5)]
    assert first == directional_differences(adapter, blocks_of(adapter), batches)
    assert first != directional_differences(adapter, blocks_of(adapter), batches, seed=1)


def test_what_has_no_difference():
    model = tiny_model("llama")
    adapter = Adapter.of(model)
    groups, batch = blocks_of(adapter), Batch(tiny_tokens(1, 8), None)
    with pytest.raises(UserError, match=r"expected a model in float32, got torch.bfloat16"):
        half = Adapter.of(tiny_model("llama").bfloat16())
        directional_differences(half, blocks_of(half), [batch])
    with pytest.raises(UserError, match="at least two tokens"):
        directional_differences(adapter, groups, [Batch(tiny_tokens(1, 1), None)])
    with pytest.raises(UserError, match="expected at least one sequence"):
        directional_differences(adapter, groups, [])
    headless = Adapter.of(AutoModel.from_config(model.config))
    with pytest.raises(UserError, match="with its head"):
        directional_differences(headless, blocks_of(headless), [batch])
    dense = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(LayerError, match=r"^model.layers.0: expected finite losses at epsilon"):
        directional_differences(adapter, groups, [batch], epsilon=1e38)
    assert all(torch.equal(p, dense[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="loss of the dense model in batch 0"):
        directional_differences(adapter, groups, [batch])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("power", "weighted"), [(1, False), (1, True), (2, True)])
def test_sums_of_exact_gradients(family, power, weighted):
    model = double(family)
    adapter = Adapter.of(model)
    ids = [tiny_tokens(2, 10, seed) for seed in range(2)]
    tokens = as_token_set(ids, vocabulary=None, positions=None)
    found = gradient_sums(adapter, tokens.batches, power=power, weighted=weighted)
    expected = dict.fromkeys(found, 0.0)
    for sequence in torch.cat(ids):
        model.zero_grad()
        losses_of(model, sequence[None]).sum().backward()
        for i in range(len(adapter.blocks)):
            for ref in adapter.linears(i):
                g = getattr(ref.module, ref.parameter).grad
                g = g if ref.index is None else g[ref.index]
                g = (g.T if ref.transposed else g) * (ref.weight() if weighted else 1)
                expected[ref.name] += float(g.abs().pow(power).sum()) / 4
    assert found == pytest.approx(expected, rel=1e-6)  # Llama's norms are in fp32
