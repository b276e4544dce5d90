"""Pictures of structural runs: which there are, where they go, and that they are pictures."""

from dataclasses import replace

import pytest
from limited_files import limited_files
from matplotlib.figure import Figure
from matplotlib.image import imread
from tiny_models import tiny_model, tiny_tokens

from pyprune import pictures
from pyprune.depth.config import StructureConfig
from pyprune.depth.plot import _importance, draw
from pyprune.depth.run import prune_structure
from pyprune.errors import UserError


def report_of(method, **options):
    model = tiny_model("llama", num_hidden_layers=4)
    config = StructureConfig(method, count=2, method_options=options)
    return prune_structure(model, [tiny_tokens(2, 16)], config, curve=True)


@pytest.mark.parametrize("method, options, names", [
    ("blockpruner", {}, {"order", "importance", "perplexity"}),
    ("shortgpt", {"compensate": True}, {"order", "importance", "perplexity"}),
    ("angular", {}, {"order", "perplexity"}),  # ranks windows
])  # fmt: skip
def test_a_file_each_or_all_in_one(method, options, names, tmp_path):
    report = report_of(method, **options)
    files = draw(report.decision, report.curve, tmp_path / "pictures")
    assert {file.stem for file in files} == names
    assert set((tmp_path / "pictures").iterdir()) == set(files)
    heights = [imread(file).shape[0] for file in files]
    (one,) = draw(report.decision, report.curve, tmp_path / "all.png")
    assert imread(one).shape[0] > max(heights)
    for file in files:
        picture = imread(file)
        assert picture.shape[1] > 600 and picture[..., :3].std() > 0.05
    assert {f.stem for f in draw(report.decision, [], tmp_path / "no")} == names - {"perplexity"}


def test_bad_places(tmp_path, monkeypatch):
    report = report_of("reverse")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name, words in (
        ("picture.pdf", "a directory or a .png file"),
        ("file", "is a file"),
        ("folder.png", "is a directory"),
        ("nowhere/picture.png", "to exist"),
        ("/proc/pictures", "report: cannot write into /proc"),
    ):
        with pytest.raises(UserError, match=words):
            draw(report.decision, report.curve, tmp_path / name)
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs matplotlib"):
        draw(report.decision, report.curve, tmp_path / "all.png")


def test_a_full_disk_leaves_no_half_picture(tmp_path):
    report = report_of("reverse")
    for name in ("pictures", "all.png"):
        with (
            pytest.raises(UserError, match=r"report: cannot write into .*: File too large"),
            limited_files(5000),
        ):
            draw(report.decision, report.curve, tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["pictures"]


def test_axes_name_their_units_and_cut_bars_say_so():
    decision = report_of("blockpruner", objective="kl").decision
    axis = Figure().subplots()
    _importance(axis, decision)
    assert axis.get_ylabel() == "KL to the dense model, nats per token"
    assert axis.get_legend_handles_labels()[1] == ["attention", "MLP"]  # dense: the axis itself
    values = dict.fromkeys(decision.importance, 0.1)
    assert "cut" not in _titled(replace(decision, importance=values))
    assert "cut bars" in _titled(replace(decision, importance={**values, "A0": 9.0}))


def _titled(decision):
    axis = Figure().subplots()
    _importance(axis, decision)
    return axis.get_title()
