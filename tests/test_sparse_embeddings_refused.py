"""int8 and coded embeddings that are damaged, described wrongly, or cannot be made: refused."""

import json

import pytest
import torch
from embedding_checkpoints import (
    EMBEDDING,
    EXACT,
    HEAD,
    PARTS,
    ROUNDED,
    changed_embedding,
    compressed,
)
from safetensors.torch import load_file, save_file
from sparse_checkpoints import pruned_checkpoint
from tiny_models import tiny_model
from torch import nn

import pyprune
from pyprune.errors import UserError
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint


@pytest.fixture(scope="module", params=PARTS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tied(kind, tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("tied"), kind=kind)


SPOILT = {
    "scale": (lambda s: s[f"{EMBEDDING}.scales"].__setitem__(3, float("nan")), "scales: .*row 3"),
    "number": (lambda s: s[f"{EMBEDDING}.values"][4].fill_(-128), r"values: .*got -128"),
    "count": (
        lambda s: s.__setitem__(f"{EMBEDDING}.scales", s[f"{EMBEDDING}.scales"][:-1].clone()),
        "scales: expected shape",
    ),
    "shape": (
        lambda s: s.__setitem__(f"{EMBEDDING}.values", s[f"{EMBEDDING}.values"].T.contiguous()),
        "values: expected shape",
    ),
    "flat": (
        lambda s: s.__setitem__(f"{EMBEDDING}.values", s[f"{EMBEDDING}.values"].flatten()),
        "values: expected shape",
    ),
    "dtype": (
        lambda s: s.__setitem__(f"{EMBEDDING}.values", s[f"{EMBEDDING}.values"].bfloat16()),
        r"values: expected torch\.int8, got torch\.bfloat16",
    ),
    "missing": (lambda s: s.pop(f"{EMBEDDING}.values"), "values is missing"),
    "twice": (
        lambda s: s.__setitem__(f"{EMBEDDING}.weight", torch.ones(64, 32).bfloat16()),
        "there twice",
    ),
}


def spoil(source, folder, change=lambda state: None, **fields):
    """A copy of a one-file checkpoint with its tensors changed, and the embedding's entry."""
    raw = json.loads((source / "config.json").read_text())
    config = raw["quantization_config"]
    config["layers"][EMBEDDING] |= {n: v for n, v in fields.items() if n != "format_version"}
    config["format_version"] = fields.get("format_version", config["format_version"])
    state = load_file(source / "model.safetensors")
    change(state)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def part(name, change):
    """Replaces one part of the embedding by what `change` makes of it."""
    return lambda s: s.__setitem__(f"{EMBEDDING}.{name}", change(s[f"{EMBEDDING}.{name}"]))


SPOILT_CODED = {
    "codes": (lambda s: s[f"{EMBEDDING}.codes"][3].fill_(255), "codes: .*32 and . in row 3"),
    "offset": (
        part("row_offsets", lambda t: torch.where(torch.arange(65) == 3, t[2], t)),
        "codes: expected as many escapes in each row",
    ),
    "falling": (part("row_offsets", lambda t: t.index_fill(0, torch.tensor([5]), 900)),
                "row_offsets: expected to be monotone"),
    "end": (part("row_offsets", lambda t: t + (torch.arange(65) == 64)), "row_offsets: .* run"),
    "base": (lambda s: s[f"{EMBEDDING}.bases"][4].fill_(250), "bases: .* got 250 in row 4"),
    "fewer": (part("escapes", lambda t: t[:-1].clone()), "row_offsets: expected to run from 0"),
    "more": (part("escapes", lambda t: torch.cat([t, t])), "row_offsets: expected to run from 0"),
    "matrix": (part("escapes", lambda t: t[None].clone()), "escapes: expected one dimension"),
    "shape": (part("low", lambda t: t.T.contiguous()), "low: expected shape"),
    "narrow": (part("codes", lambda t: t[:, 3:].contiguous()), "codes: expected shape"),
    "dtype": (part("low", lambda t: t.to(torch.int8)), r"low: expected torch\.uint8, got torch"),
    "missing": (lambda s: s.pop(f"{EMBEDDING}.codes"), "codes is missing"),
    "twice": SPOILT["twice"],
}  # fmt: skip


def refused(small, message, tmp_path):
    for read in (pyprune.load, lambda s: decompress_checkpoint(s, tmp_path / "back")):
        with pytest.raises(UserError, match=rf"small.*{EMBEDDING}.*{message}"):
            read(small)


@ROUNDED
@pytest.mark.parametrize("case", SPOILT)
def test_tampered_tensors_are_refused(case, tied, tmp_path):
    change, message = SPOILT[case]
    refused(spoil(tied[1], tmp_path / "small", change), message, tmp_path)


@EXACT
@pytest.mark.parametrize("case", SPOILT_CODED)
def test_tampered_codes_are_refused(case, tied, tmp_path):
    change, message = SPOILT_CODED[case]
    refused(spoil(tied[1], tmp_path / "small", change), message, tmp_path)


def test_a_second_weight_beside_a_tied_one(tied, tmp_path):
    def change(state):
        state[f"{HEAD}.weight"] = torch.ones(64, 32).bfloat16()

    small = spoil(tied[1], tmp_path / "small", change)
    with pytest.raises(UserError, match=rf"tensor {HEAD}\.weight: expected none, it is tied to"):
        pyprune.load(small)


def test_truncated(tied, tmp_path):
    small = spoil(tied[1], tmp_path / "small")
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"small/model\.safetensors"):
        pyprune.load(small)


