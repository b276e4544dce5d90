import copy
import pickle

import pytest
import torch
from ops.compressed import random_24_mask
from torch import nn

from pyprune.errors import LayerError, UserError
from pyprune.sparse import SparseLinear, compress_model, compressed_bytes
from pyprune.sparse.dense import DenseLinear, use_own_kernels
from pyprune.sparse.direct import is_plain


def pruned(rows=24, cols=40, dtype=torch.bfloat16, pattern="24", density=0.5, bias=True, seed=0):
    gen = torch.Generator().manual_seed(seed)
    linear = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    w = torch.randn(rows, cols, generator=gen).to(dtype)
    kept = (
        random_24_mask(rows, cols, gen)
        if pattern == "24"
        else torch.rand(rows, cols, generator=gen) < density
    )
    linear.weight.data = w * kept
    if bias:
        linear.bias.data = torch.randn(rows, generator=gen).to(dtype)
    return linear


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype)


CASES = [("sparse24", "24"), ("bitmap", "24"), ("bitmap", "random")]


@pytest.mark.parametrize(("format", "pattern"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_stands_for_the_dense_layer(format, pattern, dtype, bias):
    linear = pruned(dtype=dtype, pattern=pattern, bias=bias)
    sparse = SparseLinear.from_dense(linear, format)
    assert torch.equal(sparse.decompress(), linear.weight)
    assert torch.equal(sparse.to_dense().weight, linear.weight)
    for shape in ((40,), (1, 40), (2, 3, 40), (70, 40), (0, 40)):
        x = tokens(*shape)
        want = nn.functional.linear(
            x.double(), linear.weight.double(), linear.bias.double() if bias else None
        )
        torch.testing.assert_close(sparse(x).double(), want, rtol=1e-5, atol=1e-5)
    y = sparse(tokens(5, 40, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(("format", "pattern"), CASES)
def test_direct_call_and_op_agree(format, pattern, monkeypatch):
    sparse = SparseLinear.from_dense(pruned(pattern=pattern), format)
    x = tokens(3, 7, 40)
    assert is_plain(x)
    direct = sparse(x)
    monkeypatch.setenv("PYPRUNE_BACKEND", "native")
    assert not is_plain(x)
    assert torch.equal(sparse(x), direct)
    strided = tokens(40, 7).T
    monkeypatch.delenv("PYPRUNE_BACKEND")
    assert torch.equal(sparse(strided), sparse(strided.contiguous()))


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("format", "pattern"), CASES)
def test_direct_call_and_op_agree_on_a_gpu(format, pattern, dtype, int8):
    dense = pruned(48, 128, dtype=dtype, pattern=pattern)
    sparse = SparseLinear.from_dense(dense, format, int8).cuda()
    for rows in (1, 16, 70):
        x = tokens(rows, 128, dtype=dtype).cuda()
        direct = sparse._direct_on_cuda
        assert direct(x) and not direct(x.clone().requires_grad_()) and not direct(x.cpu())
        assert torch.equal(sparse(x), sparse(x.clone().requires_grad_()))


def test_activations_of_other_kinds_take_the_op():
    sparse = SparseLinear.from_dense(pruned(), "sparse24")
    for x in (tokens(2, 40).double(), tokens(2, 40).to("meta")):
        assert not is_plain(x)
    assert sparse(tokens(2, 40).double()).dtype == torch.float64


@pytest.mark.parametrize("format", ["sparse24", "bitmap"])
def test_activations_of_another_width_are_refused(format):
    linear = pruned()
    linear.weight.data[:, 32:] = 0  # what a bitmap of 40 columns has in common with one of 36
    sparse = SparseLinear.from_dense(linear, format)
    for x in (tokens(2, 48), tokens(2, 36), tokens(2, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 40\], got shape"):
            sparse(x)


@pytest.mark.parametrize(("format", "pattern"), CASES)
def test_state_dict_round_trip(format, pattern):
    sparse = SparseLinear.from_dense(pruned(pattern=pattern), format)
    other = SparseLinear(40, 24, format, dtype=torch.bfloat16)
    other.load_state_dict(sparse.state_dict())
    x = tokens(4, 40)
    assert torch.equal(other(x), sparse(x))
    assert torch.equal(other.decompress(), sparse.decompress())
    fresh = SparseLinear(40, 24, format, dtype=torch.bfloat16, device="meta")
    fresh.load_state_dict(sparse.state_dict(), assign=True)
    assert torch.equal(fresh(x), sparse(x))


def test_replaced_and_copied_weights_are_noticed():
    x = tokens(2, 40)
    a = SparseLinear.from_dense(pruned(seed=1), "sparse24")
    b = SparseLinear.from_dense(pruned(seed=2), "sparse24")
    first = a(x)
    a.load_state_dict(b.state_dict())
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), first)
    a.float()
    assert a.values.dtype == torch.float32
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(a)(x), a(x))
    assert torch.equal(pickle.loads(pickle.dumps(a))(x), a(x))


def test_tampered_state_is_refused_with_the_layers_name():
    holder = nn.ModuleDict({"proj": SparseLinear.from_dense(pruned(), "sparse24")})
    state = holder.state_dict()
    state["proj.metadata"][3, 1] = 0
    with pytest.raises(RuntimeError, match=r"proj: meta: .*ascending"):
        holder.load_state_dict(state)
    holder = nn.ModuleDict({"proj": SparseLinear.from_dense(pruned(), "bitmap")})
    state = holder.state_dict()
    state["proj.row_offsets"][5] += 1
    with pytest.raises(RuntimeError, match=r"proj: bitmap"):
        holder.load_state_dict(state)
    truncated = holder.state_dict()
    truncated["proj.values"] = truncated["proj.values"][:-3]
    with pytest.raises(RuntimeError, match=r"proj: row_offsets|proj: bitmap"):
        holder.load_state_dict(truncated)


def test_sizes():
    linear = pruned(rows=64, cols=128, bias=False)
    dense = linear.weight.nbytes
    assert compressed_bytes(linear.weight, "dense") == dense
    assert compressed_bytes(linear.weight, "sparse24") == dense * 9 // 16
    for format in ("sparse24", "bitmap"):
        sparse = SparseLinear.from_dense(linear, format)
        nbytes = sum(t.nbytes for t in sparse.buffers())
        assert nbytes == compressed_bytes(linear.weight, format)
    assert compressed_bytes(torch.ones(2, 8), "sparse24") is None
    assert "format=bitmap, density=0.500, dtype=bfloat16" in repr(sparse)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseLinear(8, 8, "csr"), "bitmap int8, dense int8, coded, got 'csr'"),
        (lambda: SparseLinear(12, 8, "sparse24"), "multiple of 8 inputs"),
        (lambda: SparseLinear.from_dense(nn.Linear(8, 8), "sparse24"), "at most 2 non-zero"),
        (lambda: compressed_bytes(torch.ones(2, 8), "csr"), "expected dense, sparse24, bitmap"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 40, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList(
            [pruned(40, 40, pattern="24"), pruned(40, 40, pattern="random", density=0.3),
             pruned(40, 40, pattern="random", density=0.95)]
        )  # fmt: skip
        self.head = pruned(24, 40, bias=False)
        self.embed.weight = self.head.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


def test_compress_model_takes_the_smallest_format_that_pays():
    model = Tied()
    ids = torch.arange(12).reshape(2, 6)
    want = model(ids)
    chosen = compress_model(model)
    assert chosen == {
        "blocks.0": "sparse24", "blocks.1": "bitmap", "blocks.2": "dense", "head": "dense",
    }  # fmt: skip
    assert type(model.blocks[1]) is SparseLinear and type(model.blocks[2]) is nn.Linear
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(ids), want, rtol=0.05, atol=0.05)


