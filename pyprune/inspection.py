"""What is in a checkpoint: shapes, zeros, sparsity patterns and bytes of every matrix.

Tensors are read one at a time, so a checkpoint of any size can be inspected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyprune.checkpoint import Checkpoint
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.progress import Progress
from pyprune.sparse.format import sparse_bytes
from pyprune.sparse.layout import dtype_name
from pyprune.sparse.stored import DENSE, StoredCheckpoint

# The patterns looked for, most restrictive first, as N kept of every M inputs.
PATTERNS = ((1, 4), (2, 4), (4, 8))
# Trained and dequantized weights hold a few zeros that nobody pruned.
DENSE_BELOW = 0.01

# Of the table; those in TEXTS are aligned left.
COLUMNS = ("layer", "shape", "dtype", "zeros", "pattern", "stored as", "MB", "2:4 MB", "bitmap")
TEXTS = ("layer", "dtype", "pattern", "stored as")
NONE = "-"
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class LayerInspection:
    """One matrix. shape: outputs x inputs (with a leading expert count where experts are stored in
    one tensor). zeros, elements: counts. patterns: all that hold, most restrictive first; "dense",
    "row-uniform" (the same number of zeros in each row) or "unstructured" where no N:M does.
    format: how it is stored, "dense" or a compressed format. nbytes: as stored; nbytes_dense: with
    its zeros. nbytes_24, nbytes_bitmap: as `pyprune compress` would store it, in that format and at
    the precision it has; nbytes_24 is None where 2:4 cannot hold it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    elements: int
    patterns: tuple[str, ...]
    format: str
    nbytes: int
    nbytes_dense: int
    nbytes_24: int | None
    nbytes_bitmap: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def smallest(self) -> int:
        """Bytes as it is stored or in the smallest of the three formats, at the precision it has:
        coded matrices and thin factors are smaller than any of them."""
        sizes = (self.nbytes, self.nbytes_dense, self.nbytes_bitmap, self.nbytes_24)
        return min(size for size in sizes if size is not None)


@dataclass(frozen=True)
class Inspection:
    """layers: the matrices of the decoder blocks. others: matrices outside of them that are stored
    in a compressed format (a pruned head, embeddings with int8 or coded rows). other_bytes: of all
    other tensors (embeddings, head, norms, biases, routers). note: why the matrices may be others
    than those, or empty."""

    path: str
    model_type: str
    layers: tuple[LayerInspection, ...]
    other_bytes: int
    note: str = ""
    others: tuple[LayerInspection, ...] = ()

    @property
    def sparsity(self) -> float:
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / elements if elements else 0.0

    @property
    def _matrices(self) -> tuple[LayerInspection, ...]:
        return (*self.layers, *self.others)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._matrices) + self.other_bytes

    @property
    def nbytes_dense(self) -> int:
        """Bytes of the checkpoint with every zero stored."""
        return sum(layer.nbytes_dense for layer in self._matrices) + self.other_bytes

    @property
    def smallest(self) -> int:
        """Bytes of the whole checkpoint with every matrix in its smallest format."""
        return sum(layer.smallest for layer in self._matrices) + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        totals = {
            "sparsity": self.sparsity,
            "nbytes": self.nbytes,
            "nbytes_dense": self.nbytes_dense,
            "nbytes_smallest": self.smallest,
        }
        layers = [
            {**asdict(layer), "sparsity": layer.sparsity, "nbytes_smallest": layer.smallest}
            for layer in self.layers
        ]
        return {**asdict(self), "layers": layers, **totals}

    def table(self) -> Table:
        """For a terminal: a row per matrix. What is the same for all of them stands in the title,
        so that names have room."""
        rows = [_cells(layer) for layer in self._matrices]
        same = [column for column in TEXTS[1:] if _agree(rows, column)]
        words = [f"{column} {rows[0][column]}" for column in same]
        if all(row["2:4 MB"] == NONE for row in rows):
            same.append("2:4 MB")
        title = Text(", ".join([f"{self.path}: {self.model_type}", *words]))
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
        columns = [column for column in COLUMNS if column not in same]
        for name in columns:
            # Names take what is left, on several lines if they must; they never vanish.
            whole = {"min_width": 12, "overflow": "fold"} if name == "layer" else {"no_wrap": True}
            table.add_column(name, justify="left" if name in TEXTS else "right", **whole)

        def add(row: dict[str, str]) -> None:
            table.add_row(*(row.get(column, "") for column in columns))

        for row in rows:
            add(row)
        table.add_section()
        add({"layer": "everything else", "MB": _megabytes(self.other_bytes)})
        zeros = f"{self.sparsity:.2%}"
        add({"layer": "total", "zeros": zeros, "MB": _megabytes(self.nbytes)})
        if self.nbytes != self.nbytes_dense:
            add({"layer": "total, dense", "MB": _megabytes(self.nbytes_dense)})
        add({"layer": "total, each in its smallest form", "MB": _megabytes(self.smallest)})
        return table


def _agree(rows: list[dict[str, str]], column: str) -> bool:
    return len({row[column] for row in rows}) == 1


