"""The residual stream of pre-norm decoders in another basis, and in fewer dimensions.

With the scale of every norm moved into the matrices behind it, RMSNorm commutes with rotations, so
that all that reads or writes the stream can be rotated at will (SliceGPT, arXiv 2401.15024,
theorem 1). What is in the stream's last dimensions can then be left out.

LayerNorm sees only what is perpendicular to the vector of ones, and commutes with the rotations
that leave that vector where it is. Of d' dimensions d' - 1 hold the stream, in coordinates that sum
to zero: the mean that the norm subtracts is zero then, and what it does is RMSNorm. (The paper
turns LayerNorm into RMSNorm by subtracting the mean in all that writes; such a model is not of its
family any more.) The direction of ones is free on the norm's output, where it carries the bias: the
new norm adds the unit vector along it, and whatever reads the stream turns that into what its
matrix made of the old bias. No matrix needs a bias of its own for that (most heads have none). The
vector is short beside what it is added to, so that rounding to 16 bits costs that nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from pyprune import ops
from pyprune.calibration.tokens import Batch
from pyprune.depth.finite import NotFiniteError
from pyprune.depth.graph import Branch, ResidualGraph, State
from pyprune.depth.writers import norm_after, writers
from pyprune.errors import UserError
from pyprune.models.experts import is_fused, is_transposed
from pyprune.models.stock import (
    InexpressibleError,
    adopt_attributes,
    behaviour,
    shapes_of,
    stock_config,
    stock_twin,
)
from pyprune.width.norms import StreamNorm

# Linear maps between embeddings of another width and the stream, and back (OPT).
INTO, OUT_OF = "project_in", "project_out"
# Where embeddings keep what they multiply by, if that depends on the width (Gemma).
EMBED_SCALE = "scalar_embed_scale"
# Attributes of a model that are set here, or that compute nothing.
SET_HERE = (EMBED_SCALE, "tie_word_embeddings", "name_or_path")


@dataclass(frozen=True, eq=False)
class Coordinates:
    """A narrower stream: `factor * x @ matrix`.

    matrix: fp64 [d, size], of which the columns from `live` on are zeros. Those before span what is
    left of the stream; with LayerNorm they sum to zero, else they are orthonormal.
    """

    matrix: Tensor
    live: int
    factor: float

    @classmethod
    def of(cls, directions: Tensor, centred: bool, size: int | None = None) -> Coordinates:
        """directions: fp64 [d, k], orthonormal columns. size: of the new stream, which is as wide
        as it has to be if it is None, and else has zeros from there on.

        A norm divides by the mean over its own width: the stream is scaled to give it the divisor
        of the whole one, with the epsilon as it is.
        """
        d, k = directions.shape
        live = k + centred
        matrix = directions @ complement(live).T if centred else directions
        size = live if size is None else size
        matrix = torch.cat([matrix, matrix.new_zeros(d, size - live)], dim=1)
        return cls(matrix, live, (size / d) ** 0.5)

    def ones(self) -> Tensor:
        """fp64 [size]: the unit vector of equal live coordinates."""
        ones = self.matrix.new_zeros(self.matrix.shape[1])
        ones[: self.live] = self.live**-0.5
        return ones


@dataclass(frozen=True, eq=False)
class Port:
    """A parameter with the stream along one axis.

    owner, name: the module and the attribute. axis: where the stream is. norm: in front of it, for
    what reads the stream.
    """

    owner: nn.Module
    name: str
    axis: int
    norm: StreamNorm | None = None

    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.owner, self.name)
        return parameter

    def moved(self, to: Coordinates) -> Tensor:
        """The parameter for a stream in other coordinates, in fp64."""
        old = self.parameter().detach()
        w, matrix = old.double().movedim(self.axis, -1), to.matrix.to(old.device)
        if self.norm is None:
            return (w @ matrix * to.factor).movedim(-1, self.axis)
        shift = self.norm.shift()
        new = (w * self.norm.scale()) @ matrix / to.factor
        if shift is not None:
            new = new + (w @ shift)[..., None] * to.ones().to(old.device)
        return new.movedim(-1, self.axis)


class Stream:
    """Everything in a model that the width of the residual stream shows in.

    Attributes:
        graph; width: d; ports; norms: of the stream, the final one last.
        centred: whether they are LayerNorms. tied: whether the head that reads the stream is the
            embeddings.
    """

    def __init__(self, graph: ResidualGraph) -> None:
        self.graph = graph
        model = graph.model
        self.width: int = model.config.get_text_config().hidden_size
        self.norms: list[StreamNorm] = []
        self.ports: list[Port] = []
        self._found: dict[int, StreamNorm] = {}
        outside = self._outside()
        for branch in graph.branches:
            self.ports += self._branch(branch)
        final = self._norm(outside)
        head, entry = model.get_output_embeddings(), model.get_input_embeddings()
        projection = getattr(graph.adapter.decoder, OUT_OF, None)
        reads = head if projection is None else projection
        self.ports.append(Port(reads, "weight", 1, final))
        self.tied = projection is None and head.weight is entry.weight
        self.centred = final.centred
        self._check()

    @classmethod
    def of(cls, model: Any) -> Stream:
        """Raises UserError if the model's norms do not commute with rotations of its stream."""
        return cls(ResidualGraph.of(model))

    def numel(self, width: int) -> int:
        """Parameters of a model with a stream of `width`, its head not tied to the embeddings if it
        reads the stream."""
        touched = {id(port.parameter()) for port in self.ports}
        touched |= {id(p) for norm in self.norms for p in norm.module.parameters()}
        rest = sum(p.numel() for p in self.graph.model.parameters() if id(p) not in touched)
        ports: int = sum(p.parameter().numel() // self.width for p in self.ports)
        return int(rest + (ports + sum(len(n.parameters()) for n in self.norms)) * width)

    def directions(self, width: int) -> int:
        """How many directions of the stream one of `width` holds."""
        return width - self.centred

    def changes(self, width: int) -> dict[str, Any]:
        """The fields of the configuration that a stream of `width` needs."""
        config = self.graph.model.config.get_text_config()
        changes = {"hidden_size": width}
        if not isinstance(getattr(type(config), "head_dim", None), property):
            size = getattr(config, "head_dim", None)
            changes["head_dim"] = size or config.hidden_size // config.num_attention_heads
        return changes | ({"tie_word_embeddings": False} if self.tied else {})

    def fits(self, width: int) -> bool:
        """Whether the stream can be that wide: with `obstacle` everything can be zeros, else the
        configuration has to take it."""
        if self.directions(width) < 1:
            return False
        try:
            return bool(self.obstacle) or bool(stock_config(self.graph.model, self.changes(width)))
        except InexpressibleError:
            return False

    @cached_property
    def obstacle(self) -> str:
        """Why the architecture has no model with a narrower stream and the same heads, "" if it
        has."""
        try:
            self._twin(self.width // 2)
        except InexpressibleError as error:
            return str(error)
        return ""

    @torch.no_grad()
    def slice(self, directions: Tensor) -> None:
        """Leaves the stream's components in `directions` (fp64 [d, k], orthonormal columns), in
        place; with `obstacle` in the shapes of before, as zeros from there on.

        With LayerNorm they have to be perpendicular to the vector of ones, and the stream is k + 1
        wide. The head is untied from the embeddings, because the final norm's scale goes into it.

        Raises UserError if the architecture cannot say the result.
        """
        model = self.graph.model
        size = self.width if self.obstacle else None
        to = Coordinates.of(directions, self.centred, size)
        twin = None if self.obstacle else self._twin_or_error(to.live)
        if self.tied:
            untie(model)
        if twin is not None:
            self._adopt(twin, to.live)
        for port in self.ports:
            old = port.parameter()
            new = port.moved(to).to(old.dtype).contiguous()
            setattr(port.owner, port.name, nn.Parameter(new, requires_grad=old.requires_grad))
        for norm in self.norms:
            norm.reset(to.ones())

    # ---- stock models

    def _twin_or_error(self, width: int) -> Any:
        try:
            return self._twin(width)
        except InexpressibleError as error:
            name = type(self.graph.model).__name__
            raise UserError(f"{name}: no stock model is narrower: {error}") from error

    def _twin(self, width: int) -> Any:
        """The stock model with a stream of `width`."""
        model = self.graph.model
        twin = stock_twin(model, self.changes(width))
        name = type(model.config.get_text_config()).__name__
        expected = self._shapes(width)
        wrong = sorted({key for key, _ in expected.items() ^ shapes_of(twin).items()})
        if wrong:
            raise InexpressibleError(
                f"{name} with hidden_size {width} cannot say that {wrong[0]} is "
                f"{expected.get(wrong[0])}"
            )
        pairs = behaviour(model).items() ^ behaviour(twin).items()
        different = sorted({key for key, _ in pairs if key.rpartition(":")[2] not in SET_HERE})
        if different:
            raise InexpressibleError(f"{name} would change {different[0]}")
        return twin

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes with a stream of `width`."""
        model = self.graph.model
        names = {id(module): name for name, module in model.named_modules()}
        shapes = shapes_of(model)
        for port in self.ports:
            shape = list(port.parameter().shape)
            shape[port.axis] = width
            shapes[f"{names[id(port.owner)]}.{port.name}"] = tuple(shape)
        for norm in self.norms:
            for key in norm.parameters():
                shapes[f"{names[id(norm.module)]}.{key}"] = (width,)
        return shapes

    def _adopt(self, twin: Any, width: int) -> None:
        """Makes the configuration and the modules say what those of `twin` do."""
        model = self.graph.model
        config = model.config.get_text_config()
        for name, value in self.changes(width).items():
            setattr(config, name, value)
        adopt_attributes(model, twin)
        entry, other = model.get_input_embeddings(), twin.get_input_embeddings()
        old, new = (getattr(module, EMBED_SCALE, None) for module in (entry, other))
        if old is not None and new is not None and old != new:
            entry.weight.mul_(old / new)
            setattr(entry, EMBED_SCALE, new)
            entry.embed_scale.fill_(new)

    # ---- inside

    def _branch(self, branch: Branch) -> Iterator[Port]:
        block = self.graph.adapter.blocks[branch.layer]
        layout = self.graph.layouts[branch.layer]
        norms = layout.norms(branch.kind) or layout.shared
        if norm_after(self.graph, branch) is not None or len(norms) != 1:
            raise UserError(
                f"{type(block).__name__}: expected one norm in front of each branch to slice the "
                f"stream, got {' and '.join(norms)} at its {branch.kind}: a norm behind a branch "
                "scales what it writes coordinate by coordinate, which no other basis can say"
            )
        norm = self._norm(block.get_submodule(norms[0]))
        writing = {id(p) for p in writers(self.graph, branch)}
        for path in layout.inner(branch.kind):
            for module in block.get_submodule(path).modules():
                if "Norm" in type(module).__name__:
                    continue  # of queries and keys
                for key, p in module.named_parameters(recurse=False):
                    if id(p) in writing:
                        yield Port(module, key, _output_axis(module, key, p))
                    elif p.dim() > 1 and not key.endswith("bias"):
                        axis = p.dim() - 2 if _stored_transposed(module) else p.dim() - 1
                        yield Port(module, key, axis, norm)

    def _norm(self, module: nn.Module) -> StreamNorm:
        if id(module) not in self._found:  # the branches of a parallel layer may share theirs
            name = type(self.graph.model).__name__
            self._found[id(module)] = StreamNorm.of(name, module, self.width)
            self.norms.append(self._found[id(module)])
        return self._found[id(module)]

    def _outside(self) -> nn.Module:
        """Adds what embeds tokens and positions to the ports; returns the final norm."""
        inside = {m for block in self.graph.adapter.blocks for m in block.modules()}
        decoder = self.graph.adapter.decoder
        entry = self.graph.model.get_input_embeddings()
        projected = getattr(decoder, INTO, None) is not None
        norms: dict[str, nn.Module] = {}
        for name, module in decoder.named_modules():
            held = any(True for _ in module.parameters(recurse=False))
            if module in inside or not (held or "Norm" in type(module).__name__):
                continue
            if name == INTO:
                self.ports.append(Port(module, "weight", 0))
            elif isinstance(module, nn.Embedding):
                if module is not entry or not projected:
                    self.ports.append(Port(module, "weight", 1))
            elif name != OUT_OF:
                norms[name] = module
        if len(norms) != 1:
            raise UserError(
                f"{type(decoder).__name__}: expected embeddings, layers and one norm behind them "
                f"to slice the stream, got {', '.join(norms) or 'no norm'} besides (a norm behind "
                "the embeddings writes to the stream coordinate by coordinate)"
            )
        return next(iter(norms.values()))

    def _check(self) -> None:
        name = type(self.graph.model).__name__
        if len({norm.centred for norm in self.norms}) != 1:
            raise UserError(f"{name}: expected norms of one kind, got RMSNorm and LayerNorm")
        for port in self.ports:
            if port.parameter().shape[port.axis] != self.width:
                raise UserError(
                    f"{name}: expected {self.width} along axis {port.axis} of {port.name} in "
                    f"{type(port.owner).__name__}, got {tuple(port.parameter().shape)}"
                )


def _output_axis(module: nn.Module, name: str, parameter: Tensor) -> int:
    if name.endswith("bias") or _stored_transposed(module):
        return parameter.dim() - 1
    return parameter.dim() - 2  # [d, f], or [experts, d, f]


def _stored_transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or (is_fused(module) and is_transposed(module))


# ---- bases


def complement(size: int) -> Tensor:
    """fp64 [size, size - 1]: orthonormal columns perpendicular to the vector of ones, as near the
    unit vectors as a reflection (of the last one onto ones) leaves them."""
    last = torch.zeros(size, dtype=torch.float64)
    last[-1] = 1
    ones = torch.full_like(last, size**-0.5)
    away = last - ones
    reflection = torch.eye(size, dtype=torch.float64) - torch.outer(away, away) / (1 - ones[-1])
    return reflection[:, :-1]


def principal_basis(gram: Tensor, count: int, centred: bool = False) -> Tensor:
    """fp64 [d, count]: the eigenvectors of largest eigenvalues of a symmetric `[d, d]`; centred: of
    what is perpendicular to the vector of ones."""
    if centred:
        rest = complement(len(gram))
        return rest @ principal_basis(rest.T @ gram.double() @ rest, count)
    vectors: Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors[:, -count:].flip(1)


class StreamGram:
    """Sum over tokens of `x x^T / mean(x^2)`, fp64 [d, d]: what a norm makes of the stream, so that
    every token and every depth counts alike; or of `x x^T`. centred: of x minus its mean."""

    def __init__(self, width: int, normalised: bool, centred: bool = False) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.normalised = normalised
        self.centred = centred

    def add(self, state: Tensor, batch: Batch) -> None:
        """state: [B, T, d], of which padding is left out."""
        x = state.flatten(0, 1).float()
        if batch.attention_mask is not None:
            x = x[batch.attention_mask.flatten().to(x.device) != 0]
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        if self.normalised:
            x = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        if not bool(x.isfinite().all()):
            raise NotFiniteError("the model's hidden states have NaN or infinite values")
        self.gram += ops.gram(x).double().cpu()

    def basis(self, count: int) -> Tensor:
        """fp64 [d, count]: principal directions."""
        return principal_basis(self.gram, count, self.centred)


@torch.no_grad()
def one_basis(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    count: int,
    normalised: bool = True,
    centred: bool = False,
) -> Tensor:
    """fp64 [d, count]: principal directions of the stream in front of all norms together; centred:
    the norms are LayerNorms."""
    found = None
    for batch in batches:
        state, context = graph.start(batch)
        found = found or StreamGram(state.total.shape[-1], normalised, centred)
        for branch in graph.branches:
            if not graph.second_of_parallel(branch):
                found.add(state.total, batch)
            state = graph.run(branch, state, context)
        found.add(state.total, batch)
    assert found is not None
    return found.basis(count)


@torch.no_grad()
def projected_states(graph: ResidualGraph, batch: Batch, bases: Sequence[Tensor]) -> Tensor:
    """[B, T, d]: the last layer's output if the stream in front of every branch, and at the end, is
    projected onto the span of its basis: what slicing does, in the original coordinates."""
    state, context = graph.start(batch)
    for branch, basis in zip(graph.branches, bases, strict=False):
        state = graph.run(branch, projected(state, basis), context)
    return projected(state, bases[-1]).total


def projected(state: State, basis: Tensor) -> State:
    """The stream projected onto the span of `basis [d, count]`."""
    q = basis.to(state.total.device)
    read, total = ((x.double() @ q @ q.T).to(x.dtype) for x in state)
    return State(read, total)


def untie(model: Any) -> None:
    """Gives the head its own copy of the embeddings, so that they can differ."""
    head, entry = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not entry.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
