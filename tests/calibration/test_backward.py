"""The backward pass against plain autograd on every family, and what it refuses."""

import pytest
import torch
from tiny_models import FAMILIES, MOE_FAMILIES, tiny_model, tiny_tokens

from pyprune.calibration import head
from pyprune.calibration.backward import PassOptions, backward_pass
from pyprune.calibration.tokens import Batch
from pyprune.errors import LayerError, UserError
from pyprune.models import running
from pyprune.models.adapter import Adapter


def model64(family="llama", **overrides):
    model = tiny_model(family, **overrides).double()
    model.config._experts_implementation = "eager"  # the grouped product knows no fp64
    return model


def assert_close(got, want):
    # Norms and rotations are in fp32 in these models, whatever the rest is in.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.max()))


def refs_of(adapter):
    return [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]


class Sums:
    """Of one matrix: the gradients of single sequences, and what else a visit says."""

    def __init__(self):
        self.absolute, self.total, self.tokens, self.leaders = 0.0, 0.0, 0, set()

    def __call__(self, sample):
        gradient = sample.g.T @ sample.x
        self.absolute = self.absolute + gradient.abs() / sample.targets
        self.total = self.total + gradient
        self.tokens += len(sample.x)
        self.leaders.add(sample.leader)


def collect(model, batches, names=None, progress=None, **options):
    adapter = Adapter.of(model)
    visitors = {ref.name: Sums() for ref in refs_of(adapter) if names is None or ref.name in names}
    return visitors, backward_pass(adapter, batches, visitors, PassOptions(**options), progress)


def autograd(model, sequences):
    """Per matrix: sum over sequences of |gradient of the sequence's mean loss|, by autograd."""
    sums = {}
    for ids in sequences:
        model.zero_grad()
        # Not the model's own loss, which is in fp32 whatever the model is in.
        logits = model(input_ids=ids[None], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:]).backward()
        for ref in refs_of(Adapter.of(model)):
            owner = getattr(ref.module, ref.parameter)
            gradient = torch.zeros_like(owner) if owner.grad is None else owner.grad
            gradient = gradient if ref.index is None else gradient[ref.index]
            gradient = gradient.T if ref.transposed else gradient
            sums[ref.name] = sums.get(ref.name, 0.0) + gradient.abs()
    model.zero_grad()
    return sums


def hook_count(model):
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return hooks + sum("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "deepseek_v2", "llama4_text"])
def test_equals_autograd_sequence_by_sequence(family, checkpointing, monkeypatch):
    monkeypatch.setattr(running, "LOGITS_BYTES", 4 * 3 * 2 * 64)  # the head in pieces of 3 tokens
    model = model64(family)
    ids = tiny_tokens(3, 12)
    batches = [Batch(ids[:2]), Batch(ids[2:, :9])]
    got, report = collect(model, batches, checkpointing=checkpointing)
    want = autograd(model, [ids[0], ids[1], ids[2, :9]])
    assert got.keys() == want.keys()
    for name, sums in got.items():
        if sums.tokens == 0:
            assert not want[name].any(), name
            continue
        assert_close(sums.absolute, want[name])
    assert (report.sequences, report.targets) == (3, 11 + 11 + 8)


def test_gradients_pass_through_tied_parameters():
    """Embedding and head, and a matrix in two blocks; these have no visit of their own."""
    model = model64("llama", tie_word_embeddings=True)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    got, _ = collect(model, [Batch(tiny_tokens(2, 12))])
    assert len(got) == 12 and not any("up_proj" in name for name in got)
    want = autograd(model, tiny_tokens(2, 12))
    for name, sums in got.items():
        assert_close(sums.absolute, want[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_padding_is_as_if_it_were_not_there(family):
    model = model64(family)
    ids, mask = tiny_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    for n, length in enumerate([12, 5, 2]):
        mask[n, length:] = 0
    got, report = collect(model, [Batch(ids, mask)])
    alone, single = collect(model, [Batch(ids[n : n + 1, :k]) for n, k in enumerate([12, 5, 2])])
    for name, sums in got.items():
        assert sums.tokens == alone[name].tokens
        if sums.tokens:
            assert_close(sums.absolute, alone[name].absolute)
    assert report.targets == single.targets == 11 + 4 + 1


def test_a_token_behind_a_hole_is_predicted_by_nothing():
    """Targets are counted as they are summed over: of five real tokens two follow a real one."""
    ids, mask = tiny_tokens(1, 8), torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1]])
    model, name = model64(), "model.layers.0.mlp.up_proj"
    adapter, visitors = Adapter.of(model), {name: Sums()}
    report = backward_pass(adapter, [Batch(ids, mask)], visitors)
    assert report.targets == 2
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits[[0, 3]], ids[0, [1, 4]]).backward()
    assert_close(visitors[name].absolute, model.get_submodule(name).weight.grad.abs())
    with pytest.raises(UserError, match=r"two tokens in a row .*, got 2"):
        apart = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0]])
        backward_pass(adapter, [Batch(ids, apart)], visitors)


