"""Micro-benchmarks of the ops, one call each, by pytest-benchmark.

    pytest benchmarks/test_micro.py --benchmark-enable --benchmark-group-by=param:op,param:shape
    pytest benchmarks/test_micro.py --benchmark-enable -k "gram and native" --benchmark-autosave

For comparing two commits on one machine (`--benchmark-compare`); the tables in README come from
bench_*.py, which also run the reference algorithms and the measured limits side by side.
"""

from typing import NamedTuple

import pytest
import torch
from _harness import forced_backend, our_backends

from pyprune import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Linear layers of SmolLM2-135M (outputs x inputs) and a square one past the second-level cache.
SHAPES = [(576, 576), (1536, 576), (2048, 2048)]
TOKENS = 512
RECONSTRUCTED = 16


class Problem(NamedTuple):
    """Weight, calibration inputs and output gradients, Gram matrix with its factor, 2:4 mask."""

    w: torch.Tensor
    x: torch.Tensor
    g: torch.Tensor
    gram: torch.Tensor
    factor: ops.ObsFactor
    mask: torch.Tensor


def problem(shape):
    rows, cols = shape
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, cols, generator=generator).to(DEVICE)
    x = torch.randn(TOKENS, cols, generator=generator).to(DEVICE)
    g = torch.randn(TOKENS, rows, generator=generator).to(DEVICE)
    gram = ops.gram(x)
    return Problem(w, x, g, gram, ops.obs_factor(gram), ops.mask_nm(w, 2, 4))


def reconstruct(p):
    """To 1e-4 of the weights. Few rows: the reference factors a matrix for each."""
    few = slice(RECONSTRUCTED)
    return ops.obs_reconstruct(
        p.w[few], p.gram, p.mask[few], factor=p.factor, tolerance=3e-6
    ).weight


CALLS = {
    "gram": lambda p: ops.gram(p.x),
    "column_norms": lambda p: ops.column_norms(p.x),
    "fisher_accumulate": lambda p: ops.fisher_accumulate(
        torch.zeros_like(p.w), p.g[None], p.x[None]
    ),
    "kron_quadratic": lambda p: ops.kron_quadratic(p.w, p.gram),
    "obs_factor": lambda p: ops.obs_factor(p.gram, damping=0.01).u,
    "obs_sweep": lambda p: ops.obs_sweep(p.w, p.factor.u, nm=(2, 4)).loss,
    "obs_reconstruct": reconstruct,
    "mask_nm": lambda p: ops.mask_nm(p.w, 2, 4),
    "mask_topk": lambda p: ops.mask_topk(p.w, p.w.shape[1] // 2),
    "mask_global": lambda p: ops.mask_global([p.w], p.w.numel() // 2)[0],
}
CASES = [(op, backend) for op in CALLS for backend in our_backends(op, DEVICE, torch.float32)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_micro(benchmark, op, backend, shape):
    inputs = problem(shape)
    expected = CALLS[op](inputs)

    def call():
        with forced_backend(backend):
            result = CALLS[op](inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    got = benchmark(call)
    if expected.dtype == torch.bool:
        assert torch.equal(got, expected)
    else:
        error = (got - expected).norm() / expected.norm()
        # A sweep chooses as it goes: rounding decides near ties, which its loss hardly sees.
        assert float(error) < (1e-2 if op == "obs_sweep" else 1e-3)
