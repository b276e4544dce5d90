"""Whole models pruned in memory: every family, method and pattern, and what must not change."""

import itertools

import pytest
import torch
from forked import run_forked
from tiny_models import FAMILIES, HIDDEN, MOE_FAMILIES, VOCAB, tiny_model, tiny_tokens
from torch import nn
from transformers import BatchEncoding

from pyprune.calibration.tokens import Batch
from pyprune.config import PruneConfig
from pyprune.errors import LayerError, UserError
from pyprune.methods import METHODS
from pyprune.models.adapter import Adapter
from pyprune.patterns import NM, Unstructured, pruned_count
from pyprune.prune import prune

PATTERNS = [Unstructured(0.5), Unstructured(0.3, "row"), Unstructured(0.6, "layer"), NM(2, 4)]
CALIBRATED = [m for m in METHODS if METHODS[m].statistic]
# One token has no next one and so no gradient; test_gradient_methods has these methods' experts.
FORWARD_ONLY = [m for m in CALIBRATED if METHODS[m].gradient is None]


def tokens(rows=8, length=32):
    """Enough of them that every expert of the tiny models sees its share."""
    return [tiny_tokens(rows, length, seed) for seed in range(2)]


def linears(model):
    adapter = Adapter.of(model)
    return [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]


def assert_pruned(w, pattern, method):
    zero = w == 0
    if isinstance(pattern, NM):
        counts = zero.reshape(len(w), -1, pattern.m).sum(-1)
        assert bool((counts == pattern.m - pattern.n).all())
    elif (pattern.scope or METHODS[method].default_scope) == "row":
        assert bool((zero.sum(1) == pruned_count(w.shape[1], pattern.sparsity)).all())
    else:
        assert int(zero.sum()) == pruned_count(w.numel(), pattern.sparsity)


def assert_rest_unchanged(model, before, refs):
    pruned = {ref.parameter_name for ref in refs}
    after = model.state_dict()
    assert pruned < set(before) and after.keys() == before.keys()
    for name, value in before.items():
        if name not in pruned:
            assert torch.equal(after[name], value), name


def every_two_of_three():
    """All families, methods and patterns. Every family meets every method, and every pattern both;
    other triples are slow: methods see matrices, whichever family these are of."""
    for i, family in enumerate(FAMILIES):
        for j, method in enumerate(METHODS):
            for k, pattern in enumerate(PATTERNS):
                slow = () if (i + j + k) % len(PATTERNS) == 0 else pytest.mark.slow
                named = f"{family}-{method}-{pattern}"
                yield pytest.param(family, method, pattern, marks=slow, id=named)


@pytest.mark.parametrize(("family", "method", "pattern"), list(every_two_of_three()))
def test_every_family_method_and_pattern(family, method, pattern):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # Few long sequences: gradients take a pass each.
    report = prune(model, tokens(2, 128), method, pattern)
    refs = linears(model)
    assert [layer.name for layer in report.layers] == sorted(
        (ref.name for ref in refs), key=[layer.name for layer in report.layers].index
    )
    assert len(report.layers) == len(refs)
    for ref in refs:
        assert_pruned(ref.weight(), pattern, method)
    assert_rest_unchanged(model, before, refs)
    assert bool(model(tiny_tokens()).logits.isfinite().all())


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_global_scope(family, method):
    model = tiny_model(family)
    with torch.no_grad():  # so that layers differ in what they lose
        for i, ref in enumerate(linears(model)):
            ref.weight().mul_(1 + i / 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = prune(model, tokens(), method, Unstructured(0.5, "global"))
    refs = linears(model)
    elements = sum(ref.weight().numel() for ref in refs)
    zeros = sum(int((ref.weight() == 0).sum()) for ref in refs)
    assert zeros == pruned_count(elements, 0.5)
    assert len({layer.sparsity for layer in report.layers}) > 2
    assert report.sparsity == zeros / elements
    assert_rest_unchanged(model, before, refs)


def test_global_magnitude_is_one_sort_over_all_layers():
    model = tiny_model("llama")
    refs = linears(model)
    flat = torch.cat([ref.weight().flatten() for ref in refs]).abs()
    order = flat.sort(stable=True).indices[: pruned_count(len(flat), 0.4)]
    want = torch.ones_like(flat, dtype=torch.bool)
    want[order] = False
    prune(model, None, "magnitude", Unstructured(0.4, "global"))
    assert torch.equal(torch.cat([ref.weight().flatten() for ref in refs]) != 0, want)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda", "update": "sequential", "sparsity": 0.5},
        {"method": "wanda", "update": "iterative", "pattern": "2:4"},
        {"method": "magnitude", "update": "sequential", "pattern": "2:4"},
        {"method": "wanda", "score_mass": True, "sparsity": 0.5},
        {"method": "wanda", "score_mass": True, "update": "sequential", "sparsity": 0.5},
    ],
    ids=str,
)
def test_variants(options):
    report = prune(tiny_model("llama"), tokens(), **options)
    for layer in report.layers:
        assert layer.zeros == pruned_count(layer.elements, 0.5)
        updated = options.get("update", "none") != "none"
        if updated:
            assert layer.relative_error_after < layer.relative_error_before_update
            assert layer.damping == 0.01 and layer.loss > 0 and layer.error_basis == "gram"
        else:
            assert layer.relative_error_after == pytest.approx(layer.relative_error_before_update)
            assert layer.damping is None and layer.error_basis == "column norms"


