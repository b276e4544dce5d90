"""Pruning methods, one file each: which statistic, which score, which update. They know tensors,
not models; `METHODS` is the table of them."""

from difflib import get_close_matches

from pyprune.errors import UserError
from pyprune.methods import exactobs, gblm, magnitude, obd, obs, sparsegpt, wanda, woodfisher
from pyprune.methods.base import LayerInputs, Method, MethodOptions, Solution

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


def find_method(name: str) -> Method:
    """The row of `METHODS` called `name`; UserError with the closest name otherwise."""
    if name in METHODS:
        return METHODS[name]
    close = get_close_matches(str(name), METHODS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"method: expected one of {', '.join(METHODS)}, got {name!r}{hint}")


__all__ = ["METHODS", "LayerInputs", "Method", "MethodOptions", "Solution", "find_method"]
