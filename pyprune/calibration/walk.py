"""The calibration walk: block by block, statistics of the inputs, then pruning.

In the default mode every batch runs through the decoder once, as a coroutine. It waits at the entry
of each block, so that the previous one can be written out and the next one loaded, and before each
stage (the matrices that read one tensor) until the stage has been pruned from the statistic of all
batches. So every statistic sees the pruned matrices before it, within its block too
("true-sequential" in Frantar and Alistarh 2023), at the cost of a single forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import functional_call

from pyprune.calibration import schedule
from pyprune.calibration.autograd import without_parameter_gradients
from pyprune.calibration.coroutine import Forward, Pause, stopping_at_entries
from pyprune.calibration.group import BlockVisit, Group
from pyprune.calibration.progress import PhaseClock, WalkEvent, WalkProgress, WalkReport
from pyprune.calibration.schedule import Site, SiteInput, Stage
from pyprune.calibration.spill import Parked, Spill, SpillTo
from pyprune.calibration.stats import Statistic
from pyprune.calibration.store import BlockStore, InMemoryStore
from pyprune.calibration.tokens import Batch
from pyprune.errors import OVERFLOW, LayerError, UserError
from pyprune.models.adapter import Adapter
from pyprune.models.experts import is_fused, observed
from pyprune.models.linears import parameters_of
from pyprune.models.running import evaluation

__all__ = [
    "BlockStore",
    "BlockVisit",
    "Group",
    "InMemoryStore",
    "Mode",
    "WalkEvent",
    "WalkReport",
    "walk",
]

Mode = Literal["single", "two-pass", "naive"]


def walk(
    adapter: Adapter,
    batches: Sequence[Batch],
    *,
    statistic: Callable[[int, torch.device], Statistic] | None,
    prune_group: Callable[[Group], None],
    store: BlockStore,
    mode: Mode = "single",
    device: torch.device | str = "cpu",
    spill: SpillTo = "none",
    progress: WalkProgress | None = None,
    prepare_block: Callable[[BlockVisit], None] | None = None,
) -> WalkReport:
    """Hands every prunable matrix of the model to `prune_group`, in the order of the forward, with
    the statistic of its inputs.

    Args:
        batches: the calibration tokens.
        statistic: makes an empty statistic of C columns on a device. None: none is needed, so
            nothing runs and `batches` may be empty.
        prune_group: writes the pruned weights through `LinearRef.write`.
        mode: `single`, see above; `naive` gives the same result by running the block once per
            stage; `two-pass` takes all statistics of a block while it is still dense, as the
            reference code of SparseGPT and Wanda does, and runs it again once it is pruned.
        device: where blocks run and statistics are kept.
        spill: moves the input that a waiting batch has handed over to `host` memory (from a GPU) or
            to temporary files on `disk` until the batch goes on.
        prepare_block: called at each block before anything of it is pruned, in every mode; it costs
            one more forward, and those that it runs itself. Needs a `statistic`.

    Raises:
        LayerError: inputs of a layer are NaN or infinite, or a layer is not called exactly once, or
            padding cannot be told apart in its input.
        UserError: an argument is wrong, or what the model calls depends on the data.

    Whatever happens, hooks are removed, waiting forwards abandoned, training flags restored.
    """
    if mode not in get_args(Mode):
        raise UserError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
    device = torch.device(device)
    runner = _Walk(adapter, prune_group, store, device, progress, prepare_block)
    if statistic is None:
        if prepare_block is not None:
            raise ValueError("prepare_block: expected none without a statistic")
        return runner.without_statistics()
    forwards = [Forward(adapter.decoder, b, i, device) for i, b in enumerate(batches)]
    runner.report.tokens = sum(f.real_tokens for f in forwards)
    if not runner.report.tokens:
        raise UserError("calibration: expected at least one token, got none")
    # Version counters, which tell whether a tensor was written to, are not kept in inference mode.
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation(adapter.decoder))
        spilling = stack.enter_context(Spill(spill, device))
        for forward in forwards:
            stack.callback(forward.stop)
        stack.enter_context(stopping_at_entries(adapter.blocks, adapter.block_names))
        runner.run(forwards, statistic, mode, spilling)
    return runner.report


@dataclass(eq=False)
class _Collected:
    """The statistics of one stage: one, or one an expert."""

    stage: Stage
    statistics: list[Statistic]
    seconds: float = 0.0

    def groups(self, block: int) -> list[Group]:
        leader = self.stage.leader
        if not leader.fused:
            linears = [site.linears[0] for site in self.stage.sites]
            return [Group(linears, self.statistics[0], block, self.seconds)]
        share = self.seconds / len(leader.linears)
        experts = [
            Group([ref], statistic, block, share)
            for ref, statistic in zip(leader.linears, self.statistics, strict=True)
        ]
        for expert in experts:
            expert.peers = experts
        return experts


class _Walk:
    """The state of one walk; at any time at most one of `forwards` runs, `_current`."""

    def __init__(
        self,
        adapter: Adapter,
        prune_group: Callable[[Group], None],
        store: BlockStore,
        device: torch.device,
        progress: WalkProgress | None,
        prepare_block: Callable[[BlockVisit], None] | None,
    ) -> None:
        self.report = WalkReport()
        self._adapter = adapter
        self._prune_group = prune_group
        self._store = store
        self._device = device
        self._progress = progress
        self._prepare_block = prepare_block
        self._clock = PhaseClock(self.report.seconds, device)
        self._block = 0
        self._pruned = 0
        self._block_forwards = 0
        self._plans: dict[object, list[list[int]]] = {}

    def without_statistics(self) -> WalkReport:
        for i in range(len(self._adapter.blocks)):
            self._load(i)
            for ref in self._adapter.linears(i):
                self._prune(Group([ref], None, i))
            self._flush(i)
        self._clock.settle()
        return self.report

    def run(
        self,
        forwards: list[Forward],
        statistic: Callable[[int, torch.device], Statistic],
        mode: Mode,
        spill: Spill,
    ) -> None:
        self._forwards = forwards
        self._statistic = statistic
        self._spill = spill
        self._parked = {f: Parked() for f in forwards}
        with self._clock.charge("load"):
            self._store.load_rest()
        names = self._adapter.block_names
        self._reach(names[0])
        for i in range(len(names)):
            self._load(i)
            for forward in forwards:
                forward.read.clear()
            sites = schedule.sites_of(self._adapter.linears(i))
            stages = self._stages(sites)
            if self._prepare_block is not None and sites:
                self._prepare(sites, stages, self._prepare_block)
            following = names[i + 1] if i + 1 < len(names) else None
            if mode == "single":
                self._prune_while_running(sites, stages, following)
            else:
                self._prune_then_run(sites, stages, following, at_once=mode == "two-pass")
            self._flush(i)
        self._clock.settle()
        self.report.spilled_bytes = spill.spilled_bytes
        self.report.passes = self._block_forwards / (len(forwards) * len(names))

    # The three modes.

    def _prune_while_running(
        self, sites: list[Site], stages: list[Stage], following: str | None
    ) -> None:
        def wait(stage: Stage, inputs: list[SiteInput]) -> None:
            tensors = [given.x for given in inputs]
            self._current.wait(Pause(stage.leader.name, tensors, inputs=inputs))

        observer = self._observer(stages, wait)

        def observe(site: Site, inputs: list[SiteInput]) -> None:
            # prune_group may run the model itself: that forward is not ours to pause.
            if Forward.running() is not None:
                observer(site, inputs)

        self._block_forwards += len(self._forwards)
        with schedule.observing(sites, observe):
            for stage in stages:
                collected = self._collect(stage)
                self._reach(stage.leader.name, collected)
                self._prune_stage(collected)
            if following is not None:
                self._reach(following)

    def _prune_then_run(
        self, sites: list[Site], stages: list[Stage], following: str | None, at_once: bool
    ) -> None:
        for part in [stages] if at_once else [[stage] for stage in stages]:
            collected = {stage: self._collect(stage) for stage in part}
            self._run_blocks(sites, stages, collected)
            for stage in part:
                self._prune_stage(collected.pop(stage))
        if following is not None:
            self._block_forwards += len(self._forwards)
            self._reach(following)

    def _run_blocks(
        self, sites: list[Site], stages: list[Stage], collected: dict[Stage, _Collected]
    ) -> None:
        """Runs the current block on every batch for the statistics of some of its stages."""
        due: Iterator[Stage] = iter(())

        def update(stage: Stage, inputs: list[SiteInput]) -> None:
            self._check_turn(next(due, None), stage)
            if stage in collected:
                self._update(collected[stage], self._current, inputs)

        with schedule.observing(sites, self._observer(stages, update)):
            for forward in self._forwards:
                due = iter(stages)
                self._run_block(forward)
                self._check_turn(next(due, None), None)

    def _check_turn(self, due: Stage | None, reached: Stage | None) -> None:
        if due is not reached:
            end = f"the end of {self._adapter.block_names[self._block]}"
            names = [end if stage is None else stage.leader.name for stage in (reached, due)]
            raise _out_of_turn(self._current, *names)

    def _observer(
        self, stages: list[Stage], at_leader: Callable[[Stage, list[SiteInput]], None]
    ) -> Callable[[Site, list[SiteInput]], None]:
        """Calls `at_leader` where a stage begins and checks that its other sites read the same."""
        stage_of = {site: stage for stage in stages for site in stage.sites}

        def observe(site: Site, inputs: list[SiteInput]) -> None:
            stage, read = stage_of[site], self._current.read
            x = inputs[0].x
            if site is stage.leader:
                read[stage] = schedule.TensorId(x)
                at_leader(stage, inputs)
            elif stage not in read or not read[stage].matches(x):
                raise LayerError(
                    site.name,
                    f"reads another tensor than {stage.leader.name} does in batch "
                    f"{self._current.index}, but not in the first block and batch of its kind",
                )

        return observe

    def _stages(self, sites: list[Site]) -> list[Stage]:
        """The stages of the current block: tried out on the first batch for the first block of its
        kind, the same for others with the same class and matrices."""
        name = self._adapter.block_names[self._block]
        kind = (
            type(self._adapter.blocks[self._block]),
            tuple(
                (s.name[len(name) :], s.linears[0].weight().shape, len(s.linears)) for s in sites
            ),
        )
        if kind not in self._plans:
            stages = schedule.find_stages(sites, lambda: self._run_block(self._forwards[0]))
            self._plans[kind] = [[sites.index(site) for site in stage.sites] for stage in stages]
        return [Stage([sites[k] for k in members]) for members in self._plans[kind]]

    # Running.

    def _reach(self, name: str, collected: _Collected | None = None) -> None:
        """Lets every batch run on to its pause at `name`, where its input is collected."""
        for done, forward in enumerate(self._forwards, 1):
            self._restore(forward)
            self._current = forward
            with self._clock.charge("forward"):
                pause = forward.resume()
            if pause is None or pause.name != name:
                reached = "the end of the decoder" if pause is None else pause.name
                raise _out_of_turn(forward, reached, name)
            if collected is not None:
                self._update(collected, forward, pause.inputs)
            self._park(forward, pause.tensors)
            self._tell("batch", name, done, len(self._forwards))

    def _prepare(
        self, sites: list[Site], stages: list[Stage], prepare_block: Callable[[BlockVisit], None]
    ) -> None:
        collected = {stage: self._collect(stage) for stage in stages}
        self._run_blocks(sites, stages, collected)
        groups = [group for part in collected.values() for group in part.groups(self._block)]
        for group in groups:
            _check_finite(group)
        name = self._adapter.block_names[self._block]
        tokens = [forward.real_tokens for forward in self._forwards]
        tell = partial(self._tell, "batch", name)
        with ExitStack() as stack, self._clock.charge("prune"):
            # Experts one by one, as everywhere here: torch's grouped products may have no gradient.
            for module in self._adapter.blocks[self._block].modules():
                if is_fused(module):
                    stack.enter_context(observed(module))
            stack.enter_context(without_parameter_gradients(self._adapter.blocks[self._block]))
            prepare_block(BlockVisit(name, groups, tokens, self._run_changed, tell))

    def _run_changed(self, k: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """`BlockVisit.run`."""
        name, forward = self._adapter.block_names[self._block], self._forwards[k]
        refs = [] if weights is None else self._adapter.linears(self._block)
        parameters = parameters_of(refs, weights or {}, name)
        return forward.real_outputs(name, self._run_block(forward, parameters))

    def _run_block(self, forward: Forward, parameters: dict[str, Tensor] | None = None) -> Any:
        """Runs the current block on what the model is about to call it with, with some of its
        parameters replaced; its output."""
        pause = forward.pause
        assert pause is not None, "a block runs on the arguments of the pause at its entry"
        self._restore(forward)
        self._current = forward
        self._block_forwards += 1
        # A block may write to its input, which is needed once more.
        copies = {id(t): t.clone() for t in pause.tensors}
        args = [copies.get(id(a), a) for a in pause.args]
        kwargs = {key: copies.get(id(a), a) for key, a in pause.kwargs.items()}
        with self._clock.charge("forward"):
            block = self._adapter.blocks[self._block]
            if parameters:
                output = functional_call(block, parameters, tuple(args), kwargs)
            else:
                output = block(*args, **kwargs)
        self._park(forward, pause.tensors)
        return output

    def _park(self, forward: Forward, tensors: list[Tensor]) -> None:
        with self._clock.charge("forward"):
            self._parked[forward] = self._spill.put(str(forward.index), tensors)
        held = sum(parked.held_bytes for parked in self._parked.values())
        self.report.held_bytes = max(self.report.held_bytes, held)

    def _restore(self, forward: Forward) -> None:
        with self._clock.charge("forward"):
            self._parked[forward].restore()

    # Statistics and pruning.

    def _collect(self, stage: Stage) -> _Collected:
        linears = stage.leader.linears
        with self._clock.charge("statistics"):
            return _Collected(
                stage, [self._statistic(ref.weight().shape[1], self._device) for ref in linears]
            )

    def _update(self, collected: _Collected, forward: Forward, inputs: list[SiteInput]) -> None:
        start = time.perf_counter()
        with self._clock.charge("statistics"):
            rows = forward.real_rows(collected.stage.leader, inputs)
            for given, x in zip(inputs, rows, strict=True):
                if len(x):
                    collected.statistics[given.member].update(x)
        collected.seconds += time.perf_counter() - start

    def _prune_stage(self, collected: _Collected) -> None:
        for group in collected.groups(self._block):
            _check_finite(group)
            self._prune(group)

    def _prune(self, group: Group) -> None:
        with self._clock.charge("prune"):
            self._prune_group(group)
        for ref in group.linears:
            self._pruned += 1
            total = len(self._adapter.linears(self._block))
            self._tell("linear", ref.name, self._pruned, total)

    # Blocks and progress.

    def _load(self, i: int) -> None:
        self._block, self._pruned = i, 0
        with self._clock.charge("load"):
            self._store.load(i)

    def _flush(self, i: int) -> None:
        with self._clock.charge("flush"):
            self._store.flush(i)
        self._tell("block", self._adapter.block_names[i], i + 1, len(self._adapter.blocks))

    def _tell(
        self, kind: Literal["block", "linear", "batch"], name: str, done: int, total: int
    ) -> None:
        if self._progress is not None:
            blocks = len(self._adapter.blocks)
            self._progress(WalkEvent(kind, self._block, blocks, name, done, total))


def _check_finite(group: Group) -> None:
    if group.statistic is not None and not group.statistic.finite():
        ref = group.linears[0]
        half = ref.weight().dtype == torch.float16
        raise LayerError(
            ref.name, f"its calibration input has NaN or infinite values{OVERFLOW if half else ''}"
        )


def _out_of_turn(forward: Forward, reached: str, due: str) -> UserError:
    return UserError(
        f"batch {forward.index} reached {reached} where {due} was expected: which matrices run, "
        "and in which order, must not depend on the data"
    )