def test_reference_count_prunes_one_more():
    for options, extra in (
        ({"method": "magnitude"}, 1),
        ({"method": "sparsegpt", "block_size": 16}, 2),
    ):
        model = tiny_model("llama")
        prune(model, tokens(), sparsity=0.5, reference_count=True, include=["*q_proj"], **options)
        w = model.model.layers[0].self_attn.q_proj.weight
        assert int((w == 0).sum()) == w.numel() // 2 + extra


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        *((method, Unstructured(0.5, "row")) for method in METHODS),
        *itertools.product(["wanda", "sparsegpt"], [Unstructured(0.5, "global"), NM(2, 4)]),
    ],
    ids=str,
)
def test_preserve_zeros(method, pattern):
    """Every method at the other patterns: test_preserve_mask, what may stay is one mask by then."""
    model = tiny_model("llama")
    prune(model, tokens(), "magnitude", 0.3)
    zeros = {ref.name: ref.weight() == 0 for ref in linears(model)}
    report = prune(model, tokens(), method, pattern, preserve_zeros=True)
    for ref in linears(model):
        assert not bool((zeros[ref.name] & (ref.weight() != 0)).any())
    if pattern == Unstructured(0.5, "global"):
        assert report.sparsity == 0.5


def test_what_the_sweep_did_is_reported():
    model = tiny_model("llama")
    inputs = []
    layer = model.model.layers[0].self_attn.q_proj
    w = layer.weight.detach().clone()
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for batch in tokens():
        model(batch)
    hook.remove()
    x = torch.cat(inputs).detach().double()
    report = prune(model, tokens(), "sparsegpt", "2:4").layers[0]
    change = layer.weight.detach().double() - w

    def energy(d):
        return float((x @ d.T).square().sum())

    assert report.name == "model.layers.0.self_attn.q_proj"
    assert report.shape == (HIDDEN, HIDDEN) and report.tokens == len(x)
    assert (report.method, report.pattern, report.error_basis) == ("sparsegpt", "2:4", "gram")
    assert report.sparsity == 0.5 and report.zeros == w.numel() // 2
    assert report.relative_error_after == pytest.approx(
        energy(change) / energy(w.double()), rel=1e-4
    )
    zeroed = energy((w * (layer.weight == 0)).double()) / energy(w.double())
    assert report.relative_error_before_update == pytest.approx(zeroed, rel=1e-4)
    assert report.relative_error_after < report.relative_error_before_update
    # Twice the loss is the damped squared error per token.
    damped = energy(change) / len(x)
    damped += 0.01 * float(x.square().sum(0).mean()) / len(x) * float(change.square().sum())
    assert 2 * report.loss == pytest.approx(damped, rel=1e-4)


