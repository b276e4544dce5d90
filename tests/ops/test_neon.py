"""Products of compressed weights, sums for statistics and row top-k with NEON: compiled for aarch64
and emulated, with and without its extension BF16.

Skipped without a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user)."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ops.compressed import pack_24, pack_bitmap, random_24_mask
from ops.isa import ALL

from pyprune import ops

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
pytestmark = pytest.mark.skipif(
    not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64"
)
PRODUCT, MASK_TOPK, CODED, SET, GRAM, FISHER = range(6)
DENSE, SPARSE24, BITMAP = 0, 1, 2
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4}  # of tensor_view.h
# Columns that end within a byte of mask, a step of eight, a word of 64, and after several words.
SHAPES = [(1, 1), (3, 7), (2, 63), (5, 65), (4, 72), (17, 200), (33, 1096)]
# Every number of sums side by side, one and several chunks; tiles of one to three vectors.
TOKENS = [1, 2, 3, 4, 5, 6, 8, 9, 13, 16, 17, 24, 25, 32, 33, 50]
# A processor of the emulator, and the set that is the best one there.
PROCESSORS = {"portable": "neoverse-n1", "neon_bf16": "max"}


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    built = tmp_path_factory.mktemp("neon") / "calls"
    names = [
        "sparse_linear",
        "sparse_int8",
        "linear_int8",
        "linear_coded",
        "mask_topk",
        "mask_global",
        "gram",
        "fisher_accumulate",
    ]
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-static", "-fopenmp", "-ffp-contract=fast", "-Wall",
         "-Wextra", "-Werror", "-DPYPRUNE_ISA=portable", f"-I{ROOT / 'csrc'}",
         ROOT / "tests/ops/neon_calls.cpp", *(ROOT / f"csrc/cpu/{s}.cpp" for s in names),
         "-o", built],
        check=True,
    )  # fmt: skip
    return built


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def run(calls: Path, isa: str, requests: list[bytes]) -> bytes:
    """What the requests give on the processor whose best set is `isa`, as it chooses itself."""
    command = [EMULATOR, "-cpu", PROCESSORS[isa], calls]
    done = subprocess.run(command, input=b"".join(requests), capture_output=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr.decode())
    return done.stdout


def header(*numbers: int) -> bytes:
    return np.array(numbers, dtype=np.int64).tobytes()


def product(fmt, shape, tokens, dtype, x_dtype, gen) -> tuple[bytes, torch.Tensor]:
    """A call, and what it should give (fp64)."""
    rows, cols = shape
    w = torch.randn(rows, cols, generator=gen).to(dtype)
    scales = torch.rand(rows, generator=gen)
    if dtype == torch.int8:
        w = torch.randint(-127, 128, (rows, cols), generator=gen, dtype=torch.int8)
    else:
        scales = torch.ones(rows)
    if fmt == DENSE:
        mask, parts = torch.ones(rows, cols, dtype=torch.bool), (w,)
    elif fmt == SPARSE24:
        mask = random_24_mask(rows, cols, gen)
        parts = pack_24(w, mask)
    else:
        mask = torch.rand(rows, cols, generator=gen) < 0.5
        mask[0] = rows > 2  # an empty row, or a full one
        parts = pack_bitmap(w, mask)
    x = torch.randn(tokens, cols, generator=gen).to(x_dtype)
    bias = torch.randn(rows, generator=gen)
    want = x.double() @ (w.double() * mask * scales.double()[:, None]).T + bias.double()
    arrays = [*parts, x, bias, *([scales] if dtype == torch.int8 else [])]
    numbers = (fmt, rows, cols, tokens, parts[0].numel(), DTYPES[dtype], x_dtype == torch.bfloat16)
    return header(PRODUCT, *numbers) + b"".join(map(raw, arrays)), want


def compare(given: bytes, wanted: list, x_dtype: torch.dtype) -> None:
    size = x_dtype.itemsize
    for fmt, shape, tokens, want in wanted:
        part, given = given[: want.numel() * size], given[want.numel() * size :]
        got = torch.frombuffer(bytearray(part), dtype=x_dtype).view(want.shape).double()
        # fp32 sums of at most 1,096 products; bf16 outputs are rounded to 8 bits.
        bound = (2.0**-8 if size == 2 else 1e-5) * want.abs().max() + 1e-6
        assert (got - want).abs().max() <= bound, (fmt, shape, tokens)
    assert not given


@pytest.mark.parametrize("isa", PROCESSORS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_products(calls, dtype, x_dtype, isa):
    gen = torch.Generator().manual_seed(0)
    requests, wanted = [], []
    for shape in SHAPES:
        for fmt in (DENSE, SPARSE24, BITMAP):
            if fmt == SPARSE24 and shape[1] % 8:
                continue
            for tokens in TOKENS:
                request, want = product(fmt, shape, tokens, dtype, x_dtype, gen)
                requests.append(request)
                wanted.append((fmt, shape, tokens, want))
    compare(run(calls, isa, requests), wanted, x_dtype)


@pytest.mark.parametrize("isa", PROCESSORS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_coded_products(calls, x_dtype, isa):
    gen = torch.Generator().manual_seed(0)
    requests, wanted = [], []
    for rows, cols in SHAPES:
        w = torch.randn(rows, cols, generator=gen).to(torch.bfloat16)
        w[:, ::5] *= 2.0**20  # escapes
        parts = ops.pack_coded(w)
        for tokens in TOKENS:
            x = torch.randn(tokens, cols, generator=gen).to(x_dtype)
            numbers = (CODED, DENSE, rows, cols, tokens, parts[3].numel(), 0, x_dtype.itemsize == 2)
            requests.append(header(*numbers) + b"".join(map(raw, (*parts, x))))
            wanted.append((CODED, (rows, cols), tokens, x.double() @ w.double().T))
    compare(run(calls, isa, requests), wanted, x_dtype)


def whole_numbers(tokens, gen) -> tuple[bytes, torch.Tensor]:
    """Sums that fp32 holds exactly, most of them between two bf16 numbers."""
    w = torch.randint(-127, 128, (33, 200), generator=gen).bfloat16()
    x = torch.randint(-127, 128, (tokens, 200), generator=gen).bfloat16()
    numbers = (PRODUCT, DENSE, 33, 200, tokens, w.numel(), DTYPES[w.dtype], 1)
    exact = (x.double() @ w.double().T).float().bfloat16()
    return header(*numbers) + raw(w) + raw(x) + raw(torch.zeros(33)), exact


@pytest.mark.parametrize("isa", PROCESSORS)
def test_sums_are_rounded_once_and_to_even(calls, isa):
    gen = torch.Generator().manual_seed(0)
    requests, wanted = zip(*(whole_numbers(tokens, gen) for tokens in TOKENS), strict=True)
    assert run(calls, isa, list(requests)) == b"".join(map(raw, wanted))


def special_product(fmt: int, tokens: int, gen) -> tuple[bytes, torch.Tensor]:
    """Infinities and NaNs in kept weights and bias; activations are neither nor zero."""
    rows, cols = 17, 72
    w = torch.randn(rows, cols, generator=gen).bfloat16()
    mask = random_24_mask(rows, cols, gen) if fmt != DENSE else torch.ones_like(w).bool()
    for row, found in ((0, ["inf"]), (3, ["-inf"]), (4, ["inf", "-inf"]), (16, ["nan"])):
        kept = mask[row].nonzero()[:, 0]
        w[row, kept[-len(found) :]] = torch.tensor([float(f) for f in found]).bfloat16()
    w[7], w[8] = 3e38, -3e38  # sums overflow
    parts = {DENSE: lambda: (w,), SPARSE24: lambda: pack_24(w, mask)}.get(
        fmt, lambda: pack_bitmap(w, mask)
    )()
    x = (1 + torch.rand(tokens, cols, generator=gen)).bfloat16()
    numbers = (PRODUCT, fmt, rows, cols, tokens, parts[0].numel(), DTYPES[w.dtype], 1)
    kept = torch.where(mask, w.double(), 0.0)
    request = header(*numbers) + b"".join(map(raw, (*parts, x, torch.zeros(rows))))
    return request, (x.double() @ kept.T).bfloat16()


@pytest.mark.parametrize("isa", PROCESSORS)
def test_infinities_and_nans(calls, isa):
    gen = torch.Generator().manual_seed(0)
    cases = [special_product(f, m, gen) for f in (DENSE, SPARSE24, BITMAP) for m in TOKENS]
    given = run(calls, isa, [request for request, _ in cases])
    for _, want in cases:
        got = torch.frombuffer(bytearray(given[: 2 * want.numel()]), dtype=torch.bfloat16)
        given = given[2 * want.numel() :]
        torch.testing.assert_close(got.view(want.shape), want, equal_nan=True, rtol=0.02, atol=0.05)
        assert want[:, 0].isinf().all() and want[:, 4].isnan().all() and want[:, 7].isinf().all()
    assert not given


def subnormal_product(tokens: int) -> bytes:
    w, x = torch.full((1, 8), 1e-39).bfloat16(), torch.full((tokens, 8), 2.0**100).bfloat16()
    numbers = (PRODUCT, DENSE, 1, 8, tokens, 8, DTYPES[w.dtype], 1)
    return header(*numbers) + raw(w) + raw(x) + raw(torch.zeros(1))


@pytest.mark.parametrize("isa", PROCESSORS)
def test_the_processor_chooses(calls, isa):
    """Each its best set, but not one that is turned off; bf16 products take subnormals for zero."""
    for chosen in {isa, "portable"}:
        requests = [header(SET, ALL.index(chosen), 0, 0, 0, 0, 0, 0)] if chosen != isa else []
        requests += [subnormal_product(tokens) for tokens in (1, 16, 33)]
        given = run(calls, isa, requests)
        if chosen != isa:
            assert given[0] == ALL.index(isa)
            given = given[1:]
        got = torch.frombuffer(bytearray(given), dtype=torch.bfloat16).double()
        one = torch.tensor(1e-39).bfloat16().double() * 8 * 2.0**100
        want = torch.zeros(50).double() if chosen == "neon_bf16" else one.repeat(50)
        torch.testing.assert_close(got, want, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("isa", PROCESSORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_for_statistics(calls, dtype, isa):
    """Tokens that end within a pair, a step of four and a panel's depth of 1,024; columns that
    leave blocks, vectors and panels of 24 in part empty, the ones alone in a new panel."""
    gen = torch.Generator().manual_seed(0)
    requests, wanted = [], []
    for tokens, cols in [(1, 1), (2, 7), (35, 23), (64, 24), (1061, 49), (2301, 30)]:
        x = torch.randn(2, tokens, cols, generator=gen).to(dtype)
        wide = torch.cat([x[0], torch.ones(tokens, 1)], dim=1).double()
        for ones in (0, 1):
            kept = (torch.rand(tokens, generator=gen) < (0.7 if ones else 2)).float()
            arrays = (
                header(GRAM, ones, 0, cols, tokens, 0, DTYPES[dtype], 0) + raw(x[0]) + raw(kept)
            )
            rows = wide[:, : cols + ones]
            requests.append(arrays)
            wanted.append((rows * kept[:, None]).T @ rows)
        g = torch.randn(2, tokens, 29, generator=gen).to(dtype)
        requests.append(header(FISHER, 0, 29, cols, tokens, 0, DTYPES[dtype], 0) + raw(g) + raw(x))
        wanted.append((g.double().mT @ x.double()).abs().sum(0))
    given = torch.frombuffer(bytearray(run(calls, isa, requests)), dtype=torch.float32)
    for got, want in zip(given.split([w.numel() for w in wanted]), wanted, strict=True):
        assert (got.view(want.shape) - want).abs().max() <= 4e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mask_topk(calls, dtype):
    gen = torch.Generator().manual_seed(0)
    requests, wanted = [], []
    for rows, cols in [(3, 5), (4, 200), (7, 1100)]:
        w = torch.randn(rows, cols, generator=gen).to(dtype)
        w[0, : cols // 2] = 1.5  # ties
        w[-1, 1] = float("nan")
        scale = torch.rand(cols, generator=gen)
        for pruned in (0, cols // 2, cols):
            numbers = header(MASK_TOPK, 0, rows, cols, 0, pruned, DTYPES[dtype], 0)
            requests.append(numbers + raw(w) + raw(scale))
            wanted.append(ops.mask_topk(w, pruned, column_scale=scale))
    given = run(calls, "portable", requests)
    assert given == b"".join(raw(mask) for mask in wanted)
