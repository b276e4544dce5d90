"""The CUDA kernel of `linear_bitmap`. Which bits, values and activations a lane holds, and how it
expands them, is tested by running whole warps of the kernel's own functions on the CPU (see
bitmap_lanes_emulation.cpp); the rest carries the marker `gpu`."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from ops.compressed import pack_bitmap

from pyprune import ops
from pyprune.ops import linear_bitmap_cuda, registry
from pyprune.ops.sparse_linear import TRITON_ROWS

ROOT = Path(__file__).resolve().parents[2]
SEGMENTS = [8, 4, 2, 1]


@pytest.fixture(scope="module")
def lanes(tmp_path_factory):
    """The emulated warps as a library."""
    library = tmp_path_factory.mktemp("lanes") / "bitmap_lanes.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
    source = ROOT / "tests" / "ops" / "bitmap_lanes_emulation.cpp"
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def random(shape, seed, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(name, rows, cols, seed=0):
    gen = torch.Generator().manual_seed(seed)
    if name == "rows of many densities":  # none, all, and everything between
        return torch.rand(rows, cols, generator=gen) < torch.linspace(0, 1, rows)[:, None]
    return torch.rand(rows, cols, generator=gen) < float(name)


def emulate(lanes, segments, packed, x, rows):
    """W as the lanes expand it, the product, and cycles a load of values."""
    values, bitmap, offsets = packed
    elements = torch.full((rows, x.shape[1]), float("nan"), dtype=torch.bfloat16)
    y = torch.full((x.shape[0], rows), float("nan"))
    cycles = ctypes.c_double()
    status = lanes.emulate(
        segments, pointer(values), ctypes.c_int64(len(values)), pointer(bitmap), pointer(offsets),
        rows, x.shape[1] // 32, pointer(x), x.shape[0], pointer(elements), pointer(y),
        ctypes.byref(cycles),
    )  # fmt: skip
    assert status == 0
    return elements, y, cycles.value


def bits(t):
    return t.view(torch.int16)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("density", ["0", "0.05", "0.5", "0.95", "1", "rows of many densities"])
@pytest.mark.parametrize("shape", [(1, 32), (16, 1024), (37, 1376), (5, 2144)], ids=str)
def test_a_warp_expands_what_unpacking_gives(lanes, segments, density, shape):
    rows, cols = shape
    w, mask = random(shape, 1), mask_of(density, rows, cols)
    packed = pack_bitmap(w, mask)
    tokens = 16 // segments  # two tiles
    x = random((tokens, cols), 2)
    elements, y, _ = emulate(lanes, segments, packed, x, rows)
    assert torch.equal(bits(elements), bits(ops.unpack_bitmap(*packed, cols)))
    dense = (w * mask).double()
    want, scale = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    assert ((y.double() - want).abs() <= 2e-5 * scale).all()


@pytest.mark.parametrize("segments", SEGMENTS)
def test_bit_patterns_survive(lanes, segments):
    # Infinities, NaN payloads, negative zeros: elements move as bits. x is zero, y of no interest.
    pattern = torch.randint(-(2**15), 2**15, (16, 256), generator=torch.Generator().manual_seed(3))
    w = pattern.to(torch.int16).view(torch.bfloat16)
    mask = mask_of("0.6", 16, 256)
    packed = (w[mask], *pack_bitmap(torch.zeros(16, 256), mask)[1:])
    elements, _, _ = emulate(lanes, segments, packed, torch.zeros(1, 256).bfloat16(), 16)
    assert torch.equal(bits(elements), bits(w) * mask)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_every_weight_meets_its_own_activation(lanes, segments):
    # One weight a row and one activation at a time: a product that goes astray shows as a zero.
    cols = 256
    for column in range(0, cols, 37):
        w = torch.zeros(16, cols, dtype=torch.bfloat16)
        w[:, column] = torch.arange(1, 17, dtype=torch.bfloat16)
        x = torch.zeros(16 // segments, cols, dtype=torch.bfloat16)
        x[:, column] = torch.arange(1, len(x) + 1, dtype=torch.bfloat16)
        _, y, _ = emulate(lanes, segments, ops.pack_bitmap(w), x, 16)
        assert torch.equal(y, torch.outer(x[:, column], w[:, column]).float())


def test_every_nibble_at_every_position(lanes):
    values = torch.arange(1, 7, dtype=torch.int16)  # three words
    for above in (0, 0xFFFFFFF):  # bits of the word that are not the nibble's
        out = torch.full((16, 2, 4), -1, dtype=torch.int16)
        lanes.expand_all(pointer(values), ctypes.c_uint32(above), pointer(out))
        for nibble in range(16):
            for position in range(2):
                left = iter(values[position:].tolist())
                want = [next(left) if nibble >> i & 1 else 0 for i in range(4)]
                assert out[nibble, position].tolist() == want


@pytest.mark.parametrize("segments", SEGMENTS)
def test_offsets_that_contradict_the_bits_read_nothing_outside(lanes, segments):
    # Guarded by a copy of exactly the values: what the emulation reads past them would be found by
    # the sanitizers, and here by a NaN that must not be there.
    w, mask = random((16, 512), 4), mask_of("0.5", 16, 512)
    values, bitmap, offsets = pack_bitmap(w, mask)
    guarded = torch.full((len(values) + 2048,), float("nan"), dtype=torch.bfloat16)
    guarded[: len(values)] = values
    ends = [torch.full_like(offsets, len(values) - i) for i in range(-1, 10)]
    wrapping = torch.full_like(offsets, 2**32 - 3)
    for broken in (
        offsets + 5, offsets + 2**31 - 1, offsets - 9, offsets.flip(0), *ends, wrapping
    ):  # fmt: skip
        tampered = (guarded[: len(values)], bitmap, broken.contiguous())
        elements, _, _ = emulate(lanes, segments, tampered, torch.ones(1, 512).bfloat16(), 16)
        # What was not copied is what shared memory held: 0xffff, a NaN of another pattern.
        assert not (bits(elements) == bits(guarded[-1:])).any()


@pytest.mark.parametrize("values", [0, 1, 7, 8, 9, 16, 19481, 2**31 - 1])
def test_copies_end_with_the_values(lanes, values):
    lanes.end_of_reads.restype = ctypes.c_int64
    last = values // 8
    starts = {0, 1, last - 65, last - 2, last - 1, last, last + 1, 2**28, 2**29 - 1}
    for first in sorted(start for start in starts if start >= 0):
        for chunks in (0, 1, 2, 3, 65):
            end = lanes.end_of_reads(first, chunks, ctypes.c_uint32(values))
            # All that was asked for and is there, and no more.
            want = min(8 * (first + chunks), values) if chunks and 8 * first < values else 0
            assert end == want


def test_no_block_counts_past_the_end_of_a_row(lanes):
    # 33 to 35 turns are five for each of eight blocks, but for the last, which has none: its words
    # begin where the last row's allocation may end.
    for words in range(129, 141):
        before = [lanes.words_before_block(words, block, 8) for block in range(8)]
        assert before == [min(20 * block, words) for block in range(8)]


def test_layout_of_a_turn(lanes):
    for segments in SEGMENTS:
        out = (ctypes.c_int * 5)()
        lanes.sizes(segments, out)
        turn, row, rows, cols, copies = out
        assert rows * cols == 2048 and turn == rows * row == 4352
        # From an unaligned start a full row has one chunk more; a lane copies every 4 segments-th.
        assert row // 16 >= cols // 8 + 1 and copies * 4 * segments >= cols // 8 + 1
        # Rows that are read together begin 4 segments words apart modulo the 32 banks.
        assert row // 4 % 32 == 4 * segments % 32


@pytest.mark.parametrize(("segments", "most"), [(8, 1.5), (4, 1.9), (2, 2.3), (1, 2.6)])
def test_loads_of_values_seldom_meet_in_a_bank(lanes, segments, most):
    w, mask = random((16, 4096), 5), mask_of("0.5", 16, 4096)
    *_, cycles = emulate(lanes, segments, pack_bitmap(w, mask), random((1, 4096), 6), 16)
    assert 1 <= cycles <= most


def test_a_warp_finds_the_shared_rows_of_x(lanes):
    # The kernel for more than sixteen rows of x: the lanes' four columns of each step, and how many
    # of the sixteen lanes that are served at a time meet in a bank.
    columns = (ctypes.c_int * (8 * 32 * 4))()
    assert lanes.wide_x(columns) == 1
    got = torch.tensor(list(columns)).reshape(8, 32, 4)
    first = 16 * torch.arange(8)[:, None] + 4 * (torch.arange(32) % 4)
    token = 128 * (torch.arange(32) // 4)
    assert torch.equal(got, (token + first)[..., None] + torch.arange(4))


def test_parts_of_an_fp32_number(lanes):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(7)) * 10.0 ** torch.randint(
        -28, 38, (1000,), generator=torch.Generator().manual_seed(8)
    )
    largest = torch.finfo(torch.float32).max
    special = [0.0, -0.0, 1 + 2**-23, -largest, largest, float("inf"), -float("inf")]
    nan_in_the_last_bit = torch.tensor([0x7F800001]).int().view(torch.float32)
    x = torch.cat((x, torch.tensor(special), nan_in_the_last_bit))
    parts = torch.full((len(x), 3), -1.0)
    lanes.parts(pointer(x), ctypes.c_int64(len(x)), pointer(parts))
    assert torch.equal(parts.bfloat16().float().nan_to_num(1.0), parts.nan_to_num(1.0))
    assert torch.equal(parts.sum(1).nan_to_num(7.0, 8.0, 9.0), x.nan_to_num(7.0, 8.0, 9.0))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("rows", "cols", "dtype", "values", "served"),
    [
        (1, 64, BF16, BF16, "kernel"),
        (16, 64, FP16, FP16, "kernel"),
        (64, 64, BF16, BF16, "kernel"),
        (65, 64, BF16, BF16, "expand"),
        (5, 64, FP32, BF16, "kernel"),
        (6, 64, FP32, BF16, "expand"),
        (1, 64, FP32, FP32, "triton"),
        (1, 64, BF16, FP16, "triton"),
        (1, 72, BF16, BF16, "triton"),  # rows of the bitmap begin within words
        (2, 72, FP32, FP32, "expand"),
        (0, 64, BF16, BF16, "kernel"),
    ],
)
def test_route(rows, cols, dtype, values, served):
    x, values = torch.zeros(rows, cols, dtype=dtype), torch.zeros(10, dtype=values)
    bitmap = torch.zeros(8, -(-cols // 8), dtype=torch.uint8)
    assert linear_bitmap_cuda.route(x, values, bitmap) == served
    reason = linear_bitmap_cuda.limits(x, values, bitmap, torch.zeros(9).long(), None)
    assert bool(reason) == (served == "triton")
    if reason:
        assert f"{rows} rows of {dtype} with {cols} columns" in reason


def test_more_values_than_positions_can_count_go_elsewhere():
    x = torch.zeros(1, 64, dtype=BF16, device="meta")
    values = torch.empty(2**31, dtype=BF16, device="meta")
    bitmap = torch.empty(2**26, 8, dtype=torch.uint8, device="meta")
    assert linear_bitmap_cuda.route(x, values, bitmap) == "triton"
    assert linear_bitmap_cuda.route(x, values[1:], bitmap) == "kernel"


@pytest.mark.parametrize("table", [*linear_bitmap_cuda.ROUTES.values()])
def test_the_table_asks_no_kernel_for_more_rows_than_it_takes(table):
    most = [rows for rows, _ in table]
    assert most[-1] is None and most[:-1] == sorted(most[:-1])
    assert all(rows <= TRITON_ROWS for rows, served in table if served == "triton")
    kernel_rows = {served: rows for rows, served in table}["kernel"]
    assert kernel_rows <= (5 if table is linear_bitmap_cuda.ROUTES[FP32, BF16] else 64)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_expanded_product(dtype):
    # The route that needs no GPU.
    w, mask = random((24, 96), 9), mask_of("0.4", 24, 96)
    x, bias = random((2, 40, 96), 10, dtype), random((24,), 11)
    got = linear_bitmap_cuda.linear_bitmap_cuda(x, *pack_bitmap(w, mask), bias)
    want = x.double() @ (w * mask).double().T + bias.double()
    tolerance = 2**-8 if dtype == BF16 else 1e-6
    scale = x.double().abs() @ (w * mask).double().abs().T + bias.double().abs()
    assert got.dtype == dtype and ((got.double() - want).abs() <= tolerance * scale).all()


# --- on a GPU -----------------------------------------------------------------------------------


def assert_product(got, x, dense, bias=None):
    want = x.double() @ dense.double().T
    scale = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    limit = {BF16: 2**-8, FP16: 2**-10, FP32: 1e-5}[x.dtype]
    assert got.dtype == x.dtype and got.shape == want.shape
    assert ((got.double() - want).abs() <= limit * scale + 1e-30).all()


def check_on_a_gpu(shape, density, dtype, rows_of_x):
    rows, cols = shape
    values_dtype = BF16 if dtype == FP32 else dtype
    w, mask = random(shape, 12, values_dtype), mask_of(density, rows, cols)
    packed = [t.cuda() for t in pack_bitmap(w, mask)]
    bias = random((rows,), 13)
    for m in rows_of_x:
        x = random((m, cols), 14 + m, dtype)
        for b in (None, bias):
            got = ops.linear_bitmap(x.cuda(), *packed, bias=None if b is None else b.cuda())
            assert_product(got.cpu(), x, w * mask, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("density", ["0.5", "0.1", "rows of many densities"])
# One turn or less; rows that fill no warp; columns that fill no turn and no vector; several slabs;
# so many rows that other shapes of blocks serve them.
@pytest.mark.parametrize(
    "shape", [(16, 32), (37, 160), (1, 1024), (130, 4128), (4096, 4096), (6000, 544)]
)
def test_matches_float64_on_a_gpu(use_backend, shape, density, dtype):
    use_backend("cuda", "linear_bitmap", "cuda", dtype)
    # The kernel's numbers of rows, one of every case; then the expanded matrix.
    few = (1, 2, 3, 5) if dtype == FP32 else (1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 64)
    check_on_a_gpu(shape, density, dtype, (*few, 100))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_sanitized_on_a_gpu(use_backend, dtype):
    """Small enough for compute-sanitizer (`make gpu-sanitize`). The last chunk of values is partly
    outside, and the tampered offsets point there."""
    use_backend("cuda", "linear_bitmap", "cuda", dtype)
    few = (1, 2, 4, 5) if dtype == FP32 else (1, 2, 4, 8, 16, 20, 64)
    check_on_a_gpu((37, 1056), "0.5", dtype, few)
    for rows, cols in ((19, 544), (4300, 96)):  # few and many rows have kernels of their own
        w = random((rows, cols), 15, BF16 if dtype == FP32 else dtype)
        values, bitmap, offsets = (t.cuda() for t in pack_bitmap(w, mask_of("0.5", rows, cols)))
        for broken in (offsets + 5, offsets + 2**31 - 1, offsets - 9, offsets.flip(0)):
            for m in few:
                x = torch.ones(m, cols, dtype=dtype, device="cuda")
                assert ops.linear_bitmap(x, values, bitmap, broken).shape == (m, rows)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_views_that_are_not_aligned_on_a_gpu(use_backend):
    use_backend("cuda", "linear_bitmap", "cuda", BF16)
    w, mask = random((40, 256), 16), mask_of("0.5", 40, 256)
    packed = [t.cuda() for t in pack_bitmap(w, mask)]
    moved = [torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) for t in packed]
    x = random((3, 257), 17)
    got = ops.linear_bitmap(x.cuda()[:, 1:], *moved)
    assert_product(got.cpu(), x[:, 1:].contiguous(), w * mask)


@pytest.mark.gpu
def test_activations_of_any_magnitude_on_a_gpu(use_backend):
    # fp32 activations in three bf16 parts: one product an output, exact.
    use_backend("cuda", "linear_bitmap", "cuda", FP32)
    w = torch.zeros(5, 64, dtype=BF16)
    w[:, 33] = torch.tensor([1.0, -0.5, 0.25, -1.0, 0.75], dtype=BF16)
    packed = [t.cuda() for t in ops.pack_bitmap(w)]
    x = torch.zeros(2, 64)
    for value in (1 + 2**-23, -3.4028234e38, 2.0e-30, float("inf"), -float("inf")):
        x[:, 33] = value
        got = ops.linear_bitmap(x.cuda(), *packed).cpu()
        assert torch.equal(got, x[:, 33:34] * w[:, 33].float())


@pytest.mark.gpu
def test_same_result_every_time_on_a_gpu(use_backend):
    use_backend("cuda", "linear_bitmap", "cuda", BF16)
    packed = [t.cuda() for t in pack_bitmap(random((256, 8192), 18), mask_of("0.5", 256, 8192))]
    for m in (1, 5, 16, 64):
        x = random((m, 8192), 19).cuda()
        want = ops.linear_bitmap(x, *packed)
        for _ in range(20):
            assert torch.equal(ops.linear_bitmap(x, *packed), want)


@pytest.mark.gpu
def test_in_a_cuda_graph_on_a_gpu(use_backend):
    use_backend("cuda", "linear_bitmap", "cuda", BF16)
    w, mask = random((64, 512), 20), mask_of("0.5", 64, 512)
    packed = [t.cuda() for t in pack_bitmap(w, mask)]
    x = torch.zeros(2, 512, dtype=BF16, device="cuda")
    ops.linear_bitmap(x, *packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear_bitmap(x, *packed)
    fresh = random((2, 512), 21)
    x.copy_(fresh)
    graph.replay()
    assert_product(y.cpu(), fresh, w * mask)


@pytest.mark.gpu
def test_other_dtypes_and_widths_go_to_triton_on_a_gpu():
    for cols, dtype in ((104, BF16), (128, FP32)):
        w, mask = random((40, cols), 22, dtype), mask_of("0.5", 40, cols)
        x, packed = random((1, cols), 23, dtype), pack_bitmap(w, mask)
        args = (x.cuda(), *(t.cuda() for t in packed), None)
        assert registry.select("linear_bitmap", args) == "triton"
        assert_product(torch.ops.pyprune.linear_bitmap(*args).cpu(), x, w * mask)
