"""From a dense (or old sparse) checkpoint to a compressed one and back, one tensor in memory.

Each shard of the input becomes the shard of the same name of the output. A shard is gone through
twice: once to decide the formats, which gives every size and so the header, once to write.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.checkpoint import (
    TensorEntry,
    check_output,
    copy_auxiliary,
    output_directory,
    write_tensor,
)
from pyprune.checkpoint.output import AUXILIARY_BYTES, CARD, REPORT
from pyprune.checkpoint.shards import DTYPES, LENGTH_BYTES
from pyprune.checkpoint.source import INDEX
from pyprune.devices import find_dtype
from pyprune.errors import UserError
from pyprune.progress import Progress
from pyprune.sparse import format as formats
from pyprune.sparse.choice import (
    Chooser,
    LayerConversion,
    compressible,
    embedding_tensors,
)
from pyprune.sparse.layout import CODED, DENSE_INT8, FACTORED, FORMATS, INT8, LayerFormat
from pyprune.sparse.stored import CONFIG, DENSE, StoredCheckpoint, rounded_within

# How the input embedding and the head may be stored.
EMBEDDINGS = ("same", INT8, CODED)
# What becomes of each dense tensor: the tensors that are written for it, by name.
Plan = Mapping[str, Mapping[str, TensorEntry]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class ConversionReport:
    """layers: every linear layer that could be compressed, and embeddings with int8 or coded
    rows.
    nbytes_before, nbytes_after: of the tensors in the input's and the output's files; nbytes_dense:
    of the dense model that both stand for. rows: of the products that formats were chosen by, None
    where bytes decided. notes: what a reader should know."""

    path: str
    layers: dict[str, LayerConversion]
    nbytes_before: int
    nbytes_after: int
    nbytes_dense: int
    rows: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def formats(self) -> dict[str, str]:
        return {name: layer.format for name, layer in self.layers.items()}

    @property
    def title(self) -> str:
        """What became of the bytes, for people."""
        return (
            f"{self.nbytes_before / 1e6:,.2f} MB to {self.nbytes_after / 1e6:,.2f} MB "
            f"({self.nbytes_after / max(1, self.nbytes_dense):.1%} of dense)"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "formats": self.formats}


def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    allowed: tuple[str, ...] = FORMATS,
    int8: bool = False,
    embeddings: str = "same",
    dtype: torch.dtype | str | None = None,
    measured_rows: int | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Writes `source` compressed into the new directory `out`.

    Args:
        source: a dense checkpoint, one in an old sparse layout, or one of pyprune's own.
        allowed: the formats to choose from; each layer takes the smallest, and stays dense unless
            that saves a tenth of its bytes. Each projection of each expert counts as a linear
            layer; a mixture is compressed whole or not at all. Everything else stays as it is.
        int8: whether the layers that are compressed store int8 values, with a scale a row. A layer
            that has them already keeps them bit for bit.
        embeddings: how the input embedding and the head, tied or not, are stored. "same": as they
            are; "int8": with a scale for each entry of the vocabulary; "coded": bf16 with coded
            exponents, about 0.71 of the bytes and not a bit lost, where that saves a tenth of them.
            A head that one of the formats makes smaller keeps to that.
        dtype: what the numbers of a dense checkpoint are rounded to first, or its
            name; None leaves them.
        measured_rows: instead of the smallest, take the format (or dense) that multiplies so many
            rows fastest on this machine, among those that save a tenth of the bytes.
        progress: called with a tensor's name, how many are through, and their number.

    Raises:
        UserError: the input is none of these, damaged or incomplete, a weight to be rounded to int8
            is not finite, embeddings to be coded are not bf16, `dtype` is not a floating point one,
            or `out` cannot be written.
    """
    if embeddings not in EMBEDDINGS:
        raise UserError(f"embeddings: expected {', '.join(EMBEDDINGS)}, got {embeddings!r}")
    if not allowed or not set(allowed) <= set(FORMATS):
        raise UserError(f"formats: expected some of {', '.join(FORMATS)}, got {allowed}")
    rounded = find_dtype(dtype)
    check_output(out)
    stored = StoredCheckpoint.open(source)
    if rounded is not None:
        stored = stored.rounded(rounded)
    checkpoint = stored.checkpoint()
    stored.require_complete(checkpoint)
    candidates, whole = compressible(checkpoint), stored
    stored = whole.split(candidates.stacks)
    rows = set() if embeddings == "same" else set(embedding_tensors(checkpoint, embeddings))
    steps = _Steps(progress, len(stored.entries) + len({*candidates.tensors, *rows}))
    chooser = Chooser(stored, candidates, allowed, int8, measured_rows, embeddings)
    decisions = chooser.decide(rows, steps.next)
    # What stays dense, stays one tensor.
    stored = whole.split(
        tensor for tensor in candidates.stacks if decisions[f"{tensor}.0{formats.WEIGHT}"].layer
    )
    layers: dict[str, LayerFormat] = {}
    plan = {tensor: {tensor: entry} for tensor, entry in stored.entries.items()}
    for tensor, decision in decisions.items():
        if decision.layer is not None:
            name = tensor.removesuffix(formats.WEIGHT)
            layers[name] = decision.layer
            plan[tensor] = _parts(name, decision.layer, decision.nnz, stored.entries[tensor])
    raw = stored.dense_raw
    raw |= _compressed(layers)

    def convert(tensor: str) -> dict[str, Tensor]:
        name = tensor.removesuffix(formats.WEIGHT)
        if name not in layers or tensor not in decisions:
            return {tensor: stored.read(tensor)}
        if stored.layers.get(name) == layers[name]:
            packed = stored.read_parts(name)
        else:
            packed = formats.pack(stored.read(tensor), layers[name])
        return {f"{name}.{part}": t for part, t in packed.items()}

    after = _write(stored, out, plan, convert, raw, _compressed_card(layers), steps)
    sizes = (whole.nbytes, after, whole.dense_nbytes)
    chosen = {t.removesuffix(formats.WEIGHT): d.report for t, d in decisions.items()}
    return ConversionReport(str(out), chosen, *sizes, measured_rows, candidates.notes())


