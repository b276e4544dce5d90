"""Damaged compressed checkpoints: a UserError or a model, never anything else."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_checkpoints import bits_equal, pruned_checkpoint, write_legacy

from pyprune.checkpoint import read_tensor
from pyprune.errors import UserError
from pyprune.sparse import SparseLinear
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.stored import StoredCheckpoint

OWN = ("2:4", "random", "2:4 int8", "random int8", "2:4 rows", "2:4 coded")
KINDS = (*OWN, "sparse-24-bitmask", "sparse-bitmask")
WEIGHTS = "model.safetensors"
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SIZES = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**62, 2**63, 10**30]))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    made = {}
    for kind in KINDS:
        dense = pruned_checkpoint(
            folder / f"dense {kind}", pattern="random" if "random" in kind else "2:4",
            num_hidden_layers=1,
        )  # fmt: skip
        made[kind] = folder / kind.replace(":", "of")
        if kind in OWN:
            rows = {"2:4 rows": "int8", "2:4 coded": "coded"}.get(kind, "same")  # embedding, head
            compress_checkpoint(dense, made[kind], int8="int8" in kind, embeddings=rows)
        else:
            write_legacy(dense, made[kind], kind)
    return made


def survives(folder: Path) -> None:
    """Every tensor reads, with the promised shape, and multiplies; or a UserError names the
    folder."""
    try:
        stored = StoredCheckpoint.open(folder)
        for name, entry in stored.entries.items():
            dense = stored.read(name)
            assert dense.shape == entry.shape and dense.dtype == entry.dtype
            if name not in stored.parts or not stored.layers:
                continue
            key = name.removesuffix(".weight")
            layer = stored.layers[key]
            rows, cols = layer.shape
            linear = SparseLinear(
                cols, rows, layer.format,
                int8=layer.int8, bias=False, dtype=dense.dtype, device="meta",
            )  # fmt: skip
            state = {part: read_tensor(e) for part, e in stored.parts[name].items()}
            linear.load_state_dict(state, assign=True)
            assert bits_equal(linear.decompress(), dense.T if layer.transposed else dense)
            assert linear(torch.zeros(2, cols)).shape == (2, rows)
    except UserError as error:
        assert str(folder) in str(error)


def damaged(source: Path, content: bytes | None = None, raw: object = None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        shutil.copytree(source, folder)
        if content is not None:
            (folder / WEIGHTS).write_bytes(content)
        if raw is not None:
            (folder / "config.json").write_text(json.dumps(raw))
        survives(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_untouched(kind, checkpoints):
    survives(checkpoints[kind])


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(data=st.data())
def test_flipped_bytes(kind, checkpoints, data):
    content = bytearray((checkpoints[kind] / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    end = data.draw(st.sampled_from([8, header, len(content)]))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    damaged(checkpoints[kind], bytes(content))


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(data=st.data())
def test_truncated(kind, checkpoints, data):
    content = (checkpoints[kind] / WEIGHTS).read_bytes()
    damaged(checkpoints[kind], content[: data.draw(st.integers(0, len(content) - 1))])


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(data=st.data())
def test_altered_header(kind, checkpoints, data):
    content = (checkpoints[kind] / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    what = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name"]))
    if what == "name":
        header[name + "x"] = header.pop(name)
    elif what == "dtype":
        header[name]["dtype"] = data.draw(st.sampled_from(["U8", "I8", "I64", "F16", "F32", "X"]))
    else:
        values = header[name][what]
        if what == "shape" and data.draw(st.booleans()):
            header[name]["shape"] = values[::-1]  # as many elements
        else:
            values[data.draw(st.integers(0, len(values) - 1))] = data.draw(SIZES)
    text = json.dumps(header).encode()
    damaged(checkpoints[kind], len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize("kind", OWN)
@FUZZ
@given(data=st.data())
def test_altered_configuration(kind, checkpoints, data):
    raw = json.loads((checkpoints[kind] / "config.json").read_text())
    config = raw["quantization_config"]
    name = data.draw(st.sampled_from(sorted(config["layers"])))
    layer = config["layers"][name]
    junk = st.sampled_from([None, True, 0, -1, 1.5, "x", [], {}, [[8], 8], {"format": []}])
    fields = ["shape", "format", "values", "transposed", "layer", "version", "name", "layers"]
    what = data.draw(st.sampled_from(fields))
    if what == "shape":
        layer["shape"][data.draw(st.integers(0, 1))] = data.draw(SIZES)
    elif what == "format":
        known = st.sampled_from(["bitmap", "sparse24", "dense", "coded"])
        layer["format"] = data.draw(st.one_of(junk, known))
    elif what in ("values", "transposed"):
        layer[what] = data.draw(st.one_of(junk, st.sampled_from(["int8", True])))
        config["format_version"] = data.draw(st.sampled_from([1, 2, 3, 5]))
    elif what == "layer":
        config["layers"][name] = data.draw(junk)
    elif what == "version":
        config["format_version"] = data.draw(junk)
    elif what == "name":
        config["layers"][name[:-1]] = config["layers"].pop(name)
    else:
        config["layers"] = data.draw(junk)
    damaged(checkpoints[kind], raw=raw)
