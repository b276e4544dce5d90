"""Gradients through compressed products: those of the dense product, or an error; never silence."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from ops.compressed import pack_24, pack_bitmap, random_24_mask
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune import ops
from pyprune.ops import _transforms, registry
from pyprune.sparse import SparseLinear
from pyprune.sparse.dense import use_own_kernels

TRAINED = ["linear_24", "linear_bitmap", "linear_24_int8", "linear_bitmap_int8", "linear_int8"]
FORMATS = [*TRAINED, "linear_coded", "linear_dense"]
# (x, values or scales): the rounding of the gradient is that of x's dtype.
DTYPES = [
    (torch.float32, torch.float32, 1e-5),
    (torch.float32, torch.bfloat16, 1e-5),
    (torch.bfloat16, torch.bfloat16, 2**-7),
    (torch.float16, torch.bfloat16, 2**-9),
    (torch.float64, torch.float64, 1e-12),
]


def weight(op, dtype, shape=(5, 24), seed=0):
    """The op's weight tensors and the fp64 matrix they stand for."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=gen).to(dtype)
    if op == "linear_dense":
        return (w,), w.double()
    if op == "linear_coded":
        return ops.pack_coded(w.bfloat16()), w.bfloat16().double()
    scales = torch.rand(shape[0], generator=gen).to(dtype)
    if op.endswith("int8"):
        w = torch.randint(-127, 128, shape, generator=gen).to(torch.int8)
    if op == "linear_int8":
        return (w, scales), w.double() * scales.double()[:, None]
    mask = random_24_mask(*shape, gen) if "24" in op else torch.rand(shape, generator=gen) < 0.5
    packed = (pack_24 if "24" in op else pack_bitmap)(w, mask)
    dense = (w * mask).double()
    if op.endswith("int8"):
        return (*packed, scales), dense * scales.double()[:, None]
    return packed, dense