def decompress_checkpoint(
    source: str | Path, out: str | Path, *, progress: Progress | None = None
) -> ConversionReport:
    """Writes the dense checkpoint that `source` stands for into the new directory `out`, every
    tensor bit for bit and config.json without what says how weights were stored.

    Arguments and errors as for `compress_checkpoint`; a dense `source` is refused.
    """
    check_output(out)
    stored = StoredCheckpoint.open(source)
    if stored.kind == DENSE:
        raise UserError(f"{stored.path}: expected a compressed checkpoint, it is dense")
    stored.require_complete(stored.checkpoint())
    steps = _Steps(progress, len(stored.entries))
    plan = {tensor: {tensor: entry} for tensor, entry in stored.entries.items()}

    def convert(tensor: str) -> dict[str, Tensor]:
        return {tensor: stored.read(tensor)}

    after = _write(stored, out, plan, convert, stored.dense_raw, DENSE_CARD, steps)
    layers = {}
    entries = stored.split(stored.stacks).entries
    for tensor in stored.parts:
        entry, name = entries[tensor], tensor.removesuffix(formats.WEIGHT)
        transposed = stored.layers and stored.layers[name].transposed
        shape = entry.shape[::-1] if transposed else entry.shape
        layers[name] = LayerConversion.dense(shape, entry.dtype, entry.nbytes)
    return ConversionReport(str(out), layers, stored.nbytes, after, stored.dense_nbytes)


@contextmanager
def write_factored(
    source: str | Path, out: str | Path, weights: Mapping[str, Tensor | tuple[Tensor, Tensor]]
) -> Iterator[Path]:
    """Writes the dense checkpoint `source` with other weights; yields the directory, to which the
    report and the card still have to be added, before it becomes `out` (all or nothing).

    Args:
        weights: by the tensor's name in the checkpoint: another one in its place, or `up [R, k]`
            and `down [k, C]` of a linear layer that is to be stored as these. Rounded to the dtype
            of the tensor.

    Raises:
        UserError: `source` is not dense, or `out` cannot be written.
    """
    check_output(out)
    stored = StoredCheckpoint.open(source)
    if stored.kind != DENSE:
        raise UserError(f"{stored.path}: expected a dense checkpoint, it is {stored.kind}")
    layers: dict[str, LayerFormat] = {}
    plan = {tensor: {tensor: entry} for tensor, entry in stored.entries.items()}
    for tensor, value in weights.items():
        if isinstance(value, tuple):
            up, down = value
            name = tensor.removesuffix(formats.WEIGHT)
            shape = (up.shape[0], down.shape[1])
            layers[name] = LayerFormat(FACTORED, shape, rank=up.shape[1])
            plan[tensor] = _parts(name, layers[name], 0, stored.entries[tensor])

    def convert(tensor: str) -> dict[str, Tensor]:
        value = weights.get(tensor)
        if value is None:
            return {tensor: stored.read(tensor)}
        given = value if isinstance(value, tuple) else (value,)
        dtype = stored.entries[tensor].dtype
        where = f"{stored.path}: new {tensor}"
        return {
            n: rounded_within(t.detach().cpu(), dtype, where)
            for n, t in zip(plan[tensor], given, strict=True)
        }

    raw = stored.dense_raw
    if layers:
        raw |= _compressed(layers)
    with _directory(stored, out, plan, raw) as folder:
        _write_tensors(stored, folder, plan, convert, _Steps(None, len(plan)))
        yield folder


def _compressed(layers: Mapping[str, LayerFormat]) -> dict[str, Any]:
    """Fields of config.json."""
    return {
        "quantization_config": formats.quantization_config(layers),
        # Without pyprune transformers skips a method that it does not know, and fills the layers
        # with random numbers. It stops at this instead, and quotes it; pyprune's hook takes it out.
        "transformers_weights": formats.HOW_TO_LOAD,
    }


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self, words: str) -> None:
        if self._progress is not None:
            self._progress(words, self._done, self._total)
        self._done += 1


