"""Layers that call their CPU kernel without PyTorch's dispatch."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

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
    assert is_plain(x) and is_plain(x.float()) and is_plain(x.half()) and is_plain(x.T)
    for other in (x.double(), x.to("meta"), x.float().requires_grad_()):
        assert not is_plain(other)
    assert not is_plain(x.as_subclass(Tagged))
    functional = torch._to_functional_tensor(x)
    for other in (torch._neg_view(x), torch._efficientzerotensor(3, 40), functional):
        assert not is_plain(other)  # the memory does not hold the numbers
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(x.float())
    seen = []
    torch.func.vmap(lambda row: (seen.append(is_plain(row)), row)[1])(x)
    torch.func.jvp(lambda t: (seen.append(is_plain(t)), t)[1], (x.float(),), (x.float(),))
    torch.vmap(lambda _: (seen.append(is_plain(x)), _)[1])(x)  # a weight of it may be x's
    torch.jit.trace(lambda t: (seen.append(is_plain(t)), t + 1)[1], x, check_trace=False)
    make_fx(lambda t: (seen.append(is_plain(t)), t + 1)[1])(x)
    assert seen == [False] * 5
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
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("form", ["sparse24", "bitmap"])
def test_fp16_layers_are_prepared_too(form, int8, bias):
    layer = SparseLinear.from_dense(linear(bias, torch.float16), form, int8)
    assert_serves(layer, torch.float16)
    ready = layer._prepared
    assert ready is not None
    assert_serves(layer, torch.float32)
    assert_serves(layer, torch.bfloat16)
    assert layer._prepared is ready
    x = tokens(40, 5, dtype=torch.float16).T
    product = getattr(ops, ready.op)  # the operator: the same kernel, reached otherwise
    assert torch.equal(layer(x), product(x, *layer._weight, bias=layer.bias))


@native
def test_every_fp16_bias_is_widened_exactly():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    layer = SparseLinear.from_dense(nn.Linear(8, 2**16, dtype=torch.float16), "bitmap")
    layer.load_state_dict(
        {
            "values": torch.empty(0, dtype=torch.float16),
            "bitmap": torch.zeros(2**16, 1, dtype=torch.uint8),
            "row_offsets": torch.zeros(2**16 + 1, dtype=torch.int64),
            "bias": every,
        }
    )
    got = layer(torch.ones(1, 8))[0]
    assert layer._prepared is not None
    numbers = every.isfinite() | every.isinf()
    assert torch.equal(got[numbers], every.float()[numbers]) and got[~numbers].isnan().all()


@native
def test_bytes_are_prepared_like_numbers():
    layer = SparseLinear.from_dense(linear(True), "coded")
    assert_serves(layer)
    ready = layer._prepared
    assert ready is not None and ready.op == "linear_coded"
    assert_serves(layer, torch.float32)
    assert layer._prepared is ready
    layer.low = layer.low ^ 1  # every sign
    assert_serves(layer)
    assert layer._prepared is not ready


@native
@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize(
    "change", ["written", "replaced", "moved", "data", "written in data", "added to data"]
)
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
            layer.to(torch.float32).bias.add_(3)
            layer.to(torch.bfloat16)
        elif change == "data":
            layer.bias.data = layer.bias.data + 3
        elif change == "written in data":  # a tensor with a version counter of its own
            layer.bias.data.fill_(3)
        else:
            layer.bias.data += 3
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
        assert_serves(layer)
        layer.scales.mul_(2)
        assert_serves(layer)
        layer.scales.data = layer.scales / 2
        assert_serves(layer)
        layer.scales.data.mul_(2)
    else:
        layer.values = 2 * layer.values
        assert_serves(layer)
        layer.values.data = layer.values / 2
    assert_serves(layer)
    with torch.no_grad():
        (layer.weight if isinstance(layer, DenseLinear) else layer.values).zero_()
    assert torch.equal(layer(tokens(1, 40))[0], layer.bias)


@native
def test_other_layouts_at_the_same_address_are_taken_anew():
    square = nn.Linear(40, 40).requires_grad_(False).bfloat16()
    x = tokens(2, 40)
    layer = DenseLinear.of(square)
    layer(x)
    layer.weight.data = layer.weight.data.T
    assert_serves(layer)
    layer.weight = nn.Parameter(layer.weight.T[:24], False)
    layer.bias.data = layer.bias.data[:24]
    layer.out_features = 24
    assert_serves(layer)
    layer = SparseLinear.from_dense(linear(), "sparse24")
    layer(x)
    layer.values = layer.values.view(torch.float16)
    assert_serves(layer)
    layer = SparseLinear.from_dense(linear(), "sparse24")
    layer(x)
    layer.values, layer.metadata = layer.values[:16], layer.metadata[:16]
    layer.bias, layer.out_features = layer.bias[:16], 16
    assert_serves(layer)


@native
@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_of_another_dtype(kind, dtype):
    layer = layers(True)[kind]
    bias = layer.bias.to(dtype)
    layer.bias = nn.Parameter(bias, False) if isinstance(layer, DenseLinear) else bias
    if isinstance(layer, DenseLinear):
        with pytest.raises(RuntimeError, match="same dtype"):  # as with nn.Linear
            layer(tokens(2, 40))
    else:
        assert_serves(layer)


@native
def test_tensors_that_are_not_contiguous_go_another_way():
    for layer in layers(True):
        bias = torch.stack([layer.bias, layer.bias], 1)[:, 0]
        layer.bias = nn.Parameter(bias, False) if isinstance(layer, DenseLinear) else bias
        assert_serves(layer)
        assert layer._prepared is None
    layer = layers(True)[2]
    layer.values = layer.values.T.contiguous().T
    assert_serves(layer)


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
@pytest.mark.parametrize("kind", range(5))
def test_nothing_is_held_that_a_layer_has_no_more(kind):
    layer = layers(True)[kind]
    layer(tokens(1, 40))
    held = StorageWeakRef(next(iter(layer.state_dict().values())).untyped_storage())
    assert not held.expired()
    layer.to("meta")
    assert held.expired()


@contextmanager
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@native
@pytest.mark.parametrize("kind", range(5))
def test_parameters_that_are_swapped(kind):
    layer = layers(True)[kind]
    layer(tokens(1, 40))
    other = copy.deepcopy(layer)
    other.bias.add_(3)
    with swapping():
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(tokens(2, 40)), other(tokens(2, 40)))
        layer.to(torch.float32).to(torch.bfloat16)
    assert_serves(layer)


@native
@pytest.mark.parametrize("kind", range(5))
def test_inference_tensors_that_are_loaded(kind):
    with torch.inference_mode():
        layer = layers(True)[kind]
        other = copy.deepcopy(layer)
        other.bias.add_(3)
        layer(tokens(1, 40))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(tokens(2, 40)), other(tokens(2, 40)))


@native
@pytest.mark.parametrize("kind", range(5))
def test_inference_tensors_that_are_written_to(kind):
    with torch.inference_mode():
        layer = layers(True)[kind]
        layer(tokens(1, 40))
        layer.bias.add_(3)
        if kind in (2, 3):
            layer.scales.mul_(2)
        assert_serves(layer)


@native
def test_a_head_sees_what_is_loaded_into_the_weight_it_is_tied_to():
    owner = SparseLinear.from_dense(linear(False), "sparse24", int8=True)
    head = SparseLinear(40, 24, "sparse24", int8=True, bias=False, tied_to=owner)
    head(tokens(1, 40))
    other = copy.deepcopy(owner)
    other.scales.mul_(2)
    owner.load_state_dict(other.state_dict())
    assert torch.equal(head(tokens(2, 40)), other(tokens(2, 40)))


@native
@pytest.mark.parametrize("kind", range(5))
def test_results_are_where_the_layer_is(kind):
    layer = layers(True)[kind]
    x = tokens(2, 40)
    want = layer(x)
    with torch.device("meta"):
        assert torch.equal(layer(x), want)


@native
@pytest.mark.parametrize("kind", range(5))
def test_traces_hold_the_product(kind):
    layer = layers(True)[kind]
    trace = make_fx(layer)(tokens(2, 40))
    x = tokens(3, 40)[1:] * 2
    torch.testing.assert_close(trace(x), layer(x), rtol=0.01, atol=0.1)


@native
def test_weights_that_are_computed_or_batched_are_left_to_pytorch():
    class Twice(nn.Module):
        def forward(self, t):
            return 2 * t

    x = tokens(2, 40)
    for name in ("weight", "bias"):
        layer = DenseLinear.of(linear())
        layer(x)
        nn.utils.parametrize.register_parametrization(layer, name, Twice())
        assert_serves(layer)
    layer = DenseLinear.of(linear())
    weights = torch.stack([layer.weight, 2 * layer.weight])
    call = torch.vmap(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)))
    for got, weight in zip(call(weights), weights, strict=True):
        want = nn.functional.linear(x, weight, layer.bias)
        torch.testing.assert_close(got, want, rtol=0.01, atol=0.1)
    layer(x)
    layer.weight = nn.Parameter(layer.weight.as_subclass(Tagged), False)
    assert type(layer(x)) is Tagged


@native
def test_a_bias_elsewhere_is_an_error():
    for layer in layers(True):
        layer(tokens(1, 40))
        bias = layer.bias.to("meta")
        layer.bias = nn.Parameter(bias, False) if isinstance(layer, DenseLinear) else bias
        with pytest.raises((RuntimeError, ValueError), match=r"meta|device"):
            layer(tokens(1, 40))


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
@pytest.mark.parametrize("format", ["bitmap", "coded"])
def test_products_while_an_equal_weight_is_loaded(monkeypatch, format):
    layer = SparseLinear.from_dense(linear(), format)
    x, load, during = tokens(2, 40), nn.Module._load_from_state_dict, []

    def other_thread_first(module, *args):
        during.append(layer(x))
        load(module, *args)

    want = layer(x)
    monkeypatch.setattr(nn.Module, "_load_from_state_dict", other_thread_first)
    for assign in (False, True):
        layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    assert len(during) == 2 and all(torch.equal(y, want) for y in [*during, layer(x)])


@native
@pytest.mark.parametrize("kind", range(5))
def test_threads_share_a_layer(kind):
    """The first products of all, and those while what the layer holds is replaced by its equal."""
    rows = (1, 3, 12, 16)
    xs = [tokens(n, 40) for n in rows]
    source = layers(True)[kind]
    wanted = [source(x) for x in xs]
    for _ in range(10):
        layer, start = copy.deepcopy(source), Barrier(len(rows) + 1)

        def multiply(number, layer=layer, start=start):
            start.wait()
            return all(torch.equal(layer(xs[number]), wanted[number]) for _ in range(20))

        def replace(layer=layer, start=start):
            start.wait()
            for _ in range(20):
                for tensor in layer.state_dict(keep_vars=True).values():
                    tensor.data = tensor.data.clone()
            return True

        with ThreadPoolExecutor(len(rows) + 1) as pool:
            done = [pool.submit(multiply, number) for number in range(len(rows))]
            done.append(pool.submit(replace))
            assert all(thread.result() for thread in done)


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
    apart = _native.capsule(torch.empty(24, 2, dtype=torch.bfloat16)[:, 0])
    with pytest.raises(ValueError, match="bias: expected a contiguous tensor"):
        make("linear_24", parts, apart, 24, 40)
    with pytest.raises(ValueError, match="scales: expected a contiguous tensor"):
        make("linear_int8", [_native.capsule(values.to(torch.int8)), apart], None, 24, 20)
    short = make("linear_24", parts, _native.capsule(values[0, :20]), 24, 40)
    with pytest.raises(ValueError, match="bias: unexpected shape"):
        short.multiply(y.data_ptr(), x.data_ptr(), 1, True, 1)
    with pytest.raises(ValueError, match="threads"):
        make("linear_24", parts, None, 24, 40).multiply(y.data_ptr(), x.data_ptr(), 1, True, 0)
