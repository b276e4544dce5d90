"""What may be opened as a checkpoint, and the one line that says why something may not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
)

from pyprune.checkpoint import Checkpoint, read_header, read_tensor, write_tensor
from pyprune.errors import UserError
from pyprune.sparse.convert import compress_checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "in", max_shard_size="20KB")
    return tmp_path / "in"


def header_and_data(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def expect(folder: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


def expect_unusable(folder: Path, message: str) -> None:
    """On opening where transformers looks at a configuration's values then, else on building."""
    with pytest.raises(
        UserError, match=rf"(cannot be used|cannot be built).*({message})"
    ) as caught:
        Checkpoint.open(folder).build_model()
    assert "\n" not in str(caught.value)


def test_open(folder):
    checkpoint = Checkpoint.open(str(folder))
    state = load_file(folder / WEIGHTS)
    assert checkpoint.tensors.keys() == state.keys()
    assert checkpoint.dtype == torch.float32 and checkpoint.streaming_obstacle() == ""
    assert checkpoint.nbytes == sum(v.nbytes for v in state.values())
    for name, entry in checkpoint.tensors.items():
        assert torch.equal(read_tensor(entry), state[name])
    assert torch.equal(checkpoint.load_model().lm_head.weight, state["lm_head.weight"])


def test_main_dtype_is_that_of_most_bytes(folder):
    state = {k: v.bfloat16() for k, v in load_file(folder / WEIGHTS).items()}
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.build_model().dtype == torch.bfloat16
    assert checkpoint.build_model(dtype=torch.float32).dtype == torch.float32
    assert checkpoint.load_model(dtype=torch.float32).dtype == torch.float32


def test_every_dtype_is_read_and_written(tmp_path):
    state = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            torch.float64,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.int64,
            torch.uint8,
            torch.bool,
        )
    } | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)}
    save_file(state, tmp_path / "a")
    save_file({k: torch.zeros_like(v) for k, v in state.items()}, tmp_path / "b")
    entries = read_header(tmp_path / "a")
    assert entries.keys() == state.keys()
    for name, entry in entries.items():
        value = read_tensor(entry)
        assert value.dtype == state[name].dtype and value.shape == state[name].shape
        assert value.tolist() == state[name].tolist()
        write_tensor(entry, value, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="expected shape"):
        write_tensor(entries["scalar"], torch.ones(2), tmp_path / "b")


def test_transposed_values_are_written_in_order(tmp_path):
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "a")
    w = torch.arange(6.0).reshape(3, 2).T
    write_tensor(read_header(tmp_path / "a")["w"], w, tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["w"], w)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_no_such_directory(source):
    expect(source, "no such directory")


def test_file_instead_of_directory(folder):
    expect(folder / "config.json", "expected a directory")


