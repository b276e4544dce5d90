"""Damaged directories, odd paths and odd numbers: one line that says what, and nothing written."""

import errno
import io
import json
import os
import re
import shutil
import struct
import sys

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from sparse_checkpoints import pruned_checkpoint

import pyprune
from pyprune import cli
from pyprune.deci_convert import compress_deci
from pyprune.errors import UserError
from pyprune.sparse.convert import _Steps, compress_checkpoint

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    config = {"vocab_size": 258, "eos_token_id": 257, "num_hidden_layers": 1}
    dense = pruned_checkpoint(folder / "dense", **config)
    byte_tokenizer().save_pretrained(dense)
    compress_checkpoint(dense, folder / "small")
    compress_deci(dense, folder / "deci")
    return folder


@pytest.fixture
def small(folders, tmp_path):
    return shutil.copytree(folders / "small", tmp_path / "small")


def refused(capsys, folder, *arguments):
    """The one line that a command ends with; it writes nothing beside `folder`."""
    before = sorted(folder.parent.iterdir())
    assert cli.main([str(a) for a in arguments]) == 2
    assert sorted(folder.parent.iterdir()) == before
    (line,) = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("pyprune:")]
    return line


def commands(folder):
    out = ["--out", folder.parent / "out"]
    return [
        ["compress", folder, *out], ["decompress", folder, *out], ["inspect", folder],
        ["generate", folder, "abc"], ["bench", folder, "--batches", "1"],
    ]  # fmt: skip


def config(change):
    def spoil(folder):
        raw = json.loads((folder / "config.json").read_text())
        change(raw)
        (folder / "config.json").write_text(json.dumps(raw))

    return spoil


def beside(**parts):
    def spoil(folder):
        file = folder / "model.safetensors"
        added = {f"{LAYER}.{part}": torch.ones(shape) for part, shape in parts.items()}
        save_file({**load_file(file), **added}, file, {"format": "pt"})

    return spoil


def indexed(name, keep):
    def spoil(folder):
        (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
        weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), name)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        if not keep:
            (folder / "model.safetensors").unlink()

    return spoil


def layer_twice(folder):
    text = (folder / "config.json").read_text()
    other = f'"{LAYER}": {{"format": "bitmap", "shape": [64, 32]}}, '
    (folder / "config.json").write_text(text.replace(f'"{LAYER}":', f'{other}"{LAYER}":'))


def tensor_twice(folder):
    file = folder / "model.safetensors"
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header, rest = file.read_bytes()[8 : 8 + length].decode(), file.read_bytes()[8 + length :]
    first = header.index(f'"{LAYER}.values"')
    again = header[first : header.index("}", first) + 1]
    changed = f"{header[:first]}{again},{header[first:]}".encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + rest)


