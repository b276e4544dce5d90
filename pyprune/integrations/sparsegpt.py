"""`SparseGPT` with the interface of the SparseGPT and Wanda repositories.

from pyprune.integrations.sparsegpt import SparseGPT  # instead of: from sparsegpt import *
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.errors import UserError
from pyprune.integrations.layer import accumulate, like_weight, matrix, sweep, tokens


class SparseGPT:
    """Hessian of a layer's inputs, then its weights pruned and updated (Frantar & Alistarh 2023,
    arXiv 2301.00774).

    Attributes:
        H: `[C, C]` fp32 on the layer's device, 2 / nsamples * X^T X.
        nsamples: sequences seen.
        rows, columns: R and C.
    """

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
    ) -> float:
        """Prunes the layer in place.

        Args:
            sparsity: share to remove from every block of columns, where prunen is 0.
            prunen, prunem: remove prunen of every prunem consecutive weights.
            blocksize: columns a block.
            percdamp: damping as a share of the Hessian's mean diagonal; see the package for what
                happens where it is not enough.

        Returns:
            1/2 tr(D H D^T), D the change of the weights, H damped: the "error" that the original
            prints.

        Raises:
            UserError: `quantizer` is set, or no input but zeros was seen. ValueError: a pattern
                that does not fit, or inputs that were not finite.
        """
        if getattr(self, "quantizer", None) is not None:
            raise UserError("quantizer: expected none; pyprune prune -O quantise_bits=4 rounds too")
        if prunen and not (0 < prunen < prunem and self.columns % prunem == 0):
            raise UserError(
                "prunen, prunem: expected fewer than all of every prunem weights, prunem a divisor "
                f"of the {self.columns} columns, got prunen {prunen} and prunem {prunem}"
            )
        swept = sweep(
            matrix(self.layer), self._hessian(),
            sparsity=sparsity, pruned=prunen, group=prunem, block_size=blocksize, damping=percdamp,
        )  # fmt: skip
        weight: nn.Parameter = self.layer.weight  # type: ignore[assignment]
        w = like_weight(self.layer, swept.weight)
        with torch.inference_mode(False):  # or the layer could not be trained afterwards
            weight.data = w.clone() if w.is_inference() else w
        return float(swept.loss.sum())

    def free(self) -> None:
        """Lets go of the Hessian."""
        self.H = None

    def _hessian(self) -> Tensor:
        if self.H is None:
            raise UserError("H: expected it to be there still, got a call after free()")
        return self.H
