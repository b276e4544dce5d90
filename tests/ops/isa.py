"""The instruction sets that the native kernels can be restricted to on this processor."""

from collections.abc import Iterator
from contextlib import contextmanager

from pyprune import _native

# In the order of Isa (csrc/cpu/processor.h).
ALL = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_amx", "neon_bf16")


@contextmanager
def restricted(isa: str) -> Iterator[None]:
    """Within the context the native kernels use one instruction set. For property tests, which
    cannot take the fixture `use_isa` anew for each example."""
    assert _native.MODULE is not None, _native.MISSING
    _native.MODULE.set_isa(isa)
    try:
        yield
    finally:
        _native.MODULE.set_isa("best")


def _available() -> list[str]:
    found = []
    for isa in ALL:
        try:
            with restricted(isa):
                found.append(isa)
        except ValueError:  # this processor does not have it
            continue
    return found


AVAILABLE = _available()
