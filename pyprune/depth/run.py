"""Structural pruning from a model, or from a checkpoint to a smaller, ordinary checkpoint."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from pyprune.calibration.configured import configured_tokens
from pyprune.calibration.tokens import TokenSet
from pyprune.checkpoint.output import save_stock
from pyprune.config import check_call
from pyprune.deci import NOTE, check_before, save_deci, to_deci
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import DepthDecision
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.plot import draw
from pyprune.depth.registry import DEPTH_METHODS, run_search
from pyprune.depth.repack import repack
from pyprune.depth.report import StructureReport
from pyprune.depth.score import perplexities
from pyprune.errors import UserError
from pyprune.families import Family, Run
from pyprune.measure import Measure
from pyprune.models.adapter import Adapter
from pyprune.models.running import evaluation
from pyprune.models.stock import parameter_count
from pyprune.pictures import check_pictures
from pyprune.progress import Progress
from pyprune.registry import HEADERS, MethodRow
from pyprune.report import RunReport, model_name, versions
from pyprune.structural import check_in_memory, prune_loaded
from pyprune.surroundings import in_memory, undisturbed

Curve = tuple[tuple[int, float], ...]
STATE_FILE = "search.json"  # in the directory of --state
# Said where re-packing brings nothing.
NOTHING_GOES = "no layer goes: no attention and MLP of different layers came next to each other"
# Said where single branches go and the result is DeciLM.
FIRST_STAYS = "the attention of layer 0 was no candidate: DeciLM does not run without it"


@undisturbed()
def prune_structure(
    model: Any,
    tokenizer_or_batches: object,
    config: StructureConfig,
    progress: Progress | None = None,
    *,
    curve: bool = False,
) -> StructureReport:
    """Removes branches or layers from a transformers model in memory, in place.

    Args:
        model: a causal language model; it stays on its device.
        tokenizer_or_batches: a tokenizer, with which `config.calibration` is read; or the batches
            themselves, see `calibration.batches.as_token_set`.
        config: what to do. Its device and dtype are a checkpoint's business: expected "auto".
        progress: called with (what happens, done, total or None).
        curve: whether to measure perplexity after every removal, see `StructureReport.curve`.

    Returns:
        The report. `model` is an ordinary, smaller model of its class: it saves, loads and
        generates as any other.

    Raises:
        UserError: the request, the data or the architecture make it impossible. Methods that change
            weights may have done so.
    """
    check_call(config, StructureConfig, progress)
    check_in_memory(config)
    if config.fill == "deci":
        raise UserError("fill: expected packed or zeros for a model in memory, got 'deci'")
    model = in_memory(model, structure=True)
    return _prune(model, tokenizer_or_batches, config, progress, curve, Measure())


def _prune(
    model: Any,
    data: object,
    config: StructureConfig,
    progress: Progress | None,
    curve: bool,
    measure: Measure,
) -> StructureReport:
    adapter = Adapter.of(model)
    if config.fill == "deci":
        check_before(model, adapter)
    with measure.phase("tokens"):
        tokens = configured_tokens(data, config.calibration, model.config)
    by_branch = DEPTH_METHODS.find(config.method).unit == "block"
    before = parameter_count(model)
    with evaluation(model):
        dense = perplexities(ResidualGraph(model, adapter), tokens.batches) if curve else []
        with measure.phase("search"):
            decision = run_search(model, adapter, tokens, config, progress)
        decision = replace(decision, model=model_name(model))
        with measure.phase("curve"):
            points = _curve(model, adapter, tokens, decision, before, dense) if curve else ()
        with measure.phase("repacking"):
            packing = repack(ResidualGraph(model, adapter), decision.removed, config.fill)
    notes = [packing.reason] if packing.reason else []
    if len(packing.pairs) == packing.before and config.fill == "packed" and not packing.reason:
        notes.append(NOTHING_GOES)
    after, zeros = parameter_count(model), _zeros(model, packing.zeros)
    if config.fill == "deci":
        deci = to_deci(model)
        after, zeros = deci.parameters, deci.padding
        notes += [FIRST_STAYS, NOTE] if by_branch else [NOTE]
    return StructureReport(
        decision=decision,
        packing=packing,
        parameters=(before, after),
        zeros=zeros,
        versions=versions(),
        curve=points,
        notes=tuple(notes),
        run=RunReport.of(measure),
    )


@undisturbed()
def prune_structure_checkpoint(
    source: str | Path,
    out: str | Path,
    config: StructureConfig,
    progress: Progress | None = None,
    *,
    batches: object = None,
    trust_remote_code: bool = False,
    curve: bool = False,
) -> StructureReport:
    """`prune_structure` from a checkpoint into a new directory, in the checkpoint's dtypes. The
    model is held in memory.

    Args:
        source: a Hugging Face directory with safetensors, or a hub id.
        out: a directory that does not exist or is empty. It appears when everything is written.
        batches: token ids to calibrate on; None reads `config.calibration` with the checkpoint's
            own tokenizer.
        trust_remote_code: run the model code that comes with the checkpoint, if any; it is copied
            into `out` then.

    Returns:
        The report, which is in `out` as pyprune.json too.

    Raises:
        UserError: see `prune_structure`, `Checkpoint.open` and `output_directory`. Nothing is left
            at `out`.
    """
    check_call(config, StructureConfig, progress)

    def prune(model: Any, data: object, measure: Measure) -> StructureReport:
        return _prune(model, data, config, progress, curve, measure)

    return prune_loaded(
        source,
        out,
        config,
        prune,
        batches=batches,
        trust_remote_code=trust_remote_code,
        save=save_deci if config.fill == "deci" else save_stock,
    )


def _zeros(model: Any, halves: list[Branch]) -> int:
    """Parameters of the halves that are there but zero; their norms are not."""
    if not halves:
        return 0
    graph = ResidualGraph(model, Adapter.of(model))
    total = 0
    for branch in halves:
        block, layout = graph.adapter.blocks[branch.layer], graph.layouts[branch.layer]
        for name in layout.inner(branch.kind):
            total += sum(p.numel() for p in block.get_submodule(name).parameters())
    return total


def _curve(
    model: Any,
    adapter: Adapter,
    tokens: TokenSet,
    decision: DepthDecision,
    before: int,
    dense: list[float],
) -> Curve:
    """Parameters and perplexity after every removal. A method that changes the weights that stay
    has only a beginning and an end: in between there was no model."""
    steps = decision.steps if not decision.transforms else decision.steps[-1:]
    sizes = [before, *(step.parameters or 0 for step in steps)]
    known = [step.score for step in steps if step.score is not None]
    searched = decision.objective == "perplexity" and len(known) == len(steps)
    if searched and not decision.transforms:
        return tuple(zip(sizes, [*dense, *known], strict=True))
    prefixes = [decision.removed]
    if not decision.transforms:
        ends = list(accumulate(len(step.unit) for step in steps))
        prefixes = [decision.removed[:end] for end in ends]
    scores = [*dense, *perplexities(ResidualGraph(model, adapter), tokens.batches, prefixes)]
    return tuple(zip(sizes, scores, strict=True))


def _resumable(run: Run, folder: Path) -> StructureConfig:
    """The configuration with the search's state file in `folder`; UserError if the method keeps
    none, or was told of another one."""
    config: StructureConfig = run.config
    if not hasattr(config.own_options(), "state"):
        run.needs_none("state")
    if (named := config.own_options().state) is not None:
        raise UserError(f"state: expected --state or -O state, got {folder} and {named}")
    folder.mkdir(parents=True, exist_ok=True)
    options = {**config.method_options, "state": str(folder / STATE_FILE)}
    return replace(config, method_options=options)


def _run(run: Run) -> StructureReport:
    run.needs_none("preserve_mask")
    config = run.config if run.state is None else _resumable(run, run.state)
    if run.pictures is not None:
        check_pictures(run.pictures)
    report = prune_structure_checkpoint(
        run.source,
        run.out,
        config,
        run.bar.step,
        trust_remote_code=run.trust_remote_code,
        curve=run.pictures is not None,
    )
    if run.pictures is not None:
        draw(report.decision, report.curve, run.pictures)
    return report


FAMILY = Family(
    title="branches and layers",
    methods=DEPTH_METHODS.load,
    config=StructureConfig,
    call="prune_structure",
    targets={"ratio": ("count",), "count": ("ratio",)},
    run=_run,
    headers=HEADERS,
    describe=MethodRow.describe,
)
