"""The backward pass: gradients of the language-model loss at the output of every prunable matrix.

The gradient of a weight `[R, C]` is `G^T X`, with the matrix's inputs X and the gradients G of its
outputs, and no weight gradient is ever stored. Parameters ask for no gradient, so autograd carries
the activations' gradients only; a hook on the input keeps X, a hook on the output receives G, and
both go to a visitor, which adds what it wants of them to sums of its own. The visit is over before
the backward pass reaches the matrix below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.calibration import schedule
from pyprune.calibration.autograd import (
    asking_entry,
    checkpointed,
    on_device,
    without_parameter_gradients,
)
from pyprune.calibration.head import Head, check_head, next_labels, sequence_targets
from pyprune.calibration.sample import Sample
from pyprune.calibration.schedule import TensorId
from pyprune.calibration.tokens import Batch, one_by_one
from pyprune.errors import OVERFLOW, LayerError, UserError
from pyprune.models.adapter import Adapter
from pyprune.models.experts import ExpertInput, observed
from pyprune.models.linears import LinearRef
from pyprune.models.running import evaluation
from pyprune.progress import CountProgress

__all__ = ["BackwardReport", "PassOptions", "Sample", "Visitor", "backward_pass"]

# fp16 has neither exponents for small gradients nor for large ones; bf16, fp32 and fp64 have. Of
# the first sequence the largest shall be 2^9 at most, 2^7 below what fp16 holds. Of a logit it can
# be as large as the scale itself, which therefore is no larger than 2^15.
FIRST_HALF_SCALE, LEAST_HALF_SCALE, LARGEST_HALF_SCALE = 2.0**8, 2.0**-8, 2.0**15
HALF_PEAK = 2.0**9
Visitor = Callable[[Sample], None]


@dataclass(frozen=True)
class PassOptions:
    """How a backward pass runs.

    checkpointing: keep only the blocks' inputs and run each block again when the backward pass
        reaches it: one more forward, and the activations of one block at a time.
    device: where the model runs; afterwards it is back where it was.
    fisher_samples: 0: the labels are the text's own next tokens. S > 0: S times over labels are
        drawn from the model's own distribution at each token, and each draw has a backward pass
        (one forward serves all). G is divided by sqrt(S), so that sums over the draws of squares
        and outer products are means over them: of the Fisher information itself rather than the
        empirical one (Kunstner et al. 2019, arXiv 1905.12558). One pass for the mean loss of S
        draws would give 1 / S of it.
    seed: of the draws, which depend on the sequences and their order but on no batch size.
    loss_scale: multiplies the loss and is divided out of G in fp32 (in fp64 models fp64). None: for
        fp16 the power of two that the first sequence, run once more for it, bears; otherwise 1.
    """

    checkpointing: bool = False
    device: torch.device | str = "cpu"
    fisher_samples: int = 0
    seed: int = 0
    loss_scale: float | None = None

    def __post_init__(self) -> None:
        if self.fisher_samples < 0:
            raise UserError(f"fisher_samples: expected 0 or more, got {self.fisher_samples}")


PLAIN = PassOptions()


@dataclass(frozen=True)
class BackwardReport:
    """What the pass saw. sequences: in all batches. targets: tokens that one before them
    predicts."""

    sequences: int
    targets: int


def backward_pass(
    adapter: Adapter,
    batches: Sequence[Batch],
    visitors: Mapping[str, Visitor],
    options: PassOptions = PLAIN,
    progress: CountProgress | None = None,
) -> BackwardReport:
    """Runs the model forward and backward on every sequence and shows each matrix's part to its
    visitor.

    The loss is the cross entropy of each next token, summed (not averaged) over the tokens of a
    sequence: a gradient of G is then of the size that a single token gives, which 16-bit floats
    hold. Sequences go through the model one at a time, whatever the batch size, so that the
    activations of one are all that is held. Each is in exactly one call of every visitor that saw a
    token of it. Padding is in no visit, and predicts and is predicted by nothing.

    Args:
        adapter: of a causal language model with its head, all of it in memory. Matrices whose
            parameter another module holds too are not among `adapter.linears`.
        batches: token ids `[B, T]`, each sequence of at least two real tokens in a row.
        visitors: by `LinearRef.name`; matrices without one cost nothing, and no gradient flows
            below the first block that has one. What a visitor is handed is only valid during the
            call and not to be written to.
        progress: called with sequences done and in all.

    Returns:
        The report. The model's parameters, their requires_grad flags and `.grad`, training flags
        and hooks are as before, whatever happens.

    Raises:
        LayerError: a gradient is NaN or infinite, or vanished everywhere, or in fp16 where all are
            too small to tell; a matrix runs twice or not at all, writes to its input, or padding
            cannot be told apart in it.
        UserError: the model has no head, a sequence has fewer than two tokens in a row, a visitor's
            name is unknown.
    """
    model, device = adapter.model, torch.device(options.device)
    _check_model(adapter, visitors)
    for i, batch in enumerate(batches):
        sequence_targets(i, batch)  # refused before any has run, by the batch it was given in
    given = [_Tokens.of(i, single, device) for i, single in enumerate(one_by_one(batches))]
    if not given:
        raise UserError("calibration: expected at least one sequence, got none")
    dtype = next(model.parameters()).dtype
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluation(model))
        stack.enter_context(without_parameter_gradients(model))
        stack.enter_context(on_device(model, device))
        scale = options.loss_scale
        if scale is None:
            half = dtype == torch.float16
            scale = _half_scale(adapter, given[0], visitors, options.checkpointing) if half else 1.0
        run = _Pass(adapter, visitors, options, scale)
        stack.enter_context(run.hooked(options.checkpointing))
        for done, tokens in enumerate(given, 1):
            run.run(tokens)
            if progress is not None:
                progress(done, len(given))
    run.check(dtype)
    return BackwardReport(len(given), sum(tokens.targets for tokens in given))


def _half_scale(
    adapter: Adapter, tokens: _Tokens, names: Iterable[str], checkpointing: bool
) -> float:
    """What the loss of an fp16 model is multiplied by: as much as leaves room above the largest
    gradient at the matrices `names` on this sequence. FIRST_HALF_SCALE if none is found there that
    is finite and not zero: the pass itself then names the layer."""
    scale = FIRST_HALF_SCALE
    while True:
        probe = _Pass(adapter, dict.fromkeys(names, _unseen), PLAIN, scale)
        with probe.hooked(checkpointing):
            probe.run(tokens)
        peak = probe.peak()
        if math.isfinite(peak) or scale <= LEAST_HALF_SCALE:
            break
        scale = max(LEAST_HALF_SCALE, scale / 2**4)
    if not math.isfinite(peak) or not peak:
        return FIRST_HALF_SCALE
    fits = 2.0 ** math.floor(math.log2(HALF_PEAK / peak))
    return min(LARGEST_HALF_SCALE, max(LEAST_HALF_SCALE, fits))


@dataclass(frozen=True, eq=False)
class _Tokens:
    """A sequence on the device. real: `[T]` bool, None if no token is padding; targets: predicted
    tokens."""

    index: int
    batch: Batch
    real: Tensor | None
    targets: int

    @classmethod
    def of(cls, index: int, single: Batch, device: torch.device) -> _Tokens:
        (targets,) = sequence_targets(index, single)
        single = single.to(device)
        mask = single.attention_mask
        real = None if mask is None or bool((mask != 0).all()) else mask[0] != 0
        return cls(index, single, real, targets)

    @property
    def length(self) -> int:
        return self.batch.input_ids.shape[1]


class _Pass:
    """The state of one backward pass."""

    def __init__(
        self,
        adapter: Adapter,
        visitors: Mapping[str, Visitor],
        options: PassOptions,
        scale: float,
    ) -> None:
        self._adapter = adapter
        self._visitors = visitors
        self._scale = scale
        self._head, self._draw = Head(adapter, scale, options.fisher_samples, options.seed), 0
        self._refs = [
            [ref for ref in adapter.linears(i) if ref.name in visitors]
            for i in range(len(adapter.blocks))
        ]
        self._first = next(i for i, refs in enumerate(self._refs) if refs)
        # Largest |g| so far, on the device: NaN stays NaN, and nothing waits for the device.
        self._peak: dict[str, Tensor] = {}
        self._input_peak: dict[str, Tensor] = {}
        self._inputs: list[tuple[TensorId, str]] = []
        self._ran: set[str] = set()
        self._visited: set[str] = set()

    # One sequence.

    def run(self, tokens: _Tokens) -> None:
        self._tokens = tokens
        self._inputs.clear()
        self._ran.clear()
        ids, mask = tokens.batch.input_ids, tokens.batch.attention_mask
        out = self._adapter.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden: Tensor = out[0]
        labels = next_labels(ids, None if tokens.real is None else tokens.real[None])
        gradients = self._head.gradients(out, hidden.detach(), ids, labels)
        for self._draw, gradient in enumerate(gradients):
            self._visited.clear()
            self._ran.clear()  # checkpointed blocks run again
            more = self._draw + 1 < len(gradients)
            hidden.backward(gradient, retain_graph=more)  # type: ignore[no-untyped-call]
            for refs in self._refs:
                for ref in refs:
                    if ref.index is None and ref.name not in self._visited:
                        raise LayerError(
                            ref.name,
                            f"no gradient reached it in batch {tokens.index} "
                            + schedule.without(ref.name),
                        )

    def peak(self) -> float:
        """The largest |g| so far; NaN or infinite if one is."""
        return float(torch.stack(list(self._peak.values())).max())

    def check(self, dtype: torch.dtype) -> None:
        """LayerError for what the gradients of the whole pass should not be."""
        dead = []
        for name in (ref.name for refs in self._refs for ref in refs):
            if name in self._input_peak and not bool(self._input_peak[name].isfinite()):
                raise LayerError(
                    name, f"expected finite input activations, got NaN or infinity{OVERFLOW}"
                )
        for name, peak in self._peak.items():
            if not bool(peak.isfinite()):
                raise LayerError(name, f"expected finite gradients, got NaN or infinity{OVERFLOW}")
            if not bool(peak):
                dead.append(name)
        # Beside a gradient of 1 or more (as scaled) what fp16 takes for zero is zero.
        lost = dtype == torch.float16 and self.peak() * self._scale < 1
        if dead and (lost or len(dead) == len(self._peak)):
            raise LayerError(
                dead[0],
                f"expected a gradient, got zero for every token ({len(dead)} of {len(self._peak)} "
                "layers; a 16-bit underflow? try --dtype bfloat16 or float32)",
            )

    # Hooks.

    @contextmanager
    def hooked(self, checkpointing: bool) -> Iterator[None]:
        with ExitStack() as stack:
            blocks = self._adapter.blocks
            entry = blocks[self._first].register_forward_pre_hook(asking_entry, with_kwargs=True)
            stack.callback(entry.remove)
            for i, refs in enumerate(self._refs):
                fused: dict[nn.Module, dict[str, list[LinearRef]]] = {}
                for site in schedule.sites_of(refs):
                    ref = site.linears[0]
                    if site.fused:
                        fused.setdefault(ref.module, {})[ref.parameter] = site.linears
                    else:
                        hook = ref.module.register_forward_hook(
                            partial(self._linear_ran, ref), with_kwargs=True
                        )
                        stack.callback(hook.remove)
                for module, projections in fused.items():
                    ran = partial(self._expert_ran, projections)
                    stack.enter_context(observed(module, produced=ran))
                if checkpointing and i >= self._first:
                    stack.enter_context(checkpointed(blocks[i]))
            yield

    def _linear_ran(
        self,
        ref: LinearRef,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        if not torch.is_grad_enabled():  # the first forward of a checkpointed block
            return
        self._runs(ref)
        if not output.requires_grad:
            return
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        length = self._tokens.length
        # DeepSeek's key-value projection reads [1, 1, T, C].
        if tuple(given.shape[:-1]) not in {(1, length), (1, 1, length), (length,)}:
            raise LayerError(
                ref.name,
                f"expected one row for each of the 1x{length} tokens, got an input of shape "
                f"{tuple(given.shape)}: its sequences cannot be told apart",
            )
        leader = self._leader(ref, given)
        x, version = given.detach(), given._version

        def arrived(g: Tensor) -> None:
            if given._version != version:
                raise LayerError(ref.name, "its input was written to after it was read")
            self._visited.add(ref.name)
            x_t, g_t, real = x.reshape(length, -1), g.reshape(length, -1), self._tokens.real
            if real is not None:
                x_t, g_t = x_t[real], g_t[real]
            self._visit(ref, x_t, g_t, leader)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _runs(self, ref: LinearRef) -> None:
        """LayerError unless it is the first time in this forward. A run on a constant counts: no
        gradient comes to its output, but its bias has one (Zaya's values of the token before the
        first)."""
        if ref.name in self._ran:
            raise LayerError(ref.name, schedule.runs_twice(ref.name))
        self._ran.add(ref.name)

    def _leader(self, ref: LinearRef, given: Tensor) -> str:
        for tensor, name in self._inputs:
            if tensor.matches(given):
                return name
        self._inputs.append((TensorId(given), ref.name))
        return ref.name

    def _expert_ran(
        self,
        projections: Mapping[str, list[LinearRef]],
        module: nn.Module,
        projection: str,
        given: ExpertInput,
        output: Tensor,
    ) -> None:
        refs = [ref for ref in projections.get(projection, []) if ref.index == given.expert]
        if not refs or not torch.is_grad_enabled():
            return
        (ref,) = refs
        self._runs(ref)
        if not output.requires_grad or not len(given.x):
            return
        length = self._tokens.length
        if given.tokens != length:
            raise LayerError(
                ref.name,
                f"expected to be routed 1x{length} tokens, got {given.tokens}: its sequences "
                "cannot be told apart",
            )
        x, rows = given.x.detach(), given.rows

        def arrived(g: Tensor) -> None:
            if self._tokens.real is None:
                self._visit(ref, x, g, ref.name)
                return
            real = self._tokens.real[rows]
            if real.any():
                self._visit(ref, x[real], g[real], ref.name)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _visit(self, ref: LinearRef, x: Tensor, g: Tensor, leader: str) -> None:
        """x, g: of the real tokens, `[T, C]` and `[T, R]`."""
        with torch.no_grad():
            if self._scale != 1.0:
                wide = torch.promote_types(g.dtype, torch.float32)
                x, g = x.to(wide), g.to(wide) / self._scale
            elif g.dtype != x.dtype:
                x = x.to(g.dtype)
            _raise_peak(self._peak, ref.name, g)
            if leader == ref.name:
                _raise_peak(self._input_peak, ref.name, x)
            sample = Sample(x, g, self._tokens.targets, leader, self._draw)
            self._visitors[ref.name](sample)


def _raise_peak(peaks: dict[str, Tensor], name: str, x: Tensor) -> None:
    # A twentieth of the time of the infinity norm on a CPU.
    least, most = torch.aminmax(x)
    peak = torch.maximum(-least, most)
    peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak


def _check_model(adapter: Adapter, visitors: Mapping[str, Visitor]) -> None:
    check_head(adapter)
    known = {ref.name for i in range(len(adapter.blocks)) for ref in adapter.linears(i)}
    unknown = sorted(set(visitors) - known)
    if unknown or not visitors:
        raise UserError(f"visitors: expected names of prunable matrices, got {unknown or 'none'}")


def _unseen(sample: Sample) -> None:
    """What a visit is for that only looks for the largest gradient."""
