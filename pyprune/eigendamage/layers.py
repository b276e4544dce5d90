"""EigenDamage in memory: what goes of every matrix, and what is written in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.calibration.backward import PassOptions
from pyprune.calibration.factors import collect_factors
from pyprune.calibration.gradient_stats import EigenDiagonal, KroneckerFactors
from pyprune.calibration.gradients import fill_statistics, sums_dtype
from pyprune.calibration.tokens import TokenSet
from pyprune.eigendamage.config import EigenDamageConfig
from pyprune.errors import LayerError
from pyprune.layer_pruner import minimum_tokens, write_weight
from pyprune.methods.eigendamage import (
    EigenBasis,
    Factors,
    eigenvectors,
    element_costs,
    thin_factors,
)
from pyprune.methods.structure_budget import select_structures
from pyprune.models.adapter import Adapter
from pyprune.models.linears import LinearRef
from pyprune.patterns import Unstructured, pruned_count
from pyprune.progress import CountProgress, Progress
from pyprune.sparse.factored import FactoredLinear
from pyprune.surgeon.matrix import Matrix
from pyprune.surgeon.store import GIB, TensorStore, grouped

Form = Literal["dense", "factored", "kept"]
# Factors in fp32, their eigenvectors in fp64, and these in fp32 while the curvature is taken anew.
COPIES = 4


@dataclass(frozen=True)
class EigenLayer:
    """What became of one matrix `[R, C]`.

    rows, columns: output and input directions left. removed: entries of the rotated weight that
    went. loss: predicted increase of the loss, nats per predicted token, by what went. form: what
    it is now, `kept` where nothing is known of it (`note`). parameters: of that form.
    factored_parameters: of its thin factors, whether they are fewer or not.
    """

    name: str
    shape: tuple[int, int]
    rows: int
    columns: int
    removed: int
    loss: float
    form: Form
    parameters: int
    factored_parameters: int
    note: str = ""


@torch.no_grad()
def damage(
    adapter: Adapter,
    tokens: TokenSet,
    config: EigenDamageConfig,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[EigenLayer]:
    """Prunes the matrices of `adapter` in place, in memory; see the package. A matrix that nothing
    goes from stays as it is, bit for bit.

    An expert that saw too few tokens (`layers.minimum_tokens`) and a matrix whose inputs or
    gradients were all zero stay as they are and are named. Biases stay as they are.

    Args:
        config: with `factored` a `FactoredLinear` takes the place of an `nn.Linear` where it is
            smaller; fused experts and Conv1D stay dense.
        device: where the backward passes run; eigenvectors are computed on the CPU, in fp64.
        progress: called with (what happens, done, total): batches ("factors", "curvature") or
            matrices ("eigenvectors", "weights"), over all parts.

    Raises:
        LayerError, UserError: see `collect_factors`; nothing has changed then. New weights that do
            not fit into the parameter's dtype: the matrices before that one have changed.
    """
    blocks = [[Matrix(ref) for ref in adapter.linears(i)] for i in range(len(adapter.blocks))]
    refs = [matrix.ref for block in blocks for matrix in block]
    own = config.own_options()
    groups = grouped(blocks, own.factor_memory * GIB, COPIES)
    run = _Run(adapter, tokens, config, device, progress, len(refs))
    with TensorStore(len(groups) > 1, "cpu") as store:
        for number, group in enumerate(groups):
            run.look([matrix.ref for matrix in group], store, number, len(groups))
        chosen = run.choose()
        layers = []
        for done, ref in enumerate(refs, 1):
            if ref.name in run.notes:
                layers.append(_kept(ref, run.notes[ref.name]))
            else:
                known = _Known.of(store.take(ref.name))
                layers.append(_write(adapter, ref, known, chosen[ref.name], own.factored))
            run.say("weights", done, len(refs))
    return layers


@dataclass(frozen=True, eq=False)
class _Known:
    """The basis of one matrix, and its curvature there if it was taken anew."""

    basis: EigenBasis
    again: Tensor | None = None

    def costs(self, ref: LinearRef) -> tuple[Tensor, Tensor]:
        """The rotated weight `[R, C]` and what its entries cost, fp64."""
        rotated = self.basis.rotate(ref.weight().cpu())
        again = self.again
        curvature = self.basis.curvature() if again is None else again.double()
        costs = element_costs(rotated, curvature)
        if not bool(costs.isfinite().all()):
            raise LayerError(ref.name, "expected finite weights, got NaN or infinity")
        return rotated, costs

    def tensors(self) -> dict[str, Tensor]:
        """What `of` takes back."""
        again = {} if self.again is None else {"again": self.again}
        return {**self.basis._asdict(), **again}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> _Known:
        again = tensors.pop("again", None)
        return cls(EigenBasis(**tensors), again)


@dataclass(frozen=True, eq=False)
class _Choice:
    """What goes of one rotated weight: entries (`mask`, True = kept), or directions (indices)."""

    mask: Tensor | None = None
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    columns: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def kept(self, costs: Tensor) -> Tensor:
        """Bool `[R, C]`."""
        if self.mask is not None:
            return self.mask
        kept = torch.ones_like(costs, dtype=torch.bool)
        kept[self.rows] = kept[:, self.columns] = False
        return kept


class _Run:
    """notes: matrices of which nothing can be said, and why. scores: of the others the costs of
    their output and of their input directions, `[R]` and `[C]`, or of their entries `[R, C]`."""

    def __init__(
        self,
        adapter: Adapter,
        tokens: TokenSet,
        config: EigenDamageConfig,
        device: torch.device | str,
        progress: Progress | None,
        matrices: int,
    ) -> None:
        self._matrices, self._seen = matrices, 0
        self._adapter, self._tokens, self._config = adapter, tokens, config
        self._own, self._device, self._progress = config.own_options(), device, progress
        self._pass = PassOptions(
            config.gradient_checkpointing,
            device,
            self._own.fisher_samples,
            config.calibration.seed,
        )
        self.notes: dict[str, str] = {}
        self.scores: dict[str, tuple[Tensor, ...]] = {}

    def look(self, refs: list[LinearRef], store: TensorStore, number: int, parts: int) -> None:
        """Finds bases and scores of part `number` of the matrices; the bases go into `store`."""
        factors = collect_factors(
            self._adapter,
            self._tokens,
            refs,
            self._pass,
            progress=self._told("factors", number, parts),
        )
        unknown = {ref.name: _unknown(ref, factors[ref.name]) for ref in refs}
        self.notes |= {name: why for name, why in unknown.items() if why}
        bases = self._bases({name: f for name, f in factors.items() if not unknown[name]})
        self._seen += len(refs)
        del factors
        again = self._reestimated(bases, number, parts) if self._own.reestimate and bases else {}
        known = {name: _Known(basis, again.get(name)) for name, basis in bases.items()}
        for ref in refs:
            if ref.name in known:
                _, costs = known[ref.name].costs(ref)
                directions = self._own.unit == "directions"
                self.scores[ref.name] = (
                    (costs.sum(1), costs.sum(0)) if directions else (costs.float(),)
                )
        store.put({name: some.tensors() for name, some in known.items()})

    def _bases(self, factors: dict[str, KroneckerFactors]) -> dict[str, EigenBasis]:
        """On the CPU. Matrices that read one tensor share its factor in memory, so its eigenvectors
        are taken once."""
        inputs: dict[int, tuple[Tensor, Tensor]] = {}
        bases = {}
        self.say("eigenvectors", self._seen, self._matrices)
        for done, (name, statistic) in enumerate(factors.items(), 1):
            a, g = (t.cpu() for t in statistic.normalised())
            right = inputs.get(id(statistic.a)) or eigenvectors(a)
            inputs[id(statistic.a)] = right
            left = eigenvectors(g)
            bases[name] = EigenBasis(left[1], right[1], left[0], right[0])
            self.say("eigenvectors", self._seen + done, self._matrices)
        return bases

    def _reestimated(
        self, bases: dict[str, EigenBasis], number: int, parts: int
    ) -> dict[str, Tensor]:
        dtype = sums_dtype(self._adapter)
        made = {
            name: EigenDiagonal(
                basis.left.to(self._device, dtype), basis.right.to(self._device, dtype)
            )
            for name, basis in bases.items()
        }
        fill_statistics(
            self._adapter,
            self._tokens,
            made,
            self._pass,
            self._told("curvature", number, parts),
        )
        return {name: statistic.total / statistic.targets for name, statistic in made.items()}

    def say(self, phase: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(phase, done, total)

    def _told(self, phase: str, number: int, parts: int) -> CountProgress | None:
        say = self._progress
        if say is None:
            return None
        return lambda done, total: say(phase, number * total + done, parts * total)

    def choose(self) -> dict[str, _Choice]:
        """One threshold over all matrices that are known."""
        names, scores = list(self.scores), list(self.scores.values())
        if self._own.unit == "directions":
            rows, columns = ([found[k] for found in scores] for k in (0, 1))
            gone = select_structures(rows, columns, self._config.sparsity, self._own.cap)
            return {name: _Choice(None, *pair) for name, pair in zip(names, gone, strict=True)}
        costs = [found[0] for found in scores]
        count = pruned_count(sum(c.numel() for c in costs), self._config.sparsity)
        masks = ops.mask_global(costs, count) if costs else []
        return {name: _Choice(mask) for name, mask in zip(names, masks, strict=True)}


def _unknown(ref: LinearRef, statistic: KroneckerFactors) -> str:
    """Why nothing can be said of this matrix, if so."""
    needed = 1.0
    if ref.index is not None:
        needed = minimum_tokens(ref.weight().shape[1], Unstructured(0.5))
    if statistic.tokens < needed:
        return f"saw {statistic.tokens} of the {needed:.0f} tokens that it takes: kept"
    silent = statistic.silent()
    return silent and f"no {silent} but zero: kept"


def _kept(ref: LinearRef, why: str) -> EigenLayer:
    rows, columns = ref.weight().shape
    size = rows * columns
    return EigenLayer(ref.name, (rows, columns), rows, columns, 0, 0.0, "kept", size, size, why)


def _write(
    adapter: Adapter, ref: LinearRef, known: _Known, choice: _Choice, factored: bool
) -> EigenLayer:
    rows, columns = ref.weight().shape
    rotated, costs = known.costs(ref)
    kept = choice.kept(costs)
    rotated = torch.where(kept, rotated, 0)
    out, into = _left(rows, choice.rows), _left(columns, choice.columns)
    thin = min(len(out), len(into)) * (rows + columns)
    smaller = thin < rows * columns and type(ref.module) is nn.Linear
    form: Form = "factored" if factored and smaller else "dense"
    if form == "factored":
        _install(adapter.model, ref, thin_factors(known.basis, rotated, out, into))
    elif not bool(kept.all()):  # rotated there and back it would differ by rounding
        write_weight(ref, known.basis.restore(rotated).to(ref.weight().device))
    return EigenLayer(
        name=ref.name,
        shape=(rows, columns),
        rows=len(out),
        columns=len(into),
        removed=int((~kept).sum()),
        loss=float(costs[~kept].sum()),
        form=form,
        parameters=thin if form == "factored" else rows * columns,
        factored_parameters=thin,
    )


def _left(count: int, gone: Tensor) -> Tensor:
    """Indices below `count` that are not among `gone`."""
    stay = torch.ones(count, dtype=torch.bool)
    stay[gone] = False
    return stay.nonzero()[:, 0]


def _install(model: nn.Module, ref: LinearRef, factors: Factors) -> None:
    """Two thin linear layers in place of one."""
    linear = ref.module
    assert isinstance(linear, nn.Linear)
    for part in factors:
        if not bool(part.to(linear.weight.dtype).isfinite().all()):
            raise LayerError(ref.name, f"its factors do not fit into {linear.weight.dtype}")
    model.set_submodule(ref.name, FactoredLinear.of(factors.up, factors.down, linear))