@ROUNDED
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": None}, "values: expected int8 with format dense, got None"),
        ({"shape": [32, 64]}, r"values: expected shape \[32, 64\]"),
        ({"transposed": True}, rf"the model lacks a linear layer or embedding {EMBEDDING}"),
        ({"format": "bitmap"}, rf"tensor {EMBEDDING}\.bitmap is missing"),
        ({"format_version": 2}, "needs format_version 3, got 2"),
        ({"format_version": 7}, "expected a format_version among 1, 2, 3, 4, 5, 6, got 7"),
    ],
)
def test_configuration(fields, message, tied, tmp_path):
    with pytest.raises(UserError, match=message):
        pyprune.load(spoil(tied[1], tmp_path / "small", **fields))


@EXACT
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": "int8"}, "coded: expected neither values nor transposed"),
        ({"transposed": True}, "coded: expected neither values nor transposed"),
        ({"rank": 3}, "rank: expected none with format coded, got 3"),
        ({"shape": [32, 64]}, r"low: expected shape \[32, 64\]"),
        ({"format": "bitmap"}, rf"tensor {EMBEDDING}\.values is missing"),
        ({"format_version": 4}, "needs format_version 5, got 4"),
    ],
)
def test_configuration_of_coded_rows(fields, message, tied, tmp_path):
    with pytest.raises(UserError, match=message):
        pyprune.load(spoil(tied[1], tmp_path / "small", **fields))


def test_embeddings_of_another_kind(kind, tmp_path, monkeypatch):
    dense = pruned_checkpoint(tmp_path / "dense")

    class Other(nn.Embedding):
        pass

    build = type(tiny_model("llama")).get_input_embeddings

    def other(self):
        made = build(self)
        made.__class__ = Other
        return made

    monkeypatch.setattr(type(tiny_model("llama")), "get_input_embeddings", other)
    with pytest.raises(UserError, match=r"dense: embeddings: expected nn\.Embedding or"):
        compress_checkpoint(dense, tmp_path / "small", embeddings=kind)
    assert not (tmp_path / "small").exists()


@ROUNDED
def test_weights_that_cannot_be_rounded(tied, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text((tied[0] / "config.json").read_text())
    state = load_file(tied[0] / "model.safetensors")
    state[f"{EMBEDDING}.weight"][7, 1] = float("inf")
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{EMBEDDING}\.weight: int8: .*finite.* in row 7"):
        compress_checkpoint(dense, tmp_path / "small", embeddings="int8")


@EXACT
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bf16_alone_is_coded(dtype, tied, tmp_path):
    dense = changed_embedding(tied[0], tmp_path / "dense", lambda w: w.to(dtype))
    with pytest.raises(UserError, match=rf"{EMBEDDING}\.weight: expected bfloat16, .*got float"):
        compress_checkpoint(dense, tmp_path / "small", embeddings="coded")
    assert not (tmp_path / "small").exists()


def test_an_unknown_kind(tied, tmp_path):
    with pytest.raises(UserError, match="embeddings: expected same, int8, coded, got 'int4'"):
        compress_checkpoint(tied[0], tmp_path / "small", embeddings="int4")
