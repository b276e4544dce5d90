"""pyprune: prune large language models and run them faster."""

from pyprune import ops

__version__ = "0.1.0"

__all__ = ["__version__", "ops"]
