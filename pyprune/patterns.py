"""Which weights may stay: frozen values that every method takes.

Sparsity is the fraction removed. `NM(n, m)` keeps n of every m consecutive inputs of a row
(NVIDIA's and PyTorch's reading; the SparseGPT and Wanda repositories count the pruned ones).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from pyprune.errors import UserError

Scope = Literal["row", "block", "layer", "global"]
SCOPES: tuple[str, ...] = get_args(Scope)


def pruned_count(n: int, sparsity: float) -> int:
    """How many of `n` weights are removed: `n * sparsity` rounded to nearest, halves up."""
    return math.floor(n * sparsity + 0.5)


def percent_hint(share: float) -> str:
    """What to add where a fraction was expected and `share` looks like a percentage."""
    return f" ({share:g} % is {share / 100:g})" if 1 < share < 100 else ""


@dataclass(frozen=True)
class Unstructured:
    """Any weights, `sparsity` of each comparison group.

    scope: the group among which weights compete: one output `row`; a `block` of columns over all
    rows (SparseGPT's rule); one `layer`; all layers together (`global`). None: the method's own.
    """

    sparsity: float
    scope: Scope | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(
                f"sparsity: expected a fraction in [0, 1), got {self.sparsity}"
                + percent_hint(self.sparsity)
            )
        if self.scope is not None and self.scope not in SCOPES:
            raise UserError(f"scope: expected one of {', '.join(SCOPES)}, got {self.scope!r}")

    def __str__(self) -> str:
        share = format(Decimal(f"{100 * self.sparsity:g}"), "f") + "%"  # no exponents: 0.0000001%
        return share if self.scope is None else f"{share} {self.scope}"


@dataclass(frozen=True)
class NM:
    """`n` weights kept of every `m` consecutive ones along a row."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise UserError(
                f"pattern: N:M keeps N of every M weights and needs 1 <= N <= M, "
                f"got {self.n}:{self.m}"
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


def scope_of(pattern: Pattern, default: str) -> str:
    """Among which weights those of an unstructured pattern compete, `default` if it does not say;
    "" for N:M, whose groups are its own."""
    return "" if isinstance(pattern, NM) else pattern.scope or default


def parse_nm(text: str) -> NM:
    """`"2:4"` as a pattern."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise UserError(f"pattern: expected N:M such as 2:4, got {text!r}")
    return NM(int(match[1]), int(match[2]))
