"""How each layer of a checkpoint is to be stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyprune.checkpoint import Checkpoint, TensorEntry
from pyprune.checkpoint.names import EXPERT, candidate_names, keeps_suffix, owners
from pyprune.errors import UserError
from pyprune.models.experts import expert_count, is_fused, is_transposed, projections
from pyprune.sparse import format as formats
from pyprune.sparse.embedding import embedding_scale
from pyprune.sparse.layout import (
    ALL_PARTS,
    CODED,
    DENSE_INT8,
    FACTORED,
    INT8,
    LayerFormat,
    dtype_name,
)
from pyprune.sparse.linear import stored_transposed, weight_of
from pyprune.sparse.measured import MeasuredChoice
from pyprune.sparse.stored import DENSE, StoredCheckpoint


@dataclass(frozen=True)
class LayerConversion:
    """What became of one linear layer or embedding. format: "dense", "sparse24", "bitmap",
    "factored" or "coded".
    values: their dtype as stored; dtype: that of the dense weight. shape: outputs by inputs.
    density: the share of elements that are stored. error: `|W - stored W| / |W|` where values are
    int8, else None. seconds: of a product, by format, where that was measured."""

    format: str
    values: str
    dtype: str
    shape: tuple[int, int]
    density: float
    nbytes_dense: int
    nbytes: int
    error: float | None = None
    seconds: dict[str, float] | None = None

    @classmethod
    def dense(
        cls, shape: Sequence[int], dtype: torch.dtype, nbytes: int, density: float = 1.0
    ) -> LayerConversion:
        """Of a weight `[R, C]` that stays as it is."""
        name, (rows, cols) = dtype_name(dtype), shape
        return cls(DENSE, name, name, (rows, cols), density, nbytes, nbytes)


@dataclass(frozen=True)
class Decision:
    """layer: how the weight is stored, None for dense. nnz: elements that a bitmap stores, or the
    escapes of a coded weight."""

    layer: LayerFormat | None
    nnz: int
    report: LayerConversion


@dataclass(frozen=True)
class Candidates:
    """What can be compressed. tensors: each the weight of one linear layer of the model (see
    `weight_of`) or of one projection of one expert, and whether it holds it transposed. stacks:
    those that are the matrices X.0.weight and so on of a tensor `X [E, ...]`. mixtures: the tensors
    of one module of experts. refused: why others stay dense, by the module's name."""

    tensors: Mapping[str, bool]
    stacks: tuple[str, ...]
    mixtures: tuple[tuple[str, ...], ...]
    refused: Mapping[str, str]

    def is_stacked(self, tensor: str) -> bool:
        return tensor.removesuffix(formats.WEIGHT).rpartition(".")[0] in self.stacks

    def notes(self) -> tuple[str, ...]:
        """What stays dense whatever its zeros, a sentence a reason."""
        modules: dict[str, list[str]] = {}
        for name, reason in self.refused.items():
            modules.setdefault(reason, []).append(name)
        return tuple(
            f"Experts stay dense in {first}{f' and {len(more)} more' if more else ''}: {reason}"
            for reason, (first, *more) in modules.items()
        )


