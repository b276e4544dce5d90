"""What stands for the classes of the SparseGPT and Wanda repositories, against their algorithms."""

import logging

import pytest
import torch
from bench_obs import algorithm
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyprune.errors import UserError
from pyprune.integrations.sparsegpt import SparseGPT
from pyprune.integrations.wanda import WrappedGPT


def layer_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(48, 20, dtype=dtype), (3, 30, 48)
    if kind == "conv1d":
        return Conv1D(20, 48).to(dtype), (3, 30, 48)
    return nn.Conv2d(3, 20, 4, stride=2, padding=1, dtype=dtype), (3, 3, 16, 16)


def seen(layer, x):
    """`[R, C]`, and the inputs of the layer `[T, C]`, so that y = x @ W^T."""
    if isinstance(layer, nn.Conv2d):
        patches = nn.functional.unfold(x, 4, padding=1, stride=2)
        return layer.weight.detach().flatten(1), patches.transpose(1, 2).flatten(0, 1)
    w = layer.weight.detach()
    return w.T if isinstance(layer, Conv1D) else w, x.flatten(0, -2)


def own(layer, w):
    return (w.T if isinstance(layer, Conv1D) else w).reshape(layer.weight.shape)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("rule", [{"nm": (2, 4)}, {"nm": (1, 4)}, {"sparsity": 0.5}], ids=str)
def test_sparsegpt_does_what_the_repository_does(kind, rule):
    layer, shape = layer_of(kind)
    gpt = SparseGPT(layer)
    batches = [torch.randn(shape), torch.randn(2, *shape[1:])]
    for x in batches:
        gpt.add_batch(x, layer(x))
    w, rows = seen(layer, torch.cat(batches))
    hessian = rows.double().T @ rows.double() * 2 / 5
    assert gpt.nsamples == 5 and (gpt.rows, gpt.columns) == (20, 48)
    torch.testing.assert_close(gpt.H, hessian.float(), rtol=1e-5, atol=1e-4)
    want, kept = algorithm(w.double(), hessian, rule)
    n, m = rule.get("nm", (0, 0))
    loss = gpt.fasterprune(rule.get("sparsity", 0.0), prunen=m - n, prunem=m)
    torch.testing.assert_close(layer.weight.detach(), own(layer, want).float(), rtol=0, atol=1e-4)
    assert torch.equal(layer.weight != 0, own(layer, kept)) and layer.weight.is_contiguous()
    change = want - w
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    assert loss == pytest.approx(float((change @ hessian * change).sum()) / 2, rel=1e-3)
    gpt.free()
    with pytest.raises(UserError, match="free"):
        gpt.add_batch(batches[0])


def test_sparsegpt_keeps_the_dtype_and_zeroes_what_is_dead():
    layer, shape = layer_of("linear", torch.bfloat16)
    gpt = SparseGPT(layer)
    x = torch.randn(shape).bfloat16()
    x[..., 7] = 0
    gpt.add_batch(x[0])
    assert gpt.nsamples == 1
    gpt.fasterprune(0.25)
    assert layer.weight.dtype == torch.bfloat16 and isinstance(layer.weight, nn.Parameter)
    assert not layer.weight[:, 7].any()
    # The threshold rule: one more than a quarter, at least.
    assert int((layer.weight == 0).sum()) >= 20 * 48 // 4 + 1