def test_magnitudes_of_a_batch_are_not_those_of_its_sum():
    got, _ = collect(model64(), [Batch(tiny_tokens(2, 12))])
    for sums in got.values():
        assert (sums.absolute * 11 > sums.total.abs() * 1.01).any()


def test_leaders_are_the_first_to_read_a_tensor():
    got, _ = collect(model64(), [Batch(tiny_tokens(2, 12)), Batch(tiny_tokens(1, 9))])
    at = "model.layers.1."
    leaders = {name[len(at) :]: s.leaders for name, s in got.items() if name.startswith(at)}
    assert leaders == {
        "self_attn.q_proj": {at + "self_attn.q_proj"},
        "self_attn.k_proj": {at + "self_attn.q_proj"},
        "self_attn.v_proj": {at + "self_attn.q_proj"},
        "self_attn.o_proj": {at + "self_attn.o_proj"},
        "mlp.gate_proj": {at + "mlp.gate_proj"},
        "mlp.up_proj": {at + "mlp.gate_proj"},
        "mlp.down_proj": {at + "mlp.down_proj"},
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_behind(checkpointing):
    model = model64("mixtral").train()
    frozen = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    hooks = hook_count(model)
    collect(model, [Batch(tiny_tokens())], checkpointing=checkpointing)
    assert hook_count(model) == hooks
    assert all(p.grad is None for p in model.parameters())
    assert [p is not frozen for p in model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert all(m.training for m in model.modules())


def test_no_weight_gradient_and_nothing_below_the_first_visited_block():
    model = model64()
    first = []
    hook = model.model.layers[0].register_forward_hook(
        lambda module, args, out: first.append(out if torch.is_tensor(out) else out[0])
    )
    collect(model, [Batch(tiny_tokens())], names={"model.layers.1.mlp.down_proj"})
    hook.remove()
    assert [out.requires_grad for out in first] == [False, False]


def test_restores_after_an_error_in_a_visitor():
    model = model64()
    hooks = hook_count(model)

    def visitor(sample):
        raise RuntimeError("out of luck")

    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(RuntimeError, match="out of luck"):
        backward_pass(Adapter.of(model), [Batch(tiny_tokens())], {name: visitor})
    assert hook_count(model) == hooks
    assert all(p.requires_grad for p in model.parameters())


def test_loss_scale_is_divided_out():
    model = tiny_model("llama")
    plain, _ = collect(model, [Batch(tiny_tokens())])
    scaled, _ = collect(model, [Batch(tiny_tokens())], loss_scale=1024.0)
    for name, sums in plain.items():
        torch.testing.assert_close(scaled[name].total, sums.total, rtol=1e-4, atol=1e-5)


def test_bfloat16_close_to_single():
    model = tiny_model("llama")
    want, _ = collect(model, [Batch(tiny_tokens(4, 16))])
    got, _ = collect(model.bfloat16(), [Batch(tiny_tokens(4, 16))])
    for name, sums in want.items():
        error = (got[name].absolute - sums.absolute).norm() / sums.absolute.norm()
        assert error < 0.1, name


@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e4])
def test_fp16_close_to_single(factor, monkeypatch):
    """Whether gradients are near the smallest numbers of fp16 or beyond the largest."""
    summed = head._summed
    monkeypatch.setattr(head, "_summed", lambda *given: factor * summed(*given))
    model = tiny_model("llama").half()
    batches = [Batch(tiny_tokens(4, 16)), Batch(tiny_tokens(2, 8, seed=1))]
    got, _ = collect(model, batches)
    want, _ = collect(model.float(), batches)
    for name, sums in want.items():
        error = (got[name].absolute - sums.absolute).norm() / sums.absolute.norm()
        assert error < 0.02, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fp16_scale_leaves_each_visit_alone(checkpointing):
    """The run that finds it is not seen by visitors, progress or the report."""
    model, seen = tiny_model("mixtral").half(), []
    batches = [Batch(tiny_tokens(1, 16)), Batch(tiny_tokens(2, 8))]
    options = {"checkpointing": checkpointing, "progress": lambda done, _: seen.append(done)}
    got, report = collect(model, batches, **options)
    want, other = collect(model.float(), batches, checkpointing=checkpointing)
    assert seen == [1, 2, 3] and report == other
    assert {n: s.tokens for n, s in got.items() if ".experts." not in n} == {
        n: s.tokens for n, s in want.items() if ".experts." not in n
    }
    assert hook_count(model) == 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_dead_layer_beside_others_is_no_error(dtype):
    model = model64().to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    got, _ = collect(model, [Batch(tiny_tokens())])
    dead = [name for name, sums in got.items() if not sums.total.any()]
    assert dead == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_expert_without_tokens_is_never_visited(family):
    model = model64(family)
    adapter = Adapter.of(model)
    experts = adapter.experts(1)[0]

    def pre(module, args, kwargs):
        hidden, chosen, shares = args
        return (hidden, chosen.masked_fill(chosen == 3, 0), shares), kwargs

    hook = experts.register_forward_pre_hook(pre, with_kwargs=True)
    got, _ = collect(model, [Batch(tiny_tokens())])
    hook.remove()
    unseen = [name for name, sums in got.items() if not sums.leaders]
    assert [n.rsplit(".", 1)[1] for n in unseen] == ["3", "3"]