class Chooser:
    """Decides layer by layer; arguments as for `compress_checkpoint`.

    stored: with the stacks of `candidates` split.
    """

    def __init__(
        self,
        stored: StoredCheckpoint,
        candidates: Candidates,
        allowed: tuple[str, ...],
        int8: bool,
        measured_rows: int | None,
        embeddings: str,
    ) -> None:
        self._stored, self._transposed, self._allowed = stored, candidates.tensors, allowed
        self._candidates = candidates
        self._int8, self._embeddings = int8, embeddings
        total = sum(stored.entries[tensor].nbytes for tensor in candidates.tensors)
        self._measured = None if measured_rows is None else MeasuredChoice(measured_rows, total)

    def decide(self, rows: Collection[str], told: Callable[[str], None]) -> dict[str, Decision]:
        """For every candidate, mixtures whole, and embeddings `rows`, in the checkpoint's order.
        told: each tensor as its turn comes."""
        decisions = {}
        for tensor in self._stored.entries:
            if tensor in self._transposed or tensor in rows:
                told(tensor)
                choose = self.choose_embedding if tensor in rows else self.choose
                decisions[tensor] = choose(tensor)
        return _whole_mixtures(decisions, self._candidates.mixtures)

    def choose(self, tensor: str) -> Decision:
        kept = self._stored.layers.get(tensor.removesuffix(formats.WEIGHT))
        if kept is not None and kept.format == FACTORED:
            return _as_it_is(kept, self._stored.entries[tensor])
        dense, transposed = self._stored.read(tensor), self._transposed[tensor]
        weight = dense.T if transposed else dense
        sizes, nnz = formats.candidates(weight, self._allowed)
        kind, seconds = next(iter(sizes), DENSE), None
        if self._measured is not None and sizes:
            kind, seconds = self._measured(weight, sizes, nnz, self._int8)
        density = nnz / weight.numel() if weight.numel() else 1.0
        report = LayerConversion.dense(weight.shape, dense.dtype, dense.nbytes, density)
        report = replace(report, seconds=seconds)
        if kind == DENSE:
            return Decision(None, nnz, report)
        stacked = self._candidates.is_stacked(tensor)
        layer = LayerFormat(kind, report.shape, self._int8, transposed, stacked=stacked)
        nnz, error = self._stored_values(tensor, dense, layer, nnz)
        report = replace(
            report,
            format=kind,
            values=INT8 if self._int8 else report.dtype,
            density=nnz / weight.numel(),
            nbytes=layer.nbytes(nnz, dense.dtype),
            error=error,
        )
        return Decision(layer, nnz, report)

    def choose_embedding(self, tensor: str) -> Decision:
        """int8 or coded rows for an embedding, or for a head that no format makes smaller."""
        if tensor in self._transposed:
            decision = self.choose(tensor)
            if decision.layer is not None:
                return decision
        dense = self._stored.read(tensor)
        return self._coded(dense) if self._embeddings == CODED else self._int8_rows(tensor, dense)

    def _coded(self, dense: Tensor) -> Decision:
        report = LayerConversion.dense(dense.shape, dense.dtype, dense.nbytes)
        escapes = formats.coded_escapes(dense)
        if escapes is None:
            return Decision(None, 0, report)
        layer = LayerFormat(CODED, report.shape)
        report = replace(report, format=CODED, nbytes=layer.nbytes(escapes, dense.dtype))
        return Decision(layer, escapes, report)

    def _int8_rows(self, tensor: str, dense: Tensor) -> Decision:
        report = LayerConversion.dense(dense.shape, dense.dtype, dense.nbytes)
        layer = LayerFormat(DENSE_INT8, report.shape, int8=True)
        _, error = self._stored_values(tensor, dense, layer, dense.numel())
        nbytes = layer.nbytes(dense.numel(), dense.dtype)
        report = replace(report, values=INT8, nbytes=nbytes, error=error)
        return Decision(layer, dense.numel(), report)

    def _stored_values(
        self, tensor: str, dense: Tensor, layer: LayerFormat, nnz: int
    ) -> tuple[int, float | None]:
        """How many values `layer` stores, and their relative error with int8."""
        if self._stored.layers.get(tensor.removesuffix(formats.WEIGHT)) == layer:
            parts = self._stored.parts[tensor]  # taken over as they are
            return math.prod(parts["values"].shape), 0.0 if layer.int8 else None
        if not layer.int8:
            return nnz, None
        try:
            return formats.quantization_error(dense, layer)
        except UserError as error:
            file = self._stored.entries[tensor].file
            raise UserError(f"{file}: tensor {tensor}: {error}") from error


def _as_it_is(layer: LayerFormat, dense: TensorEntry) -> Decision:
    """Factors have no zeros to leave out, and their product is larger."""
    nbytes = layer.nbytes(0, dense.dtype)
    report = LayerConversion.dense(layer.shape, dense.dtype, dense.nbytes, nbytes / dense.nbytes)
    return Decision(layer, 0, replace(report, format=layer.format, nbytes=nbytes))


def _whole_mixtures(
    decisions: Mapping[str, Decision], mixtures: Iterable[Iterable[str]]
) -> dict[str, Decision]:
    """The decisions, by tensor, with a mixture's experts compressed all, or none: they are one
    module of the model."""
    made = dict(decisions)
    for tensors in mixtures:
        if any(decisions[tensor].layer is None for tensor in tensors):
            made |= {tensor: _dense(decisions[tensor]) for tensor in tensors}
    return made


def _dense(decision: Decision) -> Decision:
    old = decision.report
    report = replace(old, format=DENSE, values=old.dtype, nbytes=old.nbytes_dense, error=None)
    return Decision(None, decision.nnz, report)


