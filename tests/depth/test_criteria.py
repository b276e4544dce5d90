"""Importance of whole layers, and segments of them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model, tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth.criteria import (
    magnitude,
    removal_losses,
    removal_order,
    reverse,
    run_layer,
    taylor,
)
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.save import drop_layers
from pyprune.depth.segments import fisher_partition, group_count, linear_cka, segment_order
from pyprune.errors import UserError


def loss_of(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_removal_losses_equal_real_removal(family):
    layers = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    if family == "gemma2":
        layers["layer_types"] = ["sliding_attention", "full_attention"] * 2
    ids = tiny_tokens(3, 12)
    graph = ResidualGraph.of(tiny_model(family, **layers))
    got = removal_losses(graph, [Batch(ids[:1]), Batch(ids[1:])])
    for i in range(4):
        model = tiny_model(family, **layers)
        drop_layers(model, [j for j in range(4) if j != i])
        with torch.no_grad():
            torch.testing.assert_close(float(got[i]), float(loss_of(model, ids)), rtol=1e-5, atol=0)


def test_removal_losses_ignore_padding():
    graph, ids = ResidualGraph.of(tiny_model("llama")), tiny_tokens(2, 9)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], 1)
    mask = (torch.arange(12) < 9).long().expand(2, 12)
    torch.testing.assert_close(
        removal_losses(graph, [Batch(padded, mask)]),
        removal_losses(graph, [Batch(ids)]),
        rtol=1e-5,
        atol=0.0,
    )


def test_taylor_is_weight_times_gradient_and_leaves_no_trace():
    model, ids = tiny_model("llama", num_hidden_layers=3), tiny_tokens(2, 10)
    graph = ResidualGraph.of(model)
    got = taylor(graph, [Batch(ids)])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    loss_of(model, ids).backward()
    for i, block in enumerate(model.model.layers):
        expected = sum(float((p * p.grad).detach().abs().sum()) for p in block.parameters())
        assert math.isclose(float(got[i]), expected, rel_tol=1e-4)
    expected = [
        sum(float(p.detach().abs().sum()) for p in b.parameters()) for b in model.model.layers
    ]
    assert torch.allclose(magnitude(graph), torch.tensor(expected).double(), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-4, 1.0, 64.0])
def test_taylor_in_fp16_is_that_in_fp32(factor):
    """With small gradients, which unscaled ones of a mean would be zero, and with large ones,
    which do not bear the first scale."""
    model, ids = tiny_model("llama", num_hidden_layers=3).half(), tiny_tokens(4, 32)
    with torch.no_grad():
        model.lm_head.weight *= factor
    got = taylor(ResidualGraph.of(model), [Batch(ids)])
    expected = taylor(ResidualGraph.of(model.float()), [Batch(ids)])
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=0)


def test_taylor_in_bf16_sums_in_more_bits():
    """The 300th of equal gradients would be lost in a bf16 sum of 256."""
    graph = ResidualGraph.of(tiny_model("llama").bfloat16())
    batch = Batch(tiny_tokens(1, 4))
    got, once = taylor(graph, [batch] * 300), taylor(graph, [batch])
    torch.testing.assert_close(got, 300 * once, rtol=1e-4, atol=0)


def test_signed_taylor_identity():
    """sum(w * dL/dw) of a linear map equals sum over tokens of g . (y - b): the gradients that
    `taylor` sums belong to the loss that the model has."""
    model, ids = tiny_model("llama"), tiny_tokens(2, 8)
    graph = ResidualGraph.of(model)
    linear = model.model.layers[0].mlp.down_proj
    outputs = []
    handle = linear.register_forward_hook(lambda _m, _a, o: (o.retain_grad(), outputs.append(o))[0])
    state, context = graph.start(Batch(ids))
    for i in range(2):
        state = run_layer(graph, i, state, context)
    output = graph.logits(graph.finish(state.total, Batch(ids)), ids)
    F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    handle.remove()
    signed = (linear.weight * linear.weight.grad).sum()
    # The graph may run a layer's parts more than once, switched off: only what counted has a grad.
    dots = sum((o.grad * (o - linear.bias)).sum() for o in outputs if o.grad is not None)
    torch.testing.assert_close(signed, dots, rtol=1e-4, atol=1e-6)


def test_orders():
    importance = torch.tensor([5.0, 1, 1, 9, 0, 3, 2, 4])
    assert removal_order(importance) == [4, 1, 2, 6, 5, 7, 0, 3]
    plus = removal_order(importance, plus=True)
    assert plus == [4, 5, 1, 2, 6, 7, 0, 3] and set(plus[-6:]) == {0, 1, 2, 3, 6, 7}
    assert removal_order(reverse(5)) == [4, 3, 2, 1, 0]
    with pytest.raises(UserError, match="finite"):
        removal_order(torch.tensor([1.0, float("nan")]))


def test_cka_properties():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=gen, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(6, 6, generator=gen, dtype=torch.float64))[0]
    y = torch.randn(40, 6, generator=gen, dtype=torch.float64)
    cka = linear_cka(torch.stack([x, x @ q * 3, y]))
    assert math.isclose(float(cka[0, 1]), 1.0, rel_tol=1e-9)
    assert abs(float(cka[0, 2])) < 0.3 and torch.equal(cka, cka.T)
    # Against the formula written out.
    k, m = x @ x.T, y @ y.T
    for gram in (k, m):
        gram.fill_diagonal_(0)

    def hsic(a, b):
        n = len(a)
        one = torch.ones(n, dtype=a.dtype)
        return (
            torch.trace(a @ b)
            + (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ a @ b @ one)
        ) / (n * (n - 3))

    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    torch.testing.assert_close(cka[0, 2], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_partition_is_the_optimum(seed):
    values = torch.randn(9, generator=torch.Generator().manual_seed(seed)).double()
    for groups in range(1, 10):
        starts, losses = fisher_partition(values, groups)
        assert len(starts) == groups and starts[0] == 0 and starts == sorted(set(starts))

        def cost(cuts):
            edges = [0, *cuts, 9]
            return sum(
                float(((values[a:b] - values[a:b].mean()) ** 2).sum())
                for a, b in itertools.pairwise(edges)
            )

        best = min(cost(c) for c in itertools.combinations(range(1, 9), groups - 1))
        assert math.isclose(losses[-1], best, abs_tol=1e-9)
        assert math.isclose(cost(starts[1:]), best, abs_tol=1e-9)
    assert abs(losses[-1]) < 1e-12


def test_groups_and_order_within_segments():
    assert group_count([10.0, 5.0, 4.9, 1.0, 0.99]) == 4
    assert group_count([0.0, 0.0]) == 1
    order = segment_order(torch.tensor([3.0, 1, 2, 9, 8, 7]), [0, 3, 5])
    assert sorted(order) == list(range(6))
    assert order[:3] == [1, 4, 2]  # one of each segment with more than one, then the fuller
    assert sorted(order[3:]) == [0, 3, 5]
    # Of equally full segments the one whose layer matters least, wherever it stands.
    assert segment_order(torch.tensor([5.0, 4, 1, 2]), [0, 2]) == [2, 1, 3, 0]
    assert segment_order(torch.tensor([9.0, 1, 5]), [0, 1, 2]) == [1, 2, 0]
    assert segment_order(torch.ones(4), [0, 2]) == [0, 2, 1, 3]
