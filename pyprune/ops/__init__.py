"""The kernels, one op family a module. Every op has a plain PyTorch reference and faster backends;
see `pyprune.ops._registry` for how one is chosen."""

from pyprune.ops.column_norms import column_norms
from pyprune.ops.sparse_linear import linear_24, linear_bitmap, linear_dense

__all__ = ["column_norms", "linear_24", "linear_bitmap", "linear_dense"]
