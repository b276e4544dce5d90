"""GBLM-Pruner and OBD: the specification's example, and what holds for any gradients."""

import pytest
import torch
from calibration.test_backward import autograd, model64
from methods.golden import SEQUENCES, golden, quadratic, show
from methods.gradients import output_gradients, statistic
from methods.test_properties import example, inputs_of
from tiny_models import tiny_model, tiny_tokens

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.gradient_stats import MagnitudeStatistic
from pyprune.calibration.gradients import collect_gradients
from pyprune.calibration.tokens import Batch
from pyprune.errors import LayerError, UserError
from pyprune.methods import METHODS, LayerInputs, MethodOptions
from pyprune.methods.gblm import GblmOptions, column_scale
from pyprune.methods.global_selection import GlobalSelection
from pyprune.methods.options import build_options
from pyprune.models.adapter import Adapter
from pyprune.patterns import NM, Unstructured
from pyprune.prune import prune

GRADIENT = [name for name, row in METHODS.items() if row.gradient]
HALF = Unstructured(0.5)


def golden_gradients():
    """G [32, 4]."""
    t = torch.arange(32, dtype=torch.float64)[:, None]
    i = torch.arange(4, dtype=torch.float64)
    return torch.sin(0.3 + 0.61 * t) + 0.5 * torch.cos(0.7 * t * (i + 1))


def inputs_with(method, x, g, sequences, options=None):
    made = statistic(method, x, g, sequences, options)
    return LayerInputs(x.square().sum(0), len(x), x.T @ x).with_gradient(made)


def solve(method, pattern, w, inputs, options=None):
    options = options or MethodOptions()
    METHODS[method].check(pattern, options)
    return METHODS[method].solve(w, inputs, pattern, options, None, None)


def gblm(w, x, g, sequences, **own):
    options = MethodOptions(own=GblmOptions(**own))
    inputs = inputs_with("gblm", x, g, sequences, options)
    return solve("gblm", HALF, w, inputs, options).mask, column_scale(inputs, options)


