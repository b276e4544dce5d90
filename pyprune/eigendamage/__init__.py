"""EigenDamage on a whole model: directions or entries of every matrix go in the eigenbasis of its
Kronecker-factored Fisher matrix, by one threshold over all layers.

Rotated weights are not sparse weights: what is left of a matrix is a product of two thin ones, and
stock transformers layers hold one dense matrix. So there are two results. Dense reconstruction, the
default, fits every loader and saves nothing. Thin factors (`factored`), two linear maps in a row,
save bytes and time where `k (R + C) < R C`, that is where more than half of a square matrix's
directions went on one side; a checkpoint of them takes `import pyprune` to load (docs/format.md).
"""

from pyprune.eigendamage.config import EigenDamageConfig, EigenDamageOptions
from pyprune.eigendamage.layers import EigenLayer, damage
from pyprune.eigendamage.run import (
    EigenDamageReport,
    prune_eigendamage,
    prune_eigendamage_checkpoint,
)

__all__ = [
    "EigenDamageConfig",
    "EigenDamageOptions",
    "EigenDamageReport",
    "EigenLayer",
    "damage",
    "prune_eigendamage",
    "prune_eigendamage_checkpoint",
]
