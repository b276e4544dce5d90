"""What is around a call (autocast, inference mode, compiled modules, gradients, adapters, offloaded
parameters) does not change what it does, or is refused by name."""

from contextlib import nullcontext
from functools import cache

import accelerate
import peft
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import tiny_model, tiny_tokens

from pyprune import StructureConfig, WidthConfig, prune, prune_structure, prune_width
from pyprune.config import CalibrationConfig
from pyprune.eigendamage.config import EigenDamageConfig
from pyprune.eigendamage.run import prune_eigendamage
from pyprune.errors import UserError
from pyprune.heal import HealConfig, heal_model

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False}


def tokens():
    return [tiny_tokens(8, 32, seed) for seed in range(2)]


def structure(method, **more):
    return lambda model: prune_structure(
        model, tokens(), StructureConfig(method=method, count=2, **more)
    )


def width(method):
    return lambda model: prune_width(model, tokens(), WidthConfig(method=method, ratio=0.2))


RUNS = {
    "sparsegpt": lambda model: prune(model, tokens(), "sparsegpt", 0.5),
    "gblm": lambda model: prune(model, tokens(), "gblm", 0.5),
    "obs": lambda model: prune(model, tokens(), "obs", 0.5),
    "besa": lambda model: prune(
        model, tokens(), "wanda", 0.5, allocation="besa", allocation_options={"steps": 2}
    ),
    "llm-surgeon": lambda model: prune(
        model, tokens(), "llm-surgeon", 0.5, method_options={"shots": 2}
    ),
    "eigendamage": lambda model: prune_eigendamage(
        model, tokens(), EigenDamageConfig(sparsity=0.3)
    ),
    "blockpruner": structure("blockpruner"),
    "llm-streamline": structure("llm-streamline"),
    "wanda-sp": width("wanda-sp"),
    "slicegpt": width("slicegpt"),
    "heal": lambda model: heal_model(model, tokens(), HealConfig(steps=2)),
}


def deep(**more):
    return tiny_model("llama", num_hidden_layers=4, **more)


def assert_same(model, wanted):
    found = model.state_dict()
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@cache
def pruned_alone(run):
    """The state of the model, which is not to be written to."""
    plain = deep()
    RUNS[run](plain)
    return plain.state_dict()


@pytest.mark.parametrize("around", ["autocast", "inference", "compiled blocks"])
@pytest.mark.parametrize("run", RUNS)
def test_the_result_is_that_of_a_call_by_itself(run, around):
    wanted, model = pruned_alone(run), deep()
    context = nullcontext()
    if around == "autocast":
        context = torch.autocast("cpu", dtype=torch.bfloat16)
    elif around == "inference":
        context = torch.inference_mode()
    else:
        for block in model.model.layers:
            block.compile(backend="eager")
    with context:
        RUNS[run](model)
        assert torch.is_inference_mode_enabled() == (around == "inference")
        assert torch.is_autocast_enabled("cpu") == (around == "autocast")
    assert_same(model, wanted)
    assert not any(p.is_inference() for p in model.parameters())
    loss = model(input_ids=tokens()[0], labels=tokens()[0]).loss
    loss.backward()  # it can be trained on
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("run", ["sparsegpt", "gblm", "blockpruner", "wanda-sp", "heal"])
def test_a_compiled_model_is_the_model_in_it(run):
    plain, model = deep(), deep()
    compiled = torch.compile(model, backend="eager")
    ids = tiny_tokens(2, 8, 7)
    before = compiled(input_ids=ids).logits
    report, wanted = RUNS[run](compiled), RUNS[run](plain)
    assert_same(model, plain.state_dict())
    if run in ("sparsegpt", "gblm"):
        assert [layer.name for layer in report.layers] == [layer.name for layer in wanted.layers]
        assert report.model == "LlamaForCausalLM"
    after = compiled(input_ids=ids).logits
    assert torch.equal(after, plain(input_ids=ids).logits)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("run", ["sparsegpt", "gblm", "eigendamage", "blockpruner", "slicegpt",
                                 "heal"])  # fmt: skip
