"""Compressed checkpoints in transformers: the same logits, straight into their layers, refused when
damaged."""

import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_checkpoints import pruned_checkpoint, tensors_of
from tiny_models import FAMILIES, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import pyprune
from pyprune.checkpoint import Checkpoint
from pyprune.errors import UserError
from pyprune.sparse import SparseLinear
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
from pyprune.sparse.generate import generate
from pyprune.sparse.load import load
from pyprune.sparse.quantizer import PyPruneConfig, PyPruneQuantizer

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(params=["2:4", "random"])
def pair(request, tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense", pattern=request.param)
    compress_checkpoint(dense, tmp_path / "small")
    return dense, tmp_path / "small"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A small compressed checkpoint of each pattern, to be copied before it is spoilt."""
    made = {}
    for pattern in ("2:4", "random"):
        folder = tmp_path_factory.mktemp("compressed")
        dense = pruned_checkpoint(folder / "dense", pattern=pattern, num_hidden_layers=1)
        compress_checkpoint(dense, folder / "small")
        made[pattern] = folder / "small"
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family(family, tmp_path):
    dense = pruned_checkpoint(tmp_path / "dense", family)
    report = compress_checkpoint(dense, tmp_path / "small")
    model = pyprune.load(tmp_path / "small", dtype=torch.float32)
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(sparse) == sum(kind != "dense" for kind in report.formats.values())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    ids = tiny_tokens()
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_plain_from_pretrained_and_dtypes(pair):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    layer = model.get_submodule(LAYER)
    assert type(layer) is SparseLinear and layer.values.dtype == torch.bfloat16
    stored = tensors_of(pair[1])
    assert torch.equal(layer.values, stored[f"{LAYER}.values"])
    assert torch.equal(layer.decompress(), tensors_of(pair[0])[f"{LAYER}.weight"])
    assert pyprune.load(pair[1]).dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    assert model.get_submodule(LAYER).values.dtype == torch.float32
    assert type(pyprune.load(pair[0]).get_submodule(LAYER)) is torch.nn.Linear


@pytest.mark.parametrize("dtype", ["float7", "int8", "nn", torch.int8, 16])
def test_a_dtype_that_is_none_is_refused_by_name(pair, tmp_path, dtype):
    message = f"dtype: expected one of auto, float32, bfloat16, float16, got {dtype!r}"
    for call in (
        lambda: pyprune.load(pair[0], dtype=dtype),
        lambda: pyprune.load(pair[1], dtype=dtype),
        lambda: Checkpoint.open(pair[0]).load_model(dtype=dtype),
        lambda: compress_checkpoint(pair[0], tmp_path / "out", dtype=dtype),
        lambda: generate(pair[1], "a", dtype=dtype, write=print),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_dtype_may_be_named(pair):
    assert pyprune.load(pair[1], dtype="float32").dtype == torch.float32
    assert pyprune.load(pair[1], dtype="auto").dtype == torch.bfloat16
    assert Checkpoint.open(pair[0]).load_model(dtype="float32").dtype == torch.float32


def test_generates_like_the_dense_model_with_left_padding_and_cache(pair):
    dense = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()
    sparse = pyprune.load(pair[1], dtype=torch.float32)
    ids = tiny_tokens(3, 9)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": 2}
    want = dense.generate(ids, **options)
    assert torch.equal(sparse.generate(ids, **options), want)
    assert torch.equal(sparse.generate(ids, **options, use_cache=False), want)


def test_saved_again_it_loads_and_decompresses(pair, tmp_path):
    pyprune.load(pair[1]).save_pretrained(tmp_path / "again")
    again = pyprune.load(tmp_path / "again")
    assert type(again.get_submodule(LAYER)) is SparseLinear
    decompress_checkpoint(tmp_path / "again", tmp_path / "back")
    one, other = tensors_of(pair[0]), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def shell(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


# Loads both directories without pyprune, then does as the errors say.
WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(error)
    else:
        sys.exit(f"{folder} was loaded")
assert "pyprune" not in sys.modules
import pyprune
for folder in sys.argv[1:]:
    AutoModelForCausalLM.from_pretrained(folder)
"""


def test_without_pyprune_the_error_says_what_to_do(compressed, tmp_path):
    """Of a model that was saved again, too: transformers takes the field that carries the advice
    off every configuration that it saves."""
    pyprune.load(compressed["2:4"]).save_pretrained(tmp_path / "again")
    done = shell(WITHOUT, compressed["2:4"], tmp_path / "again")
    assert not done.returncode, done.stderr
    assert done.stdout.count("`import pyprune` before loading it") == 2, done.stdout
    dense = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    dense.save_pretrained(tmp_path / "dense")
    assert "transformers_weights" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_pyprune_may_be_imported_first(compressed):
    code = "import sys, pyprune, transformers as t"
    code += "; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = shell(code, compressed["2:4"])
    assert not done.returncode, done.stderr


def test_dequantize_says_how(compressed):
    with pytest.raises(UserError, match="pyprune decompress DIR"):
        pyprune.load(compressed["2:4"]).dequantize()


def test_import_stays_light():
    done = shell("import sys, pyprune; sys.exit('torch' in sys.modules)")
    assert not done.returncode, done.stderr


def spoil(small, change):
    file = small / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def spoil_config(small, change):
    raw = json.loads((small / "config.json").read_text())
    change(raw["quantization_config"])
    (small / "config.json").write_text(json.dumps(raw))


def both_refuse(small, tmp_path, match):
    with pytest.raises(UserError, match=match):
        pyprune.load(small)
    with pytest.raises(UserError, match=match):
        AutoModelForCausalLM.from_pretrained(small)
    with pytest.raises(UserError, match=match):
        decompress_checkpoint(small, tmp_path / "back")


BITMAP = {
    "offsets": (lambda s: s[f"{LAYER}.row_offsets"][3:4].add_(1), "bitmap: expected as many"),
    "huge": (lambda s: s[f"{LAYER}.row_offsets"].__setitem__(3, 1 << 60), "monotone"),
    "end": (lambda s: s[f"{LAYER}.row_offsets"].__setitem__(-1, 0), "row_offsets: expected to run"),
    "bits": (lambda s: s[f"{LAYER}.bitmap"].fill_(255), "bitmap: expected as many bits"),
    "values": (
        lambda s: s.__setitem__(f"{LAYER}.values", s[f"{LAYER}.values"][:-1].clone()),
        "row_offsets: expected to run",
    ),
    "dtype": (
        lambda s: s.__setitem__(f"{LAYER}.row_offsets", s[f"{LAYER}.row_offsets"].int()),
        "row_offsets: expected torch.int64, got torch.int32",
    ),
    "missing": (lambda s: s.pop(f"{LAYER}.bitmap"), "bitmap is missing"),
    "flat": (
        lambda s: s.__setitem__(f"{LAYER}.values", s[f"{LAYER}.values"][None].clone()),
        "expected one dimension",
    ),
}
META = {
    "zero": (lambda s: s[f"{LAYER}.metadata"].__setitem__((2, 1), 0), "metadata: .*ascending"),
    "shape": (
        lambda s: s.__setitem__(f"{LAYER}.metadata", s[f"{LAYER}.metadata"][:-1].clone()),
        "metadata: expected shape",
    ),
    "twice": (lambda s: s.__setitem__(f"{LAYER}.weight", torch.ones(2)), "there twice"),
}


@pytest.mark.parametrize("pattern_and_case", [*(("random", c) for c in BITMAP), *(
    ("2:4", c) for c in META)], ids=str)  # fmt: skip
def test_tampered_tensors_are_refused_by_file_and_name(pattern_and_case, compressed, tmp_path):
    pattern, case = pattern_and_case
    change, message = (BITMAP if pattern == "random" else META)[case]
    shutil.copytree(compressed[pattern], tmp_path / "small")
    spoil(tmp_path / "small", change)
    both_refuse(tmp_path / "small", tmp_path, rf"small.*{LAYER}.*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=7), "format_version among 1, 2, 3, 4, 5, 6, got 7"),
        (lambda c: c.update(layers=[]), "object named layers"),
        (lambda c: c["layers"].update(x={"format": "csr", "shape": [2, 8]}), "layer x: format"),
        (lambda c: c["layers"][LAYER].update(shape=[64, -32]), "shape: expected two positive"),
        (lambda c: c["layers"][LAYER].update(shape=[64, 64]), f"{LAYER}.values: expected shape"),
        (
            lambda c: c["layers"].update(x={"format": "sparse24", "shape": [2, 8]}),
            "x.values is m",
        ),
        (
            lambda c: c["layers"].update(x={"format": "factored", "shape": [9, 8], "rank": 2}),
            "needs format_version 4, got 1",
        ),
        (
            lambda c: c["layers"].update(x={"format": "factored", "shape": [9, 8]}),
            "layer x: rank: expected a positive integer, got None",
        ),
        (
            lambda c: c["layers"][LAYER].update(rank=2),
            "rank: expected none with format sparse24, got 2",
        ),
        (
            lambda c: c["layers"].pop(LAYER),
            rf"model.safetensors: tensor {LAYER}.values: .*config.json has no layer {LAYER}",
        ),
        (
            lambda c: c["layers"].update(
                x={"format": "factored", "shape": [9, 8], "rank": 2, "transposed": True}
            ),
            "layer x: factored: expected neither values nor transposed",
        ),
    ],
)
def test_tampered_configuration_is_refused(change, message, tmp_path):
    compress_checkpoint(pruned_checkpoint(tmp_path / "dense"), tmp_path / "small")
    spoil_config(tmp_path / "small", change)
    both_refuse(tmp_path / "small", tmp_path, message)


