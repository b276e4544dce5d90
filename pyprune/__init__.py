"""Prune large language models and run them faster.

function                                       | what goes
-----------------------------------------------|-----------------------------------------------
prune, prune_checkpoint                        | weights, as zeros: magnitude, Wanda, SparseGPT
                                               | and their kin, LLM Surgeon
prune_structure, prune_structure_checkpoint    | layers, attention and MLP blocks
prune_width, prune_width_checkpoint            | channels and heads
prune_eigendamage, prune_eigendamage_checkpoint| directions of the Fisher eigenbasis
heal_model, heal_checkpoint                    | nothing: trains what is left, zeros stay
compress_checkpoint, decompress_checkpoint     | the zeros, out of the file and into it again
load                                           | nothing: loads what was compressed

The first of each pair takes a transformers model in memory and changes it in place; the other takes
a directory or hub id, and writes a new directory. Each takes a frozen configuration; `prune` takes
its fields as keywords too. `pyprune methods` lists what they can be told. What is wrong with a
request is a `UserError`, a ValueError; with a layer, a `LayerError`, which names it. The kernels
are in `pyprune.ops`, drop-ins for other tools in `pyprune.integrations`.
"""

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
    from pyprune.eigendamage.config import EigenDamageConfig
    from pyprune.eigendamage.run import prune_eigendamage, prune_eigendamage_checkpoint
    from pyprune.errors import LayerError, UserError
    from pyprune.heal import HealConfig, heal_checkpoint, heal_model
    from pyprune.prune import prune, prune_checkpoint
    from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
    from pyprune.sparse.load import load
    from pyprune.width.config import WidthConfig
    from pyprune.width.run import prune_width, prune_width_checkpoint

__version__ = "0.1.0"

__all__ = [
    "CalibrationConfig",
    "EigenDamageConfig",
    "HealConfig",
    "LayerError",
    "PruneConfig",
    "StructureConfig",
    "UserError",
    "WidthConfig",
    "__version__",
    "compress_checkpoint",
    "decompress_checkpoint",
    "heal_checkpoint",
    "heal_model",
    "load",
    "ops",
    "prune",
    "prune_checkpoint",
    "prune_eigendamage",
    "prune_eigendamage_checkpoint",
    "prune_structure",
    "prune_structure_checkpoint",
    "prune_width",
    "prune_width_checkpoint",
]

_HOMES = {
    "CalibrationConfig": "pyprune.config",
    "EigenDamageConfig": "pyprune.eigendamage.config",
    "HealConfig": "pyprune.heal",
    "LayerError": "pyprune.errors",
    "PruneConfig": "pyprune.config",
    "StructureConfig": "pyprune.depth.config",
    "UserError": "pyprune.errors",
    "WidthConfig": "pyprune.width.config",
    "compress_checkpoint": "pyprune.sparse.convert",
    "decompress_checkpoint": "pyprune.sparse.convert",
    "heal_checkpoint": "pyprune.heal",
    "heal_model": "pyprune.heal",
    "load": "pyprune.sparse.load",
    "prune": "pyprune.prune",
    "prune_checkpoint": "pyprune.prune",
    "prune_eigendamage": "pyprune.eigendamage.run",
    "prune_eigendamage_checkpoint": "pyprune.eigendamage.run",
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


def __dir__() -> list[str]:
    """With what is imported on first use: for `help` and for completion."""
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`pyprune.prune` is the function, although a module is called that too: importing the module
    makes the import system bind it here, whenever that happens."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "prune" and isinstance(value, ModuleType):
            value = value.prune
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_transformers_hook.install()
