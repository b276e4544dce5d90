"""The sparse runtime: linear layers that keep their weights compressed."""

from pyprune.sparse.layout import FORMATS
from pyprune.sparse.linear import SparseLinear, compress_model, compressed_bytes

__all__ = ["FORMATS", "SparseLinear", "compress_model", "compressed_bytes"]
