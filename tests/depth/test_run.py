"""The command that drops layers, end to end."""

import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from pyprune.checkpoint.output import save_model
from pyprune.cli import main
from pyprune.depth.layer_run import LAYER_METHODS, options_of
from pyprune.depth.layers import LacoOptions, ShortenedOptions
from pyprune.errors import UserError

OPTIONS = {"laco": ["-O", "threshold=-1", "-O", "fold=2"], "shortgpt": ["-O", "compensate=true"]}


@pytest.fixture
def source(tmp_path):
    model = tiny_model("qwen2", num_hidden_layers=5, vocab_size=258)
    save_model(model, byte_tokenizer(), tmp_path / "in", report={"method": "wanda"})
    (tmp_path / "text.txt").write_text("A stitch in time saves nine, they say. " * 100)
    return tmp_path


def run(folder, *more):
    text = ["--calibration", str(folder / "text.txt"), "--nsamples", "4", "--seqlen", "32"]
    return main(["drop-layers", str(folder / "in"), "-o", str(folder / "out"), *text, *more])


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_each_method(source, capsys, method):
    assert run(source, "-m", method, "--count", "2", "--json", *OPTIONS.get(method, [])) == 0
    decision = json.loads(capsys.readouterr().out)
    assert decision == json.loads((source / "out" / "pruning.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(source / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 3
    assert sum(p.numel() for p in loaded.parameters()) == decision["parameters"][1]
    assert len(decision["steps"]) == 2 and decision["calibration"]["tokens"] == 128
    report = json.loads((source / "out" / "pyprune.json").read_text())
    assert report["method"] == "wanda" and report["layers"]["method"] == method
    with torch.no_grad():
        assert loaded(torch.arange(8)[None]).logits.isfinite().all()


def test_ratio_stops_as_soon_as_it_is_reached(source, capsys):
    assert run(source, "-m", "reverse", "--ratio", "0.25", "--json") == 0
    decision = json.loads(capsys.readouterr().out)
    before, after = decision["parameters"]
    layer = (before - after) / len(decision["steps"])
    assert before - after >= 0.25 * before > before - after - layer


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--ratio", "0"], "ratio: expected"),
        (["--count", "5"], "at most 4 of 5"),
        (["--count", "1", "--ratio", "0.2"], "exactly one"),
        (["--count", "1", "-m", "nothing"], "method: expected one of"),
        (["--count", "1", "-O", "nothing=1"], "unknown"),
        (["--count", "1", "-O", "refit"], "name=value"),
        (["--count", "1", "-O", "refit=maybe"], "refit: expected"),
        (["--count", "1", "--nsamples", "4000"], "too little"),
    ],
)
def test_bad_input(source, capsys, wrong, words):
    assert run(source, *wrong) == 2
    assert words in capsys.readouterr().err
    assert not (source / "out").exists()


def test_options_are_checked():
    assert options_of(LacoOptions, {"threshold": 1, "highest": None}).threshold == 1
    assert options_of(ShortenedOptions, {"criterion": "taylor"}).criterion == "taylor"
    for kind, given in (
        (LacoOptions, {"fold": True}),
        (LacoOptions, {"merge": "sum"}),
        (ShortenedOptions, {"plus": 1}),
    ):
        with pytest.raises(UserError, match="expected"):
            options_of(kind, given)
