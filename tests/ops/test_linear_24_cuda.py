"""The CUDA kernel of `linear_24`. What a lane reads and feeds to the tensor cores is tested by
emulation, without a GPU (see fragments_24_emulation.cpp); the rest carries the marker `gpu`."""

import ctypes
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops.compressed import pack_24, random_24_mask
from torch.multiprocessing.reductions import StorageWeakRef

from pyprune import _native, ops
from pyprune.ops import linear_24_cuda, registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def warp(tmp_path_factory):
    """The emulated warp as a library."""
    library = tmp_path_factory.mktemp("fragments") / "fragments_24.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
    source = ROOT / "tests" / "ops" / "fragments_24_emulation.cpp"
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def weight(rows, cols, dtype=torch.bfloat16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen).to(dtype)
    mask = random_24_mask(rows, cols, gen)
    return pack_24(w, mask), w * mask


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("cols", [64, 320])
@pytest.mark.parametrize("words", [2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_a_warp_multiplies_what_it_reads(warp, cols, words, seed):
    (values, meta), dense = weight(16, cols, seed=seed)
    x = torch.randn(8, cols, generator=torch.Generator().manual_seed(9 + seed)).bfloat16()
    y = torch.full((16, 8), float("nan"))
    warp.emulate_tile(pointer(values), pointer(meta), pointer(x), cols, words, pointer(y))
    want = dense.double() @ x.double().T
    scale = dense.double().abs() @ x.double().abs().T
    assert ((y.double() - want).abs() <= 2e-6 * scale).all()


def test_every_column_meets_its_own_weight(warp):
    # One weight and one activation at a time: a product that goes astray shows as a zero.
    for column in range(64):
        w = torch.zeros(16, 64, dtype=torch.bfloat16)
        w[:, column] = torch.arange(1, 17, dtype=torch.bfloat16)
        values, meta = ops.pack_24(w)
        x = torch.zeros(8, 64, dtype=torch.bfloat16)
        x[:, column] = torch.arange(1, 9, dtype=torch.bfloat16)
        y = torch.empty(16, 8)
        warp.emulate_tile(pointer(values), pointer(meta), pointer(x), 64, 2, pointer(y))
        assert torch.equal(y, torch.outer(torch.arange(1.0, 17.0), torch.arange(1.0, 9.0)))


@pytest.mark.parametrize("words", [2, 4])
def test_staging_fills_every_piece_once_without_bank_conflicts(warp, words):
    for rows, pieces in ((16, 4 * words), (8, 8 * words)):
        count = (ctypes.c_int * (rows * pieces))()
        warp.staged_pieces(rows, pieces, count)
        assert list(count) == [1] * (rows * pieces)
    assert warp.worst_bank_conflict(words) == 1


@pytest.mark.parametrize(("words", "team"), [(4, 1), (2, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize("rows", [1, 13, 64])
def test_the_threads_of_a_team_deal_out_every_piece_of_x_once(warp, words, team, rows):
    count = (ctypes.c_int * (64 * 8 * words))()
    warp.dealt_pieces(words, team, rows, count)
    assert list(count) == [1] * (rows * 8 * words) + [0] * ((64 - rows) * 8 * words)


@pytest.mark.parametrize("words", [2, 4])
def test_one_address_serves_all_tiles(warp, words):
    warp.tiles_are_apart.restype = ctypes.c_bool
    assert warp.tiles_are_apart(words)


def test_what_lies_past_the_last_row_of_x_stays_out_of_the_others(warp):
    """The kernel reads whole tiles of x: behind its rows lie others of a stage's bytes."""
    (values, meta), dense = weight(16, 64)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    x[3:] = float("nan")
    y = torch.empty(16, 8)
    warp.emulate_tile(pointer(values), pointer(meta), pointer(x), 64, 2, pointer(y))
    want = dense.double() @ x[:3].double().T
    scale = dense.double().abs() @ x[:3].double().abs().T
    assert ((y[:, :3].double() - want).abs() <= 2e-6 * scale).all() and y[:, 3:].isnan().all()


def test_documented_metadata_agrees_with_pytorch(warp):
    """PyTorch reorders 2:4 metadata so that lane i of a warp loads word i of a 32 x 32 tile: an
    independent account of which lane supplies which indices."""
    (values, meta), _ = weight(32, 64)
    _, reordered = ops.to_torch_sparse_24(values, meta)
    words = reordered.flatten().view(torch.int32).reshape(2, 32)  # per 32 columns, lane by lane
    nibbles = torch.stack((meta & 15, meta >> 4), dim=2).reshape(32, 16)
    place = (ctypes.c_int * 2)()
    for tile in range(2):
        for row in range(32):
            for chunk in range(8):
                warp.documented_metadata(row % 16, chunk, row // 16, place)
                lane, shift = place
                got = (int(words[tile, lane]) >> shift) & 15
                assert got == int(nibbles[row, 8 * tile + chunk])


def test_operands_from_any_address_are_aligned():
    flat = torch.arange(130, dtype=torch.bfloat16)
    for t in (flat[:128].view(2, 64), flat[1:129].view(2, 64), flat[:128].view(64, 2).T):
        got = _native.aligned(t)
        assert got.is_contiguous() and got.data_ptr() % 16 == 0 and torch.equal(got, t)
    assert _native.aligned(flat).data_ptr() == flat.data_ptr()


def test_inference_tensors_have_a_version():
    with torch.inference_mode():
        frozen = torch.zeros(2)
    counted = torch.zeros(2).add_(1)
    assert linear_24_cuda._version(frozen) == 0 and linear_24_cuda._version(counted) == 1


def test_products_that_share_an_algorithm():
    x = torch.zeros(104, 64, dtype=torch.bfloat16)
    key = linear_24_cuda.algorithm_key(x, 32, None)
    assert linear_24_cuda.algorithm_key(x.new_zeros(128, 64), 32, None) == key
    bias = torch.zeros(32)
    others = [
        (x.new_zeros(136, 64), 32, None),
        (x.new_zeros(64, 64), 32, None),
        (x.new_zeros(104, 128), 32, None),
        (x.half(), 32, None),
        (x, 48, None),
        (x, 32, bias),
    ]
    assert len({key, *(linear_24_cuda.algorithm_key(*other) for other in others)}) == 7


@pytest.fixture
def searches(monkeypatch):
    """What the two searches of PyTorch were asked for: (name, dtype), algorithms 5 and 6."""
    asked = []

    def old(packed, x, bias, transpose_result):
        asked.append(("old", x.dtype))
        return 5

    def new(packed, x, bias, alpha, dtype, transpose_result):
        assert alpha is None and dtype is None and transpose_result
        asked.append(("new", x.dtype))
        return 6, 1, -1, 30

    monkeypatch.setattr(linear_24_cuda, "_algorithms", {})
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", old)
    monkeypatch.setattr(torch._C, "_cusparselt", None, raising=False)
    return asked, lambda: monkeypatch.setattr(
        torch._C, "_cusparselt", SimpleNamespace(mm_search=new)
    )


def test_one_search_a_key_by_the_new_function_where_there_is_one(searches):
    asked, add_new = searches
    packed, x = torch.zeros(1), torch.zeros(72, 64, dtype=torch.bfloat16)
    assert [linear_24_cuda._algorithm(packed, x, 32, None) for _ in range(2)] == [5, 5]
    add_new()
    assert linear_24_cuda._algorithm(packed, x, 48, None) == 6
    assert asked == [("old", torch.bfloat16), ("new", torch.bfloat16)]


def test_no_search_in_fp16(searches):
    # It fails and leaves the device unusable (see _algorithm).
    asked, add_new = searches
    add_new()
    x = torch.zeros(72, 64, dtype=torch.float16)
    assert linear_24_cuda._algorithm(torch.zeros(1), x, 32, None) == 0
    assert asked == []


def test_the_library_serves_what_outlasts_its_plan(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    values, meta = torch.zeros(4096, 2048).bfloat16(), torch.zeros(4096, 512, dtype=torch.uint8)
    served = [
        tokens
        for tokens in (65, 1024, 4096, 8192, 16384)
        if linear_24_cuda._library_pays(
            torch.empty(tokens, 4096, device="meta", dtype=torch.bfloat16), values, meta, None
        )
    ]
    # 2 * 4096 * 4096 operations a token: 4e11 are reached at 11,921 tokens.
    assert served == [16384]


@pytest.fixture
def library(monkeypatch, searches):
    """cuSPARSELt's functions, done densely."""

    def product(packed, xt, bias, transpose_result, alg_id):
        assert transpose_result
        return xt.T @ packed.T

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", lambda w: w)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)


def test_weights_that_are_written_while_they_are_converted_are_converted_anew(monkeypatch, library):
    (values, meta), dense = weight(32, 64)
    x = torch.randn(72, 64).bfloat16()

    def compress(w):  # another thread comes first with its write
        monkeypatch.setattr(torch, "_cslt_compress", lambda w: w)
        values.mul_(2)
        return w

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    assert torch.equal(linear_24_cuda._library(x, values, meta, None), x @ dense.T)
    assert torch.equal(linear_24_cuda._library(x, values, meta, None), x @ (2 * dense).T)


def test_nothing_else_gets_the_address_that_a_converted_weight_is_known_by(library):
    for number in range(2):
        both = [t.clone() for t in weight(32, 64)[0]]  # views would hold what they are views of
        assert linear_24_cuda.prepare_library(*both, 72)
        held = StorageWeakRef(both[number].untyped_storage())
        both[number].data = both[number].clone()
        assert not held.expired()
        assert linear_24_cuda.prepare_library(*both, 72)
        assert held.expired()
        held = StorageWeakRef(both[number].untyped_storage())
        del both
        assert held.expired()


def test_a_graph_multiplies_by_the_library_if_it_was_prepared(monkeypatch, library, searches):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    (values, meta), dense = weight(32, 64)
    x = torch.randn(72, 64).bfloat16()
    pays = linear_24_cuda._library_pays
    assert not pays(x, values, meta, None)
    assert linear_24_cuda.prepare_library(values, meta, 72)
    assert pays(x, values, meta, None) and not pays(x.repeat(2, 1), values, meta, None)
    assert torch.equal(linear_24_cuda.linear_24_cuda(x, values, meta, None), x @ dense.T)
    values.mul_(2)  # its copy is of what it was
    assert not pays(x, values, meta, None)
    assert torch.equal(linear_24_cuda.linear_24_cuda(x, values, meta, None), x @ (2 * dense).T)
    for t in (values, meta):
        assert linear_24_cuda.prepare_library(values, meta, 72) and pays(x, values, meta, None)
        t.data = t.clone()
        assert not pays(x, values, meta, None)
    others = [(values[:31], meta[:31], 72), (values[:, :24], meta[:, :6], 72), (values, meta, 64)]
    assert not any(linear_24_cuda.prepare_library(*other) for other in others)
    assert len(searches[0]) == 1


@pytest.mark.parametrize(
    ("x", "values", "reason"),
    [
        ((4, 128, torch.bfloat16), torch.bfloat16, ""),
        ((300, 64, torch.float16), torch.float16, ""),
        ((4, 96, torch.bfloat16), torch.bfloat16, "multiple of 64 columns, got 96"),
        ((4, 128, torch.float32), torch.bfloat16, "both bf16 or both fp16"),
        ((4, 128, torch.bfloat16), torch.float16, "both bf16 or both fp16"),
    ],
)
def test_limits(x, values, reason):
    rows, cols, dtype = x
    got = linear_24_cuda.limits(
        torch.zeros(rows, cols, dtype=dtype), torch.zeros(8, cols // 2, dtype=values)
    )
    assert reason in got and bool(got) == bool(reason)


# --- on a GPU -----------------------------------------------------------------------------------


def assert_product(got, x, dense, bias=None):
    want = x.double() @ dense.double().T
    scale = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    limit = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[x.dtype]
    assert got.dtype == x.dtype and got.shape == want.shape
    assert ((got.double() - want).abs() <= limit * scale + 1e-30).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# One block; rows that fill no block; columns that fill no turn; enough of both to be split; so many
# rows that other shapes of blocks serve them.
@pytest.mark.parametrize(
    "shape", [(64, 64), (37, 192), (1, 1024), (130, 4160), (4096, 4096), (14350, 320)]
)
def test_matches_float64_on_a_gpu(use_backend, dtype, shape):
    use_backend("cuda", "linear_24", "cuda", dtype)
    tensors, dense = weight(*shape, dtype)
    on_gpu = [t.cuda() for t in tensors]
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(3))
    # 65 and 512 rows: the expanded matrix.
    for m in (1, 7, 8, 9, 16, 31, 33, 64, 65, 512):
        x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m)).to(dtype)
        for b in (None, bias):
            got = ops.linear_24(x.cuda(), *on_gpu, bias=None if b is None else b.cuda())
            assert_product(got.cpu(), x, dense, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(37, 192), (70, 4160), (14350, 64)])
def test_sanitized_on_a_gpu(use_backend, dtype, shape):
    """Small enough for compute-sanitizer (`make gpu-sanitize`): rows that fill no block, columns
    that are split, rows so many that other shapes of blocks serve them."""
    use_backend("cuda", "linear_24", "cuda", dtype)
    tensors, dense = weight(*shape, dtype)
    on_gpu = [t.cuda() for t in tensors]
    for m in (1, 8, 33, 64):
        x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m)).to(dtype)
        assert_product(ops.linear_24(x.cuda(), *on_gpu).cpu(), x, dense)


@pytest.mark.gpu
def test_same_result_every_time_on_a_gpu(use_backend):
    use_backend("cuda", "linear_24", "cuda", torch.bfloat16)
    tensors, _ = weight(256, 8192)
    on_gpu = [t.cuda() for t in tensors]
    x = torch.randn(5, 8192, dtype=torch.bfloat16, device="cuda")
    want = ops.linear_24(x, *on_gpu)
    for _ in range(20):
        assert torch.equal(ops.linear_24(x, *on_gpu), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_library_matches_float64_on_a_gpu(monkeypatch, use_backend, dtype):
    use_backend("cuda", "linear_24", "cuda", dtype)
    monkeypatch.setattr(linear_24_cuda, "LIBRARY_FLOPS", 0)
    tensors, dense = weight(96, 192, dtype)
    on_gpu = [t.cuda() for t in tensors]
    bias = torch.randn(96, generator=torch.Generator().manual_seed(3))
    for m in (65, 512):
        x = torch.randn(m, 192, generator=torch.Generator().manual_seed(m)).to(dtype)
        for b in (None, bias):
            got = ops.linear_24(x.cuda(), *on_gpu, bias=None if b is None else b.cuda())
            assert_product(got.cpu(), x, dense, b)


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [False, True])
def test_many_rows_in_a_graph_on_a_gpu(use_backend, prepared):
    use_backend("cuda", "linear_24", "cuda", torch.bfloat16)
    tensors, dense = weight(96, 192)
    on_gpu = [t.cuda() for t in tensors]
    static = torch.zeros(256, 192, dtype=torch.bfloat16, device="cuda")
    if prepared:
        linear_24_cuda.prepare_library(*on_gpu, 256)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.linear_24(static, *on_gpu)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear_24(static, *on_gpu)
    x = torch.randn(256, 192, generator=torch.Generator().manual_seed(4)).bfloat16()
    static.copy_(x)
    graph.replay()
    assert_product(y.cpu(), x, dense)


@pytest.mark.gpu
def test_changed_weights_are_compressed_anew_on_a_gpu(monkeypatch, use_backend):
    use_backend("cuda", "linear_24", "cuda", torch.bfloat16)
    monkeypatch.setattr(linear_24_cuda, "LIBRARY_FLOPS", 0)
    tensors, dense = weight(64, 128)
    values, meta = (t.cuda() for t in tensors)
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert_product(ops.linear_24(x.cuda(), values, meta).cpu(), x, dense)
    values.mul_(2)
    assert_product(ops.linear_24(x.cuda(), values, meta).cpu(), x, 2 * dense)


@pytest.mark.gpu
def test_other_dtypes_and_widths_go_to_triton_on_a_gpu():
    for cols, dtype in ((96, torch.bfloat16), (128, torch.float32)):
        tensors, dense = weight(40, cols, dtype)
        x = torch.randn(4, cols, generator=torch.Generator().manual_seed(5)).to(dtype).cuda()
        args = (x, *(t.cuda() for t in tensors), None)
        assert registry.select("linear_24", args) == "triton"
        got = torch.ops.pyprune.linear_24(*args).cpu().double()
        torch.testing.assert_close(got, x.cpu().double() @ dense.double().T, rtol=1e-2, atol=1e-1)