@pytest.mark.parametrize("op", FORMATS)
@pytest.mark.parametrize(("x_dtype", "dtype", "tolerance"), DTYPES, ids=str)
def test_gradients_are_those_of_the_dense_product(op, x_dtype, dtype, tolerance):
    tensors, dense = weight(op, dtype)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 24, generator=gen).to(x_dtype).requires_grad_()
    bias = torch.randn(5, generator=gen).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 5, generator=gen).to(x_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(ops, op)(x, *tensors, bias=bias).backward(grad)
    assert x.grad.dtype == x_dtype and bias.grad.dtype == dtype
    want = grad.double() @ dense
    assert (x.grad.double() - want).abs().max() <= tolerance * (1 + want.abs().max())
    total = grad.double().sum((0, 1))
    assert (bias.grad.double() - total).abs().max() <= max(tolerance, 2**-8) * (
        1 + total.abs().max()
    )


@pytest.mark.parametrize("op", TRAINED)  # bytes alone cannot ask for a gradient
def test_nobody_trains_a_stored_weight(op):
    tensors, _ = weight(op, torch.float32)
    trained = tensors[-1 if op.endswith("int8") else 0].clone().requires_grad_()
    changed = (*tensors[:-1], trained) if op.endswith("int8") else (trained, *tensors[1:])
    with pytest.raises(ValueError, match="gradients for x and bias alone"):
        getattr(ops, op)(torch.ones(1, 24), *changed)


def test_a_dense_weight_has_a_gradient():
    (w,), _ = weight("linear_dense", torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.linear_dense(x, w, bias=b), (x, w.requires_grad_(), b)
    )


@pytest.mark.parametrize("op", FORMATS)
def test_vmap_over_x_alone(op):
    tensors, _ = weight(op, torch.float32)
    x, bias = torch.randn(3, 24, 2), torch.randn(5)
    product = getattr(ops, op)
    got = torch.vmap(lambda x: product(x, *tensors, bias=bias), in_dims=-1)(x)
    assert torch.equal(got, product(x.permute(2, 0, 1), *tensors, bias=bias))
    with pytest.raises(ValueError, match="mapped over x alone"):
        torch.vmap(lambda b: product(x[..., 0], *tensors, bias=b))(torch.randn(2, 5))


@pytest.mark.parametrize("op", FORMATS)
@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()),
        torch.func.hessian,  # forward over backward
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
        lambda f: torch.func.vmap(torch.func.vmap(torch.func.grad(f))),
        lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
        torch.func.functionalize,
    ],
    ids=["grad", "twice", "hessian", "forward twice", "each", "tangent", "functionalize"],
)
def test_transformations_of_torch_func(op, transform):
    """The loss is of degree four, so that no derivative is a constant by luck."""
    tensors, dense = weight(op, torch.float64)
    gen = torch.Generator().manual_seed(3)
    x, bias = (torch.randn(s, dtype=torch.float64, generator=gen) for s in ((2, 3, 24), (5,)))
    product = getattr(ops, op)
    got = transform(lambda x: product(x, *tensors, bias=bias).pow(4).sum())(x)
    want = transform(lambda x: nn.functional.linear(x, dense, bias).pow(4).sum())(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize("op", FORMATS)
def test_directions_of_differentiation_agree(op):
    tensors, _ = weight(op, torch.float64, (3, 8))
    gen = torch.Generator().manual_seed(4)
    x, bias = (
        torch.randn(s, dtype=torch.float64, generator=gen, requires_grad=True)
        for s in ((2, 8), (3,))
    )

    def product(x, bias):
        return getattr(ops, op)(x, *tensors, bias=bias)

    assert torch.autograd.gradcheck(
        product, (x, bias), check_forward_ad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(product, (x, bias))


@pytest.mark.parametrize("op", ["linear_24", "linear_bitmap", "linear_int8", "linear_dense"])
def test_the_tangent_of_a_weight_is_refused_not_dropped(op):
    tensors, _ = weight(op, torch.float32)
    at = len(tensors) - 1 if op.endswith("int8") else 0
    x, w = torch.randn(2, 24), tensors[at]

    def product(w):
        return getattr(ops, op)(x, *(w if k == at else t for k, t in enumerate(tensors)))

    if op == "linear_dense":
        got = torch.func.jvp(product, (w,), (2 * w,))[1]
        torch.testing.assert_close(got, 2 * product(w), rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(ValueError, match="tangents for x and bias alone"):
        torch.func.jvp(product, (w,), (w,))
    with pytest.raises(ValueError, match="gradients for x and bias alone"):
        torch.func.grad(lambda w: product(w).sum())(w)


def _along(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize(
    ("derive", "within"),
    [
        (lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x), False),
        (lambda f, x: torch.func.jvp(f, (x,), (x,))[1], True),
        (_along, True),
    ],
    ids=["grad", "jvp", "dual"],
)
def test_transformations_and_compilation(derive, within):
    """Around a compiled product, and within what is compiled: a tangent is never dropped."""
    (w, meta), dense = weight("linear_24", torch.float32)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))

    def product(x):
        return ops.linear_24(x, w, meta)

    want = derive(lambda x: x @ dense.float().T, x)
    torch._dynamo.reset()
    compiled = torch.compile(product, backend="aot_eager")
    torch.testing.assert_close(derive(compiled, x), want, rtol=1e-4, atol=1e-4)
    if within:
        # PyTorch runs what it cannot trace: the error that is raised while it does says so.
        compiled = torch.compile(lambda x: derive(product, x), backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", ["sparse", "dense"])
def test_transforms_of_a_layer(make):
    torch.manual_seed(0)
    linear = nn.Linear(24, 6).bfloat16()
    linear.weight.data *= ops.mask_nm(linear.weight.data, 2, 4)
    layer = SparseLinear.from_dense(linear, "bitmap")
    if make == "dense":
        model = nn.Sequential(linear)
        use_own_kernels(model)
        layer = model[0]
        assert type(layer) is not nn.Linear
    x = torch.randn(2, 3, 24).bfloat16()
    with torch.no_grad():
        # Two kernels that round alike, but sum in another order.
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=2**-7, atol=2**-7)
    got = _along(layer, x)
    torch.testing.assert_close(got, nn.functional.linear(x, linear.weight), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("op", FORMATS)
def test_opcheck(op):
    tensors, _ = weight(op, torch.float32)
    x = torch.randn(2, 24, requires_grad=True)
    torch.library.opcheck(
        getattr(torch.ops.pyprune, op), (x, *tensors, torch.randn(5, requires_grad=True))
    )


def test_the_product_backward_is_an_operator_like_any_other():
    a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4, 5)))
    product = torch.ops.pyprune.full_product
    torch.library.opcheck(product, (a, b))
    assert torch.autograd.gradcheck(product, (a, b)) and torch.autograd.gradgradcheck(
        product, (a, b)
    )
    for dims in ((0, None), (None, 0), (2, 1)):
        many = [
            t.detach() if dim is None else torch.stack([t.detach(), -2 * t.detach()], dim)
            for t, dim in zip((a, b), dims, strict=True)
        ]
        got, want = (torch.vmap(f, in_dims=dims)(*many) for f in (product, torch.matmul))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", FORMATS)