def test_sparsegpt_raises_the_damping_aloud(caplog):
    layer, shape = layer_of("linear")
    gpt = SparseGPT(layer)
    gpt.add_batch(torch.randn(shape))
    gpt.H -= 0.05 * gpt.H.diagonal().mean() * torch.eye(48) + 0.2 * torch.diag(gpt.H.diagonal())
    with caplog.at_level(logging.WARNING):
        gpt.fasterprune(0.5)
    assert "damping" in caplog.text
    gpt.H[0, 0] = -1e6
    with pytest.raises(ValueError, match="not positive definite"):
        gpt.fasterprune(0.5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="expected Linear"):
        SparseGPT(nn.Embedding(3, 4))
    with pytest.raises(UserError, match="one group"):
        WrappedGPT(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(UserError, match="got one on the meta device: accelerate has offloaded it"):
        SparseGPT(nn.Linear(3, 4, device="meta"))
    with pytest.raises(UserError, match="got ReLU"):
        SparseGPT(nn.ReLU())
    with pytest.raises(UserError, match="padding"):
        WrappedGPT(nn.Conv2d(4, 4, 3, padding="same"))
    with pytest.raises(UserError, match="padded with zeros, got circular"):
        WrappedGPT(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    layer, shape = layer_of("linear")
    gpt = SparseGPT(layer)
    gpt.add_batch(torch.randn(shape))
    with pytest.raises(ValueError, match="got prunen 3 and prunem 7"):
        gpt.fasterprune(0.0, prunen=3, prunem=7)
    with pytest.raises(UserError, match="got both"):
        gpt.fasterprune(0.0, 2, 4, prune_n=2)


def test_nothing_seen_is_not_a_reason_to_zero_a_layer():
    """An expert that no token was routed to, say."""
    layer, shape = layer_of("linear")
    before = layer.weight.detach().clone()
    gpt = SparseGPT(layer)
    for x in (None, torch.zeros(0, 30, 48), torch.zeros(2, 0, 48), torch.zeros(shape)):
        if x is not None:
            gpt.add_batch(x)
        with pytest.raises(UserError, match="inputs: expected some that are not zero"):
            gpt.fasterprune(0.5)
    assert torch.equal(layer.weight, before)


def test_one_token_and_none():
    layer, _ = layer_of("linear")
    gpt, wrapped = SparseGPT(layer), WrappedGPT(layer)
    x = torch.randn(48)
    for into in (gpt, wrapped):
        into.add_batch(x)
        into.add_batch(torch.zeros(0, 30, 48))
        assert into.nsamples == 1
    torch.testing.assert_close(gpt.H, 2 * torch.outer(x, x))
    torch.testing.assert_close(wrapped.scaler_row, x.square())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_wanda_statistic(kind):
    layer, shape = layer_of(kind)
    wrapped = WrappedGPT(layer, 3, "fc")
    batches = [torch.randn(shape), torch.randn(1, *shape[1:])]
    for x in batches:
        wrapped.add_batch(x, None)
    _, rows = seen(layer, torch.cat(batches))
    assert wrapped.nsamples == 4 and wrapped.layer_name == "fc"
    torch.testing.assert_close(wrapped.scaler_row, rows.square().sum(0) / 4)


def test_layers_and_inputs_in_fp64():
    """The repositories take them: sums are fp32 there, as here."""
    layer, shape = layer_of("linear", torch.float64)
    single, _ = layer_of("linear")
    layer.weight.data = single.weight.detach().double()
    x = torch.randn(shape, dtype=torch.float64)
    found = []
    for module, inputs in ((layer, x), (single, x.float())):
        wanda, gpt = WrappedGPT(module), SparseGPT(module)
        wanda.add_batch(inputs)
        gpt.add_batch(inputs)
        assert gpt.H.dtype == wanda.scaler_row.dtype == torch.float32
        found.append((gpt.fasterprune(0.5), wanda.scaler_row))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight.float(), single.weight)


@pytest.mark.parametrize(("n", "m"), [(2, 0), (4, 4), (5, 4), (2, 5), (-1, 4)])
def test_patterns_that_do_not_fit_are_called_by_their_names(n, m):
    layer, shape = layer_of("linear")
    gpt = SparseGPT(layer)
    gpt.add_batch(torch.randn(shape))
    with pytest.raises(UserError, match=f"48 columns, got prunen {n} and prunem {m}$"):
        gpt.fasterprune(0, prunen=n, prunem=m)


def test_a_layer_pruned_in_inference_mode_can_be_trained():
    layer, shape = layer_of("linear")
    other, _ = layer_of("linear")
    x = torch.randn(shape)
    with torch.inference_mode():
        gpt = SparseGPT(layer)
        gpt.add_batch(x)
        gpt.fasterprune(0.5)
    gpt = SparseGPT(other)
    gpt.add_batch(x)
    gpt.fasterprune(0.5)
    assert torch.equal(layer.weight, other.weight)
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("kind", [SparseGPT, WrappedGPT])
def test_weights_that_are_computed_are_refused(kind):
    layer, _ = layer_of("linear")
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(UserError, match="expected a weight that is a parameter, got one that is"):
        kind(layer)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (0, 0)])
