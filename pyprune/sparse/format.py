"""The compressed checkpoint format, versions 1 to 6; `docs/format.md` describes it.

Here are the rules: what config.json says of a compressed checkpoint, and what must hold of its
tensors (`pyprune.sparse.layout`) before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.checkpoint.shards import TensorEntry
from pyprune.errors import UserError
from pyprune.ops.coded import count_escapes
from pyprune.ops.sparse_int8 import dequantize_rows, quantize_rows
from pyprune.ops.storage import bit_pattern, row_blocks
from pyprune.sparse import factored, layout
from pyprune.sparse import weight as weights
from pyprune.sparse.layout import (
    ALL_PARTS,
    CODED,
    COUNTED,
    DENSE_INT8,
    FACTORED,
    FORMATS,
    INT8,
    PARTS,
    LayerFormat,
)

METHOD = "pyprune"
# What a checkpoint says is the least that describes it: older releases read all that they can.
VERSIONS = (1, 2, 3, 4, 5, 6)
WEIGHT = ".weight"
FIELDS = ("quant_method", "format_version", "how_to_load", "layers")
LAYER_FIELDS = ("format", "shape", "values", "transposed", "rank", "stacked")
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WIDENED = 1 << 22  # elements that an int8 weight's error is taken of at a time, in fp64
HOW_TO_LOAD = (
    "this checkpoint is compressed by pyprune: `import pyprune` before loading it, or turn it into "
    "a dense one with `pyprune decompress DIR --out DENSE`"
)


def quantization_config(layers: Mapping[str, LayerFormat]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    return {
        "quant_method": METHOD,
        "format_version": max((layer.version for layer in layers.values()), default=1),
        "how_to_load": HOW_TO_LOAD,
        "layers": {name: layer.to_dict() for name, layer in layers.items()},
    }


def parse_quantization_config(value: Any, where: str) -> dict[str, LayerFormat]:
    """The layers of a `quantization_config`. Raises UserError, starting with `where`, for another
    method or version, a layer that is not described completely, and a field that no version has."""
    if not isinstance(value, Mapping) or value.get("quant_method") != METHOD:
        raise UserError(f"{where}: expected a quantization_config with quant_method {METHOD!r}")
    version = value.get("format_version")
    if type(version) is not int or version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise UserError(
            f"{where}: expected a format_version among {known}, got {version!r}; "
            "a newer pyprune may read it"
        )
    _refuse_unknown(value, FIELDS, f"{where}: quantization_config")
    layers = value.get("layers")
    if not isinstance(layers, Mapping):
        raise UserError(f"{where}: quantization_config: expected an object named layers")
    found = {str(name): _layer(layer, f"{where}: layer {name}") for name, layer in layers.items()}
    for name, layer in found.items():
        if layer.version > version:
            raise UserError(
                f"{where}: layer {name}: {layer.to_dict()} needs format_version {layer.version}, "
                f"got {version}"
            )
    return found


def _refuse_unknown(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """What a field says of the weights cannot be known, and must not be passed over."""
    unknown = next((field for field in value if field not in known), None)
    if unknown is not None:
        raise UserError(f"{where}: unknown field {unknown!r}, expected {', '.join(known)}")


def _layer(value: Any, where: str) -> LayerFormat:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected an object, got {type(value).__name__}")
    _refuse_unknown(value, LAYER_FIELDS, where)
    kind, shape = value.get("format"), value.get("shape")
    if not isinstance(kind, str) or kind not in PARTS:
        raise UserError(f"{where}: format: expected one of {', '.join(PARTS)}, got {kind!r}")
    whole = isinstance(shape, (list, tuple)) and all(type(n) is int and n > 0 for n in shape)
    if not whole or len(shape) != 2:  # type: ignore[arg-type]
        raise UserError(f"{where}: shape: expected two positive integers, got {shape!r}")
    rows, cols = shape  # type: ignore[misc]
    if kind == "sparse24" and cols % 8:
        raise UserError(f"{where}: sparse24: expected a multiple of 8 columns, got {cols}")
    values, transposed = value.get("values"), value.get("transposed", False)
    if values not in (None, INT8):
        raise UserError(f"{where}: values: expected {INT8} or nothing, got {values!r}")
    if kind == DENSE_INT8 and values != INT8:
        raise UserError(f"{where}: values: expected {INT8} with format {kind}, got {values!r}")
    if type(transposed) is not bool:
        raise UserError(f"{where}: transposed: expected true or false, got {transposed!r}")
    rank = value.get("rank", 0)
    if type(rank) is not int or (rank > 0) != (kind == FACTORED) or rank < 0:
        wanted = "a positive integer" if kind == FACTORED else f"none with format {kind}"
        raise UserError(f"{where}: rank: expected {wanted}, got {value.get('rank')!r}")
    stacked = value.get("stacked", False)
    if type(stacked) is not bool:
        raise UserError(f"{where}: stacked: expected true or false, got {stacked!r}")
    if stacked and kind not in FORMATS:
        raise UserError(f"{where}: {kind}: expected none that is stacked")
    if kind in (FACTORED, CODED) and (values is not None or transposed):
        raise UserError(f"{where}: {kind}: expected neither values nor transposed")
    return LayerFormat(kind, (rows, cols), values == INT8, transposed, rank, stacked)


def stacks_of(layers: Mapping[str, LayerFormat], where: str) -> dict[str, list[str]]:
    """The names of the layers that one dense tensor `[E, ...]` consists of, in its order, by the
    tensor's name. Raises UserError, starting with `where`, unless they are numbered from 0 and of
    one shape."""
    found: dict[str, dict[str, str]] = {}
    for name, layer in layers.items():
        if layer.stacked:
            tensor, _, number = name.rpartition(".")
            found.setdefault(tensor, {})[number] = name
    stacks = {}
    for tensor, numbered in found.items():
        stacks[tensor] = [numbered.get(str(e), "") for e in range(len(numbered))]
        if "" in stacks[tensor]:
            raise UserError(
                f"{where}: layer {next(iter(numbered.values()))}: expected layers {tensor}.0 to "
                f"{tensor}.{len(numbered) - 1}, which are stacked, got {', '.join(numbered)}"
            )
        shapes = {layers[name].dense_shape for name in stacks[tensor]}
        if len(shapes) > 1 or len({layers[name].transposed for name in stacks[tensor]}) > 1:
            raise UserError(f"{where}: layers {tensor}.*: expected one shape, they are stacked")
    return stacks


def check_entries(
    name: str, layer: LayerFormat, entries: Mapping[str, TensorEntry], where: str | Path
) -> dict[str, TensorEntry]:
    """The layer's tensors by part, their dtypes and shapes checked against `layer`.

    Raises UserError that names the file (or `where`) and the tensor.
    """
    parts: dict[str, TensorEntry] = {}
    for part in layer.parts:
        tensor = f"{name}.{part}"
        if tensor not in entries:
            raise UserError(f"{where}: tensor {tensor} is missing ({layer.label})")
        parts[part] = entries[tensor]
    if name + WEIGHT in entries:
        raise UserError(f"{entries[name + WEIGHT].file}: tensor {name}{WEIGHT} is there twice")
    counted, shapes = COUNTED.get(layer.format), layer.part_shapes(layer.count(parts))
    for part, entry in parts.items():
        wanted = dict.fromkeys(layer.part_dtype(part, dtype) for dtype in VALUE_DTYPES)
        if entry.dtype not in wanted:
            expected = " or ".join(str(dtype) for dtype in wanted)
            raise UserError(
                f"{entry.file}: tensor {name}.{part}: expected {expected}, got {entry.dtype}"
            )
        if part == counted and shapes[part] == (-1,):
            raise UserError(
                f"{entry.file}: tensor {name}.{part}: expected one dimension, "
                f"got shape {list(entry.shape)}"
            )
        if entry.shape != shapes[part]:
            raise UserError(
                f"{entry.file}: tensor {name}.{part}: expected shape {list(shapes[part])}, "
                f"got {list(entry.shape)}"
            )
    for part in sorted(ALL_PARTS - parts.keys()):
        if f"{name}.{part}" in entries:
            raise UserError(
                f"{entries[f'{name}.{part}'].file}: tensor {name}.{part}: expected none, the layer "
                f"is stored as {layer.label}"
            )
    return parts


def refuse_unlisted(
    entries: Mapping[str, TensorEntry], where: str, model_takes: Callable[[str], bool]
) -> None:
    """Raises UserError if `entries`, the tensors that no layer of config.json (`where`) consists
    of, hold a compressed weight: nothing would be loaded in its place.

    model_takes: whether the model has a parameter for the tensor of that name. Asked where there
    may be factors, as a module can have parts of their names: they are none unless the model wants
    the weight that they would stand for, and the file does not have it.
    """
    named = [names for form, names in PARTS.items() if form != DENSE_INT8]
    for first, *others in (*named, ("values", "scales")):
        for tensor, entry in entries.items():
            layer = tensor.removesuffix(f".{first}")
            if layer == tensor or any(f"{layer}.{other}" not in entries for other in others):
                continue
            weight = layer + WEIGHT
            if first in PARTS[FACTORED] and (weight in entries or not model_takes(weight)):
                continue
            raise UserError(f"{entry.file}: tensor {tensor}: {where} has no layer {layer}")


def check_tensors(name: str, layer: LayerFormat, parts: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError, naming `where` and the tensor, unless the metadata describes a weight."""
    if layer.format == FACTORED:  # it has none
        return
    arrays = [parts[part] for part in layer.parts]
    try:
        weights.validate(layer, arrays)
    except ValueError as error:
        part, _, what = str(error).partition(": ")
        part = {"meta": "metadata"}.get(part, part)
        raise UserError(f"{where}: tensor {name}.{part}: {what}") from error


