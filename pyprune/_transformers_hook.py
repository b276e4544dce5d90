"""Teaches transformers the method "pyprune" when it is imported, without importing it.

`import pyprune` must stay quick. So nothing is registered until transformers loads the module that
holds its table of quantizers: at once if it has, else by a finder that waits for that module.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.quantizers.auto"


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)  # the search below must find the module itself
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        loader.exec_module = exec_module
        return spec


def _register(auto: ModuleType) -> None:
    from pyprune.sparse import quantizer

    if quantizer.METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(quantizer.METHOD)(quantizer.PyPruneConfig)
        auto.register_quantizer(quantizer.METHOD)(quantizer.PyPruneQuantizer)
        quantizer.save_with_advice()


def install() -> None:
    """Registers now or as soon as transformers loads its quantizers."""
    if AUTO in sys.modules:
        _register(sys.modules[AUTO])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
