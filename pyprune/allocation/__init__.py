"""How much sparsity each block gets. Any goes with any unstructured method."""

from pyprune.allocation.alphapruning import AlphaPruning, power_law_exponent
from pyprune.allocation.base import ALLOCATIONS, Allocation, spread
from pyprune.allocation.owl import Owl

__all__ = ["ALLOCATIONS", "Allocation", "AlphaPruning", "Owl", "power_law_exponent", "spread"]
