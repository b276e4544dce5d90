"""Products of layers on a GPU with more rows of x than the Triton kernels take: the weight is
expanded. It is plain PyTorch, so that all of it but the matrix units runs here."""

import pytest
import torch
from ops.compressed import pack_24, pack_bitmap, random_24_mask

from pyprune import ops
from pyprune.ops import _expanded, linear_24_cuda, linear_bitmap_cuda, registry
from pyprune.ops.sparse_linear import TRITON_ROWS

OPS = ["linear_24", "linear_bitmap", "linear_24_int8", "linear_bitmap_int8", "linear_int8",
       "linear_coded"]  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [FP32, BF16, FP16]
ROWS, COLS = 24, 104
# What the cuda backend's routes call themselves, beside the Triton one's.
ROUTES = {
    "linear_24": linear_24_cuda.expand_and_multiply,
    "linear_bitmap": linear_bitmap_cuda.expand_and_multiply,
}


def weight(op, dtype=BF16):
    """The op's tensors and the matrix they stand for, fp64."""
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, COLS, generator=gen).to(dtype)
    if op == "linear_coded":
        return ops.pack_coded(w.bfloat16()), w.bfloat16().double()
    q, scales = ops.quantize_rows(w)
    numbers, real = (q, q.double() * scales.double()[:, None]) if "int8" in op else (w, w.double())
    mask, packed = torch.ones(ROWS, COLS, dtype=torch.bool), (numbers,)
    if "24" in op:
        mask = random_24_mask(ROWS, COLS, gen)
        packed = pack_24(numbers, mask)
    elif "bitmap" in op:
        mask = torch.rand(ROWS, COLS, generator=gen) < 0.5
        packed = pack_bitmap(numbers, mask)
    return (*packed, scales) if "int8" in op else packed, real * mask


def activations(rows, dtype, seed=1):
    return torch.randn(rows, COLS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_a_gpu(op):
    """What multiplies there where no kernel does."""
    return registry.IMPLS[op]["triton"].resolve()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_any_two_dtypes(op, dtype, stored):
    """Sums in fp32 of the numbers that are stored: narrower activations do not round them."""
    packed, dense = weight(op, stored)
    bias = activations(1, FP32, seed=2)[0, :ROWS]
    x = activations(2 * TRITON_ROWS + 8, dtype).view(2, -1, COLS)
    got = on_a_gpu(op)(x, *packed, bias)
    want = x.double() @ dense.T + bias.double()
    scale = x.double().abs() @ dense.abs().T + bias.double().abs()
    limit = {FP32: 2e-6, BF16: 2**-8, FP16: 2**-10}[dtype]
    assert got.dtype == dtype and got.shape == want.shape
    assert ((got.double() - want).abs() <= limit * scale).all()


def test_small_weights_beside_half_activations():
    """fp16 has no 2^-30; the fp32 values have."""
    w = torch.full((2, 8), 2.0**-30)
    x = torch.full((17, 8), 2.0**15, dtype=FP16)
    got = linear_bitmap_cuda.linear_bitmap_cuda(x, *ops.pack_bitmap(w), None)
    assert torch.equal(got, torch.full((17, 2), 8 * 2.0**-15, dtype=FP16))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_serves_every_layer(op, dtype):
    """Rather than the reference, which takes temporaries of several times the dense matrix, and for
    bitmaps waits for the device, so that no graph can be captured."""
    packed, _ = weight(op, dtype)
    for rows in (1, TRITON_ROWS, TRITON_ROWS + 1, 500):
        args = (activations(rows, dtype), *packed, None)
        assert registry.unavailable(op, "triton", "cuda", dtype, args) == ""


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op):
    """A tensor without data has no number to wait for: PyTorch raises where one is asked for."""
    packed, _ = weight(op)
    x = activations(40, BF16)
    args = [t.to("meta") for t in (x, *packed, activations(1, BF16)[0, :ROWS])]
    for function in (on_a_gpu(op), ROUTES.get(op, on_a_gpu(op))):
        got = function(*args)
        assert got.is_meta and got.shape == (40, ROWS) and got.dtype == BF16


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("around", [BF16, FP16], ids=str)
def test_autocast_changes_nothing(op, around):
    packed, _ = weight(op)
    for dtype in DTYPES:
        x = activations(40, dtype)
        want = on_a_gpu(op)(x, *packed, None)
        with torch.autocast("cpu", dtype=around):
            got = on_a_gpu(op)(x, *packed, None)
        assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("op", OPS)
def test_without_outputs(op):
    packed, _ = weight(op)
    empty = [t[:0] for t in packed]
    if "bitmap" in op:
        empty[2] = packed[2][:1]
    if op == "linear_coded":
        empty[4] = packed[4][:1]
    assert on_a_gpu(op)(activations(40, BF16), *empty, None).shape == (40, 0)


def test_parts_are_the_whole():
    packed, _ = weight("linear_int8")
    x, bias = activations(20, BF16), activations(1, FP32)[0, :ROWS]
    asked = []

    def expand(rows):
        asked.append(rows)
        return packed[0][rows].to(BF16)

    shape = (ROWS, COLS)
    got = _expanded.multiply_in_parts(x, shape, expand, packed[1], bias, 5 * COLS)
    assert len(asked) == 5
    want = _expanded.multiply_in_parts(x, shape, expand, packed[1], bias)
    assert len(asked) == 6 and torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_a_graph_on_a_gpu(op, dtype):
    """By whatever serves it there."""
    packed, dense = weight(op, dtype)
    on_gpu = [t.cuda() for t in packed]
    for rows in (1, 70):
        static, x = torch.zeros(rows, COLS, dtype=dtype, device="cuda"), activations(rows, dtype)
        getattr(ops, op)(static, *on_gpu)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = getattr(ops, op)(static, *on_gpu)
        static.copy_(x)
        graph.replay()
        want, scale = x.double() @ dense.T, x.double().abs() @ dense.abs().T
        limit = {FP32: 1e-5, BF16: 2**-8, FP16: 2**-10}[dtype]
        assert y.dtype == dtype and ((y.cpu().double() - want).abs() <= limit * scale).all()
