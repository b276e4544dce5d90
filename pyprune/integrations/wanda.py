"""`WrappedGPT` with the interface of the Wanda and GBLM-Pruner repositories.

from pyprune.integrations.wanda import WrappedGPT  # instead of: from .layerwrapper import ...

Their `lib/prune.py` makes the masks itself, by sorting scores. Faster, with the same counts:

    terms = {"column_scale": wrapped.scaler_row.sqrt()}  # GBLM-Pruner: also addend=gradient.abs()
    kept = ops.mask_topk(w, int(w.shape[1] * sparsity_ratio), **terms)
    kept = ops.mask_nm(w, prune_m - prune_n, prune_m, **terms)  # for N:M: this one counts the kept
    w[~kept] = 0
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.integrations.layer import accumulate, matrix, tokens


class WrappedGPT:
    """Mean squared norm of each input of a layer (Sun et al. 2023, arXiv 2306.11695).

    Attributes:
        scaler_row: `[C]` fp32 on the layer's device, 1 / nsamples * sum of x_j^2: Wanda's score is
            |w_ij| * sqrt(scaler_row_j).
        nsamples: sequences seen.
        rows, columns: R and C.
    """

    def __init__(self, layer: nn.Module, layer_id: int = 0, layer_name: str = "none") -> None:
        """layer: an nn.Linear, transformers' Conv1D or an nn.Conv2d. Raises UserError else."""
        self.layer, self.layer_id, self.layer_name = layer, layer_id, layer_name
        self.rows, self.columns = matrix(layer).shape
        self.dev: torch.device = layer.weight.device  # type: ignore[assignment]
        self.scaler_row = torch.zeros(self.columns, device=self.dev)
        self.nsamples = 0

    def add_batch(self, inp: Tensor, out: Tensor | None = None) -> None:
        """inp: what the layer got, `[B, T, C]` or `[T, C]`. out is not used."""
        x, sequences = tokens(self.layer, inp.detach().to(self.dev))
        self.nsamples = accumulate(
            lambda acc: ops.column_norms(x, out=acc),
            self.scaler_row, 1.0, self.nsamples, sequences,
        )  # fmt: skip
