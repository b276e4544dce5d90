"""What the tables made of benchmark rows share."""

from __future__ import annotations

from typing import Any

from pyprune.sparse.bench import threads as counted

Row = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def device_of(rows: list[Row]) -> str:
    row = rows[0]
    threads = f", {counted(row['threads'])}" if row.get("threads") else ""
    return f"{row['device']}{threads}, torch {row['torch']}"
