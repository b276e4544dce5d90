"""Phases are charged what they took: by the host's clock, on a GPU by events in its queue."""

import itertools

import pytest
import torch

from pyprune.calibration import progress
from pyprune.calibration.progress import PhaseClock, WalkReport


def test_an_inner_phase_interrupts_the_outer_one(monkeypatch):
    ticks = itertools.count(0.0, 1.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ticks))
    seconds = WalkReport().seconds
    clock = PhaseClock(seconds, torch.device("cpu"))
    with clock.charge("forward"), clock.charge("statistics"):
        pass
    with clock.charge("prune"):
        pass
    clock.settle()
    assert (seconds["forward"], seconds["statistics"], seconds["prune"]) == (2.0, 1.0, 1.0)


@pytest.mark.parametrize("kept", [3, 4096])
def test_on_a_gpu_events_are_charged(monkeypatch, kept):
    """Whether they are read once, at the end, or every few."""
    ticks = itertools.count(0.0, 1.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = next(ticks)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(progress, "MOMENTS", kept)
    seconds = WalkReport().seconds
    clock = PhaseClock(seconds, torch.device("cuda"))
    for _ in range(5):
        with clock.charge("forward"), clock.charge("statistics"):
            pass
    with clock.charge("prune"):
        pass
    clock.settle()
    clock.settle()
    assert (seconds["forward"], seconds["statistics"], seconds["prune"]) == (10.0, 5.0, 1.0)


@pytest.mark.gpu
def test_a_phase_on_a_gpu_takes_what_its_kernels_do():
    seconds = WalkReport().seconds
    clock = PhaseClock(seconds, torch.device("cuda"))
    torch.cuda.synchronize()
    with clock.charge("forward"):
        torch.cuda._sleep(50_000_000)  # cycles: above 20 ms
    with clock.charge("prune"):
        torch.cuda.synchronize()  # who waits is not charged
    clock.settle()
    assert seconds["forward"] > 0.01 > seconds["prune"]