def unpack(layer: LayerFormat, parts: Mapping[str, Tensor]) -> Tensor:
    """The dense tensor (`layer.dense_shape`) of tensors that `check_tensors` let pass: bit for bit,
    or with int8 values each multiplied by its row's scale and rounded to the scales' dtype, or the
    product of factors."""
    arrays = [parts[part] for part in layer.parts]
    if layer.format == FACTORED:
        return factored.product(*arrays)
    weight = weights.unpack(layer, arrays)
    return weight.T.contiguous() if layer.transposed else weight


def pack(dense: Tensor, layer: LayerFormat) -> dict[str, Tensor]:
    """The tensors of a dense one (`layer.dense_shape`) by part.

    Every element whose bits are not all zero is kept (negative zeros too), so that `unpack`
    restores it bit for bit; with int8 values every element that does not round to zero. "coded"
    takes bf16 alone.

    Raises UserError if more than two of four are to be kept in "sparse24", or for int8 values if a
    weight is not finite.
    """
    weight = dense.T if layer.transposed else dense
    if layer.format == "sparse24" and not layout.is_24(_kept(weight)):
        raise UserError("sparse24: expected 8n columns and at most 2 non-zero of every 4")
    return dict(zip(layer.parts, weights.pack(weight, layer), strict=True))


