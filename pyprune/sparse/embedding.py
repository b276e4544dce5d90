"""Embeddings whose rows are stored in fewer bytes: as int8, each with a scale, or coded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyprune.errors import UserError
from pyprune.ops.coded import unpack_coded
from pyprune.ops.sparse_int8 import dequantize_rows
from pyprune.sparse.layout import CODED, DENSE_INT8
from pyprune.sparse.weight import StoredWeight

# transformers' embeddings that multiply what they looked up with a number of their own; every
# family has a class by a name like this. It is rounded to the weight's dtype first.
SCALED = "ScaledWordEmbedding"
SCALE = "scalar_embed_scale"


def embedding_scale(module: nn.Module) -> float | None:
    """What `module` multiplies looked-up rows with (None: nothing). Raises UserError unless it is
    an embedding that a `StoredEmbedding` can stand for. Exact classes: another may compute
    something else."""
    kind = type(module)
    scale = getattr(module, SCALE, None)
    known = kind is nn.Embedding or (kind.__name__.endswith(SCALED) and isinstance(scale, float))
    if not isinstance(module, nn.Embedding) or not known or module.max_norm is not None:
        raise UserError(
            f"embeddings: expected nn.Embedding or transformers' scaled one, got {module}"
        )
    return scale


class StoredEmbedding(StoredWeight):
    """Rows of a stored weight by their number, as `nn.Embedding` looks them up.

    For inference: there is no gradient.

    Args:
        num_embeddings, embedding_dim: rows (entries of the vocabulary) and columns.
        format: "dense" for int8 rows, each with a scale: a row is the product rounded to the dtype
            of the scales, which is what `decompress()` (and `pyprune decompress`) has in its place,
            off by at most half of the row's scale and that rounding. "coded": exactly the bf16
            rows.
        scale: what every row is multiplied with, or None.
        nnz, dtype, device, tied_to: as for `StoredWeight`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: str,
        *,
        scale: float | None = None,
        nnz: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tied_to: StoredWeight | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, format,
            int8=format == DENSE_INT8, nnz=nnz, dtype=dtype, device=device, tied_to=tied_to,
        )  # fmt: skip
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """`[...]` integers to `[..., embedding_dim]`."""
        flat = ids.reshape(-1)
        if self.format == CODED:
            rows = unpack_coded(*self._weight, rows=flat.long()).to(self.dtype)
        else:
            values, scales = self._weight
            rows = dequantize_rows(values[flat], scales[flat])
        rows = rows.view(*ids.shape, self.embedding_dim)
        if self.scale is not None:
            rows = _scaled(rows, self.scale)
        return rows

    def to_dense(self) -> nn.Embedding:
        """The embedding this stands for."""
        rows, cols = self.num_embeddings, self.embedding_dim
        if self.scale is None:
            dense = nn.Embedding(rows, cols, device="meta")
        else:
            dense = _ScaledEmbedding(rows, cols, self.scale)
        dense.weight = nn.Parameter(self.decompress(), requires_grad=False)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}, scale={self.scale}"
        )


class _ScaledEmbedding(nn.Embedding):
    def __init__(self, rows: int, cols: int, scale: float) -> None:
        super().__init__(rows, cols, device="meta")
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return _scaled(super().forward(input), self.scale)


def _scaled(rows: Tensor, scale: float) -> Tensor:
    """`rows` times `scale` rounded to their dtype. The number is made where the rows are: a copy
    from the host would be refused in a CUDA graph."""
    return rows * rows.new_full((), scale)
