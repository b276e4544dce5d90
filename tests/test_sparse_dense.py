"""Layers that a compressed model leaves dense: our kernel for few rows of bf16, else PyTorch's."""

import pytest
import torch
from sparse_checkpoints import pruned_checkpoint
from tiny_models import tiny_tokens
from torch import nn
from torch.nn import functional as F

import pyprune
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.dense import OWN_ROWS, DenseLinear, use_own_kernels
from pyprune.sparse.direct import Prepared


def layer(bias=True, dtype=torch.bfloat16):
    linear = nn.Linear(72, 50, bias, dtype=dtype).requires_grad_(False)
    return linear, DenseLinear.of(linear)


@pytest.fixture
def native_calls(monkeypatch):
    calls = []
    own = Prepared.product

    def product(ready, x):
        calls.append(ready.op)
        return own(ready, x)

    monkeypatch.setattr(Prepared, "product", product)
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(72,), (1, 72), (3, 5, 72), (OWN_ROWS, 72)])
def test_few_rows_of_bf16_are_ours(bias, shape, native_calls):
    linear, own = layer(bias)
    x = torch.randn(shape).bfloat16()
    got = own(x)
    assert native_calls == ["linear_dense"] and got.dtype == torch.bfloat16
    want = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-8)
    strided = torch.randn(72, 4).bfloat16().T
    assert torch.equal(own(strided), own(strided.contiguous()))


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.bfloat16, OWN_ROWS + 1), (torch.bfloat16, 0), (torch.float32, 1)]
)
def test_everything_else_is_pytorchs(dtype, rows, native_calls):
    linear, own = layer(dtype=dtype)
    x = torch.randn(rows, 72).to(dtype)
    assert torch.equal(own(x), linear(x)) and native_calls == []


def test_pytorch_is_not_given_rows_that_lie_apart(monkeypatch):
    """A head sees the last position of many sequences: in bf16 PyTorch takes 150 times as long."""
    linear, own = layer()
    x = torch.randn(OWN_ROWS + 1, 3, 72).bfloat16()[:, -1:]
    want, given, product = linear(x.contiguous()), [], F.linear

    def spy(x, *rest):
        given.append(x.is_contiguous())
        return product(x, *rest)

    monkeypatch.setattr(F, "linear", spy)
    assert torch.equal(own(x), want) and given == [True]


def test_gradients_flow(native_calls):
    linear, own = layer()
    x = torch.randn(2, 72).bfloat16().requires_grad_()
    own(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(2, 72), rtol=0.02, atol=0.02)
    assert native_calls == []


def test_a_forced_backend_is_obeyed(native_calls, monkeypatch):
    monkeypatch.setenv("PYPRUNE_BACKEND", "reference")
    _, own = layer()
    own(torch.randn(1, 72).bfloat16())
    assert native_calls == []


def test_parameters_are_shared_and_come_back():
    linear, own = layer()
    plain = own.plain()
    assert type(plain) is nn.Linear and own.weight is linear.weight is plain.weight
    assert own.bias is linear.bias is plain.bias and own.state_dict().keys() == {"weight", "bias"}
    holder = nn.ModuleDict({"a": linear, "b": nn.ModuleDict({"c": nn.Linear(4, 4)})})
    use_own_kernels(holder)
    assert type(holder["a"]) is type(holder["b"]["c"]) is DenseLinear


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_heads_of_compressed_models_use_it(family, tmp_path, native_calls):
    """qwen2's is tied to the embedding."""
    compress_checkpoint(pruned_checkpoint(tmp_path / "dense", family), tmp_path / "small")
    model = pyprune.load(tmp_path / "small")
    head = model.get_output_embeddings()
    assert type(head) is DenseLinear
    assert (head.weight is model.get_input_embeddings().weight) == (family == "qwen2")
    native_calls.clear()
    with torch.no_grad():
        model(tiny_tokens(1, 4))
    assert native_calls[-1] == "linear_dense"
    assert type(pyprune.load(tmp_path / "dense").get_output_embeddings()) is nn.Linear
