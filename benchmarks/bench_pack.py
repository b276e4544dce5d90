"""Packing pruned matrices into the 2:4 and bitmap layouts, and back.

Providers: ours, per backend; `torch`, the composition of PyTorch's own calls; `converter`, the
Python converter of torch.sparse (2:4 only, it also reorders the metadata); `same_copy`, a copy that
reads and writes as many bytes as the op must, timed in turns with the others: the limit.
"""

import torch
from _harness import Bench, Case, copies, forced_backend, our_backends, parse
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from pyprune import ops
from pyprune.ops import pack

SHAPES = {
    "cpu": [(576, 576), (4096, 4096), (4096, 14336)],
    "cuda": [(1536, 576), (4096, 4096), (4096, 14336), (8192, 28672)],
}
DTYPES = (torch.bfloat16, torch.float32)


def pruned(op, shape, dtype, device):
    w = torch.randn(shape, device=device).to(dtype)
    mask = ops.mask_nm(w, 2, 4) if "24" in op else ops.mask_topk(w, shape[1] // 2)
    return w.masked_fill(~mask, 0)


def traffic(op, shape, dtype):
    """Bytes that must be read and written: the dense matrix, the values, the metadata. Packing a
    bitmap reads the matrix twice, as its rows' places are known only after they are counted."""
    numel = shape[0] * shape[1]
    dense = numel * dtype.itemsize
    metadata = numel / 8
    reads = 2 if op == "pack_bitmap" else 1
    return int(reads * dense + dense / 2 + metadata)


def torch_providers(op, w, dtype):
    """The composition (our reference) and PyTorch's converter on one pruned matrix."""
    cols = w.shape[1]
    if op == "pack_24":
        found = {"torch": lambda: pack.pack_24_reference(w, None)}
        if dtype.itemsize == 2 and w.shape[0] % 32 == 0 and cols % 64 == 0:
            found = {"converter": lambda: sparse_semi_structured_from_dense_cutlass(w), **found}
        return found
    if op == "unpack_24":
        packed = pack.pack_24_reference(w, None)[:2]
        found = {"torch": lambda: pack.unpack_24_reference(*packed)}
        if dtype.itemsize == 2 and w.shape[0] % 32 == 0 and cols % 64 == 0:
            theirs = sparse_semi_structured_from_dense_cutlass(w)
            found = {"converter": lambda: sparse_semi_structured_to_dense_cutlass(*theirs), **found}
        return found
    if op == "pack_bitmap":
        return {"torch": lambda: pack.pack_bitmap_reference(w, None)}
    packed = pack.pack_bitmap_reference(w, None)
    return {"torch": lambda: pack.unpack_bitmap_reference(*packed, cols)}


def arguments(op, w):
    """Arguments of the registered op. Validation is left out: it is timed as part of no layout."""
    if op.startswith("pack"):
        return (w, None)
    packed = ops.pack_24(w) if op == "unpack_24" else ops.pack_bitmap(w)
    return packed if op == "unpack_24" else (*packed, w.shape[1])


def case(op, shape, dtype, device) -> Case:
    nbytes = traffic(op, shape, dtype)
    count = copies(nbytes, device)
    weights = [pruned(op, shape, dtype, device) for _ in range(count)]
    inputs = [arguments(op, w) for w in weights]
    theirs = [torch_providers(op, w, dtype) for w in weights]
    source = [torch.ones(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(count)]
    target = torch.empty_like(source[0])
    want = theirs[0]["torch"]()

    def run(backend):
        def call(i):
            with forced_backend(backend):
                return getattr(torch.ops.pyprune, op)(*inputs[i % count])

        return call

    def check(name, got):
        if name in ("same_copy", "converter"):  # the converter's metadata is reordered
            return
        pairs = zip(got, want, strict=True) if isinstance(got, (tuple, list)) else [(got, want)]
        assert all(torch.equal(a, b) for a, b in pairs), f"{name}: differs from the reference"

    names = [b for b in our_backends(op, device, dtype) if b != "reference"]
    providers = {backend: run(backend) for backend in names}
    providers["same_copy"] = lambda i: target.copy_(source[i % count])
    for name in theirs[0]:
        providers[name] = lambda i, name=name: theirs[i % count][name]()
    return Case(shape, dtype, 0.0, nbytes, providers, "same_copy", check, "torch", {"layout": op})


def main() -> None:
    args = parse(__doc__)
    bench = Bench("pack", args)
    shapes = [(64, 64)] if args.smoke else SHAPES[args.device]
    for shape in shapes:
        for dtype in DTYPES:
            for op in ("pack_24", "unpack_24", "pack_bitmap", "unpack_bitmap"):
                bench.run(case(op, shape, dtype, args.device))
    bench.finish()


if __name__ == "__main__":
    main()