def test_report_says_what_was_run():
    config = PruneConfig(method="wanda", pattern="2:4")
    report = prune(tiny_model("llama"), tokens(), config=config)
    assert report.config == config and report.model == "LlamaForCausalLM"
    assert {"pyprune", "torch", "transformers", "python"} == report.versions.keys()
    assert report.calibration.tokens == 2 * 8 * 32 and report.calibration.sequences == 16
    assert report.run.seconds["total"] > 0 and report.run.peak_rss_bytes > 0
    assert all(layer.seconds > 0 for layer in report.layers)


def test_same_input_same_bytes():
    first, second = tiny_model("qwen3"), tiny_model("qwen3")
    reports = [prune(m, tokens(), "sparsegpt", 0.5) for m in (first, second)]
    assert reports[0].calibration == reports[1].calibration
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_magnitude_needs_no_calibration_and_runs_nothing():
    model = tiny_model("llama")
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    report = prune(model, method="magnitude", pattern=0.5)
    assert not ran and report.calibration is None
    assert report.layers[0].tokens == 0 and report.layers[0].relative_error_after is None


def test_batches_come_in_many_shapes():
    ids = tiny_tokens(4, 16)
    reports = [
        prune(tiny_model("llama"), data, "sparsegpt", 0.5)
        for data in (
            [ids],
            [ids.int()],
            list(ids),
            [Batch(ids, None)],
            [{"input_ids": ids}],
            [BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})],
            (batch for batch in [ids[:2], ids[2:]]),
        )
    ]
    for report in reports:
        assert report.calibration.tokens == 64
        assert report.layers[0].tokens == 64


def test_padding_does_not_count():
    ids = tiny_tokens(4, 16)
    padded = torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 5, dtype=torch.long)], dim=1)
    plain, other = tiny_model("llama"), tiny_model("llama")
    prune(plain, [ids], "sparsegpt", 0.5)
    report = prune(other, [{"input_ids": padded, "attention_mask": mask}], "sparsegpt", 0.5)
    assert report.calibration.tokens == 64 and report.layers[0].tokens == 64
    for ref, twin in zip(linears(plain), linears(other), strict=True):
        torch.testing.assert_close(ref.weight(), twin.weight(), rtol=1e-3, atol=1e-3)


def test_include_and_exclude():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = prune(
        model, tokens(), "wanda", 0.5, include=["*.layers.1.*"], exclude=["*.k_proj", "*.v_proj"]
    )
    names = [layer.name for layer in report.layers]
    assert len(names) == 5 and all(".layers.1." in name for name in names)
    refs = [ref for ref in linears(model) if ref.name in names]
    assert_rest_unchanged(model, before, refs)


@pytest.mark.parametrize("method", FORWARD_ONLY)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_with_few_tokens_are_pruned_by_magnitude_and_listed(family, method):
    model = tiny_model(family)
    by_magnitude = tiny_model(family)
    prune(by_magnitude, method="magnitude", pattern=0.5)
    report = prune(model, [tiny_tokens(1, 1)], method, 0.5)
    assert report.noted
    experts = {ref.name: ref for ref in linears(by_magnitude) if ref.index is not None}
    reported = {layer.name: layer for layer in report.layers}
    for ref in linears(model):
        layer = reported[ref.name]
        few = layer.tokens < max(4, ref.weight().shape[1] / 4)
        if ref.index is not None and few:
            assert layer.method == "magnitude"
            assert layer.notes[0].startswith(f"saw {layer.tokens:.0f} of the ")
            assert torch.equal(ref.weight(), experts[ref.name].weight())
        else:
            assert layer.method == method and not layer.notes
        assert layer.zeros == pruned_count(layer.elements, 0.5)
    assert any(layer.tokens == 0 for layer in report.noted)


def test_experts_with_few_tokens_stand_outside_a_global_selection():
    report = prune(tiny_model("mixtral"), [tiny_tokens(1, 1)], "wanda", Unstructured(0.5, "global"))
    for layer in report.noted:
        assert (layer.method, layer.sparsity) == ("magnitude", 0.5)
    assert report.sparsity == 0.5


