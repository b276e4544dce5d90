"""What every picture needs."""

from __future__ import annotations

from importlib.util import find_spec

from pyprune.errors import UserError


def require_matplotlib() -> None:
    """Raises UserError, saying what to install, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError("a plot needs matplotlib: pip install 'pyprune[plot]'")
