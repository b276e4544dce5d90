"""Bytes as the report and `inspect` say them, against those in the files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_checkpoints import tensors_of
from tiny_models import tiny_model

from pyprune.checkpoint import Checkpoint
from pyprune.inspection import inspect_checkpoint
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.layout import ALL_PARTS
from pyprune.sparse.stored import StoredCheckpoint

# Conv1D holds its weight transposed, Mixtral has experts one by one, GPT-OSS in one tensor.
FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss"]


def checkpoint(folder, family, pattern):
    """2:4 by position or a random half of every matrix in the layers, along its inputs; with one
    negative zero among what is left, which compressing keeps."""
    tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
    file, gen = folder / "model.safetensors", torch.Generator().manual_seed(3)
    state = load_file(file)
    for name, w in state.items():
        if w.dim() > 1 and (".layers." in name or ".h." in name) and not name.endswith("bias"):
            swapped = family == "gpt2" or (family == "gpt_oss" and w.dim() == 3)
            shape = w.mT.shape if swapped else w.shape
            draws = torch.rand(*shape[:-1], shape[-1] // 4, 4, generator=gen)
            kept = draws.argsort(-1) < 2 if pattern == "2:4" else draws < 0.4
            kept = kept.view(shape)
            w *= kept.mT if swapped else kept
            w[w == 0] = 0.0
            w[tuple(int(i[0]) for i in torch.where(w != 0))] = -0.0
    save_file({name: w.contiguous() for name, w in state.items()}, file, {"format": "pt"})
    return folder


def bytes_of(tensors, weight):
    """In the file, of what stands for a dense tensor: itself, its parts, or its matrices' parts."""
    stem = weight.removesuffix(".weight")
    found = 0
    for name, t in tensors.items():
        part = name.removeprefix(f"{stem}.")
        number, _, rest = part.partition(".")
        matrix = number.isdecimal() and rest in ALL_PARTS
        if name == weight or (part != name and (part in ALL_PARTS or matrix)):
            found += t.nbytes
    return found


@pytest.mark.parametrize("embeddings", ["same", "int8", "coded"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_what_was_compressed(family, int8, embeddings, tmp_path):
    dense = checkpoint(tmp_path / "dense", family, "random")
    small = tmp_path / "small"
    report = compress_checkpoint(dense, small, int8=int8, embeddings=embeddings)
    tensors = tensors_of(small)
    for name, layer in report.layers.items():
        assert layer.nbytes == bytes_of(tensors, f"{name}.weight") > 0, name
    kinds = {(layer.format, layer.values) for layer in report.layers.values()}
    assert ("bitmap", "int8" if int8 else "bfloat16") in kinds
    if embeddings == "int8":
        assert ("dense", "int8") in kinds
    found = inspect_checkpoint(StoredCheckpoint.open(small))
    matrices = (*found.layers, *found.others)
    for matrix in matrices:
        assert matrix.nbytes == bytes_of(tensors, matrix.name) > 0, matrix.name
    total = sum(t.nbytes for t in tensors.values())
    assert report.nbytes_after == found.nbytes == total
    file = small / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == total
    stacked = json.loads((small / "config.json").read_text())["quantization_config"]["layers"]
    assert any(layer.get("stacked") for layer in stacked.values()) == (family == "gpt_oss")


@pytest.mark.parametrize(("format", "pattern"), [("sparse24", "2:4"), ("bitmap", "random")])
@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_says_what_compressing_will_make(family, format, pattern, tmp_path):
    dense = checkpoint(tmp_path / "dense", family, pattern)
    compress_checkpoint(dense, tmp_path / "small", allowed=(format,))
    tensors, compared = tensors_of(tmp_path / "small"), 0
    for matrix in inspect_checkpoint(Checkpoint.open(dense)).layers:
        if matrix.name not in tensors:  # else left dense
            said = matrix.nbytes_24 if format == "sparse24" else matrix.nbytes_bitmap
            assert said == bytes_of(tensors, matrix.name), matrix.name
            compared += 1
    assert compared > 3
