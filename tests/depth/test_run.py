"""`pyprune prune` with methods that remove structure, end to end."""

import json
import math

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from saved_models import load_decision, save_model, save_source
from saved_models import prune_source as run
from saved_models import reloaded as load
from tiny_models import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import pyprune
from pyprune import cli
from pyprune.depth.config import StructureConfig
from pyprune.depth.graph import KINDS, Branch, ResidualGraph
from pyprune.depth.registry import DEPTH_METHODS
from pyprune.depth.run import STATE_FILE, prune_structure, prune_structure_checkpoint
from pyprune.errors import UserError

OPTIONS = {"laco": ["-O", "threshold=-1", "-O", "fold=2"], "shortgpt": ["-O", "compensate=true"]}
# With these the model in memory has other weights than the given one, not only fewer.
CHANGES = ("laco", "llm-streamline", "shortgpt")


@pytest.fixture
def source(tmp_path):
    model = tiny_model("qwen2", num_hidden_layers=5, vocab_size=258)
    return save_source(tmp_path, model, {"method": "wanda"})


@torch.no_grad()
@pytest.mark.parametrize("method", DEPTH_METHODS.load())
def test_each_method(source, capsys, method):
    assert run(source, "-m", method, "--count", "2", "--json", *OPTIONS.get(method, [])) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((source / "out" / "pyprune.json").read_text())
    assert report["earlier"] == {"method": "wanda"} and report["model"] == "in"
    assert report["config"]["count"] == 2 and report["calibration"]["tokens"] == 128
    assert len(report["calibration"]["sha256"]) == 64
    assert report["versions"]["torch"] == torch.__version__
    decision = load_decision(source / "out")
    assert decision.method == report["decision"]["method"] == method
    assert len(decision.steps) == 2 and decision.config == report["config"]
    loaded, original = load(source / "out"), load(source / "in")
    size = sum(p.numel() for p in loaded.parameters())
    assert size == report["parameters"]["after"]
    assert loaded.config.num_hidden_layers == len(report["packing"]["pairs"])
    if decision.unit == "layer":
        assert loaded.config.num_hidden_layers == 3 and report["parameters"]["zeros"] == 0
    if method not in CHANGES:
        ids = torch.arange(40)[None]
        with ResidualGraph.of(original).skipping(decision.removed):
            masked = original(ids, use_cache=False).logits
        assert torch.equal(loaded(ids, use_cache=False).logits, masked)
        gone = report["parameters"]["before"] - decision.steps[-1].parameters
        assert size - report["parameters"]["zeros"] == pytest.approx(
            report["parameters"]["before"] - gone, rel=0.02
        )
    card = (source / "out" / "README.md").read_text()
    assert f"pruned: {method}" in card and str(source) not in card.replace(
        str(source / "text.txt"), ""
    )
    assert (source / "out" / "LICENSE").exists()


def test_ratio_stops_as_soon_as_it_is_reached(source, capsys):
    assert run(source, "-m", "reverse", "--ratio", "0.25", "--json") == 0
    parameters = json.loads(capsys.readouterr().out)["parameters"]
    before, after = parameters["before"], parameters["after"]
    layer = (before - after) / 2
    assert before - after >= 0.25 * before > before - after - layer


@pytest.mark.parametrize("by, steps", [("count", 2), ("latency", None)])
def test_other_measures(source, capsys, by, steps):
    assert run(source, "-m", "blockpruner", "--ratio", "0.2", "--by", by, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    removed = len(report["decision"]["steps"])
    assert removed == steps if steps else 1 <= removed < 10
    assert report["config"]["by"] == by


def test_zeros_instead_of_packing(source, capsys):
    options = ["-m", "blockpruner", "--count", "3", "--json"]
    assert run(source, *options) == 0 and run(source, *options, "--fill", "zeros", out="z") == 0
    packed, zeros = (load(source / name) for name in ("out", "z"))
    assert zeros.config.num_hidden_layers == 5 > packed.config.num_hidden_layers
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, zeros(ids).logits)
    first, second = (load_decision(source / name) for name in ("out", "z"))
    assert first.steps == second.steps


