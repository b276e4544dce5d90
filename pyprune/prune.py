"""Prunes a model: joins tokens, walk, methods and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.allocation import ALLOCATIONS
from pyprune.calibration.configured import configured_tokens
from pyprune.calibration.progress import WalkProgress
from pyprune.calibration.tokens import TokenSet
from pyprune.calibration.walk import InMemoryStore
from pyprune.checkpoint import (
    Checkpoint,
    Originals,
    StreamingStore,
    check_apart,
    check_output,
    copy_auxiliary,
    output_directory,
    write_parameters,
    write_report,
)
from pyprune.checkpoint.output import AUXILIARY_BYTES, save_stock
from pyprune.config import ConfigFile, PruneConfig, check_call
from pyprune.devices import find_device
from pyprune.errors import UserError
from pyprune.families import Family, Run
from pyprune.layer_pruner import check_shapes, select_linears
from pyprune.masks import Masks, describe_masks, read_masks
from pyprune.measure import Measure
from pyprune.methods import METHODS, SHOT_METHODS
from pyprune.methods.table import HEADERS, describe
from pyprune.models.adapter import Adapter
from pyprune.patterns import NM, Pattern, Unstructured
from pyprune.report import (
    CalibrationReport,
    LayerReport,
    Report,
    RunReport,
    model_card,
    model_name,
    source_name,
    versions,
)
from pyprune.session import Look, Session, look_at_whole, looks_at_whole, needs_of
from pyprune.surgeon.run import Surgeon
from pyprune.surgeon.state import State
from pyprune.surroundings import adapters, in_memory, undisturbed


@undisturbed()
def prune(
    model: nn.Module,
    tokenizer_or_batches: object = None,
    method: str | None = None,
    pattern: Pattern | str | float | None = None,
    *,
    config: PruneConfig | None = None,
    progress: WalkProgress | None = None,
    state: str | Path | None = None,
    preserve_mask: Masks | None = None,
    **options: Any,
) -> Report:
    """Prunes the decoder blocks of a transformers model in memory, in place.

    The outcome depends on the arguments alone: `torch.autocast`, inference mode and compiled
    modules around the call are without effect in it.

    Args:
        model: a causal language model (or its decoder), on any device; blocks go to
            `config.device` one at a time and come back. What peft has added beside a layer takes
            part in the forward and stays as it is.
        tokenizer_or_batches: a tokenizer, with which `config.calibration` is read; or the batches
            themselves, see `calibration.batches.as_token_set`. Magnitude needs neither.
        method: a name in `pyprune.methods.METHODS` or `SHOT_METHODS`.
        pattern: "2:4" or NM(2, 4); a sparsity, 0.5 or Unstructured(0.5, "row").
        config: all of it as one value, instead of method, pattern and options.
        progress: called with what the walk does.
        state: for a method in shots, a directory for what an interrupted run needs to go on after
            its last shot. Given again, with the model as it was before pruning, the run ends with
            the same bytes.
        preserve_mask: bool tensors by layer name, or a safetensors file of them, True = may stay:
            what is False goes, and counts among the pruned; see `masks.read_masks`.
        options: other fields of `PruneConfig`, `calibration` as a mapping or CalibrationConfig.

    Returns:
        The report; every pruned weight is exactly zero in `model`.

    Raises:
        UserError: the request, the data or a layer (LayerError, named) make it impossible. Checks
            come first; after an error in the middle, the blocks before the named one are pruned.
    """
    config = _config(method, pattern, config, options)
    check_call(config, PruneConfig, progress)
    if config.dtype != "auto":
        raise UserError(f"dtype: expected auto for a model in memory, got {config.dtype!r}")
    _check_mask(config, preserve_mask)
    measure = Measure()
    model = in_memory(model)
    adapter = _adapter(model, config)
    masks = read_masks(preserve_mask, adapter)
    with measure.phase("tokens"):
        tokens = _tokens(tokenizer_or_batches, model, config)
    device = find_device(config.device)
    if config.in_shots():
        surgeon = _surgeon(config, adapter, tokens, device, measure, progress, state)
        layers = surgeon.run()
        notes = (*surgeon.notes(), *_target(config, {}), *_untouched(adapter))
        return _report(model_name(model), config, tokens, layers, measure, notes)
    _no_state(config, state)
    look = look_at_whole(config, adapter, tokens, device, measure, progress)
    with InMemoryStore(adapter, device) as store:
        pruned = Session(
            config, adapter, tokens, store,
            device=device, measure=measure, progress=progress, look=look, masks=masks,
        ).run()  # fmt: skip
    notes = (*pruned.notes, *_target(config, masks), *_untouched(adapter))
    return _report(model_name(model), config, tokens, pruned.layers, measure, notes)


@undisturbed()
def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    config: PruneConfig,
    progress: WalkProgress | None = None,
    *,
    batches: object = None,
    state: str | Path | None = None,
    preserve_mask: Masks | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Prunes a checkpoint into a new directory, one block in memory at a time.

    A method that needs gradients takes them first, with the whole model in memory, and so does
    ECoFLaP with its losses; the walk that prunes then streams as ever, with the gradients'
    statistics beside it. A method in shots has the whole model in memory all the time.

    Args:
        source: a Hugging Face directory with safetensors, or a hub id.
        out: a directory that does not exist or is empty. It appears when everything is written.
        config, progress, state: see `prune`.
        batches: token ids to calibrate on; None reads `config.calibration` with the checkpoint's
            own tokenizer.
        preserve_mask: see `prune`.
        trust_remote_code: run the model code that comes with the checkpoint, if any; it is copied
            into `out` then.

    Returns:
        The report, which is in `out` as pyprune.json too. Only the pruned matrices differ between
        `source` and `out`.

    Raises:
        UserError: see `prune`, `Checkpoint.open` and `output_directory`. Nothing is left at `out`.
    """
    check_call(config, PruneConfig, progress)
    _check_mask(config, preserve_mask)
    measure = Measure()
    check_output(out)
    if state is not None:
        check_apart(out, state)
    with measure.phase("open"):
        checkpoint = Checkpoint.open(source, trust_remote_code=trust_remote_code)
    name = source_name(source)
    if config.in_shots():
        return _shots(name, checkpoint, out, config, batches, state, measure, progress)
    _no_state(config, state)
    with measure.phase("open"):
        problem = checkpoint.streaming_obstacle()
        streamed = not problem
        dtype, device = config.torch_dtype, find_device(config.device)
        model = checkpoint.build_model("meta" if streamed else "cpu", dtype)
        originals = None if streamed else Originals(checkpoint, model)
        adapter = _adapter(model, config)
        masks = read_masks(preserve_mask, adapter)
    with measure.phase("tokens"):
        if batches is None and _is_shown(config):
            batches = checkpoint.tokenizer()
        tokens = _tokens(batches, model, config)
    look = Look()
    if looks_at_whole(config):
        with measure.phase("open"):
            whole = _adapter(checkpoint.load_model("cpu", dtype), config)
        look = look_at_whole(config, whole, tokens, device, measure, progress)
        del whole
    session = partial(
        Session, config, adapter, tokens,
        device=device, measure=measure, progress=progress, look=look, masks=masks,
    )  # fmt: skip
    with output_directory(out, needed=checkpoint.nbytes + AUXILIARY_BYTES) as folder:
        # Streaming keeps the shards; save_pretrained makes its own, and its own index.
        copy_auxiliary(checkpoint, folder, index=streamed)
        if originals is None:
            with measure.phase("copy"):
                store = StreamingStore(checkpoint, adapter, folder, device, dtype)
            pruned = session(store=store).run()
        else:
            with InMemoryStore(adapter, device) as memory:
                pruned = session(store=memory).run()
            with measure.phase("write"):
                originals.restore(model)
                save_stock(model, folder)
        notes = (*pruned.notes, *_target(config, masks), *_untouched(adapter))
        if not streamed:
            notes = (f"loaded whole, not streamed block by block: {problem}", *notes)
        report = _report(name, config, tokens, pruned.layers, measure, notes)
        write_report(folder, report.to_dict(), model_card(report))
    return report