SPOILT = {
    "dtype": (
        config(lambda c: c.update(dtype="float7", torch_dtype="float7")),
        r"small: a configuration that cannot be used: .*float7",
    ),
    "sizes": (config(lambda c: c.update(hidden_size=31)), r"small: a config.*\(31\) is not a mult"),
    "text": (config(lambda c: c.update(hidden_size="32")), "small: a config.*hidden_size"),
    "type": (config(lambda c: c.update(model_type=["llama"])), r"small: unknown .*\['llama'\]"),
    "no quantization": (
        config(lambda c: c.pop("quantization_config")),
        r"small/config\.json: expected a quantization_config with quant_method 'pyprune'",
    ),
    "another": (
        config(lambda c: c.update(quantization_config={})),
        r"small/config\.json: expected a quantization_config with quant_method 'pyprune'",
    ),
    "unknown field": (
        config(lambda c: c["quantization_config"]["layers"][LAYER].update(permuted=True)),
        rf"small/config\.json: layer {LAYER}: unknown field 'permuted'",
    ),
    "unknown field beside the layers": (
        config(lambda c: c["quantization_config"].update(rotation="hadamard")),
        r"small/config\.json: quantization_config: unknown field 'rotation'",
    ),
    "a bitmap beside 2:4": (
        beside(bitmap=(64, 4), row_offsets=65),
        rf"small/model\.safetensors: tensor {LAYER}\.bitmap: .*stored as sparse24",
    ),
    "factors beside 2:4": (
        beside(**{"up.weight": (64, 2), "down.weight": (2, 32)}),
        rf"small/model\.safetensors: tensor {LAYER}\.down\.weight: .*stored as sparse24",
    ),
    "scales beside 2:4": (beside(scales=64), rf"tensor {LAYER}\.scales: .*stored as sparse24"),
    "a shard of another kind": (
        indexed("model.bin", False),
        r"small/model\.safetensors\.index\.json: 'model\.bin' is no name of a \.safetensors file",
    ),
    "shards and one file": (indexed("a.safetensors", True), "small: expected .* got both"),
    "layer twice": (layer_twice, rf"small/config\.json: .*{LAYER} is there twice"),
    "tensor twice": (tensor_twice, rf"small/model\.safetensors: .*{LAYER}\.values is there twice"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_directory(case, small, capsys):
    spoil, message = SPOILT[case]
    spoil(small)
    for command in commands(small):
        assert re.search(message, refused(capsys, small, *command))
    with pytest.raises(UserError, match=message):
        pyprune.load(small)


def test_a_dense_tensor_of_another_shape(small, capsys):
    """transformers names it in its log alone."""
    state = load_file(small / "model.safetensors")
    state["model.norm.weight"] = torch.ones(31).bfloat16()
    save_file(state, small / "model.safetensors", {"format": "pt"})
    message = r"small/model\.safetensors: cannot be loaded: model\.norm\.weight has shape \[31\]"
    with pytest.raises(UserError, match=message):
        pyprune.load(small)
    assert re.search(message, refused(capsys, small, "generate", small, "abc"))


def test_a_compressed_layer_that_the_model_has_no_place_for(tmp_path, capsys):
    small = tmp_path / "small"
    compress_checkpoint(pruned_checkpoint(tmp_path / "dense"), small)  # of two blocks
    config(lambda c: c.update(num_hidden_layers=1))(small)
    for command in ("decompress", "compress"):
        line = refused(capsys, small, command, small, "--out", small.parent / "out")
        assert re.search(r"tensor model\.layers\.1\..*: the model has no place for it", line)


def test_a_tokenizer_configuration_that_is_none(small, capsys):
    (small / "tokenizer_config.json").write_text("[]")
    line = refused(capsys, small, "generate", small, "abc")
    # Which of them depends on the version of transformers.
    assert re.search(rf"{small}: its tokenizer does not load: (Attribute|Type)Error", line)


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.0.mlp.up_proj.bias"])
def test_a_dense_tensor_that_is_missing(tensor, index, small, folders, capsys):
    """From the file; the index, where there is one, does not name it either."""
    state = load_file(small / "model.safetensors")
    weight_map = dict.fromkeys(state, "model.safetensors")
    del state[tensor]
    save_file(state, small / "model.safetensors", {"format": "pt"})
    where = small / "model.safetensors"
    if index:
        where = small / "model.safetensors.index.json"
        where.write_text(json.dumps({"weight_map": weight_map}))
        line = refused(capsys, small, "decompress", small, "--out", small.parent / "out")
        assert f"{small / 'model.safetensors'}: tensor {tensor} is missing; the index has" in line
        del weight_map[tensor]
        where.write_text(json.dumps({"weight_map": weight_map}))
    for command in ("decompress", "compress"):
        line = refused(capsys, small, command, small, "--out", small.parent / "out")
        assert line == f"pyprune: {where}: no tensor of the checkpoint is {tensor}"
    with pytest.raises(UserError, match=re.escape(f"{where}: tensor {tensor} is missing")):
        pyprune.load(small)
    dense = shutil.copytree(folders / "dense", small.parent / "dense")
    state = load_file(dense / "model.safetensors")
    del state[tensor]
    # A buffer of old files that no model takes any more does not make up for it.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    line = refused(capsys, dense, "compress", dense, "--out", small.parent / "out")
    assert f"no tensor of the checkpoint is {tensor}" in line


def test_decilm_is_not_run(folders, capsys):
    for command in (["generate", folders / "deci", "a"], ["inspect", folders / "deci"]):
        line = refused(capsys, folders / "deci", *command)
        assert "`pyprune decompress` makes it a stock one" in line


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"eos_token_id": "a"}, "TypeError"),
        ({"eos_token_id": 10**20}, "ValueError"),
        ({"bad_words_ids": "x"}, "`bad_words_ids` has to be"),
        ({"top_k": "x"}, "TypeError"),
    ],
)
def test_a_generation_config_that_makes_no_sense(asked, message, small, capsys):
    (small / "generation_config.json").write_text(json.dumps(asked))
    line = refused(capsys, small, "generate", small, "abc")
    assert f"{small}: cannot generate, by its generation_config.json" in line and message in line