def test_half_precision_weights_stay_in_their_dtype():
    model = tiny_model("llama").bfloat16()
    kept = {ref.name: ref.weight().clone() for ref in linears(model)}
    prune(model, tokens(), "wanda", "2:4")
    for ref in linears(model):
        w = ref.weight()
        assert w.dtype == torch.bfloat16
        assert torch.equal(w, kept[ref.name] * (w != 0))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sparsegpt", {"reconstruct": False}),
        ("sparsegpt", {"reconstruct": True}),
        ("wanda", {"update": "sequential"}),
        ("wanda", {"update": "iterative"}),
    ],
    ids=str,
)
def test_double_precision_weights_are_updated_as_single_ones_are(method, more):
    single, double = tiny_model("llama"), tiny_model("llama").double()
    for model in (single, double):
        prune(model, tokens(), method, "2:4", **more)
    assert {ref.weight().dtype for ref in linears(double)} == {torch.float64}
    # Of the queries, keys and values of the first block the inputs are the same.
    for a, b in zip(linears(single)[:3], linears(double)[:3], strict=True):
        assert torch.equal(a.weight() != 0, b.weight() != 0)
        assert (a.weight() - b.weight()).norm() < 3e-2 * a.weight().norm()


@pytest.mark.parametrize("walk", ["single", "naive"])
def test_walks_that_are_true_sequential_agree(walk):
    model, twin = tiny_model("llama"), tiny_model("llama")
    prune(model, tokens(), "sparsegpt", 0.5)
    prune(twin, tokens(), "sparsegpt", 0.5, walk=walk)
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)


def expect(message, *args, error=UserError, **kwargs):
    with pytest.raises(error, match=message) as caught:
        prune(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("wanda", 0.5), {"spasity": 1}, "config: unknown key 'spasity', did you mean sparsity"),
        (("wanda", 1.5), {}, r"sparsity: expected a fraction in \[0, 1\), got 1.5"),
        (("wonda", 0.5), {}, r"method: expected one of .*got 'wonda' \(did you mean wanda\?\)"),
        (("wanda", "3:2"), {}, "1 <= N <= M, got 3:2"),
        (("wanda", "2:4"), {"sparsity": 0.5}, "exactly one of sparsity and pattern"),
        (("wanda", 0.5), {"include": ["*.qq_proj"]}, r"include: no layer matches '\*.qq_proj'"),
        (("wanda", 0.5), {"exclude": ["x"]}, "exclude: no layer matches 'x'; layers are called"),
        (("wanda", 0.5), {"exclude": ["*"]}, "expected some layers to prune, all are excluded"),
        (("wanda", 0.5), {"dtype": "bfloat16"}, "dtype: expected auto for a model in memory"),
        (("wanda", 0.5), {"config": PruneConfig(sparsity=0.5)}, "either config or method"),
        (("wanda", "2:5"), {}, r"model.layers.0.self_attn.q_proj: expected a number of inputs "
         r"that 5 divides for 2:5, got 32 \(leave it out with --exclude"),
    ],
)  # fmt: skip
def test_bad_requests(args, options, message):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expect(message, model, tokens(), *args, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "calibration: sparsegpt expected a tokenizer or batches, got none"),
        ("some text", "expected a tokenizer or an iterable of token id tensors, got str"),
        (3, "expected a tokenizer or an iterable of token id tensors, got int"),
        ([], "expected some tokens, got 0 batches without"),
        ([torch.zeros(1, 0, dtype=torch.long)], "expected some tokens, got 1 batches without"),
        (["text"], "batch 0: expected a tensor of token ids or a mapping .* got text"),
        (
            [torch.ones(2, 3)],
            r"batch 0: expected token ids as integers \[B, T\], got torch.float32",
        ),
        ([torch.ones(2, 3, 4).long()], r"as integers \[B, T\], got torch.int64 \(2, 3, 4\)"),
        ([{"input_ids": [[1, 2], [3]]}], "input_ids as integers .* got a list that is none"),
        (
            [{"input_ids": tiny_tokens(), "attention_mask": torch.ones(2, 3).long()}],
            r"expected an attention_mask \(2, 16\), got \(2, 3\)",
        ),
        (
            [{"input_ids": tiny_tokens(), "attention_mask": 3}],
            "expected attention_mask as integers",
        ),
        (
            [tiny_tokens(), tiny_tokens() + VOCAB],
            r"batch 1: expected token ids in \[0, 64\), got 6",
        ),
        ([tiny_tokens() - 60], r"expected token ids in \[0, 64\), got -"),
        ([tiny_tokens(1, 129)], "batch 0: expected at most the model's 128 positions, got 129"),
        (
            [{"input_ids": tiny_tokens(), "attention_mask": torch.zeros(2, 16).long()}],
            "expected some tokens, got 1 batches without",
        ),
    ],
)
def test_bad_calibration(data, message):
    expect(message, tiny_model("llama"), data, "sparsegpt", 0.5)


