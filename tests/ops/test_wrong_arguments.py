"""What is no dense tensor, or does not fit, is refused with the argument's name by every op."""

import numpy as np
import pytest
import torch

from pyprune import ops

W = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(1))
G = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(2))
H = X.flatten(0, 1).T @ X.flatten(0, 1)
HG = G.flatten(0, 1).T @ G.flatten(0, 1)
U = ops.obs_factor(H).u
VALUES, META = ops.pack_24(W, ops.mask_nm(W, 2, 4))
BITMAP = ops.pack_bitmap(W, ops.mask_topk(W, 8))
CODED = ops.pack_coded(W.bfloat16())
Q, SCALES = ops.quantize_rows(W)

# By op and argument: the call with one argument to be put in its place.
CALLS = {
    ("gram", "x"): ops.gram,
    ("column_norms", "x"): ops.column_norms,
    ("fisher_accumulate", "g"): lambda g: ops.fisher_accumulate(torch.zeros(8, 16), g, X),
    ("fisher_accumulate", "x"): lambda x: ops.fisher_accumulate(torch.zeros(8, 16), G, x),
    ("obs_factor", "h"): ops.obs_factor,
    ("inverse_diagonal", "u"): ops.inverse_diagonal,
    ("obs_sweep", "w"): lambda w: ops.obs_sweep(w, U, sparsity=0.5),
    ("obs_sweep", "u"): lambda u: ops.obs_sweep(W, u, sparsity=0.5),
    ("obs_greedy", "w"): lambda w: ops.obs_greedy(w, torch.eye(16), steps=4),
    ("obs_greedy", "inverse"): lambda inverse: ops.obs_greedy(W, inverse, steps=4),
    ("obs_reconstruct", "w"): lambda w: ops.obs_reconstruct(w, H, W > 0),
    ("obs_reconstruct", "h"): lambda h: ops.obs_reconstruct(W, h, W > 0),
    ("mask_nm", "w"): lambda w: ops.mask_nm(w, 2, 4),
    ("mask_topk", "w"): lambda w: ops.mask_topk(w, 8),
    ("mask_topk", "column_scale"): lambda scale: ops.mask_topk(W, 8, column_scale=scale),
    ("kron_quadratic", "w"): lambda w: ops.kron_quadratic(w, H),
    ("kron_quadratic", "h"): lambda h: ops.kron_quadratic(W, h),
    ("kron_pcg", "w"): lambda w: ops.kron_pcg(w, W > 0, H, HG),
    ("row_grid", "w"): lambda w: ops.row_grid(w, 4),
    ("quantize_rows", "w"): ops.quantize_rows,
    ("dequantize_rows", "q"): lambda q: ops.dequantize_rows(q, SCALES),
    ("dequantize_rows", "scales"): lambda scales: ops.dequantize_rows(Q, scales),
    ("pack_24", "w"): ops.pack_24,
    ("pack_bitmap", "w"): ops.pack_bitmap,
    ("pack_coded", "w"): ops.pack_coded,
    ("linear_dense", "x"): lambda x: ops.linear_dense(x, W),
    ("linear_dense", "weight"): lambda weight: ops.linear_dense(X, weight),
    ("linear_24", "x"): lambda x: ops.linear_24(x, VALUES, META),
    ("linear_bitmap", "x"): lambda x: ops.linear_bitmap(x, *BITMAP),
    ("linear_coded", "x"): lambda x: ops.linear_coded(x, *CODED),
    ("linear_int8", "x"): lambda x: ops.linear_int8(x, Q, SCALES),
}


@pytest.mark.parametrize("op", CALLS, ids=" ".join)
def test_what_is_no_tensor(op):
    _, name = op
    wrong = [[1.0], np.ones((8, 16))] if name == "column_scale" else [None, [1.0], np.ones((8, 16))]
    for value in wrong:
        with pytest.raises(
            TypeError, match=f"^{name}: expected a tensor, got {type(value).__name__}$"
        ):
            CALLS[op](value)


@pytest.mark.parametrize("op", CALLS, ids=" ".join)
def test_what_is_not_dense(op):
    message = f"^{op[1]}: expected a dense tensor, got one of layout torch.sparse_coo$"
    with pytest.raises(ValueError, match=message):
        CALLS[op](torch.eye(16).to_sparse())


@pytest.mark.parametrize(("call", "message"), [
    (lambda: ops.inverse_diagonal(W), r"u: expected shape \[..., C, C\], got \(8, 16\)"),
    (lambda: ops.inverse_diagonal(U[0]), r"u: expected shape \[..., C, C\], got \(16,\)"),
    (lambda: ops.inverse_diagonal(U.bfloat16()), r"u: expected fp32 or fp64, got torch.bfloat16"),
    (lambda: ops.inverse_diagonal(U.long()), r"u: expected fp32 or fp64, got torch.int64"),
    # These spread over all rows before.
    (lambda: ops.dequantize_rows(Q, SCALES[:1]), r"scales: expected shape \(8,\), got \(1,\)"),
    (lambda: ops.dequantize_rows(Q, SCALES[:, None]), r"scales: expected shape \(8,\), got"),
    (lambda: ops.dequantize_rows(Q, SCALES.int()), "scales: expected bf16, fp16, fp32 or fp64"),
    (lambda: ops.dequantize_rows(Q[0], SCALES), r"q: expected 2 dimensions, got shape \(16,\)"),
])  # fmt: skip
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
