"""DeciLM: what is written computes what the masked model does, and nothing that is zero is kept."""

import json

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from saved_models import load_decision, save_model, save_source
from saved_models import prune_source as prune
from saved_models import reloaded as load
from tiny_models import FAMILIES, tiny_model, tiny_tokens
from torch.nn.functional import linear, silu
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune import cli
from pyprune.checkpoint import Checkpoint
from pyprune.deci import ffn_channels, ffn_mult, save_deci, to_deci
from pyprune.deci_convert import stock_tensors
from pyprune.depth import run
from pyprune.depth.config import StructureConfig
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.repack import repack
from pyprune.depth.run import prune_structure
from pyprune.errors import UserError
from pyprune.width.structure import Widths

# Biases everywhere and an untied head; a tied one and biases of q, k and v; none.
KINDS = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": None},
}
IDS = tiny_tokens(2, 12)


def model_of(family, **more):
    sizes = {"num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 8}
    return tiny_model(family, **{**sizes, "num_key_value_heads": 4, **KINDS[family], **more})


def branches(text):
    kinds = {"A": "attention", "M": "mlp"}
    return [Branch(kinds[name[0]], int(name[1:])) for name in text.split()]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


def run_deci(folder):
    """The logits of a DeciLM directory, by its files alone: as vLLM and llama.cpp compute it."""
    config = json.loads((folder / "config.json").read_text())
    stored = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
    unread = set(stored)

    def get(name):
        unread.discard(name)
        return stored.get(name)

    def norm(x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return x * scale * get(f"{name}.weight")

    def project(x, name, *, bias):
        assert bias == (f"{name}.bias" in stored)
        return linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size, time = hidden // heads, IDS.shape[1]
    angle = torch.arange(time)[:, None] * config["rope_theta"] ** (
        -torch.arange(0, size, 2).double() / size
    )
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))

    def rotated(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    qkv_bias = config.get("qkv_bias", config["attention_bias"])
    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    x = get("model.embed_tokens.weight")[IDS]
    for i, block in enumerate(config["block_configs"]):
        layer, attention, ffn = f"model.layers.{i}", block["attention"], block["ffn"]
        if not attention["no_op"]:
            groups = heads // attention["n_heads_in_group"]
            y = norm(x, f"{layer}.input_layernorm")
            q, k, v = (
                project(y, f"{layer}.self_attn.{name}_proj", bias=qkv_bias)
                .view(2, time, n, size)
                .transpose(1, 2)
                for name, n in (("q", heads), ("k", groups), ("v", groups))
            )
            k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
            scores = rotated(q) @ rotated(k).mT / size**0.5
            y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
            y = y.transpose(1, 2).reshape(2, time, hidden)
            x = x + project(y, f"{layer}.self_attn.o_proj", bias=config["attention_bias"])
        y, bias = norm(x, f"{layer}.post_attention_layernorm"), config["mlp_bias"]
        gate, up = (project(y, f"{layer}.mlp.{name}_proj", bias=bias) for name in ("gate", "up"))
        assert gate.shape[-1] == ffn_channels(ffn["ffn_mult"], hidden) and not ffn["no_op"]
        x = x + project(silu(gate) * up, f"{layer}.mlp.down_proj", bias=bias)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    result = norm(x, "model.norm") @ get(f"{head}.weight").T
    assert not unread
    return result


def written(model, folder):
    folder.mkdir()
    save_deci(model, folder)
    return folder, json.loads((folder / "config.json").read_text())


def stock(folder):
    """The stock model of a DeciLM directory."""
    config, tensors = stock_tensors(folder)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return model


def test_ffn_mult_says_every_multiple_of_256():
    for hidden in (32, 576, 896, 4096, 5120, 8192, 16384):
        for channels in range(256, (64 << 10) + 1, 256):
            mult = json.loads(json.dumps(ffn_mult(channels, hidden)))
            assert ffn_channels(mult, hidden) == channels
    assert ffn_channels(5.25, 8192) == 28672 and ffn_channels(0.5, 8192) == 2816  # NVIDIA's 49B


@pytest.mark.parametrize("fill", ["packed", "zeros"])
@pytest.mark.parametrize("removed", ["A1 A2", "M1 M2 A3", "M0 A1 M3", "A2 M2"])
@pytest.mark.parametrize("family", KINDS)
def test_written_is_the_masked_model(family, removed, fill, tmp_path):
    model, gone = model_of(family), branches(removed)
    graph = ResidualGraph.of(model)
    dense = sum(p.numel() for p in model.parameters())
    asked = graph.removed_parameters(gone)
    with graph.skipping(gone):
        masked = logits(model)
    repack(graph, gone, fill)
    held = {name: p.clone() for name, p in model.named_parameters()}
    folder, config = written(model, tmp_path / "out")
    torch.testing.assert_close(run_deci(folder).float(), masked, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(stock(folder)), masked)
    deci = to_deci(model)
    assert all(torch.equal(p, held[name]) for name, p in model.named_parameters())
    assert deci.wanted == dense - asked
    # Layers without an MLP have one of 256 channels and its norm; nothing else is padding.
    tiny = sum(b["ffn"]["ffn_mult"] == ffn_mult(256, 32) for b in config["block_configs"])
    bias = 2 * 256 + 32 if family == "llama" else 0
    assert deci.padding == tiny * (3 * 256 * 32 + 32 + bias)
    assert (folder / "model.safetensors").stat().st_size < 4 * deci.parameters + 8192


def test_every_key_is_there(tmp_path):
    model = model_of("llama")
    repack(ResidualGraph.of(model), branches("A1 M2"))
    folder, config = written(model, tmp_path / "out")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas" and config["num_hidden_layers"] == 4
    assert config["rope_theta"] == 10000.0 and config["rope_scaling"] is None
    assert "rope_parameters" not in config and config["tie_word_embeddings"] is False
    attention = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}
    nothing = {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}
    ffn = {"ffn_mult": ffn_mult(512, 32), "no_op": False, "replace_with_linear": False}
    assert config["block_configs"] == [
        {"attention": attention, "ffn": ffn},
        {"attention": nothing, "ffn": ffn},
        {"attention": attention, "ffn": ffn | {"ffn_mult": ffn_mult(256, 32)}},
        {"attention": attention, "ffn": ffn},
    ]
    tensors = load_file(folder / "model.safetensors")
    assert not [n for n in tensors if n.startswith(("model.layers.1.self", "model.layers.1.inp"))]
    mlp = {n: t for n, t in tensors.items() if n.startswith("model.layers.2.mlp.")}
    assert len(mlp) == 6 and not any(t.any() for t in mlp.values())
    assert mlp["model.layers.2.mlp.down_proj.weight"].shape == (32, 256)


