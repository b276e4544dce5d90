"""A decoder as an ordered list of residual branches.

Layer l is an attention branch and an MLP branch, in execution order A_0, M_0, A_1, M_1, ... Every
branch adds something to the residual stream; to skip it is to add nothing. Everything runs through
the model's own layer forwards, with parts of them switched off, and with the masks, positions and
rotary tables that the model itself hands to each layer, so no family's arithmetic is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyprune.calibration.tokens import Batch
from pyprune.depth.layouts import Layout, layout_of
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter
from pyprune.models.running import head_logits, replaced_forward

BranchKind = Literal["attention", "mlp"]
KINDS: tuple[BranchKind, BranchKind] = ("attention", "mlp")
# Relative deviation at which a layer does not compute what its layout says (fp32; scaled by eps).
STRUCTURE_TOLERANCE = 1e3


class Branch(NamedTuple):
    """A residual branch: of layer `layer` (from 0), "attention" or "mlp"."""

    kind: BranchKind
    layer: int

    @property
    def position(self) -> int:
        """Where it stands in execution order: 2 * layer, + 1 for the MLP."""
        return 2 * self.layer + KINDS.index(self.kind)

    def __str__(self) -> str:
        return f"{'A' if self.kind == 'attention' else 'M'}{self.layer}"


class State(NamedTuple):
    """The residual stream before a branch: what the branch reads, and what its output is added to,
    each [B, T, d]. They are one tensor except before the MLP of a parallel layer, which reads the
    stream from before the attention."""

    read: Tensor
    total: Tensor


@dataclass(frozen=True)
class Context:
    """What the model hands to each of its layers for one batch of `batch.input_ids` [B, T]."""

    batch: Batch
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class ResidualGraph:
    """The residual branches of a transformers decoder, in execution order.

    Attributes:
        model, adapter, branches; layouts: one per layer.
    """

    def __init__(self, model: Any, adapter: Adapter) -> None:
        self.model = model
        self.adapter = adapter
        config = model.config.get_text_config()
        self.layouts = [layout_of(block, config) for block in adapter.blocks]
        self.branches = [Branch(kind, i) for i in range(len(self.layouts)) for kind in KINDS]
        self._sizes: dict[Branch, int] = {}
        self._output: Any = None  # the decoder's latest, whose other fields the head may read

    @classmethod
    def of(cls, model: Any) -> ResidualGraph:
        """Finds the branches and checks, on a few tokens, that every layer is the sum of them.

        Raises:
            UserError: the residual structure is unknown or is not what it looks like.
        """
        graph = cls(model, Adapter.of(model))
        graph.check()
        return graph

    @property
    def device(self) -> torch.device:
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    # ---- parameters

    def parameters(self, branch: Branch) -> int:
        """Parameters that go with the branch: its module and the norms that only it reads."""
        if branch not in self._sizes:  # searches ask for all of them in every round
            self._sizes[branch] = self._count(branch)
        return self._sizes[branch]

    def _count(self, branch: Branch) -> int:
        block = self.adapter.blocks[branch.layer]
        names = self.layouts[branch.layer].modules(branch.kind)
        owned = {id(p): p for n in names for p in block.get_submodule(n).parameters()}
        return sum(p.numel() for p in owned.values())

    def removed_parameters(self, removed: Collection[Branch]) -> int:
        """Parameters that go when all of `removed` do: a layer that loses both branches loses the
        norm that they share too."""
        total = sum(self.parameters(branch) for branch in set(removed))
        for i, layout in enumerate(self.layouts):
            if all(Branch(kind, i) in removed for kind in KINDS):
                block = self.adapter.blocks[i]
                total += sum(
                    p.numel() for n in layout.shared for p in block.get_submodule(n).parameters()
                )
        return total

    # ---- skipping in place

    @contextmanager
    def skipping(self, branches: Collection[Branch], *, norms: bool = True) -> Iterator[None]:
        """Within it the model runs without these branches.

        norms: skip their own norms too; False is what zeroed last matrices do.
        Their attention leaves the key-value cache alone, so run with `use_cache=False`.
        """
        with ExitStack() as stack:
            for branch in set(branches):
                block = self.adapter.blocks[branch.layer]
                layout = self.layouts[branch.layer]
                more = self._beside[branch.layer]
                for module, forward in _switched_off(block, layout, branch, norms, more):
                    stack.enter_context(replaced_forward(module, forward))
            yield

    # ---- running from anywhere

    def second_of_parallel(self, branch: Branch) -> bool:
        """Whether the branch reads what the one before it read."""
        return branch.kind == "mlp" and self.layouts[branch.layer].parallel

    def start(self, batch: Batch, copies: int = 1) -> tuple[State, Context]:
        """The state before the first branch, and the context for `copies` x B rows.

        The decoder runs with its layers switched off, so that masks, positions and tables are its
        own. The rows are `copies` repetitions of the batch.
        """
        batch = repeated(batch, copies)
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        states: list[Tensor] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            states.append(hidden)
            arguments.append((args, kwargs))
            return hidden

        self._decoder(batch, record)
        return State(states[0], states[0]), Context(batch, arguments)

    def run(self, branch: Branch, state: State, context: Context) -> State:
        """The state after `branch` ran on `state`, the one before it."""
        other = Branch(KINDS[branch.kind == "attention"], branch.layer)
        with self.skipping([other]):
            if not self.second_of_parallel(branch):
                return self._next(branch, state, self._layer(branch.layer, state.read, context))
            # The layer would add the branch to what it read; we need its output alone.
            outputs: list[Tensor] = []
            name = self.layouts[branch.layer].last(branch.kind)
            last = self.adapter.blocks[branch.layer].get_submodule(name)
            hook = last.register_forward_hook(
                lambda _m, _i, out: outputs.append((out[0] if type(out) is tuple else out).clone())
            )
            try:
                self._layer(branch.layer, state.read, context)
            finally:
                hook.remove()
        total = state.total + outputs[0]
        return State(total, total)

    def skip(self, branch: Branch, state: State) -> State:
        """The state after `branch` if it is left out."""
        return self._next(branch, state, state.total)

    def advance(
        self,
        span: tuple[int, int],
        state: State,
        context: Context,
        removed: Collection[Branch] = (),
        factors: Mapping[int, float] | None = None,
    ) -> State:
        """The state before the branch at position `span[1]` (see `Branch.position`; after the last
        one 2 L), from the one before `span[0]`, without `removed`, the stream multiplied at the
        positions of `factors`."""
        for branch in self.branches[slice(*span)]:
            factor = 1.0 if factors is None else factors.get(branch.position, 1.0)
            if factor != 1:
                state = State(state.read * factor, state.total * factor)
            gone = branch in removed
            state = self.skip(branch, state) if gone else self.run(branch, state, context)
        return state

    def finish(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What the decoder makes of its last layer's output `hidden`, before the final norm
        [B, T, d]: that norm, and a projection. [B, T, d']"""
        last = len(self.layouts) - 1
        calls = iter(range(last + 1))

        def replay(given: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            return hidden if next(calls) == last else given

        output: Tensor = self._decoder(batch, replay).last_hidden_state
        return output

    def logits(self, finished: Tensor, input_ids: Tensor) -> Tensor:
        """The model's own head on outputs of `finish` [B, t, d'] (any positions): [B, t, V]."""
        decoder, output = self.adapter.decoder, self._output
        return head_logits(self.model, decoder, output, finished, input_ids).float()

    # ---- the check

    @torch.no_grad()
    def check(self) -> None:
        """Raises UserError unless each layer is the sum of its branches as its layout says."""
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.arange(12, device=self.device).view(2, 6) % vocabulary
        state, context = self.start(Batch(ids))
        for i, block in enumerate(self.adapter.blocks):
            pair = [Branch(kind, i) for kind in KINDS]
            whole = self._layer(i, state.total, context)
            # A norm after the residual addition, or one that makes something of zeros, shows here.
            with self.skipping(pair, norms=False):
                nothing = self._layer(i, state.total, context)
            summed = self.run(pair[1], self.run(pair[0], state, context), context).total
            self._compare(block, "adding nothing in both branches", nothing, state.total)
            self._compare(block, "its branches one after the other", summed, whole)
            state = State(whole, whole)

    def _compare(self, block: nn.Module, what: str, got: Tensor, expected: Tensor) -> None:
        tolerance = STRUCTURE_TOLERANCE * torch.finfo(expected.dtype).eps
        scale = expected.abs().max()
        difference = (got - expected).abs().max()
        # A model with NaN weights is somebody else's to report: the comparison would mean nothing.
        if scale.isfinite() and not difference <= tolerance * scale:
            raise UserError(
                f"{type(block).__name__}: unknown residual structure: {what} differs from what the "
                f"layer does by {float(difference / scale):.1e}; its layout has to be added in "
                "pyprune.depth.layouts"
            )

    # ---- inside

    def _next(self, branch: Branch, state: State, total: Tensor) -> State:
        stays = branch.kind == "attention" and self.layouts[branch.layer].parallel
        return State(state.read if stays else total, total)

    @cached_property
    def _beside(self) -> list[dict[str, int | None]]:
        """What each layer (name "") and the last module of each of its branches return beside their
        output, run on a token, by the module's name: attention weights, a router's logits, nothing
        (0); None where it returns no tuple."""
        found: list[dict[str, int | None]] = [{} for _ in self.layouts]

        def note(layer: int, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            found[layer][name] = len(output) - 1 if isinstance(output, tuple) else None

        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with ExitStack() as stack, torch.no_grad():
            for i, layout in enumerate(self.layouts):
                for name in ("", *map(layout.last, KINDS)):
                    module = self.adapter.blocks[i].get_submodule(name)
                    hook = module.register_forward_hook(partial(note, i, name))
                    stack.callback(hook.remove)
            self.adapter.decoder(input_ids=token, use_cache=False)
        return found

    def _layer(self, i: int, hidden: Tensor, context: Context) -> Tensor:
        args, kwargs = context.arguments[i]
        output = self.adapter.blocks[i](hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _decoder(self, batch: Batch, layer: Callable[..., Tensor]) -> Any:
        """Runs the decoder with `layer(hidden, *args, **kwargs)` in place of every block."""
        with ExitStack() as stack:
            forward = _in_tuple(layer, None if self._beside[0][""] is None else 1)
            for block in self.adapter.blocks:
                stack.enter_context(replaced_forward(block, forward))
            self._output = self.adapter.decoder(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        return self._output


def repeated(batch: Batch, copies: int) -> Batch:
    """The batch's rows `copies` times over: [copies * B, T], copy by copy."""
    mask = batch.attention_mask
    return Batch(
        batch.input_ids.repeat(copies, 1), None if mask is None else mask.repeat(copies, 1)
    )


def _in_tuple(layer: Callable[..., Tensor], beside: int | None) -> Callable[..., Any]:
    """`layer` with its output in a tuple, `beside` times None behind it; None: as it is."""
    if beside is None:
        return layer
    return lambda *args, **kwargs: (layer(*args, **kwargs), *(None,) * beside)


def _switched_off(
    block: nn.Module,
    layout: Layout,
    branch: Branch,
    with_norms: bool,
    beside: Mapping[str, int | None],
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The modules of a branch and forwards with which it adds nothing, at next to no cost."""
    last = layout.last(branch.kind)
    nothing = _residual if layout.adds_inside else _zeros
    yield block.get_submodule(last), _in_tuple(nothing, beside[last])
    norms = layout.norms(branch.kind) if with_norms else ()
    for name in (*layout.inner(branch.kind)[:-1], *norms):
        yield block.get_submodule(name), _same


def _same(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden


def _zeros(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return torch.zeros_like(hidden_states)


def _residual(_hidden: Tensor, residual: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return residual


def gaps(removed: Collection[Branch], layers: int) -> list[tuple[int, int]]:
    """Runs of consecutive removed branches as positions (first, end), end exclusive, ascending."""
    gone = {branch.position for branch in removed}
    if gone and not (min(gone) >= 0 and max(gone) < 2 * layers and len(gone) < 2 * layers):
        raise UserError(
            f"removed: expected some, not all, branches of {layers} layers, got "
            f"{', '.join(map(str, sorted(removed)))}"
        )
    starts = sorted(i for i in gone if i - 1 not in gone)
    ends = sorted(i + 1 for i in gone if i + 1 not in gone)
    return list(zip(starts, ends, strict=True))