def _shots(
    name: str,
    checkpoint: Checkpoint,
    out: str | Path,
    config: PruneConfig,
    batches: object,
    state: str | Path | None,
    measure: Measure,
    progress: WalkProgress | None,
) -> Report:
    """`prune_checkpoint` for a method in shots."""
    dtype, device = config.torch_dtype, find_device(config.device)
    with measure.phase("open"):
        model: Any = checkpoint.load_model("cpu", dtype)
        originals = Originals(checkpoint, model)
        adapter = _adapter(model, config)
    with measure.phase("tokens"):
        tokens = _tokens(checkpoint.tokenizer() if batches is None else batches, model, config)
    surgeon = _surgeon(config, adapter, tokens, device, measure, progress, state)
    with output_directory(out, needed=checkpoint.nbytes + AUXILIARY_BYTES) as folder:
        layers = surgeon.run()
        with measure.phase("write"):
            write_parameters(checkpoint, originals, model, surgeon.parameters(), folder, dtype)
        notes = (*surgeon.notes(), *_target(config, {}), *_untouched(adapter))
        report = _report(name, config, tokens, layers, measure, notes)
        write_report(folder, report.to_dict(), model_card(report))
    return report


def _surgeon(
    config: PruneConfig,
    adapter: Adapter,
    tokens: TokenSet | None,
    device: torch.device,
    measure: Measure,
    progress: WalkProgress | None,
    state: str | Path | None,
) -> Surgeon:
    assert tokens is not None
    with measure.phase("state"):
        saved = None if state is None else State(state, adapter.model, config, tokens)
    return Surgeon(
        config, adapter, tokens, device=device, measure=measure, progress=progress, state=saved
    )


