"""Where text comes from: the packaged sets, files, directories, data sets of the hub.

Every source is a stream of documents (strings); joined by an empty line they are the source's text.
Nothing is read before it is asked for, and nothing is kept.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pyprune.errors import UserError
from pyprune.packaged import TEXTS, packaged_documents

SEPARATOR = "\n\n"
PIECE = 1 << 16  # characters of one text-file document at most
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json.gz")
HUB_PREFIX = "hub:"


def documents(source: str | Path, part: str) -> Iterator[str]:
    """The documents of `source`, in order.

    source: "wiki" or "sotu" (packaged; `part` is "calibration" or "evaluation"); a .txt file
    (UTF-8; a document is a paragraph, that is up to an empty line); a .jsonl file (one object with
    a string `text` a line); either with .gz; a directory of such files (all below it, in the order
    of their names); "hub:ID[:CONFIG[:SPLIT[:COLUMN]]]" (streamed through the `datasets` library;
    SPLIT train, COLUMN text by default). Raises `UserError` naming file and line for what cannot be
    read.
    """
    name = str(source)
    if not name:  # as a path it would be the current directory
        raise UserError("text: expected a name or a path, got ''")
    if name in TEXTS:
        return iter(packaged_documents(name, part))
    if name.startswith(HUB_PREFIX):
        return _hub_documents(name)
    path = Path(source)
    if path.is_dir():
        return _directory_documents(path)
    if not path.is_file():
        what = "is neither" if path.exists() else "does not exist"
        raise UserError(
            f"text: expected {', '.join(TEXTS)}, a file, a directory or {HUB_PREFIX}ID, "
            f"got {name!r}, which {what}"
        )
    return _file_documents(path)


def _directory_documents(directory: Path) -> Iterator[str]:
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not paths:
        raise UserError(f"text: directory {directory} holds no {', '.join(SUFFIXES)} file")
    for path in paths:
        yield from _file_documents(path)


def _file_documents(path: Path) -> Iterator[str]:
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"text: expected a file named {', '.join(SUFFIXES)}, got {path}")
    opener: Callable[..., io.TextIOBase] = gzip.open if path.name.endswith(".gz") else open
    plain = path.name.removesuffix(".gz").endswith(".txt")
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:  # a byte order mark is no text
            yield from _paragraphs(lines) if plain else _json_texts(path, lines)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _paragraphs(lines: io.TextIOBase) -> Iterator[str]:
    """Runs of non-empty lines, cut where they pass `PIECE` characters."""
    collected: list[str] = []
    size = 0
    while line := lines.readline(PIECE):
        if line.strip():
            collected.append(line)
            size += len(line)
        if collected and (not line.strip() or size >= PIECE):
            yield "".join(collected).strip("\n")
            collected, size = [], 0
    if collected:
        yield "".join(collected).strip("\n")


def _json_texts(path: Path, lines: io.TextIOBase) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number too long, lists too deep
            raise UserError(f"{path}, line {number}: expected a JSON object: {error}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: expected an object with a string 'text'")
        _check_unicode(text, f"{path}, line {number}")
        yield text


def _check_unicode(text: str, where: str) -> None:
    """UserError unless every character is one: JSON can escape halves of those that UTF-16 stores
    in two, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(f"{where}: expected text, got half of a character, {half}") from error


def _hub_documents(source: str) -> Iterator[str]:
    fields = source.removeprefix(HUB_PREFIX).split(":")
    if not fields[0] or len(fields) > 4:
        raise UserError(f"text: expected hub:ID[:CONFIG[:SPLIT[:COLUMN]]], got {source!r}")
    identifier, config, split, column = (fields + [""] * 4)[:4]
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"text {source}: needs the datasets library: pip install 'pyprune[datasets]'"
        ) from error
    column = column or "text"
    try:
        rows = datasets.load_dataset(
            identifier, config or None, split=split or "train", streaming=True
        )
        for row in rows:
            if not isinstance(row.get(column), str):
                raise UserError(
                    f"text {source}: expected a string column {column!r}, "
                    f"got columns {', '.join(sorted(row))}"
                )
            _check_unicode(row[column], f"text {source}")
            yield row[column]
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"text {source}: the data set cannot be read ({type(error).__name__}: {first_line})"
        ) from error
