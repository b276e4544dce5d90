"""How much sparsity each block gets. Any goes with any unstructured method."""

from pyprune.allocation.alphapruning import AlphaPruning, power_law_exponent
from pyprune.allocation.base import Allocation, spread
from pyprune.allocation.besa import BesaOptions
from pyprune.allocation.ecoflap import EcoflapOptions, sparsities_by_importance
from pyprune.allocation.owl import Owl
from pyprune.allocation.table import ALLOCATIONS

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "AlphaPruning",
    "BesaOptions",
    "EcoflapOptions",
    "Owl",
    "power_law_exponent",
    "sparsities_by_importance",
    "spread",
]