def _cells(layer: LayerInspection) -> dict[str, str]:
    """Of one row, by column."""
    return {
        "layer": layer.name.removesuffix(".weight"),
        "shape": "x".join(str(n) for n in layer.shape),
        "dtype": SHORT_DTYPES.get(layer.dtype, layer.dtype),
        "zeros": f"{layer.sparsity:.2%}",
        "pattern": layer.patterns[0],
        "stored as": layer.format,
        "MB": _megabytes(layer.nbytes),
        "2:4 MB": NONE if layer.nbytes_24 is None else _megabytes(layer.nbytes_24),
        "bitmap": _megabytes(layer.nbytes_bitmap),
    }


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f}"


def inspect_checkpoint(
    source: Checkpoint | StoredCheckpoint,
    progress: Progress | None = None,
    *,
    trust_remote_code: bool = False,
) -> Inspection:
    """Reads every matrix of the decoder blocks and looks for zeros.

    source: a dense checkpoint, or one that may be compressed: its matrices are expanded one at a
    time. progress: called with a tensor's name, how many are through, and their number.
    trust_remote_code: for a `StoredCheckpoint`; a `Checkpoint` was opened with or without.
    """
    if isinstance(source, Checkpoint):
        checkpoint, stored = source, StoredCheckpoint.of_dense(source.path, {}, source.tensors)
    else:
        checkpoint, stored = source.checkpoint(trust_remote_code), source
    matrices, note = _matrices(checkpoint)
    outside = {name: False for name in stored.compressed if name not in matrices}
    found: list[LayerInspection] = []
    for name, transposed in {**matrices, **outside}.items():
        if progress is not None:
            progress(name, len(found), len(matrices) + len(outside))
        layer = inspect_matrix(name, stored.read(name), transposed=transposed)
        format, nbytes = stored.format_of(name), stored.stored_nbytes(name)
        found.append(replace(layer, format=format, nbytes=nbytes))
    rest = stored.nbytes - sum(layer.nbytes for layer in found)
    layers, others = tuple(found[: len(matrices)]), tuple(found[len(matrices) :])
    kind = str(checkpoint.config.model_type)
    return Inspection(str(checkpoint.path), kind, layers, rest, note, others)


def inspect_matrix(name: str, w: Tensor, *, transposed: bool = False) -> LayerInspection:
    """A matrix that is stored densely.

    w: `[R, C]`, or `[E, R, C]` for experts in one tensor. transposed: it is stored `[C, R]`.
    """
    if transposed:
        w = w.mT
    kept = w != 0
    elements = kept.numel()
    nonzero = int(kept.sum())
    patterns = tuple(_patterns(kept, elements - nonzero))
    # Experts in one tensor are stored one by one.
    sizes = [sparse_bytes(matrix)[0] for matrix in (w if w.dim() == 3 else [w])]
    fitting = [size["sparse24"] for size in sizes if "sparse24" in size]
    return LayerInspection(
        name=name,
        shape=tuple(w.shape),
        dtype=dtype_name(w.dtype),
        zeros=elements - nonzero,
        elements=elements,
        patterns=patterns,
        format=DENSE,
        nbytes=elements * w.element_size(),
        nbytes_dense=elements * w.element_size(),
        nbytes_24=sum(fitting) if len(fitting) == len(sizes) else None,
        nbytes_bitmap=sum(size["bitmap"] for size in sizes),
    )


def _patterns(kept: Tensor, zeros: int) -> Iterator[str]:
    columns = kept.shape[-1]
    if zeros < DENSE_BELOW * kept.numel() or not kept.numel():
        yield "dense"
        return
    found = False
    for n, m in PATTERNS:
        if columns % m == 0 and int(kept.reshape(-1, m).sum(1, dtype=torch.uint8).max()) <= n:
            found = True
            yield f"{n}:{m}"
    per_row = kept.reshape(-1, columns).sum(1)
    uniform = len(per_row) > 1 and bool((per_row == per_row[0]).all())
    if uniform:
        yield "row-uniform"
    elif not found:
        yield "unstructured"


def _matrices(checkpoint: Checkpoint) -> tuple[dict[str, bool], str]:
    """Tensor name -> whether it is stored `[inputs, outputs]`, of all prunable matrices."""
    note = checkpoint.streaming_obstacle()
    if not note:
        try:
            return _prunable(checkpoint), ""
        except UserError as error:
            note = str(error)
    entries = checkpoint.tensors.items()
    plain = {n: False for n, e in entries if len(e.shape) in (2, 3) and e.dtype.is_floating_point}
    return plain, f"every matrix is listed, embeddings too: {note}"


def _prunable(checkpoint: Checkpoint) -> dict[str, bool]:
    adapter = Adapter.of(checkpoint.build_model())
    pieces = checkpoint.names.pieces
    return {
        piece.tensor: ref.transposed
        for i in range(len(adapter.blocks))
        for ref in adapter.linears(i)
        for piece in pieces[ref.parameter_name]
        if piece.expert in (None, ref.index)  # LongCat has rows for experts without a weight
    }
