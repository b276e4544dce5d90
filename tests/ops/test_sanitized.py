"""Every kernel once, on sizes that divide nothing. Small enough for
compute-sanitizer: `make gpu-sanitize` runs what is called `sanitized`. On the CPU Triton's
interpreter runs the same calls, so that they are known to be right before a GPU sees them. The CUDA
C++ kernels of compressed layers have tests of their own."""

import pytest
import torch

from pyprune import ops
from pyprune.ops.registry import IMPLS

ROWS, COLS, TOKENS = 7, 24, 37


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def hessian():
    """fp64: what backends make of it differs by their own rounding only."""
    x = random(3 * COLS, COLS, dtype=torch.float64)
    return x.mT @ x


def pruned(device):
    w = random(ROWS, COLS, dtype=torch.bfloat16).to(device)
    return w * ops.mask_nm(w, 2, 4)


def compressed(layout, device):
    """x and the tensors of a product with a compressed matrix, int8 with scales or not."""
    w = pruned(device).float()
    numbers, scales = ops.quantize_rows(w)
    packed = {
        "linear_24": lambda: ops.pack_24(w),
        "linear_bitmap": lambda: ops.pack_bitmap(w),
        "linear_24_int8": lambda: (*int8_of(ops.pack_24, numbers), scales),
        "linear_bitmap_int8": lambda: (*int8_of(ops.pack_bitmap, numbers), scales),
        "linear_int8": lambda: (numbers, scales),
        "linear_coded": lambda: ops.pack_coded(w.bfloat16()),
    }[layout]()
    return random(3, COLS).to(device), *packed


def int8_of(pack, numbers):
    values, *rest = pack(numbers.float())
    return values.to(torch.int8), *rest


def products(layout):
    return [lambda d: getattr(ops, layout)(*compressed(layout, d))]


def sweep(device, **rule):
    u = torch.linalg.cholesky(torch.linalg.inv(hessian()), upper=True)
    swept = ops.obs_sweep(random(ROWS, COLS).to(device), u.float().to(device), **rule)
    return swept.weight, swept.mask, swept.loss


def reconstruct(device):
    w, h = random(ROWS, COLS).to(device), hessian().float().to(device)
    return ops.obs_reconstruct(w, h, w > 0, tolerance=3e-6).weight


def terms(device):
    made = {
        "column_scale": random(COLS).abs(),
        "row_scale": random(ROWS).abs(),
        "addend": random(ROWS, COLS).abs(),
        "preserve": random(ROWS, COLS) > -1,
    }
    return {name: t.to(device) for name, t in made.items()}


def by_lists(device):
    ws = [random(ROWS, COLS).to(device), random(3, 5).to(device)]
    return ops.mask_global(ws, 60)


def zeros(device):
    return torch.zeros(ROWS, COLS, device=device)


def gradients(device, dtype):
    return (random(2, TOKENS, n, dtype=dtype).to(device) for n in (ROWS, COLS))


CALLS = {
    "gram": [
        lambda d: ops.gram(random(TOKENS, COLS, dtype=torch.bfloat16).to(d)),
        lambda d: ops.gram(
            random(2, TOKENS, COLS).to(d), weight=random(2, TOKENS).abs().to(d), ones_column=True
        ),
    ],
    "column_norms": [
        lambda d: ops.column_norms(random(TOKENS, COLS).to(d), weight=random(TOKENS).abs().to(d))
    ],
    "fisher_accumulate": [
        lambda d: ops.fisher_accumulate(zeros(d), *gradients(d, torch.float32)),
        lambda d: ops.fisher_accumulate(zeros(d), *gradients(d, torch.float16), power=2),
    ],
    "obs_factor": [lambda d: ops.obs_factor(hessian().float().to(d)).u],
    "obs_sweep": [
        lambda d: sweep(d, nm=(2, 4)),
        lambda d: sweep(d, sparsity=0.5, block_size=16),
        lambda d: sweep(d, mask=random(ROWS, COLS).to(d) > 0),
    ],
    "obs_reconstruct": [reconstruct],
    "kron_quadratic": [
        lambda d: ops.kron_quadratic(random(ROWS, COLS).to(d), hessian().float().to(d)),
        lambda d: ops.kron_quadratic(random(COLS, ROWS).to(d).T, hessian().float().to(d)),
    ],
    "mask_nm": [
        lambda d: ops.mask_nm(random(ROWS, COLS).to(d), 2, 4),
        lambda d: ops.mask_nm(random(ROWS, COLS).to(d), 2, 4, **terms(d)),
    ],
    "mask_topk": [lambda d: ops.mask_topk(random(ROWS, COLS).to(d), 11, **terms(d))],
    "mask_global": [by_lists],
    "pack_24": [lambda d: ops.pack_24(pruned(d))],
    "unpack_24": [lambda d: ops.unpack_24(*ops.pack_24(pruned(d)))],
    "pack_bitmap": [lambda d: ops.pack_bitmap(pruned(d))],
    "unpack_bitmap": [lambda d: ops.unpack_bitmap(*ops.pack_bitmap(pruned(d)), COLS)],
    "linear_24": products("linear_24"),
    "linear_bitmap": products("linear_bitmap"),
    "linear_24_int8": products("linear_24_int8"),
    "linear_bitmap_int8": products("linear_bitmap_int8"),
    "linear_int8": products("linear_int8"),
    "linear_coded": products("linear_coded"),
}
# Kernels for sizes, dtypes or patterns of their own: tested where they are.
ELSEWHERE = {("linear_24", "cuda"), ("linear_bitmap", "cuda")}
CASES = [
    pytest.param(op, backend, device, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for op in CALLS
    for backend, device in (("triton", "cpu"), ("triton", "cuda"), ("cuda", "cuda"))
    if backend in IMPLS[op] and (op, backend) not in ELSEWHERE
]


@pytest.mark.parametrize(("op", "provider", "place"), CASES)
def test_sanitized(op, provider, place, use_backend):
    wanted = [call("cpu") for call in CALLS[op]]
    use_backend(provider, op, place)
    for call, want in zip(CALLS[op], wanted, strict=True):
        for a, b in zip(listed(call(place)), listed(want), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)


def listed(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)
