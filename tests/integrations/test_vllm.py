"""vLLM's engine on compressed checkpoints, beside transformers, where it is installed."""

import json
import os
import sys
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_checkpoints import pruned_checkpoint
from transformers import AutoModelForCausalLM

import pyprune
from pyprune.errors import UserError
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.format import quantization_config
from pyprune.sparse.layout import LayerFormat

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.lora.request import LoRARequest  # noqa: E402

from pyprune.integrations import vllm as plugin  # noqa: E402
from pyprune.integrations.vllm.weights import check_parts  # noqa: E402

# vLLM's attention takes heads of 32 and more: 4 heads.
WIDTH = {"hidden_size": 128}
# By a name: family, pattern, what the configuration and the compression have beside.
CASES = {
    "llama": ("llama", "2:4", WIDTH, {"embeddings": "int8"}),
    "llama-bitmap": ("llama", "half", WIDTH, {"int8": True}),
    "qwen2": ("qwen2", "half", WIDTH, {"embeddings": "coded"}),  # tied, biases of q, k, v
    "gemma3": ("gemma3_text", "half", {**WIDTH, "head_dim": 32}, {}),
    "phi3": ("phi3", "half", WIDTH, {}),  # one tensor for q, k and v, and for gate and up
    "gpt2": ("gpt2", "half", {"n_embd": 128}, {}),  # stored transposed
    "falcon": ("falcon", "2:4", WIDTH, {}),  # rows that are reordered
    "gpt_neox": ("gpt_neox", "half", WIDTH, {}),  # modules of transformers
}
GENERATED = 8


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `apply_model`
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    # The engine is another process.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))


def compressed(folder, family, pattern, config, options):
    source = pruned_checkpoint(folder / "dense", family, pattern, **config)
    compress_checkpoint(source, folder / "small", **options)
    return folder / "small"


def engine(path, **options):
    return vllm.LLM(
        str(path),
        **{
            "dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True,
            "skip_tokenizer_init": True, **options,
        },
    )  # fmt: skip


def modules_of(model):
    from pyprune.sparse.weight import StoredWeight

    found = [m for m in model.modules() if isinstance(m, StoredWeight)]
    return [(type(m).__name__, m.format, m.int8) for m in found]


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (n,), generator=generator).tolist() for n in (9, 20)]


def served(path, lora=None, **options):
    """Per prompt the tokens with what was generated and the prompt's log probabilities; and the
    modules with stored weights of each process."""
    llm = engine(path, **options)
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=GENERATED, prompt_logprobs=0, detokenize=False
    )
    given = [{"prompt_token_ids": ids} for ids in prompts()]
    outputs = llm.generate(given, sampling, use_tqdm=False, lora_request=lora)
    found = llm.apply_model(modules_of)
    llm.llm_engine.engine_core.shutdown()
    results = []
    for ids, output in zip(prompts(), outputs, strict=True):
        pairs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        chances = torch.tensor([at[token].logprob for token, at in pairs])
        results.append((ids + list(output.outputs[0].token_ids), chances))
    return results, found


def compare(path, results):
    compare_with(pyprune.load(path, dtype="float32"), results)


def compare_with(model, results):
    for tokens, chances in results:
        ids = torch.tensor([tokens])
        expected = model(ids).logits[0].float().log_softmax(-1)
        of_tokens = expected[:-1].gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(chances, of_tokens[: len(chances)], atol=1e-5, rtol=0)
        assert expected[len(chances) : -1].argmax(-1).tolist() == tokens[len(chances) + 1 :]


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_probabilities_are_those_of_transformers(tmp_path, case):
    path = compressed(tmp_path, *CASES[case])
    results, (found,) = served(path)
    assert found
    compare(path, results)


def test_weights_that_become_one_are_one_product(tmp_path):
    """q, k and v of one format are one matrix; q and v around a dense k are none."""
    folder = tmp_path / "dense"
    pruned_checkpoint(folder, "llama", "2:4", **WIDTH)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    first = "model.layers.0.self_attn"
    tensors[f"{first}.k_proj.weight"] = torch.randn(64, 128).bfloat16() / 5
    up = tensors["model.layers.0.mlp.up_proj.weight"]  # three of four: no 2:4
    up[:, ::4] = up[:, 1::4] = up[:, 2::4] = 0.25
    up[:, 3::4] = 0
    save_file(tensors, file, {"format": "pt"})
    report = compress_checkpoint(folder, tmp_path / "small")
    assert report.formats[f"{first}.k_proj"] == "dense"
    assert report.formats["model.layers.0.mlp.up_proj"] == "bitmap"
    results, (found,) = served(tmp_path / "small")
    compare(tmp_path / "small", results)
    formats = [format for _, format, _ in found]
    # Block 0: q, v, o, gate | up, down; block 1: qkv, o, gate and up, down.
    assert formats == ["sparse24"] * 4 + ["bitmap"] + ["sparse24"] * 5