def compressible(checkpoint: Checkpoint) -> Candidates:
    """What `StoredCheckpoint.split(stacks)` has to compress."""
    reason = checkpoint.streaming_obstacle()
    if reason:
        raise UserError(f"{checkpoint.path}: cannot be compressed tensor by tensor: {reason}")
    model = checkpoint.build_model()
    places = owners(model)
    found: dict[str, bool] = {}
    for name, module in model.named_modules():
        if weight_of(module) is None or len(places[id(module.weight)]) > 1:
            continue
        pieces = checkpoint.names.pieces[name + formats.WEIGHT]
        tensor = pieces[0].tensor
        entry = checkpoint.tensors[tensor]
        named = tensor.endswith(formats.WEIGHT) and all(
            keeps_suffix(model, tensor, part) for part in ALL_PARTS
        )
        if pieces[0].whole and named and entry.dtype in formats.VALUE_DTYPES:
            found[tensor] = stored_transposed(module)
    stacks: list[str] = []
    mixtures = []
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_fused(module):
            continue
        experts = _expert_tensors(checkpoint, model, name, module)
        if isinstance(experts, str):
            refused[name] = experts
            continue
        tensors, stacked = experts
        found |= dict.fromkeys(tensors, bool(stacked) and is_transposed(module))
        stacks += stacked
        mixtures.append(tuple(tensors))
    return Candidates(found, tuple(stacks), tuple(mixtures), refused)


def embedding_tensors(checkpoint: Checkpoint, kind: str) -> list[str]:
    """The tensors of the input embedding and of the head: one where they are tied.

    kind: "int8" or "coded". Raises UserError, naming it, if one of them cannot be stored so.
    """
    model = checkpoint.build_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    try:
        embedding_scale(embedding)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    if head is not None and (weight_of(head) is None or stored_transposed(head)):
        raise UserError(f"{checkpoint.path}: embeddings: expected a linear head, got {head}")
    wanted = {id(m.weight) for m in (embedding, head) if m is not None}
    names = [n for n, t in model.state_dict(keep_vars=True).items() if id(t) in wanted]
    # A tied weight is in the checkpoint under one of its names.
    found = [piece.tensor for name in names for piece in checkpoint.names.pieces.get(name, [])]
    for tensor in found:
        entry = checkpoint.tensors[tensor]
        if not tensor.endswith(formats.WEIGHT) or entry.dtype not in formats.VALUE_DTYPES:
            raise UserError(
                f"{entry.file}: tensor {tensor}: expected floating point numbers and a name that "
                f"ends in {formats.WEIGHT} to store it as {kind}, got {entry.dtype}"
            )
        if kind == CODED and entry.dtype != torch.bfloat16:
            raise UserError(
                f"{entry.file}: tensor {tensor}: expected bfloat16, whose exponents can be coded, "
                f"got {dtype_name(entry.dtype)} (--dtype bfloat16 rounds it)"
            )
    return found


def _expert_tensors(
    checkpoint: Checkpoint, model: PreTrainedModel, name: str, module: nn.Module
) -> tuple[list[str], list[str]] | str:
    """The tensors of the matrices of a module of fused experts, and those that hold all experts'
    matrices, of which the former are then parts. Or why it has to stay dense."""
    pieces = {which: checkpoint.names.pieces[f"{name}.{which}"] for which in projections(module)}
    every = [piece for found in pieces.values() for piece in found]
    tensors = [piece.tensor for piece in every]
    if any(checkpoint.tensors[tensor].dtype not in formats.VALUE_DTYPES for tensor in tensors):
        return "not all are floating point numbers"
    counts = {which: getattr(module, which).shape[0] for which in pieces}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{which} of {count}" for which, count in counts.items())
        return f"not all have every matrix ({listed})"
    if all(piece.whole for piece in every):
        # Of X transformers makes <name>.<projection>; of X.3.values it has to make the same and
        # what comes behind it.
        kept = all(
            f"{name}.{which}.0.{part}" in candidate_names(f"{found[0].tensor}.0.{part}", model)
            for which, found in pieces.items()
            for part in ALL_PARTS
        )
        count = expert_count(module)
        units = [f"{tensor}.{e}{formats.WEIGHT}" for tensor in tensors for e in range(count)]
        return (units, tensors) if kept else "transformers would not find their parts again"
    if all(EXPERT.match(piece.tensor) for piece in every):
        return tensors, []
    return "their tensors have names of another kind"