def test_unknown_architecture():
    expect("Linear: expected a transformers decoder", nn.Linear(3, 3), tokens(), "wanda", 0.5)


def test_cuda_device_that_is_not_there():
    message = "device: expected one that is here, got 'cuda:99': .* CUDA devices"
    expect(message, tiny_model("llama"), tokens(), "wanda", 0.5, device="cuda:99")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", CALIBRATED)
def test_activations_that_are_not_finite_name_the_layer(method, value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = value
    name = r"^model.layers.1.mlp.gate_proj: .*NaN or infinit"
    expect(name, model, tokens(), method, 0.5, error=LayerError)


def test_weights_that_are_not_finite_name_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 4] = float("nan")
    name = "^model.layers.1.self_attn.o_proj: expected finite weights, got NaN"
    expect(name, model, None, "magnitude", 0.5, error=LayerError)


def test_the_package_offers_the_function_whatever_was_imported_before():
    code = "\nimport pyprune\nassert pyprune.prune.__name__ == 'prune', pyprune.prune"
    code += "\nassert callable(pyprune.prune) and callable(pyprune.prune_checkpoint)"
    imports = ("import pyprune.prune", "from pyprune.prune import prune")
    done = run_forked(*(first + code for first in imports))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scope", ["block", "global"])
def test_a_hessian_that_no_damping_saves_names_the_layer(scope, monkeypatch):
    """No sum of squares gets there, so one is spoilt on its way into the factorisation."""
    from pyprune import ops

    factor = ops.obs_factor

    def spoilt(h, **kwargs):
        return factor(h - 1e3 * h.diagonal().mean() * torch.ones_like(h), **kwargs)

    monkeypatch.setattr(ops, "obs_factor", spoilt)
    expect(
        r"^model.layers.0.self_attn.q_proj: .*positive definite",
        tiny_model("llama"),
        tokens(),
        "sparsegpt",
        Unstructured(0.5, scope),
        error=LayerError,
    )


def test_an_update_that_the_dtype_cannot_hold_names_the_layer():
    model = tiny_model("llama").half()
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        # Two inputs that are nearly the same: what one loses the other has to take over.
        model.model.embed_tokens.weight[:, 1] = model.model.embed_tokens.weight[:, 0]
        model.model.layers[0].input_layernorm.weight[:2] = 1.0
        layer.weight[0] = 0.01
        layer.weight[0, :2] = 40000
    name = "^model.layers.0.self_attn.q_proj: expected updated weights within torch.float16"
    expect(name, model, tokens(), "sparsegpt", NM(1, 32), error=LayerError)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "k-obd"])
def test_a_layer_whose_inputs_are_all_zero_is_pruned_by_magnitude(method):
    """All scores are equal there: ties by index would take its first columns."""
    model = tiny_model("llama", mlp_bias=False)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    expected = {ref.name: ref.weight().clone() for ref in linears(model)}
    report = prune(model, tokens(), method, 0.5)
    pruned = {ref.name: ref.weight() for ref in linears(model)}
    found = {layer.name: layer for layer in report.layers}
    for name in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.{name}"
        assert f"{method} found no input but zero: pruned by magnitude" in found[name].notes
        w, was = pruned[name], expected[name]
        gone = w == 0
        assert int(gone.sum()) == w.numel() // 2 and torch.equal(w, was * ~gone)
        assert was[~gone].abs().min() >= was[gone].abs().max()
    assert not any("no input" in note for note in found["model.layers.0.mlp.up_proj"].notes)