@pytest.mark.parametrize("case", ["llama", "llama-bitmap", "qwen2", "phi3"])
def test_tensor_parallelism(tmp_path, monkeypatch, case):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = compressed(tmp_path, *CASES[case])
    results, found = served(path, tensor_parallel_size=2)
    assert len(found) == 2
    assert found[0] == found[1] != []
    compare(path, results)


def test_compiled(tmp_path):
    path = compressed(tmp_path, *CASES["llama"])
    results, (found,) = served(path, enforce_eager=False)
    assert found
    compare(path, results)


def test_lora_beside_compressed_layers(tmp_path):
    path = compressed(tmp_path, *CASES["qwen2"])  # loses no bit
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    rank, alpha, names = 8, 16, ["q_proj", "v_proj", "gate_proj", "down_proj"]
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            rows, cols = module.weight.shape
            a = torch.randn(rank, cols, generator=generator) / 10
            b = torch.randn(rows, rank, generator=generator) / 10
            factors[f"base_model.model.{name}.lora_A.weight"] = a
            factors[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight.data += alpha / rank * b @ a
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": names}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    request = LoRARequest("own", 1, str(adapter))
    results, (found,) = served(path, request, enable_lora=True, max_lora_rank=rank)
    assert found
    compare_with(model, results)


def refusal(path, capfd, **options):
    with pytest.raises((RuntimeError, ValueError), match=r"initialization failed|pyprune"):
        engine(path, **options)
    return "".join(capfd.readouterr())


def test_a_bitmap_whose_rows_would_be_reordered_is_refused(tmp_path, capfd):
    path = compressed(tmp_path, "falcon", "half", WIDTH, {})
    said = refusal(path, capfd)
    assert "query_key_value: bitmap: vLLM reorders the rows of falcon's" in said


def test_a_missing_tensor_is_named(tmp_path, capfd):
    path = compressed(tmp_path, *CASES["llama"])
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.v_proj.metadata"]
    save_file(tensors, file, {"format": "pt"})
    said = refusal(path, capfd)
    assert "model.layers.1.self_attn.v_proj.metadata: is missing in the checkpoint" in said


@pytest.mark.parametrize(
    ("layer", "kind"),
    [(LayerFormat("factored", (8, 16), rank=2), "factored"),
     (LayerFormat("bitmap", (8, 16), stacked=True), "stacked experts")],
)  # fmt: skip
def test_what_vllm_has_no_layers_for_is_refused(layer, kind):
    config = quantization_config({"x.y": layer})
    with pytest.raises(UserError, match=rf"x\.y: {kind}: not for vLLM; `pyprune decompress"):
        plugin.PyPruneVLLMConfig.from_config(config)


def test_another_version_is_refused():
    config = {**quantization_config({}), "format_version": 99}
    with pytest.raises(UserError, match="format_version among"):
        plugin.PyPruneVLLMConfig.from_config(json.loads(json.dumps(config)))


def parts(**changed):
    whole = {
        "values": torch.ones(4, 8, dtype=torch.bfloat16),
        "metadata": torch.full((4, 2), 0x44, dtype=torch.uint8),
    }
    return {part: t for part, t in {**whole, **changed}.items() if t is not None}


@pytest.mark.parametrize(
    ("given", "shape", "message"),
    [
        (parts(values=None), (4, 16), r"x\.values: is missing"),
        (parts(scales=torch.ones(4)), (4, 16), r"x\.scales: expected values, metadata alone"),
        (parts(), (8, 16), r"x: expected a weight of shape \(8, 16\), got \(4, 16\)"),
        (parts(values=torch.ones(4, 6)), (4, 16), r"x\.values: expected shape \(4, 8\), got"),
        (parts(metadata=torch.zeros(4, 2, dtype=torch.uint8)), (4, 16), r"x\.metadata: "),
    ],
)  # fmt: skip
def test_parts_are_checked(given, shape, message):
    layer = LayerFormat("sparse24", (4, 16))
    check_parts("x", layer, parts(), (4, 16))
    with pytest.raises(UserError, match=message):
        check_parts("x", layer, given, shape)


def test_vllm_finds_the_plugin():
    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "pyprune")
    register = found.load()
    register()
    register()
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config("pyprune") is plugin.PyPruneVLLMConfig
