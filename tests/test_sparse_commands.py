"""eval and inspect on compressed directories: what they say of the dense one they stand for."""

import errno
import io
import json
import pathlib
import shutil

import pytest
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from sparse_checkpoints import pruned_checkpoint, write_legacy

from pyprune import cli
from pyprune.inspection import inspect_checkpoint
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.stored import StoredCheckpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    made = {}
    for pattern in ("2:4", "random"):
        dense = pruned_checkpoint(
            folder / f"dense {pattern[0]}", pattern=pattern, vocab_size=258, eos_token_id=257
        )
        byte_tokenizer().save_pretrained(dense)
        compress_checkpoint(dense, folder / f"small {pattern[0]}")
        compress_checkpoint(dense, folder / f"int8 {pattern[0]}", int8=True)
        made[pattern] = (dense, folder / f"small {pattern[0]}", folder / f"int8 {pattern[0]}")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return made


def result(capsys, *arguments):
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("pattern", ["2:4", "random"])
def test_eval(pattern, folders, capsys):
    dense, small, int8 = folders[pattern]
    options = ["--text", dense.parent / "text.txt", "--seqlen", 64, "--dtype", "float32"]
    want = result(capsys, "eval", dense, *options)
    got = result(capsys, "eval", small, *options)
    assert got["sha256"] == want["sha256"] and got["tokens"] == want["tokens"]
    assert got["ppl"] == pytest.approx(want["ppl"], rel=1e-4)
    rounded = result(capsys, "eval", int8, *options)
    assert rounded["ppl"] == pytest.approx(want["ppl"], rel=0.05) and rounded["ppl"] != got["ppl"]
    # In the checkpoint's own dtype; the head is left dense.
    half = result(capsys, "eval", small, *options[:-2])
    assert half["ppl"] == pytest.approx(want["ppl"], rel=0.05)


def test_a_head_that_is_compressed(tmp_path, capsys):
    """Its size is asked for by eval, and it has no weight of its own."""
    dense = pruned_checkpoint(tmp_path / "dense", vocab_size=258, eos_token_id=257)
    byte_tokenizer().save_pretrained(dense)
    state = load_file(dense / "model.safetensors")
    state["lm_head.weight"][:, ::2] = 0
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    assert compress_checkpoint(dense, tmp_path / "small").formats["lm_head"] == "sparse24"
    (tmp_path / "text.txt").write_text("abc def " * 100)
    options = ["--text", tmp_path / "text.txt", "--seqlen", 32, "--dtype", "float32"]
    want = result(capsys, "eval", dense, *options)["ppl"]
    assert result(capsys, "eval", tmp_path / "small", *options)["ppl"] == pytest.approx(want)


@pytest.mark.parametrize("pattern", ["2:4", "random"])
def test_inspect(pattern, folders, capsys):
    dense, small, int8 = folders[pattern]
    want = result(capsys, "inspect", dense)
    assert {layer["format"] for layer in want["layers"]} == {"dense"}
    assert want["nbytes"] == want["nbytes_dense"]
    format = "sparse24" if pattern == "2:4" else "bitmap"
    for folder, suffix in ((small, ""), (int8, " int8")):
        found, stored = result(capsys, "inspect", folder), StoredCheckpoint.open(folder)
        assert found["nbytes"] == stored.nbytes < want["nbytes"] == found["nbytes_dense"]
        assert [layer["name"] for layer in found["layers"]] == [
            layer["name"] for layer in want["layers"]
        ]
        for layer, before in zip(found["layers"], want["layers"], strict=True):
            assert layer["shape"] == before["shape"] and layer["dtype"] == before["dtype"]
            assert layer["patterns"] == before["patterns"] or suffix
            if layer["format"] == "dense":
                assert layer["nbytes"] == before["nbytes"]
                continue
            assert layer["format"] == format + suffix
            assert layer["nbytes"] == stored.stored_nbytes(layer["name"]) < layer["nbytes_dense"]
        assert sum(layer["format"] != "dense" for layer in found["layers"]) >= 8
        if not suffix:
            assert found["sparsity"] == want["sparsity"]


def test_inspect_prints_the_formats(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["inspect", str(folders["2:4"][2])]) == 0
    shown = capsys.readouterr().out
    assert "sparse24 int8" in shown and "total, dense" in shown


def test_old_layouts_are_inspected_too_and_not_evaluated(tmp_path, capsys):
    dense = pruned_checkpoint(tmp_path / "dense", vocab_size=258, eos_token_id=257)
    write_legacy(dense, tmp_path / "old", "sparse-bitmask")
    byte_tokenizer().save_pretrained(tmp_path / "old")
    found = inspect_checkpoint(StoredCheckpoint.open(tmp_path / "old"))
    assert {layer.format for layer in found.layers} == {"sparse-bitmask"}
    assert found.nbytes == StoredCheckpoint.open(tmp_path / "old").nbytes
    (tmp_path / "text.txt").write_text("abc " * 100)
    options = ["--text", str(tmp_path / "text.txt"), "--seqlen", "32"]
    assert cli.main(["eval", str(tmp_path / "old"), *options]) == 2
    assert "convert it with `pyprune compress`" in capsys.readouterr().err


def test_damage_is_reported(folders, tmp_path, capsys):
    shutil.copytree(folders["2:4"][1], tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    for command in ("inspect", "eval"):
        assert cli.main([command, str(tmp_path / "small")]) == 2
        assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "decompress", "compress"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(command, name, folders, tmp_path, monkeypatch, capsys):
    """As for any user but root, who may read all."""
    _, small, _ = folders["2:4"]
    usual = io.open

    def guarded(file, *args, **kwargs):
        if str(file) == str(small / name):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return usual(file, *args, **kwargs)

    monkeypatch.setattr("io.open", guarded)
    monkeypatch.setattr("builtins.open", guarded)
    if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10 keeps the io.open of its import
        monkeypatch.setattr("pathlib._NormalAccessor.open", staticmethod(guarded))
    out = [] if command == "inspect" else ["--out", str(tmp_path / "out")]
    assert cli.main([command, str(small), *out]) == 2
    error = capsys.readouterr().err
    assert f"pyprune: {small / name}: Permission denied" in error


@pytest.mark.parametrize("pattern", ["2:4", "random"])
def test_compress_says_where_nothing_became_smaller(pattern, folders, tmp_path, capsys):
    dense, _, _ = folders[pattern]
    assert cli.main(["compress", str(dense), "--out", str(tmp_path), "--format", "sparse24"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("Nothing became smaller" in shown) == (pattern == "random")
