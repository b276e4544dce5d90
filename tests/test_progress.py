"""What is printed while something runs, where there is no terminal."""

import io

import pytest
from rich.console import Console

from pyprune import progress
from pyprune.calibration.progress import WalkEvent


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (WalkEvent("block", 2, 30, "model.layers.2", 2, 30), "block 3/30"),
        (WalkEvent("batch", 2, 30, "q_proj", 1, 4), "block 3/30 calibrating q_proj 1/4"),
        (WalkEvent("linear", 2, 30, "q_proj", 1, 7), "block 3/30 pruning q_proj 1/7"),
        # No block is being worked on.
        (WalkEvent("whole", 0, 30, "factors of shot 2/5", 3, 16), "factors of shot 2/5 3/16"),
    ],
)
def test_events_in_words(event, words, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    console, steps = Console(file=io.StringIO(), width=200), []
    with progress.ProgressBar(console, "pruning") as bar:
        step = bar.step
        monkeypatch.setattr(bar, "step", lambda *args: (steps.append(args[1:]), step(*args)))
        bar.walked(event)
    assert console.file.getvalue() == f"pruning: {words}\n"
    whole = (event.block, event.blocks) if event.kind in ("batch", "linear") else None
    assert steps == [whole or (event.done, event.total)]