def _parts(name: str, layer: LayerFormat, nnz: int, entry: TensorEntry) -> dict[str, TensorEntry]:
    """What a compressed weight becomes in the file of `entry`; offsets come later."""
    made = {}
    for part, shape in layer.part_shapes(nnz).items():
        dtype = layer.part_dtype(part, entry.dtype)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        made[f"{name}.{part}"] = TensorEntry(entry.file, 0, nbytes, dtype, shape)
    return made


def _write(
    stored: StoredCheckpoint,
    out: str | Path,
    plan: Plan,
    convert: Callable[[str], dict[str, Tensor]],
    raw: Mapping[str, Any],
    card: str,
    steps: _Steps,
) -> int:
    """Writes the output directory; returns the bytes of its tensors."""
    with _directory(stored, out, plan, raw) as folder:
        (folder / CARD).write_text(card, encoding="utf-8")
        if (stored.path / REPORT).is_file():
            shutil.copyfile(stored.path / REPORT, folder / REPORT)
        _write_tensors(stored, folder, plan, convert, steps)
    return _nbytes(plan)


@contextmanager
def _directory(
    stored: StoredCheckpoint, out: str | Path, plan: Plan, raw: Mapping[str, Any]
) -> Iterator[Path]:
    """The output directory without tensors, report and card, before it becomes `out`."""
    with output_directory(out, needed=_nbytes(plan) + AUXILIARY_BYTES) as folder:
        copy_auxiliary(stored.checkpoint(), folder, index=False)
        (folder / CONFIG).write_text(_json(raw), encoding="utf-8")
        yield folder


def _write_tensors(
    stored: StoredCheckpoint,
    folder: Path,
    plan: Plan,
    convert: Callable[[str], dict[str, Tensor]],
    steps: _Steps,
) -> None:
    weight_map: dict[str, str] = {}
    for file, tensors in _by_file(stored, plan):
        made = {n: e for tensor in tensors for n, e in plan[tensor].items()}
        placed = _create(folder / file.name, made)
        weight_map |= dict.fromkeys(placed, file.name)
        for tensor in tensors:
            steps.next(tensor)
            for name, value in convert(tensor).items():
                write_tensor(placed[name], value, folder / file.name)
    if (stored.path / INDEX).is_file():
        index = {"metadata": {"total_size": _nbytes(plan)}, "weight_map": weight_map}
        (folder / INDEX).write_text(_json(index), encoding="utf-8")


def _nbytes(plan: Plan) -> int:
    return sum(entry.nbytes for made in plan.values() for entry in made.values())


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _by_file(stored: StoredCheckpoint, plan: Plan) -> Iterator[tuple[Path, list[str]]]:
    files = sorted({stored.entries[tensor].file for tensor in plan})
    for file in files:
        yield file, [tensor for tensor in plan if stored.entries[tensor].file == file]


def _create(file: Path, made: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """A safetensors file with its header written and its tensors' bytes still to come.

    Tensors go by falling element size, so that each starts at a multiple of its own.
    """
    ordered = sorted(made.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in ordered:
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = LENGTH_BYTES + len(text)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        stream.truncate(start + end)
    placed = {}
    for name, entry in ordered:
        offset = start + header[name]["data_offsets"][0]
        placed[name] = TensorEntry(file, offset, entry.nbytes, entry.dtype, entry.shape)
    return placed


def _compressed_card(layers: Mapping[str, LayerFormat]) -> str:
    whole = (DENSE_INT8, CODED, FACTORED)  # these leave no zeros out
    kinds = [layer.label for layer in layers.values() if layer.format not in whole]
    counts = ", ".join(f"{kinds.count(kind)} as {kind}" for kind in sorted(set(kinds)))
    int8 = any(layer.int8 for layer in layers.values())
    exact = "with int8 values rounded to a scale a row" if int8 else "bit for bit"
    rows = sorted(name for name, layer in layers.items() if layer.format == DENSE_INT8)
    also = f"\nint8 with a scale a row, zeros and all: {', '.join(rows)}." if rows else ""
    coded = sorted(name for name, layer in layers.items() if layer.format == CODED)
    also += f"\nbf16 with coded exponents, every bit kept: {', '.join(coded)}." if coded else ""
    thin = sum(layer.format == FACTORED for layer in layers.values())
    also += f"\n{thin} linear layers are products of two thin matrices." if thin else ""
    return f"""---
tags: [pyprune, sparse]
---
# Compressed by pyprune

Zeros of {len(kinds)} linear layers are left out ({counts or "none"}).{also}
Plain transformers cannot load this:

```python
import pyprune  # before from_pretrained

model = pyprune.load("DIR")  # or AutoModelForCausalLM.from_pretrained("DIR")
```

`pyprune decompress DIR --out DENSE` restores the dense checkpoint, {exact}.
"""


DENSE_CARD = """---
tags: [pyprune]
---
# Decompressed by pyprune

An ordinary dense checkpoint; the weights that were pruned are zeros in it.
"""