def test_table_and_notes(source, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    model = tiny_model("phi", num_hidden_layers=3, vocab_size=258)
    save_model(model, byte_tokenizer(), source / "phi")
    text = ["--calibration", str(source / "text.txt"), "--nsamples", "4", "--seqlen", "32"]
    arguments = ["-m", "llm-drop", "-O", "blocks=mixed", "--count", "3", *text]
    assert cli.main(["prune", str(source / "phi"), "-o", str(source / "out"), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "Saved in" in captured.out and "3 -> " in captured.out
    for step in load_decision(source / "out").steps:
        assert str(step.unit[0]) in captured.out


def test_a_file_says_the_same(source, capsys):
    file = source / "run.yaml"
    file.write_text(
        "method: blockpruner\ncount: 4\nmethod_options: {mode: fast, looks: 2}\n"
        f"calibration: {{source: {source}/text.txt, nsamples: 4, seqlen: 32}}\n"
    )
    arguments = ["prune", str(source / "in"), "-o", str(source / "out"), "--config", str(file)]
    assert cli.main([*arguments, "--ratio", "0.1", "-O", "looks=3", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["ratio"], config["count"]) == (0.1, None)
    assert config["method_options"] == {"mode": "fast", "looks": 3}
    assert config["calibration"]["nsamples"] == 4 and config["calibration"]["batch_size"] == 8


def test_in_memory_and_from_a_checkpoint_alike(source):
    model = load(source / "in")
    tokens = [tiny_tokens(2, 24), tiny_tokens(2, 24, seed=1)]
    config = StructureConfig("blockpruner", ratio=0.2)
    report = prune_structure(model, tokens, config)
    saved = prune_structure_checkpoint(source / "in", source / "out", config, batches=tokens)
    assert report.decision.steps == saved.decision.steps and report.packing == saved.packing
    assert saved.removed_share >= 0.2 and saved.realised_share == pytest.approx(
        1 - saved.parameters[1] / saved.parameters[0]
    )
    state = load(source / "out").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert pyprune.prune_structure is prune_structure and not model.training
    with pytest.raises(UserError, match="dtype: expected auto for a model in memory"):
        prune_structure(model, tokens, StructureConfig(count=1, dtype="float32"))


def test_dtype_of_the_checkpoint_is_kept(source):
    model = load(source / "in").to(torch.bfloat16)
    save_model(model, byte_tokenizer(), source / "bf16")
    config = StructureConfig("sleb", count=2, dtype="float32")
    tokens = [tiny_tokens(2, 24)]
    prune_structure_checkpoint(source / "bf16", source / "out", config, batches=tokens)
    loaded = AutoModelForCausalLM.from_pretrained(source / "out")
    assert loaded.dtype == torch.bfloat16
    kept = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(loaded.state_dict()["model.layers.0.mlp.up_proj.weight"], kept)


@pytest.mark.parametrize("method", ["blockpruner", "sleb", "llm-drop", "reverse", "laco"])
def test_curve(method):
    model = tiny_model("llama", num_hidden_layers=4)
    tokens = [tiny_tokens(3, 24)]
    more = {"method_options": {"threshold": -1, "fold": 2}} if method == "laco" else {}
    report = prune_structure(model, tokens, StructureConfig(method, count=2, **more), curve=True)
    sizes = [size for size, _ in report.curve]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == report.parameters[0]
    assert len(report.curve) == (2 if method == "laco" else 3)

    def perplexity(model):
        with torch.no_grad():
            logits = model(tokens[0], use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[0][:, 1:].flatten(), reduction="none"
        )
        return math.exp(losses.view(3, -1).mean(1).mean())

    assert report.curve[0][1] == pytest.approx(
        perplexity(tiny_model("llama", num_hidden_layers=4)), rel=1e-4
    )
    assert report.curve[-1][1] == pytest.approx(perplexity(model), rel=1e-4)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["-m", "shortgpt", "--ratio", "0"], "ratio: expected"),
        (["-m", "shortgpt", "--count", "5"], "at most 4 layers (of 5 layers"),
        (["-m", "blockpruner", "--count", "10"], "at most 9 branches (of 10 branches"),
        (["-m", "sleb", "--count", "4"], "at most 3 layers"),
        (["-m", "shortgpt", "--count", "1", "--ratio", "0.2"], "exactly one"),
        (["-m", "shortgpt"], "exactly one of ratio and count"),
        (["-m", "shortgtp", "--count", "1"], "did you mean shortgpt"),
        (["-m", "shortgpt", "--count", "1", "-O", "nothing=1"], "no option 'nothing'"),
        (["-m", "shortgpt", "--count", "1", "-O", "refit"], "name=value"),
        (["-m", "shortgpt", "--count", "1", "-O", "refit=maybe"], "refit: expected true or false"),
        (["-m", "laco", "--count", "1", "-O", "fold=true"], "fold: expected a whole number"),
        (["-m", "laco", "--count", "1", "-O", "merge=sum"], "merge: expected rdsc or last or mean"),
        (["-m", "laco", "--count", "1", "-O", "threshold=x"], "threshold: expected a number"),
        (["-m", "shortened-llama", "--count", "1", "-O", "plus=1"], "plus: expected true or false"),
        (["-m", "shortgpt", "--count", "1", "--nsamples", "4000"], "too little"),
        (["-m", "blockpruner", "--ratio", "0.2", "--by", "flops"], "by: expected one of"),
        (["-m", "blockpruner", "--count", "1", "--fill", "ones"], "fill: expected one of"),
        (["-m", "blockpruner", "-s", "0.5"], "blockpruner, which takes --ratio or --count;"),
        (
            ["-m", "blockpruner", "--count", "1", "--damping", "1"],
            "--damping: not for blockpruner; see",
        ),
        (["-m", "wanda", "--ratio", "0.5"], "not for wanda, which takes --sparsity or --pattern;"),
        (["-m", "magnitude", "-s", "0.5", "--report", "x"], "report: magnitude has no pictures"),
        (["-m", "blockpruner", "--count", "1", "--report", "x.pdf"], "a directory or a .png"),
        (["-m", "blockpruner", "--count", "1", "--report", "no/x.png"], "to exist"),
        (["-m", "blockpruner", "--count", "1", "-O", "state=no/x"], "state: expected a file in"),
        (
            ["-m", "blockpruner", "--count", "1", "-O", "state=/proc/x"],
            "state: cannot write into /proc",
        ),
        (["-m", "blockpruner", "--count", "1", "--seqlen", "1"], "2 tokens or more"),
    ],
)
def test_bad_input(source, capsys, wrong, words):
    assert run(source, *wrong) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
    assert not (source / "out").exists()


@pytest.mark.parametrize("method", ["blockpruner", "sleb", "llm-drop", "shortgpt", "segments"])
def test_one_layer_is_too_few(source, capsys, method):
    save_model(tiny_model("qwen2", num_hidden_layers=1, vocab_size=258), byte_tokenizer(),
               source / "one")  # fmt: skip
    arguments = ["prune", str(source / "one"), "-o", str(source / "out"), "-m", method]
    text = ["--calibration", str(source / "text.txt"), "--nsamples", "4", "--seqlen", "32"]
    assert cli.main([*arguments, "--count", "2", *text]) == 2
    least = {"sleb": "0 of 1 layers may go", "llm-drop": "1 of 2 branches may go"}
    assert least.get(method, "one branch has to stay") in capsys.readouterr().err


def test_continues_in_a_second_call_and_refuses_another_model(source, capsys):
    state = source / "state.json"
    options = ["-m", "blockpruner", "-O", f"state={state}", "--json"]
    assert run(source, *options, "--count", "2") == 0
    assert run(source, *options, "--count", "3", out="more") == 0
    two, three = load_decision(source / "out"), load_decision(source / "more")
    assert three.steps[:2] == two.steps and len(three.steps) == 3
    # The same sizes and the same text, one weight another.
    model = load(source / "in")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[1, 3] += 1e-3
    save_model(model, byte_tokenizer(), source / "other")
    (source / "in").rename(source / "was")
    (source / "other").rename(source / "in")
    capsys.readouterr()
    assert run(source, *options, "--count", "3", out="third") == 2
    assert "state.json is of another model" in capsys.readouterr().err
    (source / "in").rename(source / "other")
    (source / "was").rename(source / "in")
    assert run(source, *options, "--count", "3", "--seed", "1", out="third") == 2
    assert "state.json is of another calibration text" in capsys.readouterr().err


def test_the_state_option_names_a_directory(source, capsys):
    state = source / "new" / "state"
    assert run(source, "-m", "sleb", "--count", "1", "--state", str(state)) == 0
    again = ["-m", "sleb", "--count", "2", "-O", f"state={state / STATE_FILE}"]
    assert run(source, *again, out="more") == 0
    assert load_decision(source / "more").steps[:1] == load_decision(source / "out").steps
    assert run(source, *again, "--state", str(state), out="third") == 2
    assert "expected --state or -O state" in capsys.readouterr().err
    assert run(source, "-m", "shortgpt", "--count", "1", "--state", str(state), out="third") == 2
    assert "state: shortgpt has no use for it" in capsys.readouterr().err
    (source / "file").touch()
    assert run(source, "-m", "sleb", "--count", "1", "--state", str(source / "file"), out="x") == 2
    assert "state: cannot write into" in capsys.readouterr().err


def test_methods_are_listed(capsys):
    assert cli.main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(DEPTH_METHODS.load()) < set(rows)
    assert rows["blockpruner"]["removes"] == "attention and MLP branches"
    assert rows["sleb"]["options"]["refit"] == "true or false; by default false"
    assert rows["laco"]["options"]["highest"] == "a whole number or none; by default none"
    assert cli.main(["methods"]) == 0
    assert (
        "blockpruner -O mode=...: exact or fast or naive; by default exact"
        in capsys.readouterr().out
    )


def test_every_branch_of_a_layer_that_went_is_named(source):
    config = StructureConfig("shortgpt", count=2)
    report = prune_structure(load(source / "in"), [tiny_tokens(2, 24)], config)
    for step in report.decision.steps:
        assert step.unit == tuple(Branch(kind, step.unit[0].layer) for kind in KINDS)
