"""`SparseGPT` with the interface of the SparseGPT, Wanda and GBLM-Pruner repositories.

from pyprune.integrations.sparsegpt import SparseGPT  # instead of: from sparsegpt import *

(or, in `lib/prune.py`, of: from .sparsegpt import SparseGPT). The original prints the time and the
error of every layer; here `fasterprune` returns the error, and nothing is printed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.errors import UserError
from pyprune.integrations.layer import accumulate, like_weight, matrix, sweep, tokens
from pyprune.ops import RowGrid


class SparseGPT:
    """Hessian of a layer's inputs, then its weights pruned and updated (Frantar & Alistarh 2023,
    arXiv 2301.00774).

    Attributes:
        H: `[C, C]` fp32 on the layer's device, 2 / nsamples * X^T X.
        nsamples: sequences seen.
        rows, columns: R and C.
        quantizer: set to a `Quantizer` of the SparseGPT repository (`--wbits`), it makes
            `fasterprune` round kept weights to that grid in the same sweep. Its `find_params` is
            called if it is not `ready`.
    """

    quantizer: Any = None

    def __init__(self, layer: nn.Module) -> None:
        """layer: an nn.Linear, transformers' Conv1D or an nn.Conv2d. Raises UserError else."""
        self.layer = layer
        self.rows, self.columns = matrix(layer).shape
        self.dev: torch.device = layer.weight.device  # type: ignore[assignment]
        self.H: Tensor | None = torch.zeros(self.columns, self.columns, device=self.dev)
        self.nsamples = 0

    def add_batch(self, inp: Tensor, out: Tensor | None = None, blocksize: int = 1024) -> None:
        """inp: what the layer got, `[B, T, C]` or `[T, C]`. The others are not used."""
        hessian = self._hessian()
        x, sequences = tokens(self.layer, inp.detach().to(self.dev))
        self.nsamples = accumulate(
            lambda acc: ops.gram(x, out=acc), hessian, 2.0, self.nsamples, sequences
        )

    def fasterprune(
        self,
        sparsity: float,
        prunen: int = 0,
        prunem: int = 0,
        blocksize: int = 128,
        percdamp: float = 0.01,
        *,
        prune_n: int = 0,
        prune_m: int = 0,
    ) -> float:
        """Prunes the layer in place.

        Args:
            sparsity: share to remove from every block of columns, where prunen is 0.
            prunen, prunem: remove prunen of every prunem consecutive weights.
            blocksize: columns a block, rounded up to a multiple of prunem.
            percdamp: damping as a share of the Hessian's mean diagonal; see the package for what
                happens where it is not enough.
            prune_n, prune_m: prunen and prunem, as Wanda and GBLM-Pruner call them.

        Returns:
            1/2 tr(D H D^T), D the change of the weights, H damped: the "error" that the original
            prints.

        Raises:
            UserError: no input but zeros was seen, both names of a number were given, or a
                quantizer has no such grid. ValueError: a pattern that does not fit, or inputs that
                were not finite.
        """
        if (prunen and prune_n) or (prunem and prune_m):
            raise UserError("prune_n, prune_m: expected these or prunen and prunem, got both")
        prunen, prunem = prunen or prune_n, prunem or prune_m
        if prunen and not (0 < prunen < prunem and self.columns % prunem == 0):
            raise UserError(
                "prunen, prunem: expected fewer than all of every prunem weights, prunem a divisor "
                f"of the {self.columns} columns, got prunen {prunen} and prunem {prunem}"
            )
        w = matrix(self.layer)
        swept = sweep(
            w, self._hessian(),
            sparsity=sparsity, pruned=prunen, group=prunem, block_size=blocksize, damping=percdamp,
            grid=None if self.quantizer is None else _grid(self.quantizer, w.float()),
        )  # fmt: skip
        weight: nn.Parameter = self.layer.weight  # type: ignore[assignment]
        new = like_weight(self.layer, swept.weight)
        with torch.inference_mode(False):  # or the layer could not be trained afterwards
            weight.data = new.clone() if new.is_inference() else new
        return float(swept.loss.sum())

    def free(self) -> None:
        """Lets go of the Hessian."""
        self.H = None

    def _hessian(self) -> Tensor:
        if self.H is None:
            raise UserError("H: expected it to be there still, got a call after free()")
        return self.H


def _grid(quantizer: Any, w: Tensor) -> RowGrid:
    """The grid of a `Quantizer` for `w [R, C]`: scale * (q - zero) for the whole q from 0 to
    maxq."""
    missing = [name for name in ("ready", "find_params") if not hasattr(quantizer, name)]
    if missing:
        raise UserError(
            "quantizer: expected a Quantizer as in the SparseGPT repository, got "
            f"{type(quantizer).__name__} without {' and '.join(missing)}"
        )
    if not quantizer.ready():
        quantizer.find_params(w, weight=True)
    scale, zero, maxq = (
        torch.as_tensor(t, dtype=torch.float32, device=w.device).flatten()
        for t in (quantizer.scale, quantizer.zero, quantizer.maxq)
    )
    rows = len(w)
    if len(scale) != rows or len(zero) != rows or len(maxq) != 1:
        raise UserError(
            f"quantizer: expected a scale and a zero for each of {rows} rows and one maxq, got "
            f"{len(scale)}, {len(zero)} and {len(maxq)}"
        )
    if not bool(((zero >= 0) & (zero <= maxq) & (zero == zero.round()) & (scale > 0)).all()):
        raise UserError("quantizer: expected zero on the grid of every row, and scales above 0")
    return RowGrid(scale, -zero, maxq - zero)
