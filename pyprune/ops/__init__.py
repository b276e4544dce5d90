"""The kernels, one op family a module. Every op has a plain PyTorch reference and faster backends;
see `pyprune.ops.registry` for how one is chosen. Products (`linear_*`) have gradients, see
`pyprune.ops.linear_backward`; results of the other ops never require one, whatever their inputs
do."""

from pyprune.ops import linear_backward  # noqa: F401  registers gradients
from pyprune.ops.coded import linear_coded, pack_coded, unpack_coded, validate_coded
from pyprune.ops.column_norms import column_norms
from pyprune.ops.fisher_accumulate import fisher_accumulate
from pyprune.ops.gram import gram
from pyprune.ops.kron import kron_quadratic, kron_remove
from pyprune.ops.kron_pcg import KronPcg, kron_pcg
from pyprune.ops.obs_factor import NotPositiveDefiniteError, ObsFactor, inverse_diagonal, obs_factor
from pyprune.ops.obs_greedy import ObsGreedy, obs_greedy
from pyprune.ops.obs_reconstruct import ObsReconstruct, obs_reconstruct
from pyprune.ops.obs_sweep import ObsSweep, obs_sweep
from pyprune.ops.pack import (
    pack_24,
    pack_bitmap,
    to_torch_sparse_24,
    unpack_24,
    unpack_bitmap,
    validate_24,
    validate_bitmap,
)
from pyprune.ops.row_grid import RowGrid, round_to_grid, row_grid
from pyprune.ops.select import mask_global, mask_nm, mask_topk
from pyprune.ops.sparse_int8 import (
    dequantize_rows,
    linear_24_int8,
    linear_bitmap_int8,
    linear_int8,
    quantize_rows,
)
from pyprune.ops.sparse_linear import linear_24, linear_bitmap, linear_dense

__all__ = [
    "KronPcg",
    "NotPositiveDefiniteError",
    "ObsFactor",
    "ObsGreedy",
    "ObsReconstruct",
    "ObsSweep",
    "RowGrid",
    "column_norms",
    "dequantize_rows",
    "fisher_accumulate",
    "gram",
    "inverse_diagonal",
    "kron_pcg",
    "kron_quadratic",
    "kron_remove",
    "linear_24",
    "linear_24_int8",
    "linear_bitmap",
    "linear_bitmap_int8",
    "linear_coded",
    "linear_dense",
    "linear_int8",
    "mask_global",
    "mask_nm",
    "mask_topk",
    "obs_factor",
    "obs_greedy",
    "obs_reconstruct",
    "obs_sweep",
    "pack_24",
    "pack_bitmap",
    "pack_coded",
    "quantize_rows",
    "round_to_grid",
    "row_grid",
    "to_torch_sparse_24",
    "unpack_24",
    "unpack_bitmap",
    "unpack_coded",
    "validate_24",
    "validate_bitmap",
    "validate_coded",
]