@pytest.mark.parametrize(
    ("own", "mask", "scores"),
    [
        (
            {"norm": "l1"},
            ".1..111. / 11..1..1 / 11....11 / ....1111",
            [71.930250, 8.295253, 56.708538],
        ),
        (
            {"norm": "l2"},
            ".1..111. / 11..1..1 / 11....11 / ..1.1.11",
            [54.130225, 6.147885, 42.692777],
        ),
        (
            {"norm": "l1", "gradient_only": True},
            ".1..111. / 11..1..1 / 11....11 / ..1.1.11",
            None,
        ),
    ],
    ids=["l1", "l2", "gradient-only"],
)
def test_gblm_golden(own, mask, scores):
    w, x = golden()
    # The example's gradients are means over 16 tokens; `statistic` counts 15 targets.
    g = golden_gradients() * 15 / 16
    got, scale = gblm(w, x, g, SEQUENCES, reference_normalisation=True, **own)
    assert show(got) == mask
    if scores is not None:
        torch.testing.assert_close(
            (w.abs() * scale)[0, :3], torch.tensor(scores, dtype=w.dtype), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
def test_gblm_without_gradient_term_is_wanda(pattern):
    w, x = example()
    options = MethodOptions(own=GblmOptions(alpha=0.0))
    inputs = inputs_with("gblm", x, output_gradients(len(w), x), 4, options)
    wanda = solve("wanda", pattern, w, inputs_of(x))
    assert torch.equal(solve("gblm", pattern, w, inputs, options).mask, wanda.mask)


def test_gblm_with_silent_inputs_is_the_gradient_alone():
    w, x = example()
    g = output_gradients(len(w), x)
    inputs = inputs_with("gblm", x, g, 4)
    silent = LayerInputs(torch.zeros_like(inputs.squared_norms), len(x))
    assert inputs.gradient is not None
    got = solve("gblm", HALF, w, silent.with_gradient(inputs.gradient))
    assert torch.equal(got.mask, gblm(w, x, g, 4, gradient_only=True)[0])
    assert not torch.equal(got.mask, solve("gblm", HALF, w, inputs).mask)


def test_gblm_l1_is_at_least_l2_and_the_sum_over_sequences_not_the_batch():
    w, x = example()
    g = output_gradients(len(w), x)
    _, l1 = gblm(w, x, g, 4, reference_normalisation=True, gradient_only=True)
    _, l2 = gblm(w, x, g, 4, reference_normalisation=True, gradient_only=True, norm="l2")
    assert bool((l1 >= l2 * (1 - 1e-12)).all()) and bool((l1 > 1.01 * l2).any())
    targets = len(x) // 4 - 1
    parts = [gn.T @ xn / targets for gn, xn in zip(g.chunk(4), x.chunk(4), strict=True)]
    torch.testing.assert_close(l1, sum(p.abs() for p in parts))
    torch.testing.assert_close(l2, sum(p.square() for p in parts).sqrt())
    assert bool((l1 > 1.01 * sum(parts).abs()).any())


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gblm_does_not_depend_on_how_often_the_text_is_shown(norm):
    w, x = example()
    g = output_gradients(len(w), x)
    _, once = gblm(w, x, g, 4, norm=norm)
    _, twice = gblm(w, torch.cat([x, x]), torch.cat([g, g]), 8, norm=norm)
    torch.testing.assert_close(twice, once)
    _, reference = gblm(w, torch.cat([x, x]), torch.cat([g, g]), 8, norm=norm,
                        reference_normalisation=True)  # fmt: skip
    _, half = gblm(w, x, g, 4, norm=norm, reference_normalisation=True)
    assert bool((reference > 1.01 * half).any())


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gblm_at_128_sequences_is_the_reference(norm):
    w, x = example(rows=4, columns=6, tokens=256)
    g = output_gradients(len(w), x)
    _, ours = gblm(w, x, g, 128, norm=norm)
    _, reference = gblm(w, x, g, 128, norm=norm, reference_normalisation=True)
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("method", ["obd", "k-obd"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_obd_removes_the_lowest_quadratic_costs(method, scope):
    w, x = example()
    g, sequences = output_gradients(len(w), x), 4
    if method == "obd":
        parts = zip(g.chunk(sequences), x.chunk(sequences), strict=True)
        f = sum((gn.T @ xn).square() for gn, xn in parts)
    else:
        # diag(G kron A), from the whole Kronecker product.
        f = torch.kron(g.T @ g, x.T @ x).diagonal().view_as(w)
    costs = (0.5 * w.square() * f).view(1, -1) if scope == "layer" else 0.5 * w.square() * f
    order = costs.argsort(dim=1, stable=True)[:, : costs.shape[1] // 2]
    want = torch.ones_like(costs, dtype=torch.bool).scatter(1, order, False).view_as(w)
    got = solve(method, Unstructured(0.5, scope), w, inputs_with(method, x, g, sequences))
    assert torch.equal(got.mask, want)
    assert torch.equal(got.weight, torch.where(want, w, 0))


def test_layer_obd_is_wanda_over_the_layer():
    w, x = example()
    a = solve("l-obd", HALF, w, inputs_of(x))
    b = solve("wanda", Unstructured(0.5, "layer"), w, inputs_of(x))
    assert torch.equal(a.mask, b.mask)


def test_over_all_layers_obd_counts_how_often_an_expert_is_used_once():
    """Costs of two experts on a text are those of one matrix [W1 0; 0 W2] on all its tokens."""
    text, options = 220, MethodOptions()
    _, x = example(4, 6, text)
    g = output_gradients(5, x)
    parts = [(x[:200], g[:200]), (x[200:], g[200:])]
    for method in ("l-obd", "k-obd", "obd"):
        for x_e, g_e in parts:
            made = statistic(method, x_e, g_e, 1)
            inputs = LayerInputs(x_e.square().sum(0), len(x_e), x_e.T @ x_e)
            if made is not None:
                made.targets = text
                inputs = inputs.with_gradient(made)
            curvature = METHODS[method].column_scale(inputs, options).square()
            outer = g_e[:, :, None] * x_e[:, None, :]
            want = {
                "l-obd": x_e.square().sum(0),
                "k-obd": torch.outer(g_e.square().sum(0) / text, x_e.square().mean(0)),
                "obd": outer.sum(0).square() / text,
            }[method]
            torch.testing.assert_close(curvature, want)


def test_gradients_and_scores_of_a_global_choice_wait_on_the_cpu(monkeypatch):
    """What the first walk needs of one layer does not stay where the next one is looked at."""
    moves = {}
    real = MagnitudeStatistic.to

    def to(self, device):
        moves.setdefault(id(self), []).append(str(device))
        real(self, device)

    monkeypatch.setattr(MagnitudeStatistic, "to", to)
    model = tiny_model("llama")
    prune(model, [tiny_tokens(4, 16)], "gblm", 0.5, scope="global")
    # After the pass; to count, and back; to be pruned.
    assert len(moves) == 14 and all(len(places) == 4 for places in moves.values())
    assert all(places[0] == places[2] == "cpu" for places in moves.values())
    selection = GlobalSelection(0.5)
    w = torch.randn(4, 6)
    selection.count("a", w, torch.rand(4, 6, dtype=torch.float64), None)
    assert selection._scales["a"].dtype == torch.float32


def test_options_of_another_method_are_not_taken_for_the_defaults():
    w, x = example()
    options = MethodOptions(own=GblmOptions())
    with pytest.raises(TypeError, match="own: expected ObsOptions, got GblmOptions"):
        solve("obs", HALF, w, inputs_with("obs", x, output_gradients(len(w), x), 4), options)
    with pytest.raises(ValueError, match="k-obd: expected DiagonalFactors of the gradients, got M"):
        solve("k-obd", HALF, w, inputs_with("obd", x, output_gradients(len(w), x), 4))


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
@pytest.mark.parametrize("method", GRADIENT)
def test_rows_in_another_order(method, pattern):
    w, x = example()
    g = output_gradients(len(w), x)
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(5))
    straight = solve(method, pattern, w, inputs_with(method, x, g, 4))
    permuted = solve(method, pattern, w[order], inputs_with(method, x, g[:, order], 4))
    assert torch.equal(permuted.mask, straight.mask[order])


@pytest.mark.parametrize("method", ["obd", "k-obd"])
def test_scale_of_the_loss_does_not_matter_to_obd(method):
    w, x = example()
    g = output_gradients(len(w), x)
    plain = solve(method, HALF, w, inputs_with(method, x, g, 4))
    scaled = solve(method, HALF, w, inputs_with(method, x, 3.7 * g, 4))
    assert torch.equal(plain.mask, scaled.mask)


@pytest.mark.parametrize("method", [m for m in GRADIENT if not METHODS[m].updates_weights])
def test_update_on_the_mask_lowers_the_layer_error(method):
    w, x = example()
    inputs = inputs_with(method, x, output_gradients(len(w), x), 4)
    plain = solve(method, HALF, w, inputs)
    swept = solve(method, HALF, w, inputs, MethodOptions(update="sequential"))
    assert torch.equal(plain.mask, swept.mask)
    h = x.T @ x
    assert quadratic(swept.weight - w, h) < 0.9 * quadratic(plain.weight - w, h)


@pytest.mark.parametrize("method", GRADIENT)
def test_batches_and_padding_give_the_sums_of_single_sequences(method):
    model = tiny_model("llama").double()
    adapter = Adapter.of(model)
    ids, mask = tiny_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    factory = METHODS[method].gradient(MethodOptions())

    def collect(batches):
        tokens = as_token_set(batches, vocabulary=64, positions=None)
        return collect_gradients(adapter, tokens, factory)

    batched = collect([Batch(ids, mask)])
    alone = collect([Batch(ids[:1]), Batch(ids[1:2, :7]), Batch(ids[2:])])
    for name, got in batched.items():
        assert (got.sequences, got.targets, got.tokens) == (3, 28, 31)
        for key in ("total", "a", "g", "samples"):
            if hasattr(got, key):
                a, b = getattr(got, key), getattr(alone[name], key)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_statistics_are_sums_of_what_autograd_gives_for_single_sequences(family):
    model, ids = model64(family), tiny_tokens(3, 12)
    alone = [autograd(model, [row]) for row in ids]  # |gradient of the mean loss|
    tokens = as_token_set([ids], vocabulary=64, positions=None)
    for method, own, power, scale in (
        ("gblm", GblmOptions(norm="l1"), 1, 1),
        ("gblm", GblmOptions(norm="l2"), 2, 1),
        ("obd", None, 2, 11),  # of the summed loss
    ):
        factory = METHODS[method].gradient(MethodOptions(own=own))
        for name, got in collect_gradients(Adapter.of(model), tokens, factory).items():
            want = sum((scale * g[name]) ** power for g in alone)
            torch.testing.assert_close(got.total, want, rtol=1e-4, atol=1e-5 * float(want.max()))


@pytest.mark.parametrize("method", GRADIENT)
def test_a_dead_layer_and_an_idle_expert_go_by_magnitude_and_are_listed(method):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    report = prune(model, [tiny_tokens(8, 16)], method, 0.5)
    notes = {layer.name: layer for layer in report.layers if layer.notes}
    assert sorted(notes) == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    for layer in notes.values():
        assert layer.method == "magnitude" and "no gradient but zero" in layer.notes[0]
        assert layer.sparsity == 0.5
    report = prune(tiny_model("mixtral"), [tiny_tokens(1, 2)], method, 0.5)
    experts = [layer for layer in report.layers if "experts" in layer.name]
    assert experts and all(layer.method == "magnitude" for layer in experts)
    assert all("tokens" in layer.notes[0] for layer in experts)


@pytest.mark.parametrize("method", ["gblm", "llm-surgeon"])
def test_what_two_modules_share_stays_and_is_said(method):
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    before = mlp.up_proj.weight.clone()
    report = prune(model, [tiny_tokens(4, 16)], method, 0.5)
    assert torch.equal(mlp.up_proj.weight, before) and len(report.layers) == 12
    (note,) = report.notes
    assert note.startswith("2 matrices share their parameter with another module and stay as")
    assert note.endswith("model.layers.0.mlp.gate_proj")


def test_a_sequence_of_one_token_is_refused():
    with pytest.raises(UserError, match="batch 1, sequence 1: expected at least two tokens"):
        batch = Batch(tiny_tokens(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]))
        prune(tiny_model("llama"), [tiny_tokens(2, 4), batch], "gblm", 0.5)


def test_sums_that_overflow_name_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e20)
    with pytest.raises(LayerError, match=r"model\.layers\.\S+: expected finite"):
        prune(model, [tiny_tokens(2, 8)], "obd", 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alhpa": 1.0}, "gblm has no option 'alhpa', did you mean alpha"),
        ({"alpha": True}, "gblm alpha: expected a number, got True"),
        ({"alpha": "x"}, "gblm alpha: expected a number, got 'x'"),
        ({"alpha": -1}, "gblm alpha: expected 0 or more, got -1"),
        ({"norm": "l3"}, "gblm norm: expected l1 or l2, got 'l3'"),
        ({"gradient_only": 1}, "gblm gradient_only: expected true or false, got 1"),
    ],
)
def test_options_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        build_options("gblm", GblmOptions, values)


def test_a_method_without_options_takes_none():
    assert build_options("wanda", None, {}) is None
    with pytest.raises(UserError, match="wanda has no option 'alpha', known: none"):
        build_options("wanda", None, {"alpha": 1})