@pytest.mark.parametrize(
    "name, message",
    [("model.safetensors", "the directory in which it"), ("model.gguf", "GGUF is not read")],
)
def test_file_of_weights_instead_of_its_directory(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    expect(tmp_path / name, f"got a file; .*{message}")


def test_url_instead_of_a_hub_id():
    expect("https://huggingface.co/org/model", "got a URL")


def test_directory_of_something_else(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    expect(tmp_path, "no config.json; GGUF is not read")
    (tmp_path / "adapter_config.json").write_text("{}")
    expect(tmp_path, "no config.json; an adapter of peft")


def test_hub_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    expect("someone/something", "no such directory, and the hub did not give it")
    expect("not a repository!", "no valid hub id")


def test_hub_gets_no_pickles(monkeypatch, folder):
    import huggingface_hub

    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("someone/something", revision="v1").path == folder
    assert asked["repository"] == "someone/something" and asked["revision"] == "v1"
    files = [WEIGHTS, "config.json", "tokenizer.model", "pytorch_model.bin", "x/model.safetensors"]
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files[:3]


def test_no_config(folder):
    (folder / "config.json").unlink()
    expect(folder, "it has no config.json")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    expect(folder, r"config.json: expected")


@pytest.mark.parametrize("kind", ["no_such_thing", "t5", "clip", None])
def test_unknown_architecture(folder, kind):
    edit_config(folder, model_type=kind, architectures=None)
    expect(folder, f"unknown architecture.*{kind}")


def test_wrong_type_in_config(folder):
    edit_config(folder, hidden_size="many")
    expect_unusable(folder, "hidden_size|got str")


def test_configuration_that_contradicts_itself(folder):
    edit_config(folder, num_attention_heads=0)
    expect_unusable(folder, "ZeroDivisionError")


@pytest.mark.parametrize("layers", [0, -1])
def test_no_layers(folder, tmp_path, layers):
    edit_config(folder, num_hidden_layers=layers)
    expect(folder, f"num_hidden_layers: expected 1 or more, got {layers}")
    with pytest.raises(UserError, match="num_hidden_layers: expected 1 or more"):
        compress_checkpoint(folder, tmp_path / "small")


def test_configuration_that_cannot_be_built(folder):
    edit_config(folder, hidden_act="no such thing")
    with pytest.raises(UserError, match="LlamaConfig cannot be built") as caught:
        Checkpoint.open(folder).build_model()
    assert "\n" not in str(caught.value)
    assert "cannot be built" in Checkpoint.open(folder).streaming_obstacle()
    with pytest.raises(UserError, match="cannot be loaded: KeyError: 'no such thing'"):
        Checkpoint.open(folder).load_model()


def test_shapes_that_differ_from_the_configuration(folder):
    edit_config(folder, intermediate_size=48)
    checkpoint = Checkpoint.open(folder)
    assert "has shape [64, 32]" in checkpoint.streaming_obstacle()
    with pytest.raises(UserError, match=r"cannot be loaded: .*has shape \[64, 32\]") as caught:
        checkpoint.load_model()
    assert "\n" not in str(caught.value)


def test_custom_code_is_not_run(folder):
    code = folder / "modeling_evil.py"
    code.write_text("raise SystemExit('ran')")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "modeling_evil.EvilConfig"})
    expect(folder, "unknown architecture")


