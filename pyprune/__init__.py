"""pyprune: prune large language models and run them faster."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyprune import ops

__version__ = "0.1.0"

__all__ = ["__version__", "ops"]


def __getattr__(name: str) -> Any:
    """Imports the heavy parts on first use: `pyprune --help` need not wait for torch."""
    if name == "ops":
        return import_module("pyprune.ops")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
