"""Products with AMX, in a process of its own: what test_amx.py looks at, a line of JSON a case.

python amx_child.py EMULATOR|-      # a library of amx_emulator.cpp, or a processor that has AMX
"""

import ctypes
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ops.compressed import pack_24, pack_bitmap, random_24_mask

from pyprune import _native, ops

# Rows that leave tiles of 16, and 32 and 48 of them, in part empty; columns that end within a word
# of mask, a step of 32 columns, a tile's depth of 256, and so many that a bitmap's tiles narrow.
SHAPES = [(1, 8), (15, 64), (17, 72), (49, 264), (97, 1096), (70, 9000)]
TOKENS = [8, 9, 16, 17, 32, 33, 49, 580]
FORMATS = ("dense", "sparse24", "bitmap")


def weight(fmt, rows, cols, gen):
    """W `[R, C]` int8, in bf16 as well, and its mask."""
    w = torch.randint(-127, 128, (rows, cols), generator=gen, dtype=torch.int8)
    if fmt == "dense":
        return w, torch.ones(rows, cols, dtype=torch.bool)
    if fmt == "sparse24":
        return w, random_24_mask(rows, cols, gen)
    mask = torch.rand(rows, cols, generator=gen) < 0.5
    mask[0] = rows > 2  # a full row, or an empty one
    return w, mask


def call(fmt, values, mask, x, bias, scales):
    """`x @ W^T + bias` by the op for the format; with scales where the values are int8."""
    after = () if scales is None else (scales,)
    suffix = "" if scales is None else "_int8"
    if fmt == "dense":
        if scales is None:
            return ops.linear_dense(x, values, bias=bias)
        return ops.linear_int8(x, values, scales, bias=bias)
    parts = pack_24(values, mask) if fmt == "sparse24" else pack_bitmap(values, mask)
    op = {"sparse24": "linear_24", "bitmap": "linear_bitmap"}[fmt] + suffix
    return getattr(ops, op)(x, *parts, *after, bias=bias)


def tell(row: dict) -> None:
    sys.stdout.write(json.dumps(row) + "\n")


def sums(gen):
    """Gram matrices and gradient magnitudes: case, what is given, what it should be (fp64)."""
    # Tokens that end within a word, a step of 32 tokens and a panel's depth of 1,024; columns that
    # leave tiles and panels of 48 in part empty, the column of ones alone in a new panel.
    for tokens, columns in [(1, 1), (33, 17), (64, 48), (1061, 100), (2100, 70)]:
        x = torch.randn(tokens, columns, generator=gen).bfloat16()
        g = torch.randn(2, tokens, 51, generator=gen).bfloat16()
        kept = (torch.rand(tokens, generator=gen) < 0.7).float()
        wide = torch.cat([x, torch.ones(tokens, 1)], dim=1).double()
        yield "gram", (tokens, columns), ops.gram(x), wide[:, :-1].mT @ wide[:, :-1]
        want = (wide * kept[:, None]).mT @ wide
        yield "gram", (tokens, columns), ops.gram(x, weight=kept, ones_column=True), want
        acc = torch.zeros(51, columns)
        ops.fisher_accumulate(acc, g, torch.stack([x, x.flip(0)]))
        want = (g.double().mT @ torch.stack([x, x.flip(0)]).double()).abs().sum(0)
        yield "fisher_accumulate", (tokens, columns), acc, want


def main() -> None:
    module = _native.MODULE
    library = None if sys.argv[1] == "-" else ctypes.CDLL(sys.argv[1])
    if library is not None:
        for name in ("products_made", "configurations_made", "releases_made"):
            getattr(library, name).restype = ctypes.c_int64
        library.start()
    module.set_isa("avx512_amx", emulated=library is not None)
    torch.set_num_threads(2)
    gen = torch.Generator().manual_seed(0)
    for shape, fmt, int8 in itertools.product(SHAPES, FORMATS, (False, True)):
        rows, cols = shape
        w, mask = weight(fmt, rows, cols, gen)
        scales = torch.rand(rows, generator=gen) / 100 if int8 else None
        wide = w.double() * mask * (1 if scales is None else scales.double()[:, None])
        for tokens in TOKENS:
            if tokens > 100 and rows * cols > 20_000:
                continue
            x = torch.randn(tokens, cols + 3, generator=gen).bfloat16()[:, 2:-1]  # strided
            bias = torch.randn(rows, generator=gen)
            before = library.products_made() if library else 0
            y = call(fmt, w if int8 else w.bfloat16(), mask, x, bias, scales)
            want = x.double() @ wide.T + bias.double()
            # Outputs are rounded to eight bits, sums in fp32.
            bound = 2.0**-8 * want.abs() + 2e-6 * (x.double().abs() @ wide.abs().T) + 1e-6
            tell({
                "format": fmt, "int8": int8, "shape": shape, "tokens": tokens,
                "error": float(((y.double() - want).abs() / bound).max()),
                "products": library.products_made() - before if library else None,
            })  # fmt: skip
    before = library.products_made() if library else 0
    for op, shape, got, want in sums(gen):
        tell({
            "op": op, "shape": shape,
            "error": float((got.double() - want).abs().max() / (4e-6 * want.abs().max() + 1e-30)),
            "products": library.products_made() - before if library else None,
        })  # fmt: skip
        before = library.products_made() if library else 0
    if library is not None:
        tell({
            "configurations": library.configurations_made(),
            "releases": library.releases_made(),
            "configured": bool(library.is_configured()),
        })  # fmt: skip


if __name__ == "__main__":
    main()
