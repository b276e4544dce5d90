"""Nothing past a compressed matrix is read: its values and its metadata end where a page that may
not be touched begins. A kernel that reaches further ends the child process with a signal."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = r"""
import ctypes, mmap, sys
import torch
from ops.compressed import pack_24, pack_bitmap, random_24_mask
from pyprune import _native, ops

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []

def guarded(t):
    # A copy of t whose last byte is the last before a page without permissions.
    room = -(-t.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, room + PAGE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(start + room, PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    at = room - t.nbytes
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=at).view(t.shape)
    return copy.copy_(t)

isa, reach = sys.argv[1], int(sys.argv[2])
try:
    _native.MODULE.set_isa(isa)
except ValueError:
    sys.exit(77)
gen = torch.Generator().manual_seed(0)
for shape in ((3, 72), (5, 136), (18, 1096)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = torch.randn(shape, generator=gen).to(dtype)
        mask = random_24_mask(*shape, gen)
        q = (32 * w).clamp(-127, 127).to(torch.int8)
        scales = torch.full((shape[0],), 1 / 64)
        for m in (1, 3, 8, 12, 40):
            for x_dtype in (torch.float32, torch.bfloat16):
                x = guarded(torch.randn(m, shape[1], generator=gen).to(x_dtype))
                want = x.double() @ (w * mask).double().T
                dense = ops.linear_dense(x, guarded(w * mask))
                by24 = ops.linear_24(x, *map(guarded, pack_24(w, mask)))
                bitmap = ops.linear_bitmap(x, *map(guarded, pack_bitmap(w, mask)))
                for got in (dense, by24, bitmap):
                    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-1)
                want = x.double() @ (q * mask).double().T / 64
                by24 = ops.linear_24_int8(x, *map(guarded, (*pack_24(q, mask), scales)))
                bitmap = ops.linear_bitmap_int8(x, *map(guarded, (*pack_bitmap(q, mask), scales)))
                dense = ops.linear_int8(x, *map(guarded, (q * mask, scales)))
                for got in (by24, bitmap, dense):
                    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-1)
if reach:
    values, bitmap, offsets = pack_bitmap(w, mask)
    short = torch.frombuffer(kept[-1], dtype=torch.uint8)
    print("reading the guard", flush=True)
    ctypes.string_at(short.data_ptr() + short.nbytes - 1, 1)
print("done")
"""


def child(isa: str, reach: int) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{CHILD}"
    return subprocess.run(
        [sys.executable, "-c", code, isa, str(reach)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_products_stay_inside_their_buffers(isa):
    done = child(isa, reach=0)
    if done.returncode == 77:
        pytest.skip(f"this processor does not have {isa}")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-2000:]


def test_the_guard_guards():
    done = child("portable", reach=1)
    assert done.returncode != 0, "the guard page could be read"
    assert "reading the guard" in done.stdout and "done" not in done.stdout
