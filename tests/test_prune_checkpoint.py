"""Checkpoints pruned block by block: what is written, what stays, what an error leaves behind."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.checkpoint import Checkpoint
from pyprune.config import PruneConfig
from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter
from pyprune.patterns import pruned_count
from pyprune.prune import prune, prune_checkpoint
from pyprune.report import Report


def tokens():
    return [tiny_tokens(8, 32, seed) for seed in range(2)]


def saved(folder, family="llama", dtype=torch.float32, **options):
    tiny_model(family).to(dtype).save_pretrained(folder / "in", **options)
    return folder / "in"


def linears(model):
    adapter = Adapter.of(model)
    return [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]


def assert_same_weights(model, twin):
    state = twin.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_the_model_pruned_in_memory(family, tmp_path):
    source = saved(tmp_path, family)
    config = PruneConfig(method="sparsegpt", pattern="2:4")
    report = prune_checkpoint(source, tmp_path / "out", config, batches=tokens())
    model = AutoModelForCausalLM.from_pretrained(source)
    in_memory = prune(model, tokens(), config=config)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(reloaded, model)
    ids = tiny_tokens()
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
    for layer, twin in zip(report.layers, in_memory.layers, strict=True):
        assert (layer.name, layer.zeros, layer.loss) == (twin.name, twin.zeros, twin.loss)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_global_scope_streams_too(method, tmp_path):
    source = saved(tmp_path)
    config = PruneConfig(method=method, sparsity=0.5, scope="global")
    report = prune_checkpoint(source, tmp_path / "out", config, batches=tokens())
    model = AutoModelForCausalLM.from_pretrained(source)
    prune(model, tokens(), config=config)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    assert sum(layer.zeros for layer in report.layers) == pruned_count(
        sum(layer.elements for layer in report.layers), 0.5
    )


def test_what_is_not_pruned_keeps_its_bytes(tmp_path):
    """In the checkpoint's own dtype, although the model runs in another one."""
    source = saved(tmp_path)
    config = PruneConfig(
        method="wanda", sparsity=0.5, scope="global", dtype="bfloat16", include=("*.layers.1.*",)
    )
    report = prune_checkpoint(source, tmp_path / "out", config, batches=tokens())
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert len(pruned) == 7 and before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value) == (name not in pruned)


def test_same_request_same_bytes(tmp_path):
    source = saved(tmp_path, "qwen3", max_shard_size="20KB")
    config = PruneConfig(method="sparsegpt", sparsity=0.5)
    for name in ("a", "b"):
        prune_checkpoint(source, tmp_path / name, config, batches=tokens())
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 1
    for name in files:
        first, second = ((tmp_path / x / name).read_bytes() for x in ("a", "b"))
        if name == "pyprune.json":
            first, second = json.loads(first), json.loads(second)
            assert first.pop("run").keys() == second.pop("run").keys()
        assert first == second, name


def test_report_and_card_are_in_the_output(tmp_path):
    source = saved(tmp_path)
    config = PruneConfig(method="wanda", pattern="2:4")
    report = prune_checkpoint(source, tmp_path / "out", config, batches=tokens())
    stored = Report.from_json((tmp_path / "out" / "pyprune.json").read_text())
    assert stored == report
    assert stored.model == "in" and stored.config == config
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "wanda 2:4" in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "pyprune.json").read_text()


def test_magnitude_asks_for_no_tokenizer(tmp_path):
    config = PruneConfig(method="magnitude", sparsity=0.5)
    report = prune_checkpoint(saved(tmp_path), tmp_path / "out", config)
    assert report.sparsity == 0.5 and report.calibration is None
    assert {"forward", "total"} <= report.run.seconds.keys()


def test_a_checkpoint_that_cannot_be_streamed_is_loaded_whole(tmp_path, monkeypatch):
    source = saved(tmp_path)
    monkeypatch.setattr(Checkpoint, "streaming_obstacle", lambda self: "said the test")
    built = []
    load = Checkpoint.load_model
    monkeypatch.setattr(
        Checkpoint, "load_model", lambda self, *a, **k: built.append(1) or load(self, *a, **k)
    )
    config = PruneConfig(method="sparsegpt", sparsity=0.5)
    report = prune_checkpoint(source, tmp_path / "out", config, batches=tokens())
    assert built
    assert report.notes == ("loaded whole, not streamed block by block: said the test",)
    assert Report.from_json((tmp_path / "out" / "pyprune.json").read_text()).notes == report.notes
    assert "said the test" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(source)
    prune(model, tokens(), config=config)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_model_code_of_a_checkpoint_runs_only_if_trusted(tmp_path):
    source = saved(tmp_path)
    (source / "own.py").write_text(CUSTOM_CODE)
    values = json.loads((source / "config.json").read_text())
    values |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (source / "config.json").write_text(json.dumps(values))
    config = PruneConfig(method="magnitude", sparsity=0.5)
    expect("unknown architecture: model_type 'own'", tmp_path, config)
    report = prune_checkpoint(source, tmp_path / "out", config, trust_remote_code=True)
    assert report.sparsity == 0.5
    assert (tmp_path / "out" / "own.py").read_text() == CUSTOM_CODE
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"


def expect(message, folder, config, error=UserError, **options):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message) as caught:
        prune_checkpoint(folder / "in", folder / "out", config, **options)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:5"}, "model.layers.0.self_attn.q_proj: expected a number of inputs that 5"),
        ({"sparsity": 0.5, "include": ("x",)}, "include: no layer matches 'x'"),
        ({"sparsity": 0.5}, "its tokenizer does not load"),
    ],
)
def test_bad_requests_leave_nothing_behind(options, message, tmp_path):
    saved(tmp_path)
    expect(message, tmp_path, PruneConfig(method="wanda", **options))


def test_a_layer_that_fails_leaves_nothing_behind(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "in")
    config = PruneConfig(method="wanda", sparsity=0.5)
    expect("model.layers.1.mlp.gate_proj: ", tmp_path, config, LayerError, batches=tokens())


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    source = saved(tmp_path)

    def interrupt(event):
        if event.block == 1:
            raise KeyboardInterrupt

    config = PruneConfig(method="wanda", sparsity=0.5)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "out", config, interrupt, batches=tokens())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_that_is_not_empty_is_left_alone(tmp_path):
    saved(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    message = "expected a new or an empty directory"
    expect(message, tmp_path, PruneConfig(method="magnitude", sparsity=0.5))
