"""Formats chosen by what multiplies fastest: given timings, and the real clock."""

import itertools
import json

import pytest
import torch
from ops.compressed import random_24_mask
from sparse_checkpoints import pruned_checkpoint, tensors_of

from pyprune import cli
from pyprune.errors import UserError
from pyprune.measure import last_level_cache
from pyprune.sparse import measured
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.format import candidates
from pyprune.sparse.measured import MeasuredChoice


def weight(rows=16, cols=64, dtype=torch.bfloat16):
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(rows, cols, generator=gen).to(dtype)
    return w * random_24_mask(rows, cols, gen) + 0.0


def given(monkeypatch, **seconds):
    monkeypatch.setattr(MeasuredChoice, "_measure", lambda *_: dict(seconds))


@pytest.mark.parametrize(
    ("seconds", "format"),
    [
        ({"dense": 3.0, "sparse24": 2.0, "bitmap": 1.0}, "bitmap"),
        ({"dense": 1.0, "sparse24": 2.0, "bitmap": 3.0}, "dense"),
        ({"dense": 3.0, "sparse24": 1.01, "bitmap": 1.0}, "sparse24"),  # within noise: smaller
        ({"dense": 1.0, "sparse24": 1.02, "bitmap": 9.0}, "sparse24"),
        ({"dense": 1.0, "sparse24": 1.04, "bitmap": 9.0}, "dense"),
    ],
)
def test_the_fastest_is_taken_and_the_smaller_of_equals(seconds, format, monkeypatch):
    given(monkeypatch, **seconds)
    w = weight()
    sizes, nnz = candidates(w)
    assert MeasuredChoice(1, w.nbytes)(w, sizes, nnz, False) == (format, seconds)


def test_layers_alike_are_measured_once(monkeypatch):
    measurements = []
    own = MeasuredChoice._measure
    monkeypatch.setattr(measured, "TURNS", 1)
    monkeypatch.setattr(measured, "last_level_cache", lambda: 4096)
    monkeypatch.setattr(
        MeasuredChoice, "_measure", lambda *args: measurements.append(1) or own(*args)
    )
    choice = MeasuredChoice(2, 1 << 20)
    sparser = weight()
    sparser[:8] = 0
    for w in (weight(), weight(), weight(24), weight(dtype=torch.float32), sparser):
        sizes, nnz = candidates(w)
        for int8 in (False, True):
            format, seconds = choice(w, sizes, nnz, int8)
            assert format in seconds and seconds.keys() == {"dense", "sparse24", "bitmap"}
            assert all(s > 0 for s in seconds.values())
    assert len(measurements) == len(choice.table) == 8


def test_interruptions_do_not_decide(monkeypatch):
    """All turns of a format but one meet a neighbour that takes a second."""
    clock, calls = [0.0], itertools.count()

    def now():
        clock[0] += 1e-3 if next(calls) // 2 % 5 == 0 else 1.0
        return clock[0]

    monkeypatch.setattr(measured.time, "perf_counter", now)
    w = torch.zeros(8, 16, dtype=torch.bfloat16)
    w[:, ::4] = 1
    _, seconds = MeasuredChoice(1, w.nbytes)(w, {"bitmap": 1, "sparse24": 2}, 32, False)
    assert max(seconds.values()) < 1e-3


def test_copies_exceed_the_cache(monkeypatch):
    made = []
    own = measured._copies
    monkeypatch.setattr(measured, "TURNS", 1)
    monkeypatch.setattr(measured, "last_level_cache", lambda: 5000)
    monkeypatch.setattr(measured, "_copies", lambda *args: made.append(own(*args)) or made[-1])
    w = weight()
    sizes, nnz = candidates(w)
    MeasuredChoice(1, 1 << 20)(w, sizes, nnz, False)
    for group in made:
        state = [layer.state_dict() for layer in group]
        assert sum(t.nbytes for s in state for t in s.values()) >= 10000
        assert len({next(iter(s.values())).data_ptr() for s in state}) == len(group) > 1
    made.clear()
    MeasuredChoice(1, 100)(w, sizes, nnz, False)  # a small model stays in the cache
    assert [len(group) for group in made] == [1, 1, 1]


def test_report_of_a_measured_compression(tmp_path, monkeypatch):
    given(monkeypatch, dense=2.0, sparse24=3.0, bitmap=1.0)
    dense = pruned_checkpoint(tmp_path / "dense")
    report = compress_checkpoint(dense, tmp_path / "small", measured_rows=4)
    pruned = [layer for name, layer in report.layers.items() if name != "lm_head"]
    assert {layer.format for layer in pruned} == {"bitmap"} and report.rows == 4
    assert all(layer.seconds["bitmap"] == 1.0 for layer in pruned)
    assert report.layers["lm_head"].seconds is None  # nothing to choose from
    given(monkeypatch, dense=1.0, sparse24=3.0, bitmap=2.0)
    report = compress_checkpoint(dense, tmp_path / "same", measured_rows=4)
    assert set(report.formats.values()) == {"dense"}
    assert report.nbytes_after == report.nbytes_before


def test_bytes_decide_unless_asked_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(MeasuredChoice, "__call__", None)
    dense = pruned_checkpoint(tmp_path / "dense")
    for out in ("a", "b"):
        report = compress_checkpoint(dense, tmp_path / out)
        assert report.rows is None and report.layers["lm_head"].seconds is None
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(measured, "TURNS", 1)
    monkeypatch.setattr(measured, "last_level_cache", lambda: 1 << 16)
    dense, out = str(pruned_checkpoint(tmp_path / "dense")), str(tmp_path / "small")
    options = ["compress", dense, "--choose", "measured", "--rows", "2"]
    assert cli.main([*options, "--out", out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 2
    layer = report["layers"]["model.layers.0.mlp.up_proj"]
    assert layer["seconds"].keys() == {"dense", "sparse24", "bitmap"}
    assert cli.main([*options, "--out", out + "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "microseconds a product of 2 rows" in shown and "sparse24" in shown and "…" not in shown
    for format in ("auto", "deci"):  # which do not multiply
        assert cli.main(["compress", dense, "--rows", "4", "--format", format, "--out", out]) == 2
        assert "--rows: expected --choose measured with it" in capsys.readouterr().err
    assert cli.main([*options[:-1], "0", "--out", out + "3"]) == 2
    assert cli.main(["compress", dense, "--out", out + "3", "--choose", "fastest"]) == 2
    errors = capsys.readouterr().err
    assert "expected bytes or measured" in errors and "rows: expected at least 1, got 0" in errors
    with pytest.raises(UserError):
        MeasuredChoice(0, 1)


def test_the_cache_is_found():
    assert 1 << 18 <= last_level_cache() < 1 << 40