def test_gradients_of_gradients_and_of_many_at_once(op):
    tensors, dense = weight(op, torch.float32)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
    many, found = torch.eye(15).view(15, 3, 5), []
    for product, given in ((getattr(ops, op), tensors), (nn.functional.linear, (dense.float(),))):
        y = product(x, *given)
        (first,) = torch.autograd.grad(y.square().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        (jacobian,) = torch.autograd.grad(y, x, many, is_grads_batched=True)
        found.append((first.detach(), second, jacobian))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("format", "int8"), [("sparse24", True), ("bitmap", False)])
def test_what_surrounds_a_compressed_layer_learns(format, int8):
    """As adapters and prompts need it: compiled or not, the gradient of the layer before."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 6)
    linear.weight.data *= ops.mask_nm(linear.weight.data, 2, 4)
    sparse = SparseLinear.from_dense(linear, format, int8)
    dense = sparse.to_dense()
    x = torch.randn(3, 24)
    found = []
    for layer in (dense, sparse, torch.compile(sparse, fullgraph=True, backend="aot_eager")):
        before = nn.Linear(24, 24)
        before.load_state_dict({"weight": torch.eye(24), "bias": torch.zeros(24)})
        layer(before(x)).square().sum().backward()
        found.append(before.weight.grad)
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-4, atol=1e-4)


class Noting:
    """A mode that writes down what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class DispatchMode(Noting, TorchDispatchMode):
    __torch_dispatch__ = Noting.note


class FunctionMode(Noting, TorchFunctionMode):
    __torch_function__ = Noting.note


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("op", FORMATS)
def test_who_listens_hears_the_operator(op, monkeypatch):
    tensors, _ = weight(op, torch.float32)
    x, product = torch.randn(3, 24), getattr(ops, op)
    called = []  # without PyTorch's dispatch
    run = lambda name, *args: (called.append(name), registry.call(name, *args))[1]  # noqa: E731
    monkeypatch.setattr(_transforms, "registry", SimpleNamespace(call=run, IMPLS=registry.IMPLS))
    plain = product(x, *tensors)
    assert called == [op]
    with torch.no_grad():
        assert torch.equal(product(x.clone().requires_grad_(), *tensors), plain)
    assert called == [op] * 2
    for mode in (DispatchMode(), FunctionMode()):
        with mode:
            assert torch.equal(product(x, *tensors), plain)
        assert any(f"pyprune.{op}" in name for name in mode.seen)
    with torch.profiler.profile() as profile:
        product(x, *tensors)
    assert any(event.key == f"pyprune::{op}" for event in profile.key_averages())
    assert product(x.clone().requires_grad_(), *tensors).requires_grad
    assert type(product(x.as_subclass(Tagged), *tensors)) is Tagged
    assert product(x.to("meta"), *(t.to("meta") for t in tensors)).is_meta
    assert torch.equal(product(torch._neg_view(-x), *tensors), plain)
    assert not product(torch._efficientzerotensor(3, 24), *tensors).any()
    traced = make_fx(lambda x: product(x, *tensors))(x)
    assert f"pyprune.{op}.default" in traced.code
    assert called == [op] * 2
