"""The deterministic example of the specification: 4 x 8 weights, two sequences of 16 tokens."""

import torch

SEQUENCES = 2


def golden():
    """W [4, 8] and X [32, 8], float64."""
    i = torch.arange(4, dtype=torch.float64)[:, None]
    j = torch.arange(8, dtype=torch.float64)[None]
    t = torch.arange(32, dtype=torch.float64)[:, None]
    w = torch.cos(2.3 * i + 1.7 * j + 0.5 * i * j)
    wave = torch.cos(0.4 + 0.5 * t) + 0.6 * torch.sin(0.9 * t + 0.8 * j)
    x = (1 + 3 * (j == 3)) * (wave + 0.3 * torch.cos(2.1 * t * (j + 1)))
    return w, x


def hessian(x):
    """SparseGPT's: 2 / sequences X^T X."""
    return 2 / SEQUENCES * x.T @ x


def damped(h, damping=0.01):
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def quadratic(d, h):
    """1/2 tr(D H D^T)."""
    return 0.5 * float(((d @ h) * d).sum())


def show(mask):
    """Rows of `1` = pruned and `.` = kept, as the specification writes masks."""
    return " / ".join("".join("." if kept else "1" for kept in row) for row in mask.tolist())


def exact_reconstruction(w, mask, h):
    """Per row the kept weights that minimise the quadratic error, from the closed form of OBS."""
    inverse = torch.linalg.inv(h)
    out = w.clone()
    for row, kept in zip(out, mask, strict=True):
        q = (~kept).nonzero()[:, 0]
        row -= inverse[:, q] @ torch.linalg.solve(inverse[q][:, q], row[q])
        row[q] = 0
    return out
