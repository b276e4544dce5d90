"""Pruning methods, one file each: which statistic, which score, which update. They know tensors,
not models; `METHODS` and `SHOT_METHODS` are the tables of them."""

from pyprune.methods import (
    exactobs,
    gblm,
    magnitude,
    obd,
    obs,
    sparsegpt,
    surgeon,
    wanda,
    woodfisher,
)
from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution

# Matrix by matrix, on a walk through the blocks.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        magnitude.METHOD,
        wanda.METHOD,
        sparsegpt.METHOD,
        obd.LAYER_OBD,
        obd.METHOD,
        obd.KRONECKER_OBD,
        gblm.METHOD,
        exactobs.METHOD,
        obs.METHOD,
        woodfisher.METHOD,
    )
}
# All matrices at once, in shots, with the whole model in memory: see `pyprune.surgeon`.
SHOT_METHODS: dict[str, Method] = {surgeon.METHOD.name: surgeon.METHOD}


def find_method(name: str) -> Method:
    """The row of the tables called `name`; UserError with the closest name otherwise."""
    known = {**METHODS, **SHOT_METHODS}
    if name in known:
        return known[name]
    from pyprune.registry import unknown_method  # which imports this package

    raise unknown_method(name, known)


__all__ = [
    "METHODS",
    "SHOT_METHODS",
    "LayerInputs",
    "Method",
    "MethodOptions",
    "Solution",
    "find_method",
]
