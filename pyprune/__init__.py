"""pyprune: prune large language models and run them faster."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pyprune import _transformers_hook

if TYPE_CHECKING:
    from pyprune import ops
    from pyprune.config import CalibrationConfig, PruneConfig
    from pyprune.depth.config import StructureConfig
    from pyprune.depth.run import prune_structure, prune_structure_checkpoint
    from pyprune.prune import prune, prune_checkpoint
    from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
    from pyprune.sparse.load import load
    from pyprune.width.config import WidthConfig
    from pyprune.width.run import prune_width, prune_width_checkpoint

__version__ = "0.1.0"

__all__ = [
    "CalibrationConfig",
    "PruneConfig",
    "StructureConfig",
    "WidthConfig",
    "__version__",
    "compress_checkpoint",
    "decompress_checkpoint",
    "load",
    "ops",
    "prune",
    "prune_checkpoint",
    "prune_structure",
    "prune_structure_checkpoint",
    "prune_width",
    "prune_width_checkpoint",
]

_HOMES = {
    "CalibrationConfig": "pyprune.config",
    "PruneConfig": "pyprune.config",
    "StructureConfig": "pyprune.depth.config",
    "WidthConfig": "pyprune.width.config",
    "compress_checkpoint": "pyprune.sparse.convert",
    "decompress_checkpoint": "pyprune.sparse.convert",
    "load": "pyprune.sparse.load",
    "prune": "pyprune.prune",
    "prune_checkpoint": "pyprune.prune",
    "prune_structure": "pyprune.depth.run",
    "prune_structure_checkpoint": "pyprune.depth.run",
    "prune_width": "pyprune.width.run",
    "prune_width_checkpoint": "pyprune.width.run",
}


def __getattr__(name: str) -> Any:
    """Imports the heavy parts on first use: `pyprune --help` need not wait for torch."""
    if name == "ops":
        return import_module("pyprune.ops")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """`pyprune.prune` is the function, although a module is called that too: importing the module
    makes the import system bind it here, whenever that happens."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "prune" and isinstance(value, ModuleType):
            value = value.prune
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_transformers_hook.install()