def test_encoders_are_refused(tmp_path):
    """transformers has a causal model for each of them; decoders saved as such are taken."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = {**sizes, "intermediate_size": 8, "max_position_embeddings": 16}
    BertForMaskedLM(BertConfig(**bert)).save_pretrained(tmp_path / "bert")
    expect(tmp_path / "bert", r"expected a decoder-only .*, got an encoder \(BertForMaskedLM\)")
    BertLMHeadModel(BertConfig(**bert, is_decoder=True)).save_pretrained(tmp_path / "decoder")
    assert Checkpoint.open(tmp_path / "decoder").config.is_decoder
    bart = {"vocab_size": 16, "d_model": 8, "decoder_layers": 1, "encoder_layers": 1,
            "decoder_ffn_dim": 8, "encoder_ffn_dim": 8, "decoder_attention_heads": 1,
            "encoder_attention_heads": 1, "max_position_embeddings": 16}  # fmt: skip
    BartForConditionalGeneration(BartConfig(**bart)).save_pretrained(tmp_path / "bart")
    expect(tmp_path / "bart", r"got an encoder \(BartForConditionalGeneration\)")
    BartForCausalLM(BartConfig(**bart)).save_pretrained(tmp_path / "bart-decoder")
    assert not Checkpoint.open(tmp_path / "bart-decoder").config.is_encoder_decoder


def test_quantized(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    expect(folder, "quantized by gptq")
    edit_config(folder, quantization_config=["gptq"])
    expect(folder, "quantized by unknown")
    edit_config(folder, quantization_config=None)  # as some tools write it
    assert Checkpoint.open(folder).nbytes


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    expect(folder, "no weights")
    torch.save({}, folder / "pytorch_model.bin")
    expect(folder, "only pickled weights")


def test_integer_weights(folder):
    save_file({"w": torch.zeros(3, dtype=torch.int8)}, folder / WEIGHTS)
    expect(folder, "all integers")


def test_8_bit_weights(folder):
    save_file({"w": torch.zeros(3, dtype=torch.float8_e5m2)}, folder / WEIGHTS)
    expect(folder, "expected 16, 32 or 64 bit")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_one_matrix_of_another_kind(folder, dtype):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / WEIGHTS)
    expect(folder, f"{name}: expected 16, 32 or 64 bit weights, got {dtype}")


@pytest.mark.parametrize("size", [0, 5, 100])
def test_truncated_header(folder, size):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])
    expect(folder, f"{WEIGHTS}: corrupt safetensors file: header")


def test_git_lfs_pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    expect(folder, f"{WEIGHTS}: expected weights, got a Git LFS pointer to them: git lfs pull")


def test_truncated_tensor_is_named(folder):
    file = folder / WEIGHTS
    last = list(read_header(file))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    expect(folder, f"{WEIGHTS}: truncated: tensor {last} ends at")


def test_trailing_bytes(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes() + b"x")
    expect(folder, "its tensors end at byte")


@pytest.mark.parametrize("text", [b"not json", b"[]", b"\xff\xfe"])
def test_header_is_no_json_object(folder, text):
    with_header(folder / WEIGHTS, text, b"")
    expect(folder, "its header is not")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "F3"}, "expected a dtype among"),
        ({"dtype": 7}, "lacks a valid dtype"),
        ({"shape": [32, -32]}, "lacks a valid"),
        ({"shape": None}, "lacks a valid"),
        ({"shape": [0, 2**63], "data_offsets": [0, 0]}, "lacks a valid"),
        ({"shape": [31]}, "holds 128 bytes, F32 .31. takes 124"),
        ({"data_offsets": [0]}, "1 data_offsets"),
        ({"data_offsets": [10**9, 10**9 + 128]}, "expected"),
        ({"data_offsets": [128, 0]}, "holds -128 bytes"),
    ],
)
def test_bad_entry_names_the_tensor(folder, change, message):
    header, data = header_and_data(folder / WEIGHTS)
    header["model.norm.weight"] |= change
    with_header(folder / WEIGHTS, header, data)
    expect(folder, f"{WEIGHTS}.*model.norm.weight.*{message}")


def test_overlap(folder):
    header, data = header_and_data(folder / WEIGHTS)
    header["model.norm.weight"]["data_offsets"] = [64, 192]
    with_header(folder / WEIGHTS, header, data)
    expect(folder, "starts at byte")


def test_entry_is_no_object(folder):
    with_header(folder / WEIGHTS, {"w": 3}, b"")
    expect(folder, "tensor w is described by 3")


def test_missing_shard(sharded):
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    expect(sharded, "model-00001-of.* is missing; the index says")


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "expected a weight_map"),
        ({"weight_map": {"w": "../secret"}}, "is no file name"),
        ({"weight_map": {"w": 3}}, "is no file name"),
        ({"weight_map": {"w": 3, "v": "a.safetensors"}}, "3 is no file name"),
        ({"weight_map": {"w": ["a.safetensors"]}}, "is no file name"),
        ({"weight_map": {"w": ""}}, "is no file name"),
        ({"weight_map": {"w": None}}, "None is no file name"),
    ],
)
def test_bad_index(sharded, index, message):
    (sharded / INDEX).write_text(json.dumps(index))
    expect(sharded, message)


@pytest.mark.parametrize("last", [False, True])
def test_tensor_that_two_files_have(sharded, last):
    """Which of them counts would be up to the order in which somebody reads the files."""
    files = sorted(sharded.glob("*.safetensors"))
    target, source = (files[-1], files[0]) if last else (files[0], files[-1])
    header, data = header_and_data(target)
    name = next(iter(read_header(source)))
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    with_header(target, header, data + b"\0" * 4)
    expect(sharded, f"tensor {name} is in model-.* too")


def test_json_nested_too_deeply(sharded):
    deep = "[" * 200_000
    file = min(sharded.glob("*.safetensors"))
    original = file.read_bytes()
    with_header(file, deep.encode(), b"")
    expect(sharded, f"{file.name}: corrupt safetensors file: its header is not JSON")
    file.write_bytes(original)
    (sharded / INDEX).write_text(deep)
    expect(sharded, f"{INDEX}: expected JSON")


def test_tensor_that_only_the_index_has(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.bias"] = index["weight_map"]["lm_head.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    expect(sharded, "tensor lm_head.bias is missing")


@pytest.mark.parametrize("family", FAMILIES)  # transformers makes an empty one of some
def test_no_tokenizer(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not load: its files are missing"):
        Checkpoint.open(tmp_path).tokenizer()
