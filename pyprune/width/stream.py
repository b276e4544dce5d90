"""The residual stream of RMSNorm decoders in another basis, and in fewer dimensions.

With the scale of every norm moved into the matrices behind it, RMSNorm commutes with rotations, so
that all that reads or writes the stream can be rotated at will (SliceGPT, arXiv 2401.15024,
theorem 1). What is in the stream's last dimensions can then be left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.calibration.tokens import Batch
from pyprune.depth.addons import untie, writers
from pyprune.depth.graph import Branch, ResidualGraph, State
from pyprune.errors import UserError
from pyprune.models.stock import (
    InexpressibleError,
    adopt_attributes,
    shapes_of,
    stock_config,
    stock_twin,
)

NORM_BEFORE = ("input_layernorm", "post_attention_layernorm")
EPSILONS = ("variance_epsilon", "eps")


@dataclass(frozen=True, eq=False)
class Port:
    """A parameter with the stream along one axis.

    owner, name: the module and the attribute. axis: where the stream is. norm: in front of it, for
    what reads the stream.
    """

    owner: nn.Module
    name: str
    axis: int
    norm: nn.Module | None = None

    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.owner, self.name)
        return parameter

    def rotated(self, basis: Tensor) -> Tensor:
        """The parameter for a stream in the basis `[d, d']` (orthonormal columns), in fp64."""
        w = self.parameter().detach().double().movedim(self.axis, -1)
        if self.norm is not None:
            w = w * self.norm.weight.detach().double()  # type: ignore[operator]
        return (w @ basis).movedim(-1, self.axis)


class Stream:
    """Everything in a model that the width of the residual stream shows in.

    Attributes:
        graph; width: d; ports; norms: of the stream, the final one last.
    """

    def __init__(self, graph: ResidualGraph) -> None:
        self.graph = graph
        model = graph.model
        self.width: int = model.get_input_embeddings().weight.shape[1]
        self.norms: list[nn.Module] = []
        self.ports = [Port(model.get_input_embeddings(), "weight", 1)]
        for branch in graph.branches:
            self.ports += self._branch(branch)
        final = self._final_norm()
        self.norms.append(final)
        self.tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self.ports.append(Port(model.get_output_embeddings(), "weight", 1, final))
        self._check()

    @classmethod
    def of(cls, model: Any) -> Stream:
        """Raises UserError if the model is no pre-norm RMSNorm decoder of a plain kind."""
        return cls(ResidualGraph.of(model))

    def numel(self, width: int) -> int:
        """Parameters of a stock model with a stream of `width`, its head not tied."""
        touched = {id(port.parameter()) for port in self.ports}
        touched |= {id(norm.weight) for norm in self.norms}
        rest = sum(p.numel() for p in self.graph.model.parameters() if id(p) not in touched)
        ports: int = sum(p.parameter().numel() // self.width for p in self.ports)
        return int(rest + (ports + len(self.norms)) * width)

    def changes(self, width: int) -> dict[str, Any]:
        """The fields of the configuration that a stream of `width` needs.

        A stock RMSNorm divides by the mean over its own width: eps is scaled to give the divisor of
        the whole stream, up to a factor that `slice` puts into the norms' weights.
        """
        config = self.graph.model.config.get_text_config()
        size = getattr(config, "head_dim", None)
        return {
            "hidden_size": width,
            "head_dim": size or config.hidden_size // config.num_attention_heads,
            "rms_norm_eps": config.rms_norm_eps * self.width / width,
            "tie_word_embeddings": False,
        }

    def fits(self, width: int) -> bool:
        """Whether the configuration takes it."""
        try:
            stock_config(self.graph.model, self.changes(width))
        except InexpressibleError:
            return False
        return True

    @torch.no_grad()
    def slice(self, basis: Tensor) -> None:
        """Leaves the stream's components in `basis` (fp64 [d, d'], orthonormal columns), in place.

        The head is untied from the embeddings, because the final norm's scale goes into it.

        Raises UserError if the architecture cannot say the result.
        """
        model, width = self.graph.model, basis.shape[1]
        changes = self.changes(width)
        if self.tied:
            untie(model)
        try:
            twin = stock_twin(model, changes)
        except InexpressibleError as error:
            raise UserError(
                f"{type(model).__name__}: no stock model is narrower: {error}"
            ) from error
        for port in self.ports:
            old = port.parameter()
            new = port.rotated(basis.to(old.device)).to(old.dtype).contiguous()
            setattr(port.owner, port.name, nn.Parameter(new, requires_grad=old.requires_grad))
        scale = (self.width / width) ** 0.5
        for norm in self.norms:
            old = norm.weight  # type: ignore[assignment]
            new = torch.full((width,), scale, dtype=old.dtype, device=old.device)
            norm.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        wrong = sorted({k for k, _ in shapes_of(model).items() ^ shapes_of(twin).items()})
        if wrong:
            raise UserError(
                f"{type(model).__name__}: no stock model is narrower: {wrong[0]} differs"
            )
        config = model.config.get_text_config()
        for name, value in changes.items():
            setattr(config, name, value)
        adopt_attributes(model, twin)
        _adopt_epsilons(model, twin)

    # ---- inside

    def _branch(self, branch: Branch) -> Iterator[Port]:
        block = self.graph.adapter.blocks[branch.layer]
        layout = self.graph.layouts[branch.layer]
        name = type(block).__name__
        norms = layout.attention_norms if branch.kind == "attention" else layout.mlp_norms
        if layout.parallel or len(norms) != 1 or norms[0] not in NORM_BEFORE:
            raise UserError(f"{name}: expected one norm before each branch to slice the stream")
        norm = block.get_submodule(norms[0])
        self.norms.append(norm)
        writing = {id(p) for p in writers(self.graph, branch)}
        paths = (layout.attention,) if branch.kind == "attention" else layout.mlp
        for path in paths:
            for module in block.get_submodule(path).modules():
                for key, p in module.named_parameters(recurse=False):
                    if id(p) in writing:
                        yield Port(module, key, max(0, p.dim() - 2))
                    elif p.dim() > 1:
                        yield Port(module, key, p.dim() - 1, norm)

    def _final_norm(self) -> nn.Module:
        inside = {m for block in self.graph.adapter.blocks for m in block.modules()}
        decoder = self.graph.adapter.decoder
        embeddings = self.graph.model.get_input_embeddings()
        found = [
            module
            for module in decoder.modules()
            if module not in inside
            and module is not embeddings
            and any(True for _ in module.parameters(recurse=False))
        ]
        if len(found) != 1:
            raise UserError(
                f"{type(decoder).__name__}: expected embeddings, layers and one norm, got "
                f"{', '.join(type(m).__name__ for m in found) or 'no norm'} besides"
            )
        return found[0]

    def _check(self) -> None:
        name = type(self.graph.model).__name__
        for norm in self.norms:
            _check_rms(name, norm)
        for port in self.ports:
            if port.parameter().shape[port.axis] != self.width:
                raise UserError(
                    f"{name}: expected {self.width} along axis {port.axis} of {port.name} in "
                    f"{type(port.owner).__name__}, got {tuple(port.parameter().shape)}"
                )
        if not hasattr(self.graph.model.config.get_text_config(), "rms_norm_eps"):
            raise UserError(f"{name}: expected a configuration with rms_norm_eps")


@torch.no_grad()
def _check_rms(name: str, norm: nn.Module) -> None:
    """Raises UserError unless the norm is x / sqrt(mean(x^2) + eps) * weight."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    epsilon = next((float(getattr(norm, key)) for key in EPSILONS if hasattr(norm, key)), math.nan)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(weight), generator=gen).to(weight.device, weight.dtype) + 1
    plain = getattr(norm, "bias", None) is None
    if plain:
        y = x.float()
        y = y / (y.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.float()
        tolerance = 64 * max(torch.finfo(kind).eps for kind in (weight.dtype, torch.float32))
        plain = torch.allclose(norm(x).float(), y, rtol=tolerance, atol=tolerance)
    if not plain:
        raise UserError(
            f"{name}: expected RMSNorm to slice the stream, got {type(norm).__name__}, which is "
            "not x / rms(x) * weight and does not commute with rotations"
        )


def _adopt_epsilons(model: nn.Module, twin: nn.Module) -> None:
    twins = dict(twin.named_modules())
    for name, module in model.named_modules():
        for key in EPSILONS:
            value = vars(twins[name]).get(key)
            if isinstance(value, float):
                setattr(module, key, value)


# ---- bases


def principal_basis(gram: Tensor, width: int) -> Tensor:
    """fp64 [d, width]: the eigenvectors of largest eigenvalues of a symmetric `[d, d]`."""
    vectors: Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors[:, -width:].flip(1)


class StreamGram:
    """Sum over tokens of `x x^T / mean(x^2)`, fp64 [d, d]: what a norm makes of the stream, so that
    every token and every depth counts alike; or of `x x^T`."""

    def __init__(self, width: int, normalised: bool) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.normalised = normalised

    def add(self, state: Tensor, batch: Batch) -> None:
        """state: [B, T, d], of which padding is left out."""
        x = state.flatten(0, 1).float()
        if batch.attention_mask is not None:
            x = x[batch.attention_mask.flatten().to(x.device) != 0]
        if self.normalised:
            x = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        if not bool(x.isfinite().all()):
            raise UserError("the model's hidden states have NaN or infinite values on this text")
        self.gram += ops.gram(x).double().cpu()


@torch.no_grad()
def one_basis(
    graph: ResidualGraph, batches: Sequence[Batch], width: int, normalised: bool = True
) -> Tensor:
    """fp64 [d, width]: principal directions of the stream in front of all norms together."""
    found = None
    for batch in batches:
        state, context = graph.start(batch)
        found = found or StreamGram(state.total.shape[-1], normalised)
        found.add(state.total, batch)
        for branch in graph.branches:
            state = graph.run(branch, state, context)
            found.add(state.total, batch)
    assert found is not None
    return principal_basis(found.gram, width)


@torch.no_grad()
def basis_per_branch(
    graph: ResidualGraph, batches: Sequence[Batch], width: int, normalised: bool = True
) -> list[Tensor]:
    """A basis in front of every branch and of the final norm, each from a stream that the earlier
    ones have sliced already (SliceGPT's own form; it needs a matrix on every residual connection,
    which no stock model has)."""
    running = [(batch, *graph.start(batch)) for batch in batches]
    bases = []
    for branch in [*graph.branches, None]:
        found = StreamGram(running[0][1].total.shape[-1], normalised)
        for batch, state, _ in running:
            found.add(state.total, batch)
        basis = principal_basis(found.gram, width)
        bases.append(basis)
        running = [(b, _projected(s, basis), c) for b, s, c in running]
        if branch is not None:
            running = [(b, graph.run(branch, s, c), c) for b, s, c in running]
    return bases


@torch.no_grad()
def projected_states(graph: ResidualGraph, batch: Batch, bases: Sequence[Tensor]) -> Tensor:
    """[B, T, d]: the last layer's output if the stream in front of every branch, and at the end, is
    projected onto the span of its basis: what slicing does, in the original coordinates."""
    state, context = graph.start(batch)
    for branch, basis in zip(graph.branches, bases, strict=False):
        state = graph.run(branch, _projected(state, basis), context)
    return _projected(state, bases[-1]).total


def _projected(state: State, basis: Tensor) -> State:
    q = basis.to(state.total.device)
    x = (state.total.double() @ q @ q.T).to(state.total.dtype)
    return State(x, x)
