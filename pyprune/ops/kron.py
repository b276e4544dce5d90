"""Kronecker helpers for LLM Surgeon: quadratic forms of rows and columns, and the update for
removed rows and columns, under a curvature G (x) A. Its update for weights is `ops.kron_pcg`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import (
    check_rows,
    check_same_device,
    check_shape,
    check_tensor,
    over_stack,
)
from pyprune.ops._precision import full_precision
from pyprune.ops.storage import unit_columns

FACTOR_DTYPES = (torch.float32, torch.float64)
# Rows whose product with the factor exists at a time.
PANEL = 256


def check_factors(w: Tensor, factors: dict[str, tuple[Tensor | None, int]]) -> None:
    """`w` is an fp32 or fp64 matrix, and the factors given are square, of their side, alike it."""
    check_rows("w", w)
    if w.dtype not in FACTOR_DTYPES:
        raise ValueError(f"w: expected fp32 or fp64, got {w.dtype}")
    for name, (t, side) in factors.items():
        if t is None:
            continue
        check_shape(name, t, (side, side))
        if t.dtype != w.dtype:
            raise ValueError(f"{name}: expected {w.dtype} as w, got {t.dtype}")
    check_same_device(w, *(t for t, _ in factors.values()))


def widened(w: Tensor) -> Tensor:
    """16-bit weights as fp32: there is no 16-bit arithmetic here."""
    check_tensor("w", w)
    return w.float() if w.dtype in (torch.bfloat16, torch.float16) else w


# --- kron_quadratic ------------------------------------------------------------------------------


def _check_kron_quadratic(w: Tensor, h: Tensor) -> None:
    check_rows("w", w)
    check_factors(w, {"h": (h, w.shape[1])})


@full_precision()
def kron_quadratic_reference(w: Tensor, h: Tensor) -> Tensor:
    """A panel of rows at a time. H is symmetric, so each block column of it needs only the rows of
    its upper triangle: the strictly upper blocks count twice."""
    out = torch.zeros(len(w), dtype=w.dtype, device=w.device)
    for c0 in range(0, w.shape[1], PANEL):
        c1 = min(c0 + PANEL, w.shape[1])
        panel = w[:, c0:c1]
        for r0 in range(0, len(w), PANEL):
            rows = slice(r0, r0 + PANEL)
            product = w[rows, c0:c1] @ h[c0:c1, c0:c1]
            if c0:
                product.addmm_(w[rows, :c0], h[:c0, c0:c1], alpha=2)
            out[rows] += product.mul_(panel[rows]).sum(1)
    return out


def _kron_quadratic_fake(w: Tensor, h: Tensor) -> Tensor:
    _check_kron_quadratic(w, h)
    return w.new_empty(w.shape[0])


def _kron_quadratic_native(w: Tensor, h: Tensor) -> Tensor:
    out = w.new_empty(len(w))
    along_rows_or_columns = w if 1 in w.stride() else w.contiguous()
    _native.call("kron_quadratic", out, along_rows_or_columns, unit_columns(h))
    return out


registry.register(
    "kron_quadratic(Tensor w, Tensor h) -> Tensor",
    fake=_kron_quadratic_fake,
    impls={
        "reference": registry.Impl(kron_quadratic_reference, FACTOR_DTYPES),
        "native": registry.Impl(_kron_quadratic_native, (torch.float32,)),
        "triton": registry.Impl("pyprune.kernels.kron:kron_quadratic_triton", (torch.float32,)),
    },
)


def kron_quadratic(w: Tensor, h: Tensor) -> Tensor:
    """Quadratic form of every row, `out_i = sum_jk W_ij H_jk W_ik = (W H W^T)_ii`.

    W H is never stored (a panel of it at a time), and half its work is saved by the symmetry of H.
    For columns, `(W^T G W)_jj`, pass `w.T` and G: the numerators of LLM Surgeon's row and column
    costs (van der Ouderaa et al. 2024, arXiv 2312.17244, section 3.3).

    Args:
        w: weights `[R, C]`, or a stack `[B, R, C]`; fp32 or fp64 (bf16 and fp16 are widened to
            fp32), any strides.
        h: symmetric `[C, C]` or `[B, C, C]` of that dtype; only blocks on and above the diagonal
            are read. With a stack the other argument may be one for all.

    Returns:
        `[R]` or `[B, R]`, in that dtype. NaN and infinite inputs propagate.

    Raises:
        ValueError: a shape, dtype or device does not match.
    """
    w = widened(w)
    check_tensor("h", h)
    if w.dim() == 3 and h.dim() == 2:  # rows know nothing of one another
        return kron_quadratic(w.flatten(0, 1), h).view(w.shape[:2])
    if h.dim() == 3:
        forms = over_stack(kron_quadratic, {"w": w, "h": h}, (2, 2))
        return torch.stack(forms) if forms else w.new_empty(0, *w.shape[-2:-1])
    _check_kron_quadratic(w, h)
    out: Tensor = torch.ops.pyprune.kron_quadratic(w, h)
    return out


# --- kron_remove ---------------------------------------------------------------------------------


def _check_kron_remove(
    w: Tensor, rows: Tensor, columns: Tensor, a_inverse: Tensor, g_inverse: Tensor
) -> None:
    check_rows("w", w)
    check_factors(w, {"a_inverse": (a_inverse, w.shape[1]), "g_inverse": (g_inverse, w.shape[0])})
    for name, t in (("rows", rows), ("columns", columns)):
        if t.dim() != 1 or t.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 [n], got {t.dtype} {tuple(t.shape)}")
    check_same_device(w, rows, columns)


@full_precision()
def kron_remove_reference(
    w: Tensor, rows: Tensor, columns: Tensor, a_inverse: Tensor, g_inverse: Tensor
) -> Tensor:
    """First the rows, then the columns of what that leaves."""
    w = w.clone(memory_format=torch.contiguous_format)
    w -= g_inverse[:, rows] @ torch.linalg.solve(g_inverse[rows][:, rows], w[rows])
    w[rows] = 0
    w -= w[:, columns] @ torch.linalg.solve(a_inverse[columns][:, columns], a_inverse[columns])
    w[:, columns] = 0
    return w


@full_precision()
def _remove_at_once(
    w: Tensor, rows: Tensor, columns: Tensor, a_inverse: Tensor, g_inverse: Tensor
) -> Tensor:
    """One product of rank p + q, so that W is read and written once: what the second step needs of
    the first is the q columns that it removes."""
    left, right = g_inverse[:, rows], torch.linalg.solve(g_inverse[rows][:, rows], w[rows])
    removed = torch.addmm(w[:, columns], left, right[:, columns], alpha=-1)
    spread = torch.linalg.solve(a_inverse[columns][:, columns], a_inverse[columns])
    panel, coefficients = torch.cat([left, removed], dim=1), torch.cat([right, spread])
    w = torch.addmm(w, panel, coefficients, alpha=-1)
    w[rows] = 0
    w[:, columns] = 0
    return w


def _kron_remove_fake(
    w: Tensor, rows: Tensor, columns: Tensor, a_inverse: Tensor, g_inverse: Tensor
) -> Tensor:
    _check_kron_remove(w, rows, columns, a_inverse, g_inverse)
    return w.new_empty(w.shape)


registry.register(
    "kron_remove(Tensor w, Tensor rows, Tensor columns, Tensor a_inverse, Tensor g_inverse) "
    "-> Tensor",
    fake=_kron_remove_fake,
    impls={
        "reference": registry.Impl(kron_remove_reference, FACTOR_DTYPES),
        # A panel of some hundred columns: one library product, bound by reading and writing W.
        "native": registry.Impl(_remove_at_once, FACTOR_DTYPES),
        "triton": registry.Impl(_remove_at_once, FACTOR_DTYPES),
    },
)


def kron_remove(
    w: Tensor, rows: Tensor, columns: Tensor, a_inverse: Tensor, g_inverse: Tensor
) -> Tensor:
    """The exact minimiser of `1/2 tr(D^T G D A)`, D the change of `w`, with `rows` and `columns`
    zero: `(I - P) W (I - Q)`.

    P = G^-1[:, p] (G^-1[p, p])^-1 E_p^T and Q = E_q (A^-1[q, q])^-1 A^-1[q, :]. LLM Surgeon (van
    der Ouderaa et al. 2024, arXiv 2312.17244, section 3.3) adds the two corrections made on the
    original W and lacks their cross term.

    Args:
        w: weights `[R, C]`, or a stack `[B, R, C]`; fp32 or fp64 (bf16 and fp16 are widened to
            fp32), any strides. Not modified.
        rows, columns: int64 `[p]` and `[q]`, distinct indices of what goes; either may be empty.
        a_inverse, g_inverse: `[C, C]` and `[R, R]`, inverses of the damped factors, of that dtype.
            With a stack each of these four is one for all, or `[B, ...]`.

    Returns:
        The new weights, shaped like `w`, exactly zero in `rows` and `columns`.

    Raises:
        ValueError: a shape, dtype or device does not match.
        torch.linalg.LinAlgError: a block of an inverse is singular (an index given twice, say).
    """
    w = widened(w)
    if w.dim() == 3:
        given = {"w": w, "rows": rows, "columns": columns}
        given |= {"a_inverse": a_inverse, "g_inverse": g_inverse}
        updated = over_stack(kron_remove, given, (2, 1, 1, 2, 2))
        return torch.stack(updated) if updated else torch.empty_like(w)
    _check_kron_remove(w, rows, columns, a_inverse, g_inverse)
    out: Tensor = torch.ops.pyprune.kron_remove(w, rows, columns, a_inverse, g_inverse)
    return out
