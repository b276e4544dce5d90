"""The kernels, one op family a module. Every op has a plain PyTorch reference and faster backends;
see `pyprune.ops._registry` for how one is chosen."""

from pyprune.ops.column_norms import column_norms
from pyprune.ops.obs_factor import (
    NotPositiveDefiniteError,
    ObsFactor,
    inverse_diagonal,
    obs_factor,
)
from pyprune.ops.obs_sweep import ObsSweep, obs_sweep

__all__ = [
    "NotPositiveDefiniteError",
    "ObsFactor",
    "ObsSweep",
    "column_norms",
    "inverse_diagonal",
    "obs_factor",
    "obs_sweep",
]
