"""How a method is shown in the table of methods."""

from __future__ import annotations

from typing import Any

from pyprune.methods.base import Method
from pyprune.methods.options import of_options

HEADERS = ("method", "what", "scopes", "N:M", "calibration", "--update")


def describe(method: Method) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Its cells under `HEADERS`, and the same as a mapping."""
    row = {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "scopes": list(method.scopes),
        "nm": method.nm,
        "statistic": method.statistic,
        "updates_weights": method.updates_weights,
        "updates": list(method.updates),
        "gradient": method.gradient is not None,
        **of_options(method.options_type),
    }
    cells = (
        method.name,
        f"{method.title} ({method.paper})",
        ", ".join(method.scopes),
        "any" if method.nm else "no",
        ", ".join(filter(None, [method.statistic, method.gradient and "gradients"])) or "none",
        "by itself" if method.updates_weights else ", ".join(method.updates),
    )
    return cells, row