def test_beams_that_a_generation_config_asks_for_are_not_searched(small, capsys):
    """Beams cannot be streamed; the command promises the likeliest token each time."""
    command = ["generate", str(small), "abc", "--max-new-tokens", "4"]
    assert cli.main(command) == 0
    want = capsys.readouterr().out
    (small / "generation_config.json").write_text('{"num_beams": 4, "eos_token_id": 257}')
    assert cli.main(command) == 0
    assert capsys.readouterr().out == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["abc", "--seed", 2**70], "seed: expected a number that 64 bits hold"),
        ([os.fsdecode(b"\xff\xfe")], "prompt: expected text in UTF-8"),
    ],
)
def test_what_generate_cannot_take(options, message, folders, capsys):
    assert message in refused(capsys, folders / "small", "generate", folders / "small", *options)


def test_a_batch_that_no_memory_holds(folders, capsys):
    line = refused(capsys, folders / "small", "bench", folders / "small", "--batches", 10**20)
    assert "above 0 and below 2^31" in line


def test_memory_that_runs_out(folders, tmp_path, capsys):
    options = ["--out", tmp_path / "out", "--choose", "measured", "--rows", 10**15]
    line = refused(capsys, tmp_path / "out", "compress", folders / "dense", *options)
    assert line.startswith("pyprune: out of memory: ")


def test_names_that_the_file_system_does_not_take(folders, tmp_path, capsys):
    long = tmp_path / ("n" * 300)
    assert "File name too long" in refused(
        capsys, long, "compress", folders / "dense", "--out", long
    )
    assert "File name too long" in refused(capsys, long, "inspect", "n" * 300)


def test_other_errors_of_the_system_are_defects(monkeypatch, folders):
    def broken(*args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.setattr("pyprune.inspection.inspect_checkpoint", broken)
    with pytest.raises(FileNotFoundError):
        cli.main(["inspect", str(folders / "small")])


def test_a_path_that_is_no_text_can_be_said(folders, tmp_path, monkeypatch):
    """Bytes that are not UTF-8, and a terminal that knows ASCII alone."""
    for name, encoding in ((os.fsdecode(b"\xff"), "utf-8"), ("\u6a21", "ascii")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, write_through=True))
        out = tmp_path / name
        assert cli.main(["compress", str(folders / "dense"), "--out", str(out), "--json"]) == 0
        assert json.loads(written.getvalue())["path"] == str(out)
        assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["compress", "decompress"])
@pytest.mark.parametrize("last", [0, 9])
def test_an_interrupt_leaves_nothing(command, last, folders, tmp_path, monkeypatch, capsys):
    source = folders / ("dense" if command == "compress" else "small")
    usual, steps = _Steps.next, []

    def stop(self, words):
        usual(self, words)
        if len(steps) == last:
            raise KeyboardInterrupt
        steps.append(words)

    monkeypatch.setattr(_Steps, "next", stop)
    out = tmp_path / "out"
    assert cli.main([command, str(source), "--out", str(out)]) == cli.INTERRUPTED
    assert len(steps) == last and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.endswith("pyprune: interrupted\n")