def test_refuses():
    model = model64()
    with pytest.raises(UserError, match=r"batch 1, sequence 0: expected at least two tokens.*1"):
        collect(model, [Batch(tiny_tokens()), Batch(tiny_tokens(1, 1))])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    with pytest.raises(UserError, match="batch 0, sequence 1: expected at least two"):
        collect(model, [Batch(tiny_tokens(2, 4), mask)])
    with pytest.raises(UserError, match="at least one sequence"):
        collect(model, [])
    with pytest.raises(UserError, match="visitors"):
        backward_pass(Adapter.of(model), [Batch(tiny_tokens())], {"lm_head": Sums()})
    with pytest.raises(UserError, match="LlamaModel: expected a causal language model"):
        collect(model.model, [Batch(tiny_tokens())])


def test_nan_gradient_names_the_layer():
    model = model64()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(LayerError, match=r"model\.layers\.1\.\S+: expected finite gradients"):
        collect(model, [Batch(tiny_tokens())])


def test_in_fp16_a_dead_layer_beside_tiny_gradients_is_refused(monkeypatch):
    """It may be one whose gradient fp16 does not hold."""
    summed = head._summed
    monkeypatch.setattr(head, "_summed", lambda *given: 1e-8 * summed(*given))
    model = tiny_model("llama").half()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(LayerError, match=r"layers\.1\.mlp\.\w+: expected a gradient.*2 of 14"):
        collect(model, [Batch(tiny_tokens())])


def test_vanished_gradient_names_a_layer():
    model = model64(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(LayerError, match=r"model\.layers\.\S+: expected a gradient, got zero"):
        collect(model, [Batch(tiny_tokens())])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("again", [lambda x: 2 * x, lambda x: torch.ones_like(x[:, :1])])
def test_a_matrix_that_runs_twice_is_refused(again, checkpointing):
    """Also where the second run reads a constant, so that no gradient comes to its output."""
    model = model64()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x) * mlp.up_proj(again(x)))
    names = {"model.layers.0.mlp.up_proj"}
    with pytest.raises(LayerError, match=r"mlp\.up_proj: runs more than once"):
        collect(model, [Batch(tiny_tokens())], names=names, checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("again", [lambda x: 2 * x, torch.ones_like])
def test_experts_that_run_twice_are_refused(again, checkpointing):
    model = model64("mixtral")
    experts = model.model.layers[0].mlp.experts
    moe, plain = model.model.layers[0].mlp, model.model.layers[0].mlp.forward
    routing = []
    experts.register_forward_pre_hook(lambda module, args: routing.append(args[1:]))

    def forward(x):
        out = plain(x)
        return out + experts(again(x).flatten(0, 1), *routing[-1]).view_as(x)

    moe.forward = forward
    names = {f"model.layers.0.mlp.experts.down_proj.{e}" for e in range(4)}
    with pytest.raises(LayerError, match=r"down_proj\.0: runs more than once"):
        collect(model, [Batch(tiny_tokens())], names=names, checkpointing=checkpointing)


def test_progress_counts_sequences():
    seen = []
    batches = [Batch(tiny_tokens()), Batch(tiny_tokens(1, 5))]
    collect(model64(), batches, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
