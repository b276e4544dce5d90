"""Nothing outside a compressed matrix is read: its values and its metadata end where a page that
may not be touched begins, or begin where one ends. A kernel that reaches further ends the child
process with a signal."""

import subprocess
import sys
from pathlib import Path

import pytest
from ops.isa import AVAILABLE

CHILD = r"""
import ctypes, mmap, sys
import torch
from ops.compressed import pack_24, pack_bitmap, random_24_mask
from pyprune import _native, ops

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []

after = True

def guarded(t):
    # A copy of t between two pages without permissions, next to the one after it or before it.
    if not t.numel():
        return t
    room = -(-t.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + room):
        if libc.mprotect(page, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    at = PAGE + (room - t.nbytes if after else 0)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=at).view(t.shape)
    return copy.copy_(t)

SHAPES = ((3, 72), (5, 136), (18, 1096), (1, 1), (1, 7), (2, 63), (5, 65), (17, 131), (1, 8))

def products():
    global after
    gen = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        after = shape != (5, 136) and shape[0] != 2
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = torch.randn(shape, generator=gen).to(dtype)
            eights = shape[1] % 8 == 0
            mask = torch.rand(shape, generator=gen) < 0.5
            if eights:
                mask = random_24_mask(*shape, gen)
            q = (32 * w).clamp(-127, 127).to(torch.int8)
            scales = torch.full((shape[0],), 1 / 64)
            for m in (1, 3, 8, 12, 40, 200):
                for x_dtype in (torch.float32, torch.bfloat16):
                    x = guarded(torch.randn(m, shape[1], generator=gen).to(x_dtype))
                    want = x.double() @ (w * mask).double().T
                    got = [ops.linear_dense(x, guarded(w * mask))]
                    got.append(ops.linear_bitmap(x, *map(guarded, pack_bitmap(w, mask))))
                    if eights:
                        got.append(ops.linear_24(x, *map(guarded, pack_24(w, mask))))
                    if dtype == torch.bfloat16:
                        coded = tuple(map(guarded, ops.pack_coded(w * mask)))
                        got.append(ops.linear_coded(x, *coded))
                        last = torch.tensor([shape[0] - 1])
                        assert torch.equal(ops.unpack_coded(*coded, rows=guarded(last))[0],
                                           (w * mask)[-1])
                    for y in got:
                        torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-1)
                    want = x.double() @ (q * mask).double().T / 64
                    packed = (*pack_bitmap(q, mask), scales)
                    got = [ops.linear_bitmap_int8(x, *map(guarded, packed))]
                    got.append(ops.linear_int8(x, *map(guarded, (q * mask, scales))))
                    if eights:
                        packed = (*pack_24(q, mask), scales)
                        got.append(ops.linear_24_int8(x, *map(guarded, packed)))
                    for y in got:
                        torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-1)

def wrong_masks():
    # A row whose mask keeps all columns where it has few values, in a matrix that holds just as
    # many as such a mask may lead to, or one fewer. The first is read to the matrix's end before it
    # is refused.
    global after
    after = True
    for cols in (64, 128, 1152):
        for own in (8, 7):
            mask = torch.ones(2, cols, dtype=torch.bool)
            mask[0, own:] = False
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
                values, bitmap, offsets = pack_bitmap(mask.to(dtype), mask)
                assert values.numel() == own + cols
                bitmap[0] = 255
                packed = (*map(guarded, (values, bitmap, offsets)),)
                for m in (1, 2, 3, 8, 12, 24, 40, 200):
                    for x_dtype in (torch.float32, torch.bfloat16):
                        x = torch.ones(m, cols, dtype=x_dtype)
                        try:
                            if dtype == torch.int8:
                                ops.linear_bitmap_int8(x, *packed, torch.ones(2))
                            else:
                                ops.linear_bitmap(x, *packed)
                        except ValueError as error:
                            assert "row 0 has bits that do not match" in str(error)
                        else:
                            raise AssertionError("a wrong mask was taken")
        kept.clear()

def packing():
    # Matrices, masks and what they are packed into; groups of four that keep too many, too, of
    # which nothing is stored.
    gen = torch.Generator().manual_seed(1)
    for shape in (*SHAPES, (3, 64), (2, 128), (2, 120), (4, 200)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for density in (0.0, 0.1, 0.5, 1.0):
                w = torch.randn(shape, generator=gen).to(dtype)
                mask = torch.rand(shape, generator=gen) < density
                for packed in (ops.pack_bitmap(guarded(w * mask), None),
                               ops.pack_bitmap(guarded(w), guarded(mask))):
                    back = ops.unpack_bitmap(*map(guarded, packed), shape[1])
                    assert torch.equal(back, w * mask)
                if shape[1] % 8:
                    continue
                full = mask.unflatten(1, (-1, 4)).sum(-1) > 2
                for given in (None, guarded(mask)):
                    dense = guarded(w * mask if given is None else w)
                    if full.any():
                        try:
                            ops.pack_24(dense, given)
                        except ValueError as error:
                            assert "2 kept of every 4" in str(error), error
                        else:
                            raise AssertionError("a full group was packed")
                    else:
                        back = ops.unpack_24(*map(guarded, ops.pack_24(dense, given)))
                        assert torch.equal(back, w * mask)
                few = random_24_mask(*shape, gen)
                back = ops.unpack_24(*map(guarded, ops.pack_24(guarded(w), guarded(few))))
                assert torch.equal(back, w * few)
        kept.clear()

for isa in sys.argv[1:]:
    _native.MODULE.set_isa(isa)
    packing()
    products()
    wrong_masks()
    print("done", isa, flush=True)
    kept.clear()  # a process has a limited number of mappings
last = guarded(torch.ones(3))
print("reading the guard", flush=True)
ctypes.string_at(last.data_ptr() + last.nbytes, 1)
print("read it")
"""


@pytest.fixture(scope="module")
def child() -> subprocess.CompletedProcess[str]:
    """One process for all instruction sets; its end is the end of the guard's own test."""
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{CHILD}"
    return subprocess.run(
        [sys.executable, "-c", code, *AVAILABLE],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("isa", AVAILABLE)
def test_products_and_packing_stay_inside_their_buffers(child, isa):
    assert f"done {isa}\n" in child.stdout, child.stderr[-2000:]


def test_the_guard_guards(child):
    assert child.returncode != 0, "the guard page could be read"
    assert child.stdout.endswith("reading the guard\n"), child.stderr[-2000:]
