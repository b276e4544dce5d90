"""Per-sequence gradient magnitudes: the diagonal of the empirical Fisher, GBLM's statistic."""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import registry
from pyprune.ops._checks import check_accumulator, check_matrices, check_same_device, check_shape
from pyprune.ops._precision import full_precision
from pyprune.ops.storage import unit_columns


def _check_fisher_accumulate(acc: Tensor, g: Tensor, x: Tensor, power: int, scale: float) -> None:
    check_matrices("x", x)
    check_matrices("g", g)
    check_shape("g", g, (*x.shape[:-1], g.shape[-1]))
    if g.dtype != x.dtype:
        raise ValueError(f"g: expected {x.dtype} as x has, got {g.dtype}")
    check_accumulator("acc", acc, (g.shape[-1], x.shape[-1]), x)
    check_same_device(x, g, acc)
    if power not in (1, 2):
        raise ValueError(f"power: expected 1 or 2, got {power}")


@full_precision()
def fisher_accumulate_reference(
    acc: Tensor, g: Tensor, x: Tensor, power: int, scale: float
) -> None:
    sequences = zip(g[None], x[None], strict=True) if x.dim() == 2 else zip(g, x, strict=True)
    for g_n, x_n in sequences:
        gradient = (g_n.to(acc.dtype).T @ x_n.to(acc.dtype)) * scale
        acc += gradient.abs() if power == 1 else gradient.square()


def _fisher_accumulate_native(acc: Tensor, g: Tensor, x: Tensor, power: int, scale: float) -> None:
    stacks = [unit_columns(t if t.dim() == 3 else t[None]) for t in (g, x)]
    target = acc.contiguous()
    _native.call("fisher_accumulate", target, *stacks, power, scale)
    if target is not acc:
        acc.copy_(target)


registry.register(
    "fisher_accumulate(Tensor(a!) acc, Tensor g, Tensor x, int power, float scale) -> ()",
    fake=_check_fisher_accumulate,
    impls={
        "reference": registry.Impl(fisher_accumulate_reference),
        "native": registry.Impl(_fisher_accumulate_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl(
            "pyprune.kernels.fisher_accumulate:fisher_accumulate_triton", registry.HALF_OR_SINGLE
        ),
    },
    dtype_arg=2,
)


def fisher_accumulate(
    acc: Tensor, g: Tensor, x: Tensor, *, power: int = 1, scale: float = 1.0
) -> Tensor:
    """Adds `|scale * G^T X|` or its square, sequence by sequence, to `acc`.

    `G^T X` is the gradient of a linear layer's weight for one sequence, `G` being the gradient of
    its output and `X` its input. The gradient itself is never stored: each tile of it is reduced
    over the tokens of its sequence, then made a magnitude and added. Several sequences count
    separately: the sum of magnitudes, not the magnitude of a sum.

    Args:
        acc: accumulator `[R, C]` (out x in features), fp32 (fp64 for fp64 inputs), updated in
            place.
        g: output gradients, `[T, R]` for one sequence or `[N, T, R]` for N of them; bf16, fp16,
            fp32 or fp64; any strides. Padded tokens have a gradient of zero and so drop out.
        x: inputs `[T, C]` or `[N, T, C]`, same dtype.
        power: 1 adds magnitudes (GBLM's l1), 2 adds squares (l2, OBD's and ECoFLaP's diagonal
            Fisher information).
        scale: multiplies the gradient before the magnitude is taken, e.g. GBLM's 100, or the
            inverse of a loss scale.

    Returns:
        `acc`: sums over sequences, not means. NaN and infinite inputs propagate.
        Source: Das et al. 2023 (GBLM-Pruner), eq. 4 and 5; LeCun et al. 1990 (OBD).

    Raises:
        ValueError: a shape, dtype or device does not match, or `power` is neither 1 nor 2.
    """
    _check_fisher_accumulate(acc, g, x, power, scale)
    if acc.numel() and x.numel():
        torch.ops.pyprune.fisher_accumulate(acc, g, x, power, scale)
    return acc