def _check_mask(config: PruneConfig, preserve_mask: Masks | None) -> None:
    if config.in_shots() and preserve_mask is not None:
        raise UserError(f"preserve_mask: expected none for {config.method}, got one")


def _no_state(config: PruneConfig, state: str | Path | None) -> None:
    if state is not None:
        raise UserError(f"state: {config.method} is not pruned in shots, expected none")


def _config(
    method: str | None,
    pattern: Pattern | str | float | None,
    config: PruneConfig | None,
    options: dict[str, Any],
) -> PruneConfig:
    """One config out of either way to ask."""
    if isinstance(method, ConfigFile):
        raise UserError(
            f"method: expected a name, got a {type(method).__name__}: give it as config="
        )
    if config is not None:
        if method is not None or pattern is not None or options:
            raise UserError("expected either config or method, pattern and options, got both")
        return config
    values = dict(options)
    if method is not None:
        values["method"] = method
    if isinstance(pattern, Unstructured):
        values |= {"sparsity": pattern.sparsity, "scope": values.get("scope", pattern.scope)}
    elif isinstance(pattern, NM):
        values["pattern"] = str(pattern)
    elif isinstance(pattern, str):
        values["pattern"] = pattern
    elif pattern is not None:
        values["sparsity"] = pattern
    return PruneConfig.from_dict(values)


def _adapter(model: nn.Module, config: PruneConfig) -> Adapter:
    """The adapter of what is to be pruned, with everything checked that can be in advance."""
    adapter = Adapter.of(model)
    chosen = select_linears(adapter, config.include, config.exclude)
    adapter = adapter.restricted(chosen)
    most = config.find_method().most_columns
    limit = None if most is None else most(config.options())
    for i in range(len(adapter.blocks)):
        check_shapes(adapter.linears(i), config.target(), limit)
    return adapter


def _target(config: PruneConfig, masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What is said of masks that were given, or else of a target that is nothing."""
    return describe_masks(masks) or ((config.idle(),) if config.idle() else ())


def _untouched(adapter: Adapter) -> tuple[str, ...]:
    """What is said of matrices that stay as they are."""
    notes = []
    if adapter.shared:
        notes.append(
            f"{len(adapter.shared)} matrices share their parameter with another module and stay as "
            f"they are, the first is {adapter.shared[0]}"
        )
    if left := adapter.left_alone():
        listed = ", ".join(f"{name} ({count})" for name, count in left.items())
        notes.append(f"not pruned, steering tokens or no linear maps: {listed}")
    if adapted := adapters(adapter.model):
        notes.append(
            f"adapters of peft beside {len(adapted)} layers stay as they are: merged, they would "
            "fill the zeros"
        )
    return tuple(notes)


def _is_shown(config: PruneConfig) -> bool:
    """Whether the model has to be shown tokens, by the method or by the allocation."""
    allocated = ALLOCATIONS[config.allocation].source not in (None, "weights")
    return config.in_shots() or allocated or needs_of(config) is not None


def _tokens(data: object, model: nn.Module, config: PruneConfig) -> TokenSet | None:
    """What the model is shown; None if nothing needs it."""
    if not _is_shown(config):
        return None
    if data is None:
        by_method = config.in_shots() or needs_of(config) is not None
        asks = config.method if by_method else config.allocation
        raise UserError(f"calibration: {asks} expected a tokenizer or batches, got none")
    return configured_tokens(data, config.calibration, model.config)


def _report(
    name: str,
    config: PruneConfig,
    tokens: TokenSet | None,
    layers: Sequence[LayerReport],
    measure: Measure,
    notes: tuple[str, ...] = (),
) -> Report:
    if not config.idle() and not any(layer.zeros for layer in layers):
        notes = (f"nothing was removed: the target was {config.target()}", *notes)
    return Report(
        model=name,
        config=config,
        versions=versions(),
        layers=tuple(layers),
        calibration=None if tokens is None else CalibrationReport.of(tokens),
        notes=notes,
        run=RunReport.of(measure),
    )


def _run(run: Run) -> Report:
    if run.pictures is not None:
        raise UserError(f"report: {run.config.method} has no pictures, got {run.pictures}")
    return prune_checkpoint(
        run.source,
        run.out,
        run.config,
        run.bar.walked,
        state=run.state,
        preserve_mask=run.preserve_mask,
        trust_remote_code=run.trust_remote_code,
    )


FAMILY = Family(
    title="weights (the first scope is the method's default)",
    methods=lambda: {**METHODS, **SHOT_METHODS},
    config=PruneConfig,
    call="prune",
    targets={"sparsity": ("pattern",), "pattern": ("sparsity", "scope")},
    run=_run,
    headers=HEADERS,
    describe=describe,
)
