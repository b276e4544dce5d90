"""Layers that call their CPU kernel without PyTorch's dispatch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pyprune import _native, ops
from pyprune.sparse import SparseLinear
from pyprune.sparse.dense import OWN_ROWS, DenseLinear
from pyprune.sparse.direct import is_plain

native = pytest.mark.skipif(_native.MODULE is None, reason=_native.MISSING)


def linear(bias=True, dtype=torch.bfloat16):
    gen = torch.Generator().manual_seed(0)
    made = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=gen))
    made.weight *= ops.mask_nm(made.weight, 2, 4)
    return made.to(dtype)


def tokens(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


class Tagged(torch.Tensor):
    pass


def test_what_something_else_has_a_say_in_is_not_plain(monkeypatch):
    x = tokens(3, 40)
    assert is_plain(x) and is_plain(x.float()) and is_plain(x.T)
    for other in (x.half(), x.double(), x.to("meta"), x.float().requires_grad_()):
        assert not is_plain(other)
    assert not is_plain(x.as_subclass(Tagged))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(x.float())
    seen = []
    torch.func.vmap(lambda row: (seen.append(is_plain(row)), row)[1])(x)
    torch.func.jvp(lambda t: (seen.append(is_plain(t)), t)[1], (x.float(),), (x.float(),))
    torch.jit.trace(lambda t: (seen.append(is_plain(t)), t + 1)[1], x, check_trace=False)
    assert seen == [False, False, False]
    monkeypatch.setenv("PYPRUNE_BACKEND", "native")
    assert not is_plain(x)


def layers(bias):
    return [
        *(SparseLinear.from_dense(linear(bias), form) for form in ("sparse24", "bitmap")),
        *(
            SparseLinear.from_dense(linear(bias), form, int8=True)
            for form in ("sparse24", "bitmap")
        ),
        DenseLinear.of(linear(bias)),
    ]


def dense_of(layer):
    return layer if isinstance(layer, DenseLinear) else layer.to_dense()


def assert_serves(layer, dtype=torch.bfloat16):
    for shape in ((40,), (1, 40), (2, 3, 40), (0, 40)):
        x = tokens(*shape, dtype=dtype)
        dense = dense_of(layer)
        want = nn.functional.linear(
            x.double(),
            dense.weight.double(),
            None if dense.bias is None else dense.bias.double(),
        )
        got = layer(x)
        assert got.dtype == dtype and got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=0.01, atol=0.1)


@native
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", range(5))
def test_prepared_once(kind, bias):
    layer = layers(bias)[kind]
    assert_serves(layer)
    ready = layer._prepared
    assert ready is not None
    assert_serves(layer)
    assert layer._prepared is ready
    x = tokens(40, 5).T
    assert torch.equal(layer(x), layer(x.contiguous()))


@native
@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("change", ["written", "replaced", "moved", "data"])
def test_a_bias_that_changed_is_taken_anew(kind, change):
    layer = layers(True)[kind]
    layer(tokens(1, 40))
    with torch.no_grad():
        if change == "written":
            layer.bias += 3
        elif change == "replaced":
            new = layer.bias + 3
            layer.bias = nn.Parameter(new, False) if isinstance(layer, DenseLinear) else new
        elif change == "moved":
            layer.to(torch.float32).to(torch.bfloat16)
        else:
            layer.bias.data = layer.bias.data + 3
    assert_serves(layer)


@native
@pytest.mark.parametrize("kind", range(5))
def test_weights_that_changed_are_taken_anew(kind):
    layer = layers(True)[kind]
    layer(tokens(1, 40))
    if isinstance(layer, DenseLinear):
        layer.weight.data = 2 * layer.weight.data
    elif layer.int8:
        layer.scales = 2 * layer.scales
    else:
        layer.values = 2 * layer.values
    assert_serves(layer)
    with torch.no_grad():
        (layer.weight if isinstance(layer, DenseLinear) else layer.values).zero_()
    assert torch.equal(layer(tokens(1, 40))[0], layer.bias)


@native
@pytest.mark.parametrize("kind", range(5))
def test_copies_do_not_share_what_was_prepared(kind):
    layer = layers(True)[kind]
    layer(tokens(1, 40))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._prepared is None
        assert torch.equal(other(tokens(2, 40)), layer(tokens(2, 40)))
        assert other._prepared is not layer._prepared


@native
def test_what_asks_for_gradients_is_left_to_pytorch():
    layer = SparseLinear.from_dense(linear(), "sparse24")
    layer.bias.requires_grad_()
    y = layer(tokens(2, 40))
    y.float().sum().backward()
    assert layer.bias.grad.tolist() == [2.0] * 24
    dense = DenseLinear.of(linear()).requires_grad_()
    dense(tokens(2, 40)).float().sum().backward()
    assert dense.weight.grad is not None and dense._prepared is None
    with torch.no_grad():
        assert_serves(dense)
    assert dense._prepared is not None


@native
def test_dense_layers_leave_many_rows_and_other_dtypes_to_pytorch():
    layer = DenseLinear.of(linear())
    x = tokens(OWN_ROWS + 1, 40)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.float()
    assert layer(tokens(2, 40, dtype=torch.float32)).dtype == torch.float32
    assert layer._prepared is None
    with pytest.raises(RuntimeError):
        layer(tokens(2, 39, dtype=torch.float32))


@native
def test_the_binding_refuses_what_does_not_fit():
    values, meta = ops.pack_24(linear().weight)
    parts = [_native.capsule(values), _native.capsule(meta)]
    make = _native.MODULE.PreparedLinear
    with pytest.raises(ValueError, match="name of a product, got linear_25"):
        make("linear_25", parts, None, 24, 40)
    with pytest.raises(ValueError, match="linear_24: expected 2 tensors"):
        make("linear_24", parts[:1], None, 24, 40)
    x, y = tokens(1, 48), torch.empty(1, 24, dtype=torch.bfloat16)
    for rows, cols, words in ((24, 48, "values: unexpected shape"), (23, 40, "y: unexpected")):
        wrong = make("linear_24", parts, None, rows, cols)
        with pytest.raises(ValueError, match=words):
            wrong.multiply(y.data_ptr(), x.data_ptr(), 1, True, 1)
    with pytest.raises(ValueError, match="threads"):
        make("linear_24", parts, None, 24, 40).multiply(y.data_ptr(), x.data_ptr(), 1, True, 0)
