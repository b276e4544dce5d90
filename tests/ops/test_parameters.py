"""A layer's weight is a parameter: ops take what requires a gradient, and give what does not."""

import pytest
import torch

from pyprune import ops

ROWS, COLS = 6, 16


def problem():
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, COLS, generator=gen)
    x, g = (torch.randn(3 * n, n, generator=gen) for n in (COLS, ROWS))
    h = ops.gram(x)
    return w, x, g, h, ops.gram(g), ops.obs_factor(h).u


CALLS = {
    "gram": lambda w, x, g, h, a, u: ops.gram(x),
    "column_norms": lambda w, x, g, h, a, u: ops.column_norms(x),
    "fisher_accumulate": lambda w, x, g, h, a, u: ops.fisher_accumulate(
        torch.zeros(ROWS, COLS), x[:, :ROWS], x
    ),
    "obs_factor": lambda w, x, g, h, a, u: ops.obs_factor(h)[:1],
    "obs_sweep": lambda w, x, g, h, a, u: ops.obs_sweep(w, u, nm=(2, 4)),
    "obs_sweep, fp64": lambda w, x, g, h, a, u: ops.obs_sweep(w.double(), u.double(), nm=(2, 4)),
    "obs_reconstruct": lambda w, x, g, h, a, u: ops.obs_reconstruct(w, h, ops.mask_nm(w, 2, 4)),
    "obs_greedy": lambda w, x, g, h, a, u: ops.obs_greedy(w, ops.gram(u), steps=3),
    "kron_quadratic": lambda w, x, g, h, a, u: ops.kron_quadratic(w, h),
    "kron_remove": lambda w, x, g, h, a, u: ops.kron_remove(
        w, torch.tensor([1]), torch.tensor([2]), ops.gram(u), a
    ),
    "kron_pcg": lambda w, x, g, h, a, u: ops.kron_pcg(w, ops.mask_nm(w, 2, 4), h, a),
    "pack_24": lambda w, x, g, h, a, u: ops.unpack_24(*ops.pack_24(w, ops.mask_nm(w, 2, 4))),
    "pack_bitmap": lambda w, x, g, h, a, u: ops.unpack_bitmap(*ops.pack_bitmap(w), COLS),
    "quantize_rows": lambda w, x, g, h, a, u: ops.quantize_rows(w),
    "linear_24": lambda w, x, g, h, a, u: ops.linear_24(
        x.detach(), *ops.pack_24(w, ops.mask_nm(w, 2, 4))
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_parameters_are_taken_as_numbers(call):
    given = problem()
    want = call(*given)
    got = call(*(t.clone().requires_grad_() for t in given))
    for a, b in zip(*([r] if isinstance(r, torch.Tensor) else r for r in (got, want)), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
