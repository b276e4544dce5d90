"""Zeros, patterns and bytes of a checkpoint's matrices."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from pyprune.checkpoint import Checkpoint
from pyprune.inspection import (
    Inspection,
    LayerInspection,
    inspect_checkpoint,
    inspect_matrix,
)


def nm(rows: int, columns: int, n: int, m: int) -> torch.Tensor:
    """Ones, with exactly `n` of every `m` kept, at places that differ from group to group."""
    scores = torch.rand(rows, columns // m, m, generator=torch.Generator().manual_seed(0))
    return (scores.argsort(-1) < n).float().reshape(rows, columns)


@pytest.mark.parametrize(
    "w, patterns",
    [
        (torch.ones(4, 16), ["dense"]),
        (nm(8, 16, 2, 4), ["2:4", "4:8", "row-uniform"]),
        (nm(8, 16, 1, 4), ["1:4", "2:4", "4:8", "row-uniform"]),
        (nm(8, 16, 4, 8), ["4:8", "row-uniform"]),
        (torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]), ["row-uniform"]),
        (torch.tensor([[1.0, 1, 1, 0], [0, 1, 0, 0]]), ["unstructured"]),
        (torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0]]), ["2:4"]),
        (torch.zeros(2, 8), ["1:4", "2:4", "4:8", "row-uniform"]),
        (torch.ones(0, 8), ["dense"]),
        (torch.tensor([[1.0, 1, 1, 0, 0, 0]]), ["unstructured"]),  # one row says nothing
        (nm(6, 16, 2, 4).reshape(2, 3, 16), ["2:4", "4:8", "row-uniform"]),
    ],
)
def test_patterns(w, patterns):
    assert list(inspect_matrix("w", w).patterns) == patterns


def test_4_of_8_is_seldom_2_of_4():
    assert "2:4" not in inspect_matrix("w", nm(8, 16, 4, 8)).patterns


def test_a_few_zeros_are_dense():
    w = torch.ones(10, 100)
    w.view(-1)[:9] = 0
    assert inspect_matrix("w", w).patterns == ("dense",)
    w.view(-1)[:10] = 0
    assert inspect_matrix("w", w).patterns == ("unstructured",)


def test_transposed_storage():
    w = nm(8, 16, 2, 4)
    found = inspect_matrix("w", w.T.contiguous(), transposed=True)
    assert found.shape == (8, 16) and "2:4" in found.patterns


def test_bytes():
    found = inspect_matrix("w", nm(8, 16, 2, 4).bfloat16())
    offsets = 8 * 9  # where each row's values begin
    sizes = (found.nbytes, found.nbytes_24, found.nbytes_bitmap)
    assert sizes == (256, 128 + 16, 128 + 16 + offsets)
    assert found.sparsity == 0.5 and found.smallest == 144
    assert replace(found, format="coded", nbytes=100).smallest == 100
    dense = inspect_matrix("w", torch.ones(8, 16))
    assert (
        dense.nbytes_24 is None
        and dense.nbytes_bitmap == 512 + 16 + offsets
        and dense.smallest == 512
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_checkpoint(tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    keys = ("gate_proj.weight", "c_fc.weight", "w1")
    pruned = next(name for name in state if any(key in name for key in keys))
    if family == "gpt2":  # stored [inputs, outputs]
        state[pruned] *= nm(*state[pruned].shape[::-1], 2, 4).T
    else:
        state[pruned] *= nm(*state[pruned].shape, 2, 4)
    save_file(state, file, {"format": "pt"})
    steps = []
    found = inspect_checkpoint(Checkpoint.open(tmp_path), lambda *step: steps.append(step))
    layers = {layer.name: layer for layer in found.layers}
    assert [step[0] for step in steps] == list(layers) and found.note == ""
    assert layers.pop(pruned).patterns[0] == "2:4"
    assert all(layer.patterns == ("dense",) for layer in layers.values())
    assert not any(key in name for name in layers for key in ("embed", "wte", "lm_head", "norm"))
    assert found.nbytes == sum(value.nbytes for value in state.values())
    assert found.smallest < found.nbytes and 0 < found.sparsity < 0.5


def test_unknown_model_lists_every_matrix(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.tokens.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    found = inspect_checkpoint(Checkpoint.open(tmp_path))
    assert "no tensor of the checkpoint is model.embed_tokens.weight" in found.note
    assert "model.tokens.weight" in [layer.name for layer in found.layers]


@pytest.mark.parametrize("dtypes", [["bfloat16"], ["float32", "bfloat16"]])
def test_table_in_80_columns(dtypes):
    """Names of a model's size stay whole where all matrices are alike; nothing ever vanishes."""
    layers = [
        LayerInspection(
            name=f"model.layers.{i}.self_attn.q_proj.weight",
            shape=(1536, 576),
            dtype=dtypes[i % len(dtypes)],
            zeros=442368,
            elements=884736,
            patterns=("unstructured",),
            format="dense",
            nbytes=1769472,
            nbytes_dense=1769472,
            nbytes_24=None,
            nbytes_bitmap=995328,
        )
        for i in range(28, 30)
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(Inspection("[m]/x", "llama", tuple(layers), 10**8).table())
    text = console.file.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    if len(dtypes) == 1:
        assert lines[0].strip() == "[m]/x: llama, dtype bf16, pattern unstructured, stored as dense"
        rows = [line.split() for line in lines if "1536x576" in line]
        cells = ["1536x576", "50.00%", "1.77", "1.00"]
        assert rows == [[f"model.layers.{i}.self_attn.q_proj", *cells] for i in (28, 29)]
    else:
        assert lines[0].strip() == "[m]/x: llama, pattern unstructured, stored as dense"
        cells = ["1536x576", "fp32", "50.00%", "1.77", "1.00"]
        assert cells in [line.split()[1:] for line in lines]