def test_sparsegpt_as_wanda_and_gblm_call_it(n, m):
    layer, shape = layer_of("linear")
    other, _ = layer_of("linear")
    x = torch.randn(shape)
    for module, names in (
        (layer, {"prune_n": n, "prune_m": m}),
        (other, {"prunen": n, "prunem": m}),
    ):
        gpt = SparseGPT(module)
        gpt.add_batch(x)
        gpt.fasterprune(0.5, **names, percdamp=0.01, blocksize=128)
    assert torch.equal(layer.weight, other.weight)
    assert int((layer.weight == 0).sum()) == 480 + (n == 0)  # the threshold rule: one more


class Grid:
    """What SparseGPT's Quantizer is to the class: scale * (q - zero) for q from 0 to maxq."""

    def __init__(self, bits, symmetric=False):
        self.maxq, self.symmetric = torch.tensor(2**bits - 1), symmetric
        self.scale = self.zero = torch.zeros(1)

    def ready(self):
        return torch.all(self.scale != 0)

    def find_params(self, w, weight=False):
        assert weight
        least, most = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
        if self.symmetric:
            most = torch.maximum(-least, most)
            least = -most
        self.scale = (most - least) / self.maxq
        middle = torch.full_like(self.scale, (self.maxq + 1) / 2)
        self.zero = middle if self.symmetric else torch.round(-least / self.scale)

    def round(self, w):
        q = torch.clamp(torch.round(w / self.scale[:, 0]) + self.zero[:, 0], 0, self.maxq)
        return self.scale[:, 0] * (q - self.zero[:, 0])


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_sparsegpt_rounds_to_its_quantizer(kind, symmetric):
    layer, shape = layer_of(kind)
    gpt = SparseGPT(layer)
    gpt.quantizer = Grid(3, symmetric)
    x = torch.randn(shape)
    x[..., 7] = 0  # dead: the grid is of the weights as they were
    gpt.add_batch(x)
    w, _ = seen(layer, x)
    w, hessian = w.double(), gpt.H.double()
    grid = Grid(3, symmetric)
    grid.find_params(w.float(), weight=True)
    hessian[7, 7] = 1
    w[:, 7] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    u = torch.linalg.cholesky(inverse, upper=True)
    want = torch.zeros_like(w)
    for j in range(48):
        if j % 4 == 0:
            scores = w[:, j : j + 4] ** 2 / u.diagonal()[j : j + 4] ** 2
            pruned = torch.zeros(20, 4, dtype=torch.bool)
            pruned.scatter_(1, scores.topk(2, dim=1, largest=False).indices, True)
        want[:, j] = grid.round(w[:, j].masked_fill(pruned[:, j % 4], 0).float())
        w[:, j:] -= ((w[:, j] - want[:, j]) / u[j, j])[:, None] * u[j, j:]
    gpt.fasterprune(0.0, prunen=2, prunem=4)
    assert gpt.quantizer.ready()
    assert torch.equal(layer.weight.detach(), own(layer, want).float())


def test_sparsegpt_keeps_a_quantizer_that_is_ready():
    layer, shape = layer_of("linear")
    gpt = SparseGPT(layer)
    gpt.quantizer = Grid(4)
    gpt.quantizer.find_params(2 * layer.weight.detach(), weight=True)
    scale = gpt.quantizer.scale.clone()
    gpt.add_batch(torch.randn(shape))
    gpt.fasterprune(0.5)
    assert torch.equal(gpt.quantizer.scale, scale)
    steps = layer.weight.detach() / scale
    torch.testing.assert_close(steps, steps.round())


def test_quantizers_that_do_not_fit_are_refused():
    layer, shape = layer_of("linear")
    before = layer.weight.detach().clone()
    gpt = SparseGPT(layer)
    gpt.add_batch(torch.randn(shape))
    gpt.quantizer = object()
    with pytest.raises(UserError, match="got object without ready and find_params"):
        gpt.fasterprune(0.5)
    for change, message in (
        ({"zero": torch.full((20, 1), 2.5)}, "zero on the grid"),
        ({"zero": torch.full((20, 1), 9.0)}, "zero on the grid"),
        ({"scale": torch.full((20, 1), -1.0)}, "scales above 0"),
        ({"scale": torch.full((20, 1), float("nan"))}, "scales above 0"),
        ({"scale": torch.ones(20, 3)}, "each of 20 rows and one maxq, got 60, 20 and 1"),
    ):
        gpt.quantizer = Grid(3)
        gpt.quantizer.find_params(before, weight=True)
        vars(gpt.quantizer).update(change)
        with pytest.raises(UserError, match=message):
            gpt.fasterprune(0.5)
    assert torch.equal(layer.weight, before)