def test_compress_model_leaves_what_is_in_two_places():
    twice = pruned(40, 40)
    model = nn.ModuleDict({"a": twice, "b": nn.Sequential(twice, pruned(8, 40))})
    assert compress_model(model) == {"a": "dense", "b.1": "sparse24"}
    assert model["a"] is model["b"][0] is twice
    with pytest.raises(LayerError, match="0: expected weights in memory"):
        compress_model(nn.Sequential(nn.Linear(8, 8, device="meta")))


def test_compress_model_by_name():
    model = Tied()
    assert compress_model(model, {"blocks.0": "bitmap"})["blocks.1"] == "dense"
    assert model.blocks[0].format == "bitmap"
    with pytest.raises(UserError, match=r"'blocks\.9' is not a linear layer"):
        compress_model(model, {"blocks.9": "bitmap"})
    with pytest.raises(LayerError, match=r"blocks.2: sparse24: expected"):
        compress_model(model, {"blocks.2": "sparse24"})


@pytest.mark.parametrize("kind", ["sparse24", "bitmap", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_can_be_trained_alone(kind, dtype):
    """Nothing before the layer has a gradient then, and what is computed in advance must follow."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 8, dtype=dtype).requires_grad_(False)
    linear.weight.data[:, 1::2] = 0
    x, model = torch.randn(3, 16).to(dtype), nn.Sequential(linear)
    layer = linear if kind == "dense" else SparseLinear.from_dense(linear, kind)
    if kind == "dense":
        use_own_kernels(model)
        layer = model[0]
    before = layer(x)
    layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 3.0, dtype=dtype))
    with torch.no_grad():
        layer.bias += 2
        torch.testing.assert_close(layer(x), before + 2, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("kind", ["sparse24", "bitmap", "int8", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_a_dense_layer(kind, dtype):
    linear = pruned(dtype=torch.float32)
    if kind == "dense":
        layer = DenseLinear.of(linear)
    else:
        format = "bitmap" if kind == "int8" else kind
        layer = SparseLinear.from_dense(linear, format, kind == "int8")
    x = tokens(3, 40).requires_grad_()
    with torch.autocast("cpu", dtype):
        for of in (torch.float32, torch.bfloat16, torch.float16):
            want = linear(x.to(of))
            for got in (layer(x.to(of)), layer(x.detach().to(of))):
                assert got.dtype == want.dtype == dtype
                near = {"rtol": 2**-6, "atol": 2**-4 if kind == "int8" else 2**-6}
                torch.testing.assert_close(got, want, **near)
        layer(x).sum().backward()
        assert x.grad.dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
        if kind != "dense":  # of what nobody casts
            assert layer(x.double()).dtype == torch.float64
            assert layer.to("meta")(x.to("meta")).dtype == torch.float32


def test_autocast_compiles_without_graph_breaks():
    sparse = SparseLinear.from_dense(pruned(), "sparse24")
    x = tokens(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), sparse(x)) and compiled(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("format", "pattern"), CASES)
def test_compiles_without_graph_breaks(format, pattern):
    sparse = SparseLinear.from_dense(pruned(pattern=pattern), format)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = tokens(3, 40)
    assert torch.equal(compiled(x), sparse(x))
    exported = torch.export.export(sparse, (x,))
    assert "linear_" in exported.graph_module.code
    assert torch.equal(exported.module()(x), sparse(x))