def quantization_error(dense: Tensor, layer: LayerFormat) -> tuple[int, float]:
    """What int8 values make of a dense tensor: elements that do not become zero, and
    `|W - scales * q| / |W|` (Frobenius; 0 for a matrix of zeros)."""
    weight = dense.T if layer.transposed else dense
    try:
        q, scales = quantize_rows(weight)
    except ValueError as error:
        raise UserError(f"int8: {error}") from error
    squares = torch.zeros(2, dtype=torch.float64)
    for rows in row_blocks(q.shape, WIDENED):
        wide = weight[rows].double()
        off = wide - dequantize_rows(q[rows], scales[rows].double())
        squares += torch.stack([wide.square().sum(), off.square().sum()])
    norm, lost = squares.sqrt().tolist()
    return int(q.count_nonzero()), lost / norm if norm else 0.0


def coded_escapes(weight: Tensor) -> int | None:
    """How many escapes a bf16 `weight [R, C]` has in "coded"; None if it does not save a tenth of
    its bytes."""
    if not weight.numel():
        return None
    escapes = count_escapes(weight)
    size = LayerFormat(CODED, (weight.shape[0], weight.shape[1])).nbytes(escapes, weight.dtype)
    return escapes if layout.worthwhile({CODED: size}, weight.nbytes) else None


def sparse_bytes(weight: Tensor, allowed: Sequence[str] = FORMATS) -> tuple[dict[str, int], int]:
    """What `pack` makes of `weight [R, C]`: bytes by format, of the allowed ones that can hold it;
    and how many elements it keeps."""
    return layout.sparse_bytes(_kept(weight), weight.dtype, allowed)


def candidates(weight: Tensor, allowed: Sequence[str] = FORMATS) -> tuple[dict[str, int], int]:
    """The allowed formats that save at least a tenth of the bytes of `weight [R, C]`, with their
    bytes, smallest first (2:4 where equal); and how many elements a bitmap would keep."""
    sizes, nnz = sparse_bytes(weight, allowed)
    return layout.worthwhile(sizes, weight.nbytes), nnz


def _kept(weight: Tensor) -> Tensor:
    """Which elements are stored: those whose bits are not all zero."""
    return bit_pattern(weight.contiguous()) != 0
