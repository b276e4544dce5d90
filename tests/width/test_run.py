"""`pyprune prune` with methods that narrow a model, end to end."""

import json
import math

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from saved_models import prune_source as run
from saved_models import reloaded as load
from saved_models import save_model, save_source
from tiny_models import tiny_model, tiny_tokens

from pyprune import cli
from pyprune.errors import UserError
from pyprune.width.config import WidthConfig
from pyprune.width.registry import WIDTH_METHODS
from pyprune.width.run import prune_width, prune_width_checkpoint

OPTIONS = {"disp-llm": ["-O", "iterations=2"]}


@pytest.fixture
def source(tmp_path):
    more = {"hidden_size": 64, "vocab_size": 258, "num_hidden_layers": 3}
    model = tiny_model("qwen2", **more, tie_word_embeddings=False)
    return save_source(tmp_path, model, {"method": "wanda"})


@pytest.mark.parametrize("method", WIDTH_METHODS.load())
def test_each_method(source, capsys, method):
    assert run(source, "-m", method, "--ratio", "0.1", "--json", *OPTIONS.get(method, [])) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((source / "out" / "pyprune.json").read_text())
    assert report["earlier"] == {"method": "wanda"} and report["model"] == "in"
    assert report["config"]["ratio"] == 0.1 and report["calibration"]["tokens"] == 128
    assert report["decision"]["method"] == method
    loaded, original = load(source / "out"), load(source / "in")
    after, before = (sum(p.numel() for p in m.parameters()) for m in (loaded, original))
    parameters = report["parameters"]
    assert (parameters["before"], parameters["after"]) == (before, after)
    if method == "multipruner":  # one width per layer: a stock model is as wide as its widest
        assert parameters["removed_share"] >= 0.1 >= parameters["realised_share"]
    else:
        assert parameters["zeros"] == 0 and parameters["realised_share"] >= 0.1
    for name, (old, new) in report["decision"]["sizes"].items():
        assert getattr(loaded.config, name) == new < old, name
        assert getattr(original.config, name) == old
    card = (source / "out" / "README.md").read_text()
    assert f"pruned: {method}" in card and (source / "out" / "LICENSE").exists()


@pytest.mark.parametrize(
    ("method", "family", "stays"),
    [("slicegpt", "gpt2", True), ("slicegpt", "phi", False), ("disp-llm", "mixtral", False)],
)
def test_families_of_other_kinds(tmp_path, capsys, method, family, stays):
    """LayerNorms with heads as wide as the stream, and with a size of their own; fused experts."""
    model = tiny_model(family, vocab_size=258)
    save_model(model, byte_tokenizer(), tmp_path / "in")
    (tmp_path / "text.txt").write_text("A stitch in time saves nine, they say. " * 100)
    assert run(tmp_path, "-m", method, "--ratio", "0.2", *OPTIONS.get(method, [])) == 0
    shown = capsys.readouterr().out
    parameters = json.loads((tmp_path / "out" / "pyprune.json").read_text())["parameters"]
    pruned = load(tmp_path / "out")
    assert parameters["after"] == sum(p.numel() for p in pruned.parameters())
    if stays:
        # A head of its own costs more here than the zeros, which a stock GPT-2 has to keep.
        assert "% more)" in shown and "without the zeros" in shown
        assert parameters["removed_share"] >= 0.2 > parameters["realised_share"]
    else:
        assert "% less)" in shown
        assert parameters["realised_share"] >= 0.2


def test_zeros_are_reported(source, capsys):
    assert run(source, "-m", "flap", "--ratio", "0.1", "-O", "structure=adaptive", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    loaded = load(source / "out")
    parameters = report["parameters"]
    zeros = sum(int((p == 0).sum()) for p in loaded.parameters())
    assert zeros >= parameters["zeros"] > 0
    assert parameters["removed_share"] >= 0.1 > parameters["realised_share"]
    options = ["-O", "structure=adaptive", "--report", str(source / "pictures")]
    assert run(source, "-m", "flap", "--ratio", "0.1", *options, out="b") == 0
    names = {file.name for file in (source / "pictures").iterdir()}
    assert names == {f"{n}.png" for n in ("kept", "importance-heads", "importance-mlp",
                                          "parameters", "perplexity")}  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "without the zeros" in shown and "a stock model has one size" in shown


def test_report_has_both_ends_of_the_curve(source, capsys):
    assert run(source, "-m", "wanda-sp", "--ratio", "0.2", "--json",
               "--report", str(source / "pictures")) == 0  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert (source / "pictures" / "perplexity.png").exists()
    (dense, before, first), (pruned, after, second) = report["decision"]["curve"]
    assert (dense, pruned) == ("dense", "pruned") and after < before
    assert (before, after) == (report["parameters"]["before"], report["parameters"]["after"])
    tokens = [torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])]
    model, config = load(source / "in"), WidthConfig("wanda-sp", ratio=0.2)
    assert prune_width(model, tokens, config).decision.curve == ()
    found = prune_width(load(source / "in"), tokens, config, curve=True).decision.curve
    for point, of in zip(found, (load(source / "in"), model), strict=True):
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                of(tokens[0], use_cache=False).logits[0, :-1], tokens[0][0, 1:]
            )
        assert point[2] == pytest.approx(math.exp(losses), rel=1e-4)
    assert first > 1 and second > 1


def test_memory_equals_checkpoint(source):
    config = WidthConfig("wanda-sp", ratio=0.1)
    batches = [tiny_tokens(2, 16)]
    model = load(source / "in").train()
    in_memory = prune_width(model, batches, config)
    assert model.training
    written = prune_width_checkpoint(source / "in", source / "out", config, batches=batches)
    assert in_memory.decision == written.decision
    ids = tiny_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(load(source / "out")(ids).logits, model.eval()(ids).logits)


def test_what_cannot_be_asked_for(source, capsys):
    cases = [
        (["--ratio", "0"], "ratio: expected a number between 0 and 1"),
        (["--ratio", "0.99"], "ratio: expected at most"),
        (["--ratio", "0.1", "-O", "multiple=0"], "multiple: expected at least 1"),
        (["--ratio", "0.1", "--report", "x.pdf"], "report: expected a directory or a .png file"),
        (["--ratio", "0.1", "--count", "3"], "count"),
    ]
    for more, message in cases:
        assert run(source, "-m", "wanda-sp", *more) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
        assert not (source / "out").exists()
    with pytest.raises(UserError, match="device: expected auto for a model in memory"):
        prune_width(load(source / "in"), [tiny_tokens()], WidthConfig(device="cpu"))


def test_methods_lists_them(capsys):
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in WIDTH_METHODS.load())
