"""A layer as those tools see it: a matrix `[R, C]`, and the inputs `[T, C]` it multiplies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyprune import ops
from pyprune.errors import UserError
from pyprune.models.adapter import is_computed

LOG = logging.getLogger(__name__)


def matrix(layer: nn.Module) -> Tensor:
    """The weight as `[R, C]`, a view; of a Conv2d, C is channels x kernel height x width. Raises
    UserError for any other layer than Linear, Conv1D and Conv2d."""
    if not isinstance(layer, nn.Linear | Conv1D | nn.Conv2d):
        kind = type(layer).__name__
        if kind in ("Linear", "Conv1D", "Conv2d"):  # another's, such as peft's
            kind = f"{type(layer).__module__}.{kind}"
        raise UserError(f"layer: expected Linear, Conv1D or Conv2d, got {kind}")
    if is_computed(layer):
        raise UserError(
            "layer: expected a weight that is a parameter, got one that is computed before each "
            "use (torch.nn.utils.prune, weight_norm, a parametrization)"
        )
    weight: Tensor = layer.weight.detach()
    if weight.is_meta:
        raise UserError(
            "layer: expected a weight in memory, got one on the meta device: accelerate has "
            "offloaded it, where device_map found no room"
        )
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise UserError(f"layer: expected a Conv2d with one group, got {layer.groups}")
        if isinstance(layer.padding, str):
            raise UserError(
                f"layer: expected a Conv2d with padding in numbers, got {layer.padding!r}"
            )
        if layer.padding_mode != "zeros":
            raise UserError(f"layer: expected a Conv2d padded with zeros, got {layer.padding_mode}")
        return weight.flatten(1)
    return weight.T if isinstance(layer, Conv1D) else weight


def like_weight(layer: nn.Module, w: Tensor) -> Tensor:
    """`w [R, C]` in the shape and dtype of the layer's weight, contiguous as that."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    w = w.T if isinstance(layer, Conv1D) else w
    return w.reshape(weight.shape).to(weight.dtype).contiguous()


def tokens(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    """The inputs as `[T, C]`, and how many sequences (or images) they are.

    Linear and Conv1D: `[B, ..., C]`, or one sequence, `[T, C]`, or token, `[C]`. Conv2d: `[B, C, H,
    W]`, or without B; a token is what one position of the output is computed from.
    """
    if inputs.dtype == torch.float64:  # sums are kept in fp32, as there
        inputs = inputs.float()
    if isinstance(layer, nn.Conv2d):
        images = inputs if inputs.dim() == 4 else inputs[None]
        padding: Any = layer.padding  # numbers: see `matrix`
        patches: Tensor = nn.functional.unfold(
            images, layer.kernel_size, layer.dilation, padding, layer.stride
        )
        return patches.transpose(1, 2).flatten(0, 1), images.shape[0]
    sequences = 1 if inputs.dim() <= 2 else inputs.shape[0]
    return inputs.reshape(-1, inputs.shape[-1]), sequences


def accumulate(add: Callable[[Tensor], object], acc: Tensor, scale: float, n: int, new: int) -> int:
    """Goes on with a mean that is kept as `acc = scale / n * sum`, in place: `add` adds raw sums.
    Returns the new n."""
    if not new:
        return n
    acc.mul_(n / scale)
    add(acc)
    acc.mul_(scale / (n + new))
    return n + new


def sweep(
    w: Tensor,
    h: Tensor,
    *,
    sparsity: float,
    pruned: int,
    group: int,
    block_size: int,
    damping: float,
    preserve: Tensor | None = None,
    grid: ops.RowGrid | None = None,
) -> ops.ObsSweep:
    """SparseGPT for `w [R, C]` and `h [C, C]`, weights of dead inputs taken for 0, with
    `pruned` of every `group` weights removed, or, if those are 0, `sparsity` of every block of
    columns by the threshold rule of the SparseGPT code (one more than that share, and all ties).
    With `preserve` (False: stays pruned) the count is exact instead. Kept weights are rounded to
    `grid` where one is given. Raises UserError where no input was seen, or zeros alone: all weights
    would go."""
    if not bool(h.diagonal().any()):
        raise UserError("inputs: expected some that are not zero before the layer is pruned")
    factor = ops.obs_factor(h, damping=damping)
    if float(factor.damping) > damping:
        LOG.warning("the Hessian needed a damping of %g instead of %g", factor.damping, damping)
    w = w.float().masked_fill(factor.dead, 0)
    if pruned:
        return ops.obs_sweep(
            w, factor.u,
            nm=(group - pruned, group), preserve=preserve, block_size=block_size, grid=grid,
        )  # fmt: skip
    return ops.obs_sweep(
        w, factor.u,
        sparsity=sparsity, preserve=preserve, block_size=block_size, grid=grid,
        reference_count=preserve is None and sparsity < 1,
    )  # fmt: skip
