"""The sparse runtime: linear layers that keep their weights compressed."""

from pyprune.sparse.linear import SparseLinear, compress_model, compressed_bytes
from pyprune.sparse.weight import FORMATS

__all__ = ["FORMATS", "SparseLinear", "compress_model", "compressed_bytes"]