def test_scaled_rotary_positions(tmp_path):
    scaled = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    model = model_of("llama", rope_parameters={"rope_theta": 500000.0, **scaled})
    folder, config = written(model, tmp_path / "out")
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"] == scaled
    assert torch.equal(logits(stock(folder)), logits(model))


@pytest.mark.parametrize("family", KINDS)
def test_channels_and_key_value_heads(family, tmp_path):
    """Each layer keeps its own: 3 of 4 KV groups stay 4, 2 stay 2, 1 of them or none is 1."""
    model = model_of(family, intermediate_size=1000)
    widths, gen = Widths.of(model), torch.Generator().manual_seed(0)
    left = {"mlp": [1000, 400, 256, 3], "heads": [3, 2, 1, 4]}
    kept = {
        g.name: torch.randperm(g.units, generator=gen)[: left[g.kind][g.layer]].sort().values
        for g in widths.groups
    }
    widths.mask(kept)
    masked = logits(model)
    folder, config = written(model, tmp_path / "out")
    blocks = config["block_configs"]
    assert [ffn_channels(b["ffn"]["ffn_mult"], 32) for b in blocks] == [1024, 512, 256, 256]
    assert [b["attention"]["n_heads_in_group"] for b in blocks] == [2, 4, 8, 2]
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (4, 1024)
    torch.testing.assert_close(run_deci(folder).float(), masked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(stock(folder)), masked, rtol=1e-4, atol=1e-5)
    wanted = sum(p.numel() for p in model.parameters()) - widths.removed_parameters(kept)
    assert to_deci(model).wanted == wanted


def test_one_key_value_head():
    model = model_of("qwen2", num_key_value_heads=1)
    repack(ResidualGraph.of(model), branches("A2"))
    heads = [b["attention"]["n_heads_in_group"] for b in to_deci(model).config["block_configs"]]
    assert heads == [8, 8, None, 8]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(KINDS)))
def test_other_families_are_refused(family):
    with pytest.raises(UserError, match=f"expected a model of llama, mistral, qwen2, got {family}"):
        to_deci(tiny_model(family))


@pytest.mark.parametrize(
    "family, more, words",
    [
        ("mistral", {"sliding_window": 8}, "without a sliding window, got one of 8"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
         "without a sliding window"),
        ("llama", {"head_dim": 8}, "head_dim: expected hidden_size 32 / num_attention_heads 8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: expected silu, got gelu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         "rope_type: expected default or llama3"),
    ],
)  # fmt: skip
def test_what_deci_has_no_word_for_is_refused(family, more, words):
    with pytest.raises(UserError, match=words):
        to_deci(model_of(family, **more))


def test_what_is_missing_or_extra_is_named():
    model = model_of("llama")
    repack(ResidualGraph.of(model), branches("A0"))
    with pytest.raises(UserError, match="attention of the first layer is removed"):
        to_deci(model)
    model = model_of("llama")
    model.model.layers[1].self_attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"layers\.1: DeciLM has no self_attn\.extra\.bias"):
        to_deci(model)
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"layers\.0\.mlp: unknown MLP with children .*extra"):
        to_deci(model)


