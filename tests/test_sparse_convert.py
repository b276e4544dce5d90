"""Compress and decompress: bit for bit, over shards, from the old layouts, and by command."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_checkpoints import bits_equal, pruned_checkpoint, tensors_of, write_legacy
from tiny_models import FAMILIES

from pyprune import cli
from pyprune.errors import UserError
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
from pyprune.sparse.format import candidates, pack
from pyprune.sparse.layout import LayerFormat


def assert_same(a, b):
    one, other = tensors_of(a), tensors_of(b)
    assert one.keys() == other.keys()
    assert not [name for name in one if not bits_equal(one[name], other[name])]
    assert json.loads((a / "config.json").read_text()) == json.loads(
        (b / "config.json").read_text()
    )


@pytest.mark.parametrize("pattern", ["2:4", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_every_family(family, pattern, tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense", family, pattern)
    report = compress_checkpoint(dense, tmp_path / "small")
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    assert_same(dense, tmp_path / "back")
    kinds = set(report.formats.values())
    # gpt2 stores its matrices transposed (Conv1D): 2:4 along what is stored is not along inputs.
    if pattern == "2:4" and family != "gpt2":
        assert "sparse24" in kinds and report.nbytes_after < report.nbytes_before
    else:
        assert kinds <= {"bitmap", "dense"} and "bitmap" in kinds


def test_shards_stay_and_the_index_is_right(tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense", shard="30KB")
    files = sorted(f.name for f in dense.glob("*.safetensors"))
    assert len(files) == 2
    compress_checkpoint(dense, tmp_path / "small")
    small = tmp_path / "small"
    assert sorted(f.name for f in small.glob("*.safetensors")) == files
    index = json.loads((small / "model.safetensors.index.json").read_text())
    for file in files:
        held = load_file(small / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == held.keys()
    decompress_checkpoint(small, tmp_path / "back")
    assert_same(dense, tmp_path / "back")


def test_negative_zeros_infinities_and_nans_survive(tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense")
    state = load_file(dense / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name][0, :4] = torch.tensor([0.0, -0.0, float("nan"), 0.0])
    state[name][1, :4] = torch.tensor([-0.0, -0.0, 0.0, 0.0])
    state[name][2, :4] = torch.tensor([0.0, float("-inf"), 0.0, 0.0])
    other = "model.layers.1.mlp.up_proj.weight"
    state[other][0, :4] = -0.0  # four bit patterns that are not zero: no 2:4
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    report = compress_checkpoint(dense, tmp_path / "small")
    assert report.formats[name.removesuffix(".weight")] == "sparse24"
    assert report.formats[other.removesuffix(".weight")] == "bitmap"
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    assert_same(dense, tmp_path / "back")


@pytest.mark.parametrize(
    ("key", "early"), [("quantization_config", False), ("compression_config", True)]
)
@pytest.mark.parametrize("kind", ["sparse-24-bitmask", "sparse-bitmask"])
def test_old_layouts_are_read_and_converted(kind, key, early, tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense")
    write_legacy(dense, tmp_path / "old", kind, key, early)
    decompress_checkpoint(tmp_path / "old", tmp_path / "back")
    assert_same(dense, tmp_path / "back")
    report = compress_checkpoint(tmp_path / "old", tmp_path / "small")
    assert "sparse24" in report.formats.values()
    decompress_checkpoint(tmp_path / "small", tmp_path / "again")
    assert_same(dense, tmp_path / "again")


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("part", ["bitmask", "row_offsets", "shape", "compressed"])
def test_old_layouts_that_do_not_add_up(part, early, tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense")
    write_legacy(dense, tmp_path / "old", "sparse-bitmask", early=early)
    file = tmp_path / "old" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.up_proj" + (".weight" if early else "")
    t = state[f"{name}.{part}"]
    state[f"{name}.{part}"] = t[:-1] if part == "compressed" else t ^ 1
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.safetensors: tensor {name}\."):
        decompress_checkpoint(tmp_path / "old", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_old_layout_with_a_weight_twice(tmp_path):
    write_legacy(pruned_checkpoint(tmp_path / "dense"), tmp_path / "old", "sparse-bitmask")
    file = tmp_path / "old" / "model.safetensors"
    name = "model.layers.0.mlp.up_proj"
    save_file({**load_file(file), f"{name}.weight": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"tensor {name}\.weight is there twice"):
        decompress_checkpoint(tmp_path / "old", tmp_path / "back")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_numbers_beyond_the_dtype_that_is_asked_for(name, tmp_path):
    """In a pruned matrix and in what stays as it is."""
    dense = pruned_checkpoint(tmp_path / "dense")
    state = load_file(dense / "model.safetensors")
    state[name].view(-1)[3] = 1e5
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name}: expected numbers within torch.float16, got up"):
        compress_checkpoint(dense, tmp_path / "small", dtype="float16")
    assert not (tmp_path / "small").exists()
    compress_checkpoint(dense, tmp_path / "small", dtype="float32")


def test_what_is_rounded_counts_as_rounded(tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense")
    elements = sum(t.numel() for t in load_file(dense / "model.safetensors").values())
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        small = tmp_path / dtype
        report = compress_checkpoint(dense, small, dtype=dtype)
        back = decompress_checkpoint(small, tmp_path / f"{dtype} dense")
        assert report.nbytes_dense == back.nbytes_after == itemsize * elements


def test_choice():
    w = torch.zeros(16, 64, dtype=torch.bfloat16)
    w[:, ::2] = 1
    sparse24, bitmap = 16 * (64 + 8), 16 * (64 + 8) + 8 * 17
    assert candidates(w) == ({"sparse24": sparse24, "bitmap": bitmap}, 512)
    assert candidates(w, ("bitmap",)) == ({"bitmap": bitmap}, 512)
    assert candidates(torch.ones(16, 64)) == ({}, 1024)
    assert list(candidates(torch.cat((w[:, :8] * 0 + 1, w[:, 8:] * 0), 1))[0]) == ["bitmap"]
    with pytest.raises(UserError, match="at most 2 non-zero"):
        pack(torch.ones(2, 8), LayerFormat("sparse24", (2, 8)))


def test_commands(tmp_path, capsys):
    dense = pruned_checkpoint(tmp_path / "dense", pattern="random")
    small, back = str(tmp_path / "small"), str(tmp_path / "back")
    assert cli.main(["compress", str(dense), "--out", small, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nbytes_after"] < report["nbytes_before"] == report["nbytes_dense"]
    assert cli.main(["decompress", small, "--out", back]) == 0
    assert_same(dense, tmp_path / "back")
    capsys.readouterr()
    assert cli.main(["prune", small, "-m", "magnitude", "-s", "0.5", "--out", back + "2"]) == 2
    assert "`pyprune decompress` makes it dense" in capsys.readouterr().err
    assert cli.main(["compress", str(dense), "--out", small]) == 2
    assert cli.main(["decompress", str(dense), "--out", back + "2"]) == 2
    assert cli.main(["compress", str(dense), "--out", back + "2", "--format", "csr"]) == 2
    errors = capsys.readouterr().err.splitlines()
    done = subprocess.run(
        [sys.executable, "-m", "pyprune.cli", "compress", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "pyprune compress" in done.stdout
    assert len(errors) == 3 and "it is dense" in errors[1] and "expected auto" in errors[2]
