"""LoRA beside compressed layers, and what asks them for a dense weight."""

import warnings

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from pyprune.errors import UserError
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.embedding import StoredEmbedding
from pyprune.sparse.factored import FactoredLinear
from pyprune.sparse.linear import SparseLinear
from pyprune.sparse.load import load

peft = pytest.importorskip("peft")

from pyprune.integrations.peft import beside_compressed  # noqa: E402

IDS = tiny_tokens(2, 8)
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module", params=["bitmap", "sparse24", "int8", "coded"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("compressed")
    model = tiny_model("llama", tie_word_embeddings=True)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data[:, ::2] = 0
                if request.param == "bitmap":
                    module.weight.data[:, 1] = 0
                    module.weight.data[0] = 1.0
    model.save_pretrained(made / "dense")
    more = {
        "int8": {"int8": True, "embeddings": "int8"},
        "coded": {"embeddings": "coded", "dtype": torch.bfloat16},
    }
    compress_checkpoint(made / "dense", made / "small", **more.get(request.param, {}))
    return made / "small"


def config_of(**more):
    return peft.LoraConfig(target_modules=TARGETS, r=4, **more)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.SGD(trained, lr=0.3), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


def test_lora_trains_beside_compressed_layers(folder, tmp_path):
    model = load(folder)
    assert isinstance(model.model.layers[0].self_attn.q_proj, SparseLinear)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unsupported")
        wrapped = peft.get_peft_model(model, beside_compressed(config_of(task_type="CAUSAL_LM")))
    torch.testing.assert_close(logits(wrapped), before, rtol=0, atol=0)
    losses = train(wrapped)
    assert losses[-1] < losses[0]
    after = logits(wrapped)
    assert not torch.equal(after, before)
    wrapped.save_pretrained(tmp_path)
    config = beside_compressed(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path, config=config)
    torch.testing.assert_close(logits(again), after)
    with pytest.raises(UserError, match="a SparseLinear has no dense weight to merge into"):
        again.merge_and_unload()
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), before)


def test_the_adapter_is_that_of_the_dense_model(folder):
    """The same B A gives what peft adds to the decompressed layer."""
    config = beside_compressed(config_of(init_lora_weights=False))
    wrapped = peft.get_peft_model(load(folder), config)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    base, scale = layer.get_base_layer(), layer.scaling["default"]
    low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    want = x @ (base.decompress() + scale * low).T + base.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_thin_factors():
    model = tiny_model("llama")
    linear = model.model.layers[0].self_attn.q_proj
    gen = torch.Generator().manual_seed(0)
    up, down = torch.randn(32, 4, generator=gen), torch.randn(4, 32, generator=gen)
    model.model.layers[0].self_attn.q_proj = FactoredLinear.of(up, down, linear)
    wrapped = peft.get_peft_model(model, beside_compressed(config_of()))
    losses = train(wrapped)
    assert losses[-1] < losses[0]


def test_unregistered_peft_refuses_by_name(folder):
    with pytest.raises(ValueError, match=r"Target module SparseLinear.* is not supported"):
        peft.get_peft_model(load(folder), config_of())


def test_what_needs_a_dense_weight_says_to_decompress(folder):
    model = load(folder)
    linear, embedding = model.model.layers[0].self_attn.q_proj, model.get_input_embeddings()
    said = r"SparseLinear: its weight is compressed.*`pyprune decompress` makes it so"
    with pytest.raises(UserError, match=said):
        _ = linear.weight
    assert not hasattr(linear, "weight") and getattr(linear, "weight", None) is None
    assert linear.qweight is linear.values
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        _ = linear.weights
    if isinstance(embedding, StoredEmbedding):
        with pytest.raises(UserError, match="StoredEmbedding: its weight is compressed"):
            model.resize_token_embeddings(80)
    else:
        model.resize_token_embeddings(80)
        assert logits(model).shape[-1] == 80
