"""The benchmark of compressed models: what it counts, and that it says where sparse loses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from sparse_checkpoints import prune_in_place, pruned_checkpoint
from tiny_models import tiny_model

from pyprune import cli
from pyprune.cli_sparse import bench_tables
from pyprune.errors import UserError
from pyprune.sparse import SparseLinear
from pyprune.sparse import plot as drawing
from pyprune.sparse.bench import (
    BenchResult,
    Protocol,
    Rate,
    bench,
    contestants,
    densified,
    weight_bytes,
    with_own_kernels,
)
from pyprune.sparse.compare import differences
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.dense import DenseLinear
from pyprune.sparse.load import load
from pyprune.sparse.plot import DENSE_COLOUR, colour
from pyprune.sparse.stored import StoredCheckpoint


def demo_result(threads: int) -> BenchResult:
    """What the demo measured, as if with so many threads."""
    file = Path(__file__).parents[1] / "benchmarks" / "results" / "demo.json"
    found = json.loads(file.read_text())["bench"] | {"threads": threads}
    names = [field.name for field in dataclasses.fields(BenchResult)]
    rates = [Rate(**rate) for rate in found["rates"]]
    found |= {"rates": rates, "protocol": Protocol(**found["protocol"])}
    return BenchResult(**{name: found[name] for name in names})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    dense = pruned_checkpoint(folder / "dense")
    compress_checkpoint(dense, folder / "small")
    return dense, folder / "small"


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.foo", "expected a .png file, got x.foo"), ("", "expected a .png file"),
     ("a.png", "a.png is a directory"), ("none/x.png", "none to exist")],
)  # fmt: skip
def test_a_picture_that_cannot_be_written_is_refused_first(
    pair, tmp_path, monkeypatch, capsys, name, message
):
    monkeypatch.setattr("pyprune.sparse.bench.bench", lambda *args: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").mkdir()
    assert cli.main(["bench", str(pair[1]), "--plot", name]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("threads, words", [(1, "1 thread"), (2, "2 threads")])
def test_threads_are_counted(threads, words):
    result = demo_result(threads)
    (_, rates) = bench_tables(result)
    assert str(rates.title).endswith(f", {words}")


def test_words_in_a_bar_are_readable_outside_it():
    result = demo_result(1)
    axis = Figure().subplots()
    drawing._rates(axis, result, "decode")
    colours = {patch.get_facecolor() for patch in axis.patches}
    for text in axis.texts:
        (effect,) = text.get_path_effects()
        assert to_rgba(effect._gc["foreground"]) in colours
    assert len(axis.texts) == len(result.names) * len(result.protocol.batches)


def test_command(pair, tmp_path, capsys):
    picture = tmp_path / "bench.png"
    arguments = ["bench", str(pair[1]), "--batches", "1,3", "--steps", "2", "--rounds", "2"]
    assert cli.main([*arguments, "--against", str(pair[0]), "--plot", str(picture), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # Dense in both dtypes and in bf16 with our kernel, sparse in both.
    assert len(result["rates"]) == 5 * 2 * 2 and len(result["ratios"]) == 8
    kernels = {(r["name"], r["dtype"], r["kernels"]) for r in result["rates"]}
    assert ("dense", "bfloat16", "torch") in kernels and ("dense", "bfloat16", "pyprune") in kernels
    assert result["memory"].keys() == {"sparse bfloat16"}
    assert all(0 < r["least"] <= r["median"] <= r["greatest"] for r in result["rates"])
    sizes = {(m["name"], m["dtype"]): m for m in result["models"]}
    share = sizes["sparse", "bfloat16"]["weight_bytes"] / sizes["dense", "bfloat16"]["weight_bytes"]
    assert result["memory"]["sparse bfloat16"] == pytest.approx(share) and 0.5 < share < 1
    assert sizes["sparse", "bfloat16"]["file_bytes"] < sizes["dense", "bfloat16"]["file_bytes"]
    assert sizes["sparse", "bfloat16"]["weight_bytes"] < sizes["dense", "bfloat16"]["weight_bytes"]
    assert sizes["dense", "float32"]["weight_bytes"] == 2 * sizes["dense", "bfloat16"]["file_bytes"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    (title,) = [line for line in lines if "tokens/s, median" in line]
    rates = lines[lines.index(title) :]
    # Each in one line of a pipe's eighty columns.
    for label in ("dense bfloat16, own kernel", "sparse bfloat16"):
        rows = [line for line in rates if f" {label} " in line and line.rstrip().endswith("x")]
        assert len(rows) == 4


def test_the_dense_model_is_the_same_one(pair):
    sparse = load(pair[1], torch.float32)
    dense = densified(sparse)
    assert not any(isinstance(m, SparseLinear | DenseLinear) for m in dense.modules())
    assert any(isinstance(m, SparseLinear) for m in sparse.modules())
    assert any(isinstance(m, DenseLinear) for m in sparse.modules())
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert weight_bytes(dense) == weight_bytes(load(pair[0], torch.float32))


def test_our_kernel_multiplies_the_same_weights(pair):
    dense = load(pair[0], torch.bfloat16)
    own = with_own_kernels(dense)
    assert {type(m) for m in dense.modules()} & {torch.nn.Linear, DenseLinear} == {torch.nn.Linear}
    assert {type(m) for m in own.modules()} & {torch.nn.Linear, DenseLinear} == {DenseLinear}
    shared = {t.data_ptr() for t in dense.state_dict().values()}
    assert {t.data_ptr() for t in own.state_dict().values()} == shared
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)


def test_a_layer_of_zeros(tmp_path):
    """Nothing is stored of it, and a model that has one is measured like any other."""
    model = tiny_model("llama").to(torch.bfloat16)
    prune_in_place(model, "random")
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "dense")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    assert report.layers["model.layers.0.mlp.down_proj"].density == 0
    models = contestants({"zeros": tmp_path / "small"}, dtypes=(torch.bfloat16,))
    result = bench(models, Protocol(batches=(1,), prompt=2, steps=1, rounds=1))
    assert result.names == ["dense", "zeros"]


def test_embeddings_that_are_tied_count_once():
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4, bias=False), "b": torch.nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    assert weight_bytes(tied) == 4 * (16 + 4)


def test_verdict_names_every_loss():
    def rate(name, dtype, phase, value):
        return Rate(name, dtype, phase, 1, value, value, value)

    rates = [
        rate("dense", "float32", "prefill", 10.0), rate("dense", "bfloat16", "prefill", 4.0),
        rate("dense", "float32", "decode", 2.0), rate("dense", "bfloat16", "decode", 4.0),
        rate("x", "float32", "prefill", 8.0), rate("x", "float32", "decode", 6.0),
        rate("y", "float32", "prefill", 11.0), rate("y", "float32", "decode", 6.0),
    ]  # fmt: skip
    models = [{"name": name} for name in ("dense", "x", "y")]
    result = BenchResult(models, rates, Protocol(batches=(1,)), "cpu", 1, "0")
    assert result.verdict() == [
        "x float32 loses to the fastest dense model in prefill at batch 1 (0.80x).",
        "y float32 loses nowhere here.",
    ]
    assert [row["ratio"] for row in result.ratios()] == [0.8, 1.5, 1.1, 1.5]


def test_models_take_turns(pair):
    models = contestants({"sparse": pair[1]}, dtypes=[torch.float32])
    assert [m.name for m in models] == ["dense", "sparse"] and models[0].seconds is None
    seen = []
    bench(models, Protocol((2,), 4, 1, 2), lambda words, done, total: seen.append((words, done)))
    labels = ["batch 2, dense float32", "batch 2, sparse float32"]
    assert seen == list(zip(labels * 3, range(6), strict=True))
    models = contestants({"sparse": pair[1]}, pair[0], dtypes=[torch.bfloat16])
    assert [m.label for m in models] == [
        "dense bfloat16", "dense bfloat16, own kernel", "sparse bfloat16",
    ]  # fmt: skip
    assert [m.seconds is None for m in models] == [False, True, False]


def test_another_model_is_named(pair, tmp_path, capsys):
    """Fewer layers and other widths are sometimes what is to be compared."""
    other = pruned_checkpoint(tmp_path / "other", num_hidden_layers=1, intermediate_size=48)
    command = ["bench", str(pair[1]), "--batches", "1", "--steps", "1", "--rounds", "1"]
    assert cli.main([*command, "--against", str(other), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (line,) = result["warnings"]
    assert line.startswith("sparse is another model than the dense one: ")
    assert "mlp.down_proj.weight [32, 64] instead of [32, 48]" in line
    assert "parameters more (model.layers.1." in line and "fewer" not in line
    assert {m["name"]: bool(m["differs"]) for m in result["models"]} == {
        "dense": False, "sparse": True,
    }  # fmt: skip
    assert cli.main([*command, "--against", str(other)]) == 0
    assert "sparse is another model than" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*command, "--against", str(pair[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_other_tokens_are_not_compared(pair, tmp_path, capsys):
    other = pruned_checkpoint(tmp_path / "other", vocab_size=258)
    assert cli.main(["bench", str(pair[1]), "--against", str(other)]) == 2
    assert "got vocabularies of 64 and 258 tokens" in capsys.readouterr().err
    # Where both have a tokenizer, that decides: tables of embeddings are padded now and then.
    compress_checkpoint(byte_tokenizer_in(other), tmp_path / "small")
    padded = pruned_checkpoint(tmp_path / "padded", vocab_size=264)
    stored, dense = (StoredCheckpoint.open(f) for f in (tmp_path / "small", padded))
    with pytest.raises(UserError, match="vocabularies of 258 and 264"):
        differences(stored, dense)
    assert "other shapes" in differences(stored, StoredCheckpoint.open(byte_tokenizer_in(padded)))
    words = byte_tokenizer()
    words.add_tokens(["another"])
    words.save_pretrained(padded)
    with pytest.raises(UserError, match="other tokenizers"):
        differences(stored, StoredCheckpoint.open(padded))


def byte_tokenizer_in(folder):
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.gpu
def test_graphs_decode_what_single_steps_do(pair):
    """`bench` raises where the two differ."""
    models = contestants({"sparse": pair[1]}, dtypes=[torch.bfloat16], device="cuda")
    result = bench(models, Protocol((1, 3), 4, 9, 1))
    assert result.protocol.graph and {r.phase for r in result.rates} == {"prefill", "decode"}
    result = bench(models, Protocol((1,), 4, 1, 1, graph=False))
    assert result.protocol.graph is False


def test_mistakes(pair, capsys):
    assert cli.main(["bench", str(pair[0])]) == 2
    assert cli.main(["bench", str(pair[1]), "--against", str(pair[1])]) == 2
    assert cli.main(["bench", str(pair[1]), "--batches", "1,a"]) == 2
    assert cli.main(["bench", str(pair[1]), "--rounds", "0"]) == 2
    assert cli.main(["bench", str(pair[1]), "--device", "cpu", "--graph"]) == 2
    errors = capsys.readouterr().err
    for message in (
        "it is stored as dense",
        "expected a dense",
        "numbers with commas",
        "above 0",
        "this is the CPU",
    ):
        assert message in errors
    with pytest.raises(UserError):
        Protocol(batches=())
    models = contestants({"sparse": pair[1]}, dtypes=[torch.float32])
    for prompt, steps in ((127, 2), (2, 127), (500, 1)):
        with pytest.raises(UserError, match="at most the model's 128 positions together"):
            bench(models, Protocol((1,), prompt, steps, 1))


def test_no_other_model_has_the_dense_ones_colour():
    names = ["dense", *(f"model {i}" for i in range(9))]
    colours = [colour(name, names) for name in names]
    assert len(set(colours)) == 10 and colours[0] == DENSE_COLOUR
    assert colour("model 9", [*names, "model 9"]) == colours[1]
