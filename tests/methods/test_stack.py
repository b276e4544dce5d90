"""Several matrices solved at once: experts, and linears that read the same inputs."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from pyprune import layer_pruner, ops
from pyprune.errors import LayerError
from pyprune.methods import METHODS, LayerInputs, MethodOptions
from pyprune.methods.sparsegpt import SparseGptOptions
from pyprune.models.adapter import Adapter
from pyprune.patterns import NM, Unstructured
from pyprune.prune import prune

SOLVE, STACK = METHODS["sparsegpt"].solve, METHODS["sparsegpt"].solve_stack
PATTERNS = [NM(2, 4), Unstructured(0.5), Unstructured(0.3, "row"), Unstructured(0.5, "layer")]


def inputs_of(columns=32, tokens=90, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=gen)
    x[:, 1:] += 0.5 * x[:, :-1]
    x[:, seed] = 0  # a dead input
    return LayerInputs(x.square().sum(0), tokens, x.T @ x)


def weights(count=3, rows=12, columns=32):
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(9))


def assert_same(got, want):
    assert torch.equal(got.weight, want.weight) and torch.equal(got.mask, want.mask)
    assert (got.damping, got.loss, got.notes) == (want.damping, want.loss, want.notes)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("preserved", [False, True])
def test_stack_is_the_loop_to_the_bit(pattern, shared, bits, preserved):
    w, options = weights(), MethodOptions(own=SparseGptOptions(bits), block_size=16)
    preserve = None
    if preserved:
        preserve = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) > 0.1
        w = w * preserve
    given = [inputs_of()] * 3 if shared else [inputs_of(seed=s) for s in range(3)]
    stack = STACK(w, given, pattern, options, preserve)
    for b in range(3):
        own = inputs_of(seed=0 if shared else b)
        forced = None if preserve is None else preserve[b]
        assert_same(stack[b], SOLVE(w[b], own, pattern, options, forced, None))


def test_a_stack_is_factored_in_one_call_and_keeps_its_factors(monkeypatch):
    calls = []
    factor = ops.obs_factor
    monkeypatch.setattr(
        ops, "obs_factor", lambda h, **k: calls.append(tuple(h.shape)) or factor(h, **k)
    )
    given, options = [inputs_of(seed=s) for s in range(3)], MethodOptions()
    STACK(weights(), given, NM(2, 4), options, None)
    STACK(weights(), given, NM(2, 4), options, None)
    for b, inputs in enumerate(given):
        assert torch.equal(inputs.factor(options).u, factor(inputs.gram).u), b
    assert calls == [(3, 32, 32)]


def test_factors_that_are_there_already_are_used():
    given, options = [inputs_of(seed=s) for s in range(3)], MethodOptions()
    given[1].factor(options)
    for b, solution in enumerate(STACK(weights(), given, NM(2, 4), options, None)):
        own = inputs_of(seed=b)
        assert_same(solution, SOLVE(weights()[b], own, NM(2, 4), options, None, None))


# --- the driver -------------------------------------------------------------------------------


def run(family, monkeypatch, stack_bytes=layer_pruner.STACK_BYTES, **options):
    """The pruned model, its report, and the shapes that were factored and swept."""
    shapes = {"obs_factor": [], "obs_sweep": []}
    with monkeypatch.context() as patch:
        patch.setattr(layer_pruner, "STACK_BYTES", stack_bytes)
        for name, seen in shapes.items():
            real = getattr(ops, name)

            def spy(t, *args, real=real, seen=seen, **kwargs):
                seen.append(tuple(t.shape))
                return real(t, *args, **kwargs)

            patch.setattr(ops, name, spy)
        model = tiny_model(family)
        report = prune(model, [tiny_tokens(8, 32, 0)], method="sparsegpt", **options)
    return model, report, shapes


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5},
        {"pattern": "2:4", "preserve_zeros": True},
        {"pattern": "2:4", "reconstruct": True},
        {"sparsity": 0.6, "allocation": "owl"},
    ],
    ids=str,
)
def test_driver_solves_stacks_as_it_would_one_by_one(monkeypatch, family, options):
    model, report, shapes = run(family, monkeypatch, **options)
    loop_model, loop_report, loop_shapes = run(family, monkeypatch, 0, **options)
    for a, b in zip(model.parameters(), loop_model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(report.layers, loop_report.layers, strict=True):
        assert (a.name, a.zeros, a.loss, a.damping) == (b.name, b.zeros, b.loss, b.damping)
        assert a.relative_error_after == b.relative_error_after and a.seconds > 0
    assert {s[0] for s in loop_shapes["obs_sweep"]} == {1}
    sizes = {s[0] for s in shapes["obs_sweep"]}
    assert 2 in sizes  # k and v, and gate and up
    if family != "llama":
        assert 4 in sizes and (4, 32, 32) in shapes["obs_factor"]


def test_memory_bounds_the_stack(monkeypatch):
    refs = [ref for ref in Adapter.of(tiny_model("mixtral")).linears(0) if "gate_up" in ref.name]
    rows, columns = refs[0].weight().shape
    one = 4 * (6 * rows * columns + 3 * columns**2)
    for fitting, sizes in ((1, {1}), (2, {2}), (3, {3, 1})):
        _, _, shapes = run("mixtral", monkeypatch, fitting * one, include=["*gate_up*"],
                           pattern="2:4")  # fmt: skip
        assert {s[0] for s in shapes["obs_sweep"]} == sizes


def test_one_factorisation_for_all_that_read_the_same_inputs(monkeypatch):
    """Llama: q, k and v; o; gate and up; down."""
    for options in ({"sparsity": 0.5}, {"pattern": "2:4", "reconstruct": True}):
        _, report, shapes = run("llama", monkeypatch, **options)
        assert len(report.layers) == 14
        assert len(shapes["obs_factor"]) == 2 * 4


def test_the_layer_at_fault_is_named(monkeypatch):
    model = tiny_model("mixtral")
    last = [ref for ref in Adapter.of(model).linears(0) if ref.index == 3]
    real = ops.obs_factor

    def fails(h, **kwargs):
        single = h if h.dim() == 3 else h[None]
        if any(bool((m == broken).all()) for m in single):
            raise ops.NotPositiveDefiniteError("h: not positive definite")
        return real(h, **kwargs)

    broken = None
    grams = []
    monkeypatch.setattr(ops, "obs_factor", lambda h, **k: grams.append(h) or real(h, **k))
    prune(tiny_model("mixtral"), [tiny_tokens(8, 32, 0)], pattern="2:4", include=["*.0.*gate_up*"])
    broken = next(h for h in grams if h.dim() == 3)[3]
    monkeypatch.setattr(ops, "obs_factor", fails)
    with pytest.raises(LayerError, match=rf"{last[0].name}: h: not positive definite"):
        prune(model, [tiny_tokens(8, 32, 0)], pattern="2:4", include=["*.0.*gate_up*"])
