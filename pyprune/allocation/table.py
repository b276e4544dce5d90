"""The table of allocations: how an unstructured sparsity can be shared out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyprune.allocation.besa import BesaOptions
from pyprune.allocation.ecoflap import EcoflapOptions
from pyprune.methods.options import of_options

HEADERS = ("allocation", "what", "looks at", "--allocation-strength")
# What an allocation is decided from: the weights alone; a walk's norms of the inputs; losses or
# gradients of the whole model; outputs of each block while the walk is at it.
Source = Literal["weights", "norms", "model", "blocks"]


@dataclass(frozen=True)
class AllocationRow:
    """One row. source: what it looks at; None: nothing. strength: what `allocation_strength` is;
    None: it has none. options_type: frozen dataclass of the options that only it has."""

    name: str
    title: str
    paper: str
    source: Source | None
    strength: str | None = None
    options_type: type | None = None


ALLOCATIONS: dict[str, AllocationRow] = {
    row.name: row
    for row in (
        AllocationRow("uniform", "the same for every block", "", None),
        AllocationRow(
            "alphapruning",
            "less for blocks with heavy-tailed spectra",
            "Lu et al. 2024, arXiv 2410.10912",
            "weights",
            strength="epsilon",
        ),
        AllocationRow(
            "owl",
            "less for blocks with more outliers among their Wanda scores",
            "Yin et al. 2023, arXiv 2310.05175",
            "norms",
            strength="lambda",
        ),
        AllocationRow(
            "ecoflap",
            "less for blocks or matrices with larger gradients of the loss",
            "Sung et al. 2024, arXiv 2310.02998",
            "model",
            options_type=EcoflapOptions,
        ),
        AllocationRow(
            "besa",
            "within each block, learned from the error of its output",
            "Xu et al. 2024, arXiv 2402.16880",
            "blocks",
            options_type=BesaOptions,
        ),
    )
}
_LOOKS_AT: dict[Source | None, str] = {
    None: "nothing",
    "weights": "weights",
    "norms": "input norms",
    "model": "loss of the whole model",
    "blocks": "block outputs",
}


def describe_allocation(row: AllocationRow) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Its cells under `HEADERS`, and the same as a mapping."""
    title = f"{row.title} ({row.paper})" if row.paper else row.title
    cells = (row.name, title, _LOOKS_AT[row.source], row.strength or "-")
    return cells, {
        "name": row.name,
        "kind": "allocation",
        "title": row.title,
        "paper": row.paper,
        "looks_at": _LOOKS_AT[row.source],
        "strength": row.strength,
        **of_options(row.options_type),
    }
