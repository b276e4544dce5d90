"""Joins methods, which know tensors, to the matrices of a model: prunes a group of linears that
read the same input and reports on each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pyprune.calibration.gradient_stats import GradientStatistic
from pyprune.calibration.stats import GramStatistic, NormStatistic, Statistic
from pyprune.calibration.walk import Group
from pyprune.config import PruneConfig
from pyprune.errors import OVERFLOW, LayerError, UserError
from pyprune.methods import METHODS, LayerInputs, MethodOptions, Solution
from pyprune.methods.global_selection import GlobalSelection
from pyprune.methods.selection import forced_first
from pyprune.methods.update import reconstructed
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef
from pyprune.ops.obs_factor import NotPositiveDefiniteError
from pyprune.ops.split_matrix import SplitMatrix
from pyprune.patterns import NM, Pattern, Unstructured
from pyprune.report import LayerReport


def select_linears(adapter: Adapter, include: Iterable[str], exclude: Iterable[str]) -> set[str]:
    """Names of the linears that any pattern of `include` matches and none of `exclude` does.

    Raises UserError for a pattern that matches nothing (a misspelt one would go unnoticed) and if
    nothing is left.
    """
    names = [ref.name for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
    matches: dict[str, set[str]] = {"include": set(), "exclude": set()}
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            found = {name for name in names if fnmatchcase(name, pattern)}
            if not found:
                raise UserError(
                    f"{option}: no layer matches {pattern!r}; layers are called like {names[0]}"
                )
            matches[option] |= found
    left = matches["include"] - matches["exclude"]
    if not left:
        raise UserError("include, exclude: expected some layers to prune, all are excluded")
    return left


def check_shapes(
    refs: Iterable[LinearRef], pattern: Pattern, most_columns: int | None = None
) -> None:
    """Raises LayerError for the first linear whose rows N:M does not divide, or that has more
    inputs than the method takes."""
    for ref in refs:
        columns = ref.weight().shape[1]
        if most_columns is not None and columns > most_columns:
            raise LayerError(
                ref.name,
                f"expected at most {most_columns} inputs for this method, got {columns} "
                f"(raise its option max_columns, or leave it out with --exclude {ref.name!r})",
            )
        if isinstance(pattern, NM) and columns % pattern.m:
            raise LayerError(
                ref.name,
                f"expected a number of inputs that {pattern.m} divides for {pattern}, "
                f"got {columns} (leave it out with --exclude {ref.name!r})",
            )


def check_finite(name: str, w: Tensor) -> None:
    """Raises LayerError if a weight is NaN or infinite."""
    if not bool(w.isfinite().all()):
        raise LayerError(name, "expected finite weights, got NaN or infinity")


def layer_inputs(statistic: Statistic | None, name: str) -> LayerInputs | None:
    """The tensors behind a statistic; LayerError if the layer saw NaN or infinity."""
    if statistic is None:
        return None
    if not statistic.finite():
        raise LayerError(name, f"expected finite input activations, got NaN or infinity{OVERFLOW}")
    if isinstance(statistic, GramStatistic):
        return LayerInputs(statistic.column_norms(), statistic.tokens, statistic.gram)
    if isinstance(statistic, NormStatistic):
        return LayerInputs(statistic.column_norms(), statistic.tokens)
    raise TypeError(f"expected column norms or a Gram matrix, got {type(statistic).__name__}")


def minimum_tokens(columns: int, pattern: Pattern) -> float:
    """How many tokens an expert must have seen to be pruned by its own statistic."""
    m = pattern.m if isinstance(pattern, NM) else 1
    return max(4 * m, columns / 4)


# What solving several matrices at once may hold beyond what one needs.
STACK_BYTES = 512 * 2**20


def stack_limit(rows: int, columns: int) -> int:
    """How many matrices `[rows, columns]` with a Gram matrix each are solved at once: their
    weights, masks, errors and results, and the Gram matrices and factors, within STACK_BYTES."""
    return max(1, STACK_BYTES // (4 * (6 * rows * columns + 3 * columns * columns)))


@dataclass(frozen=True, eq=False)
class _Solved:
    """What was found for a matrix along with its peers. seconds: its share of the time."""

    inputs: LayerInputs
    solution: Solution
    seconds: float


class LayerPruner:
    """Prunes groups of linears as `config` says; `reports` has one entry for each, in order.

    A layer that saw no token at all, and an expert that saw fewer than
    max(4 M, C / 4) (M of N:M, C inputs), is pruned by magnitude instead and the report says so:
    with nothing known of its inputs, a score made of them would zero it. So is a layer whose inputs
    were all zero, whose scores would be equal (not with scope global: the cut counts it already),
    and, by a method that needs gradients, one whose gradients were.

    gradients: what the backward pass accumulated, by layer; let go of once used.
    targets: patterns of layers that an allocation gave one of their own.
    masks: bool `[R, C]` by layer, False = must go, and counts among the pruned.
    """

    def __init__(
        self,
        config: PruneConfig,
        gradients: Mapping[str, GradientStatistic] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        targets: Mapping[str, Pattern] | None = None,
    ) -> None:
        self._gradients = dict(gradients or {})
        self._masks = masks or {}
        self.method = config.find_method()
        self.pattern = config.target()
        self.options = config.options()
        self.preserve_zeros = config.preserve_zeros
        self._targets = dict(targets or {})
        # Masks that an allocation chose, and why it could not judge some of the layers.
        self._chosen: dict[str, Tensor] = {}
        self._unjudged: dict[str, str] = {}
        self.reports: list[LayerReport] = []
        self.selection: GlobalSelection | None = None
        self._solved: dict[str, _Solved] = {}
        self._not_reconstructed = 0
        if isinstance(self.pattern, Unstructured) and self.pattern.scope == "global":
            self.selection = GlobalSelection(self.pattern.sparsity)

    def count_group(self, group: Group) -> None:
        """First pass of a global selection."""
        if self.selection is None:
            raise RuntimeError("count_group: expected scope global")
        inputs = layer_inputs(group.statistic, group.linears[0].name)
        for ref in group.linears:
            if self._unknown(ref, inputs) is None:
                w, preserve = self._read(ref)
                self.selection.count(ref.name, w, self._column_scale(ref, inputs), preserve)

    def judge(self, ref: LinearRef, inputs: LayerInputs | None) -> tuple[Tensor, Tensor] | None:
        """Scores `[R, C]` of a matrix by the method, smallest first, those of weights that must go
        before all others; and how many of each row must, `[R]`. None for one that the method cannot
        judge: it will be pruned by magnitude, whatever is known of it later."""
        unknown = self._unknown(ref, inputs)
        if unknown is not None:
            self._unjudged[ref.name] = unknown
            return None
        w, preserve = self._read(ref)
        scale = self._column_scale(ref, inputs)
        if preserve is None:
            scores = w.abs() if scale is None else w.abs() * scale.to(w.dtype)
            return scores, torch.zeros(len(w), dtype=torch.int64, device=w.device)
        scale = None if scale is None else scale.to(w.dtype)
        return forced_first(w, scale, preserve), (~preserve).sum(1)

    def choose(self, name: str, mask: Tensor) -> None:
        """The layer called `name` is pruned with `mask` `[R, C]`, True = kept."""
        self._chosen[name] = mask
        self._targets[name] = Unstructured(1 - int(mask.sum()) / mask.numel())

    def refine(self, ref: LinearRef) -> None:
        """Second pass of a global selection."""
        if self.selection is not None and ref.name in self.selection:
            self.selection.refine(ref.name, *self._read(ref))

    def prune_group(self, group: Group) -> None:
        inputs = layer_inputs(group.statistic, group.linears[0].name)
        for ref in group.linears:
            if ref.name not in self._solved:
                self._solve_together(_same_kind(group, ref, inputs))
            start = time.perf_counter()
            solved = self._solved.pop(ref.name, None)
            report = self.prune_linear(ref, solved.inputs if solved else inputs, solved)
            seconds = time.perf_counter() - start + (solved.seconds if solved else 0.0)
            self.reports.append(replace(report, seconds=seconds))

    def _solve_together(self, same: Iterator[tuple[LinearRef, LayerInputs | None]]) -> None:
        """Solves the first of `same` with as many of the others as fit in memory, if the method
        can; `prune_linear` then finds the answers."""
        stack = self.method.solve_stack
        if stack is None or self.selection is not None or self._chosen:
            return
        start = time.perf_counter()
        chunk: list[tuple[LinearRef, LayerInputs]] = []
        pattern = self.pattern
        for ref, inputs in same:
            target = self._targets.get(ref.name, self.pattern)
            known = inputs is not None and self._unknown(ref, inputs) is None
            if not chunk and not known:  # the first one is another method's
                return
            if inputs is not None and known and (not chunk or target == pattern):
                chunk.append((ref, inputs))
                pattern = target
            if len(chunk) == stack_limit(*ref.weight().shape):
                break
        if len(chunk) < 2:
            return
        weights, preserve = zip(*(self._read(ref) for ref, _ in chunk), strict=True)
        forced = None
        if any(p is not None for p in preserve):  # some may have a mask and others none
            free = torch.ones_like(weights[0], dtype=torch.bool)
            forced = torch.stack([free if p is None else p for p in preserve])
        given = [inputs for _, inputs in chunk]
        try:
            solutions = stack(torch.stack(weights), given, pattern, self.options, forced)
        except NotPositiveDefiniteError:
            return  # solved one by one, the layer at fault raises it again and is named
        seconds = (time.perf_counter() - start) / len(chunk)
        for (ref, inputs), solution in zip(chunk, solutions, strict=True):
            self._solved[ref.name] = _Solved(inputs, solution, seconds)

    def notes(self) -> tuple[str, ...]:
        """What the user should know of the run beyond single layers."""
        if not self._not_reconstructed:
            return ()
        return (
            f"{self._not_reconstructed} of {len(self.reports)} matrices saw fewer than "
            f"{self.options.reconstruct_tokens:g} tokens per input and were not reconstructed: "
            "more calibration text would help (--reconstruct does it all the same)",
        )

    def prune_linear(
        self, ref: LinearRef, inputs: LayerInputs | None, solved: _Solved | None = None
    ) -> LayerReport:
        w, preserve = self._read(ref)
        method, options = self.method, self.options
        pattern = self._targets.get(ref.name, self.pattern)
        mask: Tensor | None = None
        notes: tuple[str, ...] = ()
        chosen = self._chosen.pop(ref.name, None)
        unknown = self._unknown(ref, inputs)
        if unknown is not None:
            notes = (f"{unknown}: pruned by magnitude",)
            method, options = METHODS["magnitude"], MethodOptions()
            if isinstance(pattern, Unstructured) and pattern.scope not in ("row", "layer", None):
                pattern = Unstructured(pattern.sparsity)
        elif self.selection is not None:
            mask = self.selection.mask(ref.name, w, preserve)
        else:
            mask = chosen
        try:
            if solved is not None:
                solution = solved.solution
            else:
                given = self._with_gradient(ref, inputs)
                solution = method.solve(w, given, pattern, options, preserve, mask)
            if options.reconstruct and inputs is not None:
                if inputs.tokens >= options.reconstruct_tokens * w.shape[1]:
                    solution = reconstructed(w, solution, inputs, options)
                else:
                    self._not_reconstructed += 1
        except NotPositiveDefiniteError as error:
            raise LayerError(ref.name, str(error)) from error
        write_weight(ref, solution.weight)
        self._gradients.pop(ref.name, None)
        report = self._report(ref, w, inputs, solution, pattern)
        return replace(report, method=method.name, notes=notes + solution.notes)

    def _unknown(self, ref: LinearRef, inputs: LayerInputs | None) -> str | None:
        """Why the method cannot judge this matrix, if it cannot."""
        if ref.name in self._unjudged:
            return self._unjudged[ref.name]
        if self._too_few_tokens(ref, inputs):
            tokens = 0 if inputs is None else inputs.tokens
            needed = minimum_tokens(ref.weight().shape[1], self.pattern)
            return f"saw {tokens:.0f} of the {needed:.0f} tokens that {self.method.name} needs"
        # A cut over all layers has already said how many of these go.
        zero = inputs is not None and not bool(inputs.squared_norms.any())
        if zero and self.selection is None:
            return f"{self.method.name} found no input but zero"
        gradient = self._gradients.get(ref.name)
        if gradient is not None and gradient.dead():
            return f"{self.method.name} found no gradient but zero"
        return None

    def _column_scale(self, ref: LinearRef, inputs: LayerInputs | None) -> Tensor | None:
        """What `|w|` is multiplied with to be the method's score. A matrix that is only scored is
        pruned later: its gradients wait on the CPU for that."""
        try:
            scale = self.method.column_scale(self._with_gradient(ref, inputs), self.options)
        except NotPositiveDefiniteError as error:
            raise LayerError(ref.name, str(error)) from error
        if ref.name in self._gradients:
            self._gradients[ref.name].to("cpu")
        return scale

    def _with_gradient(self, ref: LinearRef, inputs: LayerInputs | None) -> LayerInputs | None:
        gradient = self._gradients.get(ref.name)
        if inputs is None or gradient is None:
            return inputs
        gradient.to(inputs.squared_norms.device)
        return inputs.with_gradient(gradient)

    def _too_few_tokens(self, ref: LinearRef, inputs: LayerInputs | None) -> bool:
        if inputs is None:
            return False
        if inputs.tokens == 0:
            return True
        few = inputs.tokens < minimum_tokens(ref.weight().shape[1], self.pattern)
        return ref.index is not None and few

    def _read(self, ref: LinearRef) -> tuple[Tensor, Tensor | None]:
        """The weight in fp32 (or fp64) and, if existing zeros are to stay or a mask is to be
        respected, where weights may stay."""
        stored = ref.weight()
        w = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True).contiguous()
        check_finite(ref.name, w)
        preserve = (w != 0) if self.preserve_zeros else None
        if ref.name in self._masks:
            mask = self._masks[ref.name].to(w.device)
            preserve = mask if preserve is None else preserve & mask
        return w, preserve

    def _report(
        self,
        ref: LinearRef,
        w: Tensor,
        inputs: LayerInputs | None,
        solution: Solution,
        pattern: Pattern,
    ) -> LayerReport:
        written = ref.weight().to(w.dtype)
        zeros, elements = int((written == 0).sum()), w.numel()
        report = LayerReport(
            name=ref.name,
            shape=(w.shape[0], w.shape[1]),
            pattern=str(pattern),
            method=self.method.name,
            sparsity=zeros / elements,
            zeros=zeros,
            elements=elements,
            damping=solution.damping,
            loss=solution.loss,
            iterations=solution.iterations,
            gap=solution.gap,
        )
        if inputs is None:
            return report
        energy = _output_energy(inputs)
        total = energy(w)
        before = energy(torch.where(solution.mask, 0, w))
        after = energy(written - w)
        return replace(
            report,
            tokens=inputs.tokens,
            relative_error_before_update=before / total if total else None,
            relative_error_after=after / total if total else None,
            error_basis="column norms" if inputs.gram is None else "gram",
            dead_inputs=int(inputs.dead.sum()),
        )


def _same_kind(
    group: Group, ref: LinearRef, inputs: LayerInputs | None
) -> Iterator[tuple[LinearRef, LayerInputs | None]]:
    """`ref`, then what can be solved along with it: the experts that follow it, or the linears of
    its shape that read the same inputs."""
    yield ref, inputs
    if group.peers:
        for peer in group.peers[group.peers.index(group) + 1 :]:
            yield peer.linears[0], layer_inputs(peer.statistic, peer.linears[0].name)
        return
    for other in group.linears[group.linears.index(ref) + 1 :]:
        weight = other.weight()
        if (weight.shape, weight.dtype) == (ref.weight().shape, ref.weight().dtype):
            yield other, inputs


def _output_energy(inputs: LayerInputs) -> Callable[[Tensor], float]:
    """tr(D H D^T) of D `[R, C]`, the squared norm of what it gives on the calibration inputs; with
    diag(H) for H where only that is known."""
    gram, norms = inputs.gram, inputs.squared_norms
    if gram is None:
        return lambda d: float((d.square() @ norms.to(d.dtype)).sum(dtype=torch.float64))
    # In fp32 three of these products would take a GPU as long as pruning the layer.
    split = SplitMatrix(gram, parts=2) if gram.device.type == "cuda" else None

    def energy(d: Tensor) -> float:
        if split is None or d.dtype != torch.float32:
            product = d @ gram.to(d.dtype)
        else:
            product = split.times(d)
        return max(0.0, float(product.mul_(d).sum(dtype=torch.float64)))

    return energy


def write_weight(ref: LinearRef, weight: Tensor) -> None:
    """LayerError rather than a `weight [R, C]` that the parameter's dtype cannot hold."""
    dtype = ref.weight().dtype
    if not bool(weight.to(dtype).isfinite().all()):
        largest = float(weight.abs().max())
        raise LayerError(
            ref.name,
            f"expected updated weights within {dtype}, got up to {largest:g} "
            "(more --damping keeps them closer to the original)",
        )
    ref.write(weight)
