"""EigenDamage on a whole model: directions or entries of every matrix go in the eigenbasis of its
Kronecker-factored Fisher matrix, by one threshold over all layers.

Rotated weights are not sparse weights: what is left of a matrix is a product of two thin ones, and
stock transformers layers hold one dense matrix. So there are two results. Dense reconstruction, the
default, fits every loader and saves nothing. Thin factors, two `nn.Linear` in a row, save bytes and
time where `k (R + C) < R C`, that is where more than half of a square matrix's directions went on
one side; a checkpoint of them needs model code that builds those pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.calibration.factors import collect_factors
from pyprune.calibration.gradient_stats import EigenDiagonal, KroneckerFactors
from pyprune.calibration.gradients import fill_statistics, sums_dtype
from pyprune.calibration.tokens import TokenSet, calibration_tokens
from pyprune.checkpoint import (
    Checkpoint,
    check_output,
    copy_auxiliary,
    output_directory,
    write_report,
)
from pyprune.checkpoint.output import AUXILIARY_BYTES, MAX_SHARD_SIZE
from pyprune.config import CalibrationConfig
from pyprune.devices import find_device
from pyprune.errors import LayerError, UserError
from pyprune.layers import minimum_tokens, select_linears
from pyprune.measure import Measure
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

Unit = Literal["directions", "elements"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EigenDamageConfig:
    """sparsity: share of the entries of all rotated weights that go. unit: whole input and output
    directions (the paper's), or single entries, which no storage of today can make use of: it says
    what the basis is worth. reestimate: take the curvature from a second backward pass in the
    basis (EK-FAC) instead of the factors' eigenvalues. cap: the most of one layer's output, and of
    its input directions that may go. factored: put thin factors into the model where they are
    smaller than the dense weight. include, exclude, calibration: see `PruneConfig`."""

    sparsity: float
    unit: Unit = "directions"
    reestimate: bool = False
    cap: float = 0.95
    factored: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity: expected a fraction in [0, 1), got {self.sparsity}")
        if self.unit not in get_args(Unit):
            raise UserError(f"unit: expected one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        if not 0 < self.cap < 1:
            raise UserError(f"cap: expected a fraction between 0 and 1, got {self.cap}")
        if self.factored and self.unit != "directions":
            raise UserError(f"factored: expected unit directions, got {self.unit!r}")


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
    form: Literal["dense", "factored", "kept"]
    parameters: int
    factored_parameters: int
    note: str = ""


def eigendamage(
    adapter: Adapter,
    tokens: TokenSet,
    config: EigenDamageConfig,
    *,
    checkpointing: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[EigenLayer]:
    """Prunes every matrix of the model in place, in memory; see the module.

    The factors take 4 (R^2 + C^2) bytes a matrix, their fp64 eigenvectors twice that. An expert
    that saw too few tokens (`layers.minimum_tokens`) and a matrix whose gradients were all zero
    stay as they are and are named.

    Raises:
        LayerError, UserError: see `collect_factors`; nothing has changed then. `factored` and
            a matrix is not the weight of an `nn.Linear`.
    """
    adapter = adapter.restricted(select_linears(adapter, config.include, config.exclude))
    refs = {ref.name: ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)}
    if config.factored:
        _check_linear(refs.values())

    def told(phase: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(phase, done, total)

    factors = collect_factors(
        adapter,
        tokens,
        refs.values(),
        checkpointing=checkpointing,
        device=device,
        progress=told("factors"),
    )
    notes = {name: _unknown(ref, factors[name]) for name, ref in refs.items()}
    bases = _bases({name: f for name, f in factors.items() if not notes[name]})
    del factors
    curvatures = {name: basis.curvature() for name, basis in bases.items()}
    if config.reestimate and bases:
        dtype = sums_dtype(adapter)
        made = {
            name: EigenDiagonal(basis.left.to(device, dtype), basis.right.to(device, dtype))
            for name, basis in bases.items()
        }
        fill_statistics(
            adapter, tokens, made, checkpointing=checkpointing, device=device,
            progress=told("curvature"),
        )  # fmt: skip
        curvatures = {name: s.total.double() / s.targets for name, s in made.items()}
    removed = _remove(refs, bases, curvatures, config)
    layers = []
    for name, ref in refs.items():
        if name in removed:
            layers.append(_write(adapter, ref, removed[name], config))
        else:
            rows, columns = ref.weight().shape
            size = rows * columns
            layers.append(
                EigenLayer(name, (rows, columns), rows, columns, 0, 0.0, "kept", size, size,
                           notes[name])
            )  # fmt: skip
    return layers


def eigendamage_checkpoint(
    source: str | Path,
    out: str | Path,
    config: EigenDamageConfig,
    *,
    checkpointing: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prunes the checkpoint `source`, all of it in memory, into a new directory `out` that every
    loader reads: dense weights in the checkpoint's own dtype, and the report as pyprune.json.

    Returns:
        The report: config, calibration, `layers` (see `EigenLayer`), `sparsity` (share of the
        rotated entries that went), seconds and peak memory.

    Raises:
        UserError: see `eigendamage`; `config.factored`, which no stock checkpoint can hold.
    """
    if config.factored:
        raise UserError(
            "factored: a checkpoint of stock layers holds dense matrices; expected false, or "
            "eigendamage() on a model in memory"
        )
    measure, place = Measure(), find_device(device)
    check_output(out)
    checkpoint = Checkpoint.open(source)
    tokenizer, wanted = checkpoint.tokenizer(), config.calibration
    model: Any = checkpoint.load_model("cpu", None)
    text_config = model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or wanted.seqlen
    with measure.phase("tokens"):
        tokens = calibration_tokens(
            wanted.source,
            tokenizer,
            nsamples=wanted.nsamples,
            seqlen=min(wanted.seqlen, limit),
            seed=wanted.seed,
            batch_size=wanted.batch_size,
            padding=wanted.padding,
            bos=wanted.bos,
        )
    with measure.phase("eigendamage"):
        layers = eigendamage(
            Adapter.of(model), tokens, config, checkpointing=checkpointing, device=place,
            progress=progress,
        )  # fmt: skip
    total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    report = {
        "config": asdict(config),
        "calibration": {
            "source": tokens.source,
            "sha256": tokens.sha256,
            "tokens": tokens.tokens,
            "sequences": tokens.nsamples,
            "seqlen": tokens.seqlen,
        },
        "sparsity": sum(layer.removed for layer in layers) / total,
        "predicted_loss": sum(layer.loss for layer in layers),
        "layers": [asdict(layer) for layer in layers],
        "run": {
            "seconds": measure.total(),
            "peak_rss_bytes": measure.peak_rss_bytes(),
            "peak_cuda_bytes": measure.peak_cuda_bytes(),
        },
    }
    with output_directory(out, needed=checkpoint.nbytes + AUXILIARY_BYTES) as folder:
        copy_auxiliary(checkpoint, folder, index=False)
        model.to(checkpoint.dtype).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        write_report(folder, {"eigendamage": report}, _card(report))
    return report


def _card(report: dict[str, Any]) -> str:
    return (
        "---\ntags:\n- pyprune\n---\n\n# Pruned with pyprune\n\n"
        f"EigenDamage: {report['sparsity']:.1%} of the entries of all matrices removed in their "
        f"Kronecker-factored eigenbases ({report['config']['unit']}), stored as dense matrices.\n"
    )


def _bases(factors: dict[str, KroneckerFactors]) -> dict[str, EigenBasis]:
    """On the CPU. Matrices that read one tensor share its factor in memory: one decomposition."""
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    bases = {}
    for name, statistic in factors.items():
        a, g = (t.cpu() for t in statistic.normalised())
        right = inputs.get(id(statistic.a)) or eigenvectors(a)
        inputs[id(statistic.a)] = right
        left = eigenvectors(g)
        bases[name] = EigenBasis(left[1], right[1], left[0], right[0])
    return bases


def _unknown(ref: LinearRef, statistic: KroneckerFactors) -> str:
    """Why nothing can be said of this matrix, if so."""
    needed = 1.0
    if ref.index is not None:
        needed = minimum_tokens(ref.weight().shape[1], Unstructured(0.5))
    if statistic.tokens < needed:
        return f"saw {statistic.tokens} of the {needed:.0f} tokens that it takes: kept"
    return "no gradient but zero: kept" if statistic.dead() else ""


@dataclass(frozen=True, eq=False)
class _Removal:
    """What is left of a matrix: its weight rotated, and the directions or entries that stay."""

    basis: EigenBasis
    rotated: Tensor
    rows: Tensor
    columns: Tensor
    removed: int
    loss: float


def _remove(
    refs: dict[str, LinearRef],
    bases: dict[str, EigenBasis],
    curvatures: dict[str, Tensor],
    config: EigenDamageConfig,
) -> dict[str, _Removal]:
    rotated = {name: basis.rotate(refs[name].weight().cpu()) for name, basis in bases.items()}
    costs = {name: element_costs(rotated[name], curvatures[name]) for name in bases}
    for name, cost in costs.items():
        if not bool(cost.isfinite().all()):
            raise LayerError(name, "expected finite weights, got NaN or infinity")
    if config.unit == "elements":
        flat = [cost.float() for cost in costs.values()]
        count = pruned_count(sum(c.numel() for c in flat), config.sparsity)
        masks = ops.mask_global(flat, count) if flat else []
        kept = dict(zip(costs, masks, strict=True))
        left = {name: (_left(c, [], 0), _left(c, [], 1)) for name, c in costs.items()}
    else:
        gone = select_structures(
            [c.sum(1) for c in costs.values()],
            [c.sum(0) for c in costs.values()],
            config.sparsity,
            config.cap,
        )
        left, kept = {}, {}
        for (name, cost), (rows, columns) in zip(costs.items(), gone, strict=True):
            left[name] = (_left(cost, rows, 0), _left(cost, columns, 1))
            kept[name] = torch.ones_like(cost, dtype=torch.bool)
            kept[name][rows] = kept[name][:, columns] = False
    return {
        name: _Removal(
            bases[name],
            torch.where(kept[name], rotated[name], 0),
            *left[name],
            int((~kept[name]).sum()),
            float(costs[name][~kept[name]].sum()),
        )
        for name in bases
    }


def _left(costs: Tensor, gone: Tensor | list[int], dim: int) -> Tensor:
    """Indices along `dim` that are not among `gone`."""
    stay = torch.ones(costs.shape[dim], dtype=torch.bool)
    stay[gone] = False
    return stay.nonzero()[:, 0]


def _write(
    adapter: Adapter, ref: LinearRef, removal: _Removal, config: EigenDamageConfig
) -> EigenLayer:
    rows, columns = ref.weight().shape
    left = len(removal.rows), len(removal.columns)
    thin = min(left) * (rows + columns)
    form: Literal["dense", "factored"] = "dense"
    if config.factored and thin < rows * columns:
        form = "factored"
        factors = thin_factors(removal.basis, removal.rotated, removal.rows, removal.columns)
        _install(adapter.model, ref, factors)
    else:
        ref.write(removal.basis.restore(removal.rotated).to(ref.weight().device))
    return EigenLayer(
        name=ref.name,
        shape=(rows, columns),
        rows=left[0],
        columns=left[1],
        removed=removal.removed,
        loss=removal.loss,
        form=form,
        parameters=thin if form == "factored" else rows * columns,
        factored_parameters=thin,
    )


def _check_linear(refs: Iterable[LinearRef]) -> None:
    for ref in refs:
        if type(ref.module) is not nn.Linear:
            raise LayerError(
                ref.name,
                f"factored: expected the weight of an nn.Linear, got one of "
                f"{type(ref.module).__name__}",
            )


def _install(model: nn.Module, ref: LinearRef, factors: Factors) -> None:
    """Two thin linear layers in place of one."""
    linear = ref.module
    assert isinstance(linear, nn.Linear)
    dtype, device = linear.weight.dtype, linear.weight.device
    made = []
    for weight, bias in ((factors.down, None), (factors.up, linear.bias)):
        out, into = weight.shape
        thin = nn.Linear(into, out, bias=bias is not None, device="meta")
        thin.weight = nn.Parameter(weight.to(device, dtype).contiguous(), requires_grad=False)
        if bias is not None:
            thin.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        made.append(thin)
    parent, _, leaf = ref.name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Sequential(*made).train(linear.training))