def test_missing_dense_tensor_and_truncation(tmp_path):
    compress_checkpoint(pruned_checkpoint(tmp_path / "dense"), tmp_path / "small")
    spoil(tmp_path / "small", lambda s: s.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight is missing"):
        pyprune.load(tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated"):
        pyprune.load(tmp_path / "small")


@pytest.mark.parametrize("hook", ["update_attn_implementation", "update_tp_plan"])
def test_the_advice_is_no_file_name_in_any_release(hook):
    """transformers calls the first from 5.18 on, the second before."""
    config = SimpleNamespace(transformers_weights="how to load", hidden_size=8)
    kept = getattr(PyPruneQuantizer(PyPruneConfig()), hook)(config)
    assert kept is config and vars(config) == {"hidden_size": 8}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' list of mappings")
def test_a_file_whose_values_were_cast_is_let_go(tmp_path):
    """Metadata alone would keep all of it that was read in memory."""
    folder = compress_checkpoint(pruned_checkpoint(tmp_path / "dense"), tmp_path / "small").path
    file = str(next(Path(folder).resolve().glob("*.safetensors")))
    kept = load(folder)  # in bf16, as it is
    assert file in Path("/proc/self/maps").read_text()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        want = kept(ids).logits.float()
    del kept
    model = load(folder, torch.float32)
    gc.collect()  # models have cycles
    assert file not in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, rtol=0.1, atol=0.1)