@pytest.mark.parametrize("how", ["meta", "offloaded"])
def test_parameters_without_data_are_refused(run, how):
    model = deep().to("meta") if how == "meta" else accelerate.cpu_offload(deep())
    with pytest.raises(UserError, match=r"67 are on meta and have no data, the first is model\."):
        RUNS[run](model)


def test_magnitude_refuses_them_too():
    with pytest.raises(UserError, match="on meta"):
        prune(deep().to("meta"), None, "magnitude", 0.5)


@pytest.mark.parametrize("run", ["gblm", "llm-surgeon", "besa"])
def test_parameters_made_in_inference_mode_have_no_gradients(run):
    with torch.inference_mode():
        model = deep()
    with pytest.raises(UserError, match=r"made in torch\.inference_mode"):
        RUNS[run](model)
    report = prune(model, tokens(), "sparsegpt", 0.5)  # needs none
    assert report.sparsity == 0.5


@pytest.mark.parametrize("run", ["sparsegpt", "gblm", "llm-surgeon", "eigendamage"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_peft_are_not_pruned(run, dora):
    model = peft.get_peft_model(deep(), peft.LoraConfig(**LORA, use_dora=dora))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = RUNS[run](model)
    assert len(report.layers) == 4 * 7
    assert sum("base_layer" in layer.name for layer in report.layers) == 4 * 2
    for name, p in model.named_parameters():
        if "lora" in name:
            assert torch.equal(p, before[name]) and p.requires_grad, name
    if run == "eigendamage":
        return
    assert report.notes[-1] == (
        "adapters of peft beside 8 layers stay as they are: merged, they would fill the zeros"
    )
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert bool((base == 0).any())


@pytest.mark.parametrize("run", ["blockpruner", "slicegpt", "heal"])
def test_structure_is_not_removed_beside_adapters(run):
    model = peft.get_peft_model(deep(), peft.LoraConfig(**LORA))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"adapters of peft, got some at .*q_proj: merge"):
        RUNS[run](model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    RUNS[run](model.merge_and_unload())


@pytest.mark.parametrize("run", ["gblm", "llm-streamline", "eigendamage", "heal"])
def test_gradients_that_are_there_stay_and_are_not_added_to(run):
    plain, model = deep(), deep()
    RUNS[run](plain)
    held = {}
    for name, p in model.named_parameters():
        p.grad = held[name] = torch.full_like(p, 3.0)
        p.requires_grad_("proj" not in name)
    RUNS[run](model)
    assert_same(model, plain.state_dict())
    for name, p in model.named_parameters():
        assert p.grad is held[name] and bool((p.grad == 3).all()), name
        assert p.requires_grad == ("proj" not in name)


@pytest.mark.parametrize("run", ["sparsegpt", "llm-surgeon", "llm-streamline", "blockpruner",
                                 "slicegpt", "heal"])  # fmt: skip
def test_each_module_keeps_its_own_mode(run):
    """A model with one layer frozen in evaluation mode, say; or all of it is."""
    for mode in (True, False):
        model = deep().train(mode)
        model.model.layers[1].eval()
        before = {module: module.training for module in model.modules()}
        RUNS[run](model)
        for name, module in model.named_modules():
            assert module.training == before.get(module, mode), name


def test_healing_takes_a_tokenizer_too(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull model " * 100)
    training = CalibrationConfig(source=str(text), nsamples=8, seqlen=16, batch_size=4)
    model = tiny_model("llama", vocab_size=300)
    report = heal_model(model, byte_tokenizer(), HealConfig(steps=2, training=training))
    assert report.tokens == 2 * 4 * 15
    with pytest.raises(UserError, match="expected a tokenizer or batches, got none"):
        heal_model(model, None, HealConfig(steps=2))
    with pytest.raises(UserError, match=r"token ids in \[0, 300\), got"):
        heal_model(model, [torch.tensor([[1, 299], [2, 300]])] * 2, HealConfig(steps=2))
