"""Rows of the benches of removed structure that are made again."""

import argparse
import json

import _structure
import pytest

SPEED = {"prefill": {"over_dense": 1.5}, "decode": {"over_dense": 1.2}, "timed": {"threads": 1}}


def row(variant="refit", ratio=0.1, layers=3, **more):
    return {"variant": variant, "ratio": ratio, "layers": layers, "parameters": 10 * layers, **more}


@pytest.fixture
def again(monkeypatch, tmp_path):
    """Rows of the file after `--again --variants refit --ratios 0.1`, with `new` rows."""
    monkeypatch.setattr(_structure, "load", lambda *_: None)
    monkeypatch.setattr(_structure, "show", lambda _: None)
    monkeypatch.setattr(_structure, "environment", lambda _: {"commit": "now"})
    monkeypatch.setattr(_structure, "rates_again", lambda *_: {"prefill": "timed anew"})

    def run(rows, new):
        file = tmp_path / "rows.json"
        file.write_text(json.dumps(rows))
        args = argparse.Namespace(
            json=file, variants=["refit"], ratios=[0.1], again=True, rates_only=False, smoke=False,
            device="cpu", nsamples=8, seqlen=256,
        )  # fmt: skip
        _structure.measure_all(args, lambda *_: new)
        return json.loads(file.read_text())

    return run


def test_only_the_named_rows_are_made_again_and_keep_their_speed(again):
    others = [row("plain", commit="then"), row("refit", 0.2, commit="then", **SPEED)]
    found = again([others[0], row(ppl=9, commit="then", **SPEED), others[1]], row(ppl=7))
    assert [found[0], found[2]] == others
    assert found[1] == row(ppl=7, commit="now", calibration_tokens=2048, **SPEED)


@pytest.mark.parametrize(
    "old", [row(ppl=9, **SPEED, zeros=0) | {"layers": 4, "parameters": 40}, row(ppl=9)]
)
def test_another_shape_and_what_was_not_timed_apart_are_timed_anew(again, old):
    (found,) = again([old], row(ppl=7))
    assert found == row(ppl=7, commit="now", calibration_tokens=2048, prefill="timed anew")


def test_what_cannot_be_reached_any_more_has_no_speed(again):
    (found,) = again([row(ppl=9, **SPEED)], {"impossible": "expected to remove more"})
    assert "prefill" not in found and found["impossible"] == "expected to remove more"
