import pytest
import torch
from tiny_models import MIXTURES, MOE_FAMILIES, tiny_model, tiny_tokens

from pyprune.models import experts as experts_module
from pyprune.models.adapter import Adapter
from pyprune.models.experts import expert_count, gate_rows, is_fused, observed, projections


def experts_of(family, **overrides):
    model = tiny_model(family, **overrides)
    model.set_experts_implementation("eager")
    adapter = Adapter.of(model)
    return model, [e for i in range(len(adapter.blocks)) for e in adapter.experts(i)]


def routing(tokens, experts, gen, k=2):
    scores = torch.rand(tokens, experts, generator=gen)
    weights, index = scores.topk(k)
    return index, weights


def test_routes_are_in_the_order_of_the_eager_forward_and_asked_for_once(monkeypatch):
    """Each question to a GPU is a wait, and some layers have 128 experts."""
    index = torch.randint(-1, 8, (50, 3), generator=torch.Generator().manual_seed(0))
    index[index == 4] = 5  # nobody goes to 4; 6 and 7 are none of the experts'
    want = [torch.where(index.T.eq(e)) for e in range(6)] + [torch.where(index.T.ge(6))]
    asked, ask = [], torch.Tensor.tolist
    monkeypatch.setattr(torch, "where", None)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: asked.append(1) or ask(t))
    got = experts_module._routes(index, 6)
    assert len(asked) == 1 and len(got) == 7
    for one, other in zip(got, want, strict=True):
        assert all(map(torch.equal, one, other))
    assert all(len(token) == 0 for _, token in experts_module._routes(index[:0], 6))


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_to_the_eager_forward_bit_for_bit(family, dtype):
    _, (experts, *_) = experts_of(family)
    experts.to(dtype)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(37, 32, generator=gen).to(dtype)
    index, weights = routing(37, 4, gen)
    weights = weights.to(dtype)
    with torch.no_grad():
        want = experts(x, index, weights)
        with observed(experts):
            assert torch.equal(experts(x, index, weights), want)
        assert torch.equal(experts(x, index, weights), want)


def calls_of(model):
    """Every fused experts module of the model with what it is given and returns."""
    calls = []
    handles = [
        module.register_forward_hook(lambda *call: calls.append(call))
        for module in model.modules()
        if is_fused(module)
    ]
    with torch.no_grad():
        model(tiny_tokens())
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_every_kind_of_experts_is_equal_to_its_eager_forward(family, dtype):
    model = tiny_model(family).to(dtype)
    model.set_experts_implementation("eager")
    calls = calls_of(model)
    assert len(calls) == (1 if family in ("deepseek_v2", "deepseek_v32", "nemotron_h") else 2)
    for experts, given, want in calls:
        seen = []
        with torch.no_grad(), observed(experts, lambda _m, name, _i, seen=seen: seen.append(name)):
            got = experts(*given)
        assert seen == list(projections(experts))
        if family == "nemotron_h" and dtype is torch.bfloat16:  # it adds up in fp32
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
        else:
            assert torch.equal(got, want)


def test_experts_that_give_back_what_they_get():
    model = tiny_model("longcat_flash")
    (call, *_) = calls_of(model)
    experts, (x, index, weights), want = call
    count = expert_count(experts)
    assert bool((index >= count).any()) and bool((index < count).any())
    with torch.no_grad(), observed(experts):
        assert torch.equal(experts(x, index, weights), want)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
def test_gate_rows_are_what_a_hidden_channel_is_made_of(family):
    (experts, given, _), *_ = calls_of(tiny_model(family))
    first = projections(experts)[0]
    rows, channels = gate_rows(experts), []

    def keep(e, x):
        channels.append(x)
        return x

    def run():
        channels.clear()
        with torch.no_grad(), observed(experts, hidden=keep):
            experts(*given)
        return torch.cat(channels)

    before, k = run(), 3
    weight = getattr(experts, first).data
    weight = weight.mT if experts.__dict__.get("is_transposed", family == "llama4_text") else weight
    weight[:, rows[k]] += 1
    changed = (run() != before).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [k]


def test_other_parameters_make_experts_unknown():
    (experts, *_), *_ = calls_of(tiny_model("olmoe"))
    assert is_fused(experts)
    experts.scale = torch.nn.Parameter(torch.ones(4))
    assert not is_fused(experts)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_equal_within_the_model_to_its_default_implementation(family):
    model, experts = experts_of(family)
    ids = tiny_tokens()
    with torch.no_grad():
        eager = model(ids).logits
        with observed(experts[0]):
            assert torch.equal(model(ids).logits, eager)
            model.set_experts_implementation("grouped_mm")
        torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=1e-5)


def test_reports_every_experts_input_and_uses_weights_changed_meanwhile():
    _, (experts, *_) = experts_of("mixtral")
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([[0, 1], [1, 0], [0, 3], [3, 0], [1, 3], [0, 1]])  # nobody asks for 2
    weights = torch.rand(6, 2)
    seen = {}

    def observe(module, projection, inputs):
        assert module is experts
        seen[projection] = inputs
        getattr(experts, projection).data.mul_(0.5)

    with torch.no_grad(), observed(experts, observe):
        got = experts(x, index, weights)
    want = experts(x, index, weights)
    assert torch.equal(got, want)
    assert list(seen) == ["gate_up_proj", "down_proj"]
    for inputs in seen.values():
        assert [i.expert for i in inputs] == [0, 1, 2, 3]
        for i in inputs:
            assert sorted(i.rows.tolist()) == (index == i.expert).any(1).nonzero()[:, 0].tolist()
            assert len(i.x) == len(i.rows)
    assert seen["gate_up_proj"][2].x.shape == (0, 32)
    assert torch.equal(seen["gate_up_proj"][3].x, x[seen["gate_up_proj"][3].rows])


def test_forward_is_restored_after_an_exception():
    _, (experts, *_) = experts_of("qwen3_moe")
    with pytest.raises(KeyboardInterrupt), observed(experts):
        assert "forward" in experts.__dict__
        raise KeyboardInterrupt
    assert "forward" not in experts.__dict__

    def mine(*args):
        return args

    experts.forward = mine
    with observed(experts):
        assert experts.forward is not mine
    assert experts.forward is mine
