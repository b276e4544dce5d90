import time

import pytest
import torch

from pyprune.measure import Measure


def test_phases_add_up():
    measure = Measure()
    for _ in range(2):
        with measure.phase("a"):
            time.sleep(0.001)
    measure.add("b", 5.0)
    total = measure.total()
    assert total["a"] >= 0.002 and total["b"] == 5.0
    assert total["total"] >= total["a"]


def test_a_phase_that_fails_counts():
    measure = Measure()
    with pytest.raises(KeyError), measure.phase("a"):
        raise KeyError
    assert "a" in measure.seconds


def test_peak_includes_what_was_allocated_and_freed():
    before = Measure.peak_rss_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert block.sum() == 64 << 20
    del block
    assert Measure.peak_rss_bytes() >= min(before, 64 << 20)
    assert (Measure.peak_cuda_bytes() is None) == (not torch.cuda.is_available())
