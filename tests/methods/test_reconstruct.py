"""The exact reconstruction as a post-pass: in memory, for every method, and what it reports."""

import sys

import pytest
import torch
from methods.golden import damped, exact_reconstruction
from tiny_models import tiny_model, tiny_tokens

from pyprune.config import PruneConfig
from pyprune.methods import METHODS, LayerInputs, MethodOptions
from pyprune.methods.update import reconstructed
from pyprune.models.adapter import Adapter
from pyprune.patterns import NM, Unstructured
from pyprune.prune import prune

UPDATE = sys.modules["pyprune.methods.update"]
TARGETS = [
    {"pattern": "2:4"},
    {"pattern": "1:4"},
    {"sparsity": 0.5},
    {"sparsity": 0.7, "scope": "row"},
    {"sparsity": 0.4, "scope": "layer"},
    {"sparsity": 0.5, "scope": "global"},
]


def example(rows=8, columns=24, tokens=90):
    gen = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=gen, dtype=torch.float64) / columns**0.5
    x = torch.randn(tokens, columns, generator=gen, dtype=torch.float64)
    x = x @ (mix + torch.eye(columns, dtype=torch.float64))
    w = torch.randn(rows, columns, generator=gen, dtype=torch.float64)
    return w, LayerInputs(x.square().sum(0), tokens, x.T @ x)


def run(options, seed=0, **kwargs):
    model = tiny_model("llama")
    report = prune(model, [tiny_tokens(8, 32, seed)], **options, **kwargs)
    return model, report


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
# A mask is a mask: those of gradient methods, which need a model, are in the test below.
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.gradient is None])
def test_is_the_closed_form_for_the_methods_mask(method, pattern):
    w, inputs = example()
    options = MethodOptions(reconstruct=True)
    solution = METHODS[method].solve(w, inputs, pattern, options, None, None)
    better = reconstructed(w, solution, inputs, options)
    assert torch.equal(better.mask, solution.mask)
    assert better.damping == 0.01
    h = damped(inputs.gram)
    want = exact_reconstruction(w, solution.mask, h)
    torch.testing.assert_close(better.weight, want, rtol=1e-9, atol=1e-9)
    change = better.weight - w
    loss = 0.5 * float(((change @ h) * change).sum()) / inputs.tokens
    assert better.loss == pytest.approx(loss, rel=1e-9)


# A mask is a mask, whichever pattern it is of: one of each kind for every method.
@pytest.mark.parametrize(
    ("method", "target"),
    [
        (method, target)
        for method in METHODS
        for target in (TARGETS if method in ("wanda", "sparsegpt") else [TARGETS[0], TARGETS[2]])
    ],
    ids=str,
)
def test_every_method_and_pattern_ends_with_less_error(method, target):
    options = {"method": method, **target}
    plain_model, plain = run(options, reconstruct=False)
    model, report = run(options, reconstruct=True)
    first = len(Adapter.of(model).linears(0))
    for before, after in zip(plain.layers[:3], report.layers[:3], strict=True):
        # q, k and v of the first block see the same inputs and lose the same weights.
        assert after.zeros == before.zeros and after.error_basis == "gram"
        if method == "exactobs":  # ends there by itself, up to single precision
            assert after.relative_error_after == pytest.approx(
                before.relative_error_after, rel=1e-3
            )
            continue
        assert after.relative_error_after < (
            before.relative_error_after
            if before.error_basis == "gram"
            else after.relative_error_before_update
        )
    for layer in report.layers:
        assert layer.relative_error_after <= layer.relative_error_before_update
        assert layer.damping is not None and layer.loss is not None and not layer.notes
    refs = zip(Adapter.of(plain_model).linears(0), Adapter.of(model).linears(0), strict=True)
    for old, new in list(refs)[: min(3, first)]:
        assert torch.equal(old.weight() == 0, new.weight() == 0)


def test_with_a_sweep_for_a_score():
    """What it starts from does not decide where it ends, up to the tolerance."""
    target = {"method": "wanda", "pattern": "2:4", "reconstruct": True}
    _, none = run(target)
    _, sweep = run({**target, "update": "sequential"})
    for a, b in zip(none.layers[:3], sweep.layers[:3], strict=True):
        assert a.zeros == b.zeros
        assert a.relative_error_after == pytest.approx(b.relative_error_after, rel=UPDATE.TOLERANCE)


def test_preserved_zeros_stay():
    model = tiny_model("llama")
    ref = Adapter.of(model).linears(0)[0]
    zeros = torch.rand(ref.weight().shape, generator=torch.Generator().manual_seed(1)) < 0.2
    ref.write(ref.weight().masked_fill(zeros, 0))
    prune(
        model, [tiny_tokens(8, 32, 0)], method="wanda", sparsity=0.5, preserve_zeros=True,
        reconstruct=True,
    )  # fmt: skip
    assert not ref.weight()[zeros].any()


def test_too_few_iterations_are_reported(monkeypatch):
    real = UPDATE.ops.obs_reconstruct
    monkeypatch.setattr(
        UPDATE.ops, "obs_reconstruct", lambda *a, **k: real(*a, **k, max_iterations=1)
    )
    _, report = run({"method": "wanda", "pattern": "2:4", "reconstruct": True})
    assert "reconstruction stopped after 1 iterations" in report.layers[0].notes[0]


def test_default_is_the_methods_own():
    for method, row in METHODS.items():
        assert row.reconstructs == (method == "sparsegpt")
        assert PruneConfig(method=method, sparsity=0.5).options().reconstruct == row.reconstructs
        for asked in (True, False):
            config = PruneConfig(method=method, sparsity=0.5, reconstruct=asked)
            assert config.options().reconstruct is asked
            assert PruneConfig.from_yaml(config.to_yaml()) == config
    config = PruneConfig(method="magnitude", sparsity=0.5, reconstruct=True)
    assert config.find_method().needs(config.options()) == "gram"
    _, report = run({"method": "magnitude", "pattern": "2:4", "reconstruct": True})
    assert "reconstruction" in str(report.table().title)


def test_too_few_tokens_per_input_leave_what_the_sweep_made():
    """down_proj has more inputs than the others: at this many tokens it alone goes without."""
    widths = {ref.weight().shape[1] for ref in Adapter.of(tiny_model("llama")).linears(0)}
    least = min(widths)
    tokens = [tiny_tokens(2, 4 * least // 2, 0)]

    def pruned(**options):
        model = tiny_model("llama")
        return prune(model, tokens, method="sparsegpt", pattern="2:4", **options), model

    report, model = pruned()
    wide = sum(layer.shape[1] > least for layer in report.layers)
    assert 0 < wide < len(report.layers)
    (note,) = report.notes
    assert f"{wide} of {len(report.layers)} matrices" in note
    # All inputs of the first attention are those of the dense model, whatever follows.
    plain, forced = pruned(reconstruct=False), pruned(reconstruct=True)
    assert not plain[0].notes and not forced[0].notes
    for ours, without, always in zip(
        *(Adapter.of(m).linears(0)[:3] for m in (model, plain[1], forced[1])), strict=True
    ):
        assert torch.equal(ours.weight(), always.weight())
        assert not torch.equal(ours.weight(), without.weight())


def test_a_rounding_sweep_is_not_reconstructed_by_default():
    config = PruneConfig(method="sparsegpt", pattern="2:4", method_options={"quantise_bits": 4})
    assert not config.reconstructs()