def test_configuration_as_vllm_reads_it(tmp_path):
    """Attributes all the way down; and the class comes with the checkpoint, if it may."""
    model = model_of("qwen2")
    repack(ResidualGraph.of(model), branches("A1"))
    folder, raw = written(model, tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.block_configs[1].attention.no_op and not config.block_configs[1].ffn.no_op
    assert config.block_configs[0].attention.n_heads_in_group == 2
    assert config.block_configs[0].ffn.ffn_mult == ffn_mult(512, 32)
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
    assert config.rope_parameters["rope_theta"] == 10000.0 and config.head_dim == 4
    assert (config.qkv_bias, config.attention_bias, config.mlp_bias) == (True, False, False)
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["block_configs"] == raw["block_configs"]


@pytest.fixture
def source(tmp_path):
    more = {"num_hidden_layers": 5, "vocab_size": 258, "intermediate_size": 512}
    return save_source(tmp_path, tiny_model("qwen2", **more))


def test_from_the_command_line_and_back(source, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    options = ["-m", "llm-drop", "-O", "blocks=attention", "--count", "2"]
    assert prune(source, *options, "--fill", "deci") == 0
    assert "plain transformers cannot load it" in " ".join(capsys.readouterr().out.split())
    report = json.loads((source / "out" / "pyprune.json").read_text())
    sizes = report["parameters"]
    assert sizes["zeros"] == 0 and sizes["realised_share"] == sizes["removed_share"]
    stored = load_file(source / "out" / "model.safetensors")
    assert sizes["after"] == sum(t.numel() for t in stored.values())
    card = (source / "out" / "README.md").read_text()
    assert "DeciLM" in card and "any loader" not in card
    # Both commands say what it is, and one makes a stock model of it.
    assert cli.main(["eval", str(source / "out")]) == 2
    assert "a DeciLM checkpoint, which transformers has no model for" in capsys.readouterr().err
    assert cli.main(["decompress", str(source / "out"), "-o", str(source / "back")]) == 0
    model, decision = load(source / "in"), load_decision(source / "out")
    with ResidualGraph.of(model).skipping(decision.removed):
        masked = logits(model)
    assert torch.equal(logits(load(source / "back")), masked)
    names = {file.name for file in (source / "back").iterdir()}
    assert "tokenizer.json" in names and "configuration_deci.py" not in names
    # What was saved as a stock model first gives the same files.
    assert prune(source, *options, out="packed") == 0
    arguments = ["compress", str(source / "packed"), "-o", str(source / "small")]
    assert cli.main([*arguments, "--format", "deci"]) == 0
    again = load_file(source / "small" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(t, again[name]) for name, t in stored.items())
    compressed = json.loads((source / "small" / "pyprune.json").read_text())
    assert compressed["parameters"] == sizes
    assert load_decision(source / "small").removed == decision.removed


@pytest.mark.parametrize("main", [torch.bfloat16, torch.float16])
def test_dtypes_there_and_back(main, source):
    """Norms and embeddings in fp32 beside 16-bit matrices, also where a branch and its norm went;
    the configuration says the matrices' dtype."""
    load(source / "in").to(main).save_pretrained(source / "in")
    file = source / "in" / "model.safetensors"
    wide = ("norm.weight", "embed_tokens.weight")
    state = {n: t.float() + 1 / 3 if n.endswith(wide) else t for n, t in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    assert prune(source, "-m", "llm-drop", "--count", "2", "--fill", "deci") == 0
    assert cli.main(["decompress", str(source / "out"), "-o", str(source / "back")]) == 0
    for name in ("out", "back"):
        found = load_file(source / name / "model.safetensors")
        wrong = {n: t.dtype for n, t in found.items() if (t.dtype == main) == n.endswith(wide)}
        assert not wrong
        assert torch.equal(found["model.norm.weight"], state["model.norm.weight"])
        config = json.loads((source / name / "config.json").read_text())
        assert config["dtype"] == str(main).removeprefix("torch.")


def test_widths_of_each_layer(source, capsys):
    """What MultiPruner has to leave in a stock model as zeros."""
    assert prune(source, "-m", "multipruner", "--ratio", "0.3", "-O", "blocks=0") == 0
    stock_sizes = json.loads((source / "out" / "pyprune.json").read_text())["parameters"]
    arguments = ["compress", str(source / "out"), "-o", str(source / "small"), "--format", "deci"]
    assert cli.main(arguments) == 0
    sizes = json.loads((source / "small" / "pyprune.json").read_text())["parameters"]
    assert stock_sizes["realised_share"] < sizes["realised_share"] <= sizes["removed_share"]
    assert cli.main(["decompress", str(source / "small"), "-o", str(source / "back")]) == 0
    torch.testing.assert_close(
        logits(load(source / "back")), logits(load(source / "out")), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "options", [["-m", "llm-drop"], ["-m", "blockpruner"], ["-m", "blockpruner", "-O", "mode=fast"]]
)
def test_the_first_attention_is_no_candidate(source, options, capsys):
    """It would be the first to go: it adds next to nothing."""
    model = load(source / "in")
    model.model.layers[0].self_attn.o_proj.weight.data *= 1e-6
    save_model(model, byte_tokenizer(), source / "first")
    (source / "in").rename(source / "was")
    (source / "first").rename(source / "in")
    options = [*options, "--count", "2", "--state", str(source / "state")]
    if "llm-drop" in options:
        options = options[:-2]
    assert prune(source, *options, out="packed") == 0
    assert Branch("attention", 0) in load_decision(source / "packed").removed
    if "--state" in options:  # of other candidates
        assert prune(source, *options, "--fill", "deci") == 2
        assert "of another choice of candidates" in " ".join(capsys.readouterr().err.split())
        options[-1] += ", deci"
    assert prune(source, *options, "--fill", "deci") == 0
    decision = load_decision(source / "out")
    assert len(decision.removed) == 2 and Branch("attention", 0) not in decision.removed
    report = json.loads((source / "out" / "pyprune.json").read_text())
    assert any("attention of layer 0 was no candidate" in note for note in report["notes"])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda layers: layers[0].self_attn.o_proj.weight.data.zero_(),
         "attention of the first layer is removed"),
        (lambda layers: layers[3].self_attn.register_module("extra", torch.nn.Linear(2, 2)),
         r"layers\.3: DeciLM has no self_attn\.extra\.bias"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_said_before_the_search(source, change, words, monkeypatch):
    model = load(source / "in")
    change(model.model.layers)
    monkeypatch.setattr(Checkpoint, "load_model", lambda *_: model)
    monkeypatch.setattr(run, "run_search", lambda *_: pytest.fail("it searches"))
    config = StructureConfig("llm-drop", count=1, fill="deci")
    with pytest.raises(UserError, match=words):
        run.prune_structure_checkpoint(source / "in", source / "out", config, batches=[IDS])


def test_bad_requests(source, capsys):
    config = StructureConfig("llm-drop", count=1, fill="deci")
    with pytest.raises(UserError, match="expected packed or zeros for a model in memory"):
        prune_structure(load(source / "in"), [IDS], config)
    arguments = ["compress", str(source / "in"), "-o", str(source / "out"), "--format", "deci"]
    assert cli.main([*arguments, "--values", "int8"]) == 2
    assert "--format deci: expected no --choose" in capsys.readouterr().err
    save_model(tiny_model("qwen3", vocab_size=258), byte_tokenizer(), source / "qwen3")
    (source / "in").rename(source / "was")
    (source / "qwen3").rename(source / "in")
    assert prune(source, "-m", "blockpruner", "--count", "1", "--fill", "deci") == 2
    error = capsys.readouterr().err
    assert "got qwen3: DeciLM has no norms of queries" in error and error.count("\n") == 1
    assert not (source / "out").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["block_configs"].pop(), r"expected no tensor model\.layers\.3"),
        (lambda c: c["block_configs"][0]["attention"].update(no_op=True),
         r"expected no tensor model\.layers\.0\.(self_attn|input_layernorm)"),
        (lambda c: c.pop("block_configs"), "expected block_configs of a DeciLM"),
        (lambda c: c["block_configs"][1]["attention"].update(no_op=False, n_heads_in_group=2),
         "self_attn.* is missing"),
        (lambda c: c["block_configs"][0]["ffn"].update(ffn_mult=ffn_mult(256, 32)),
         r"layers\.0\.mlp.* expected shape .256, 32., got .512, 32."),
        (lambda c: c["block_configs"][0]["attention"].update(n_heads_in_group=4),
         r"layers\.0\.self_attn\.k_proj.*: expected shape"),
        (lambda c: c["block_configs"][0]["ffn"].update(replace_with_linear=True), "replace_with"),
        (lambda c: c.update(hidden_size="wide"), "expected|cannot be used"),
    ],
)  # fmt: skip
def test_damaged_directories_are_refused(tmp_path, change, words):
    model = model_of("mistral")
    repack(ResidualGraph.of(model), branches("A1 M2"))
    folder, config = written(model, tmp_path / "out")
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        stock_tensors(folder)
