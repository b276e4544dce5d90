"""OBS, ExactOBS and WoodFisher: closed forms by brute force, in fp64 on tiny layers."""

import itertools

import pytest
import torch
from methods.golden import damped, exact_reconstruction, golden, hessian, quadratic, show
from methods.gradients import output_gradients, statistic
from methods.test_properties import example
from tiny_models import tiny_model, tiny_tokens

from pyprune.errors import LayerError, UserError
from pyprune.methods import METHODS, LayerInputs, MethodOptions
from pyprune.methods.exactobs import ExactObsOptions
from pyprune.methods.fisher import LowRankFisher, SampleOptions
from pyprune.methods.obs import ObsOptions, Survivors
from pyprune.methods.options import build_options
from pyprune.methods.oracle import gap_to_exact
from pyprune.methods.woodfisher import WoodFisherOptions
from pyprune.ops import NotPositiveDefiniteError
from pyprune.patterns import NM, Unstructured, pruned_count
from pyprune.prune import prune

HALF = Unstructured(0.5)
OWN = {"obs": ObsOptions, "woodfisher": WoodFisherOptions, "exactobs": ExactObsOptions}


def solve(method, pattern, w, inputs, preserve=None, mask=None, damping=0.01, **own):
    options = MethodOptions(damping=damping, own=OWN[method](**own))
    METHODS[method].check(pattern, options)
    return METHODS[method].solve(w, inputs, pattern, options, preserve, mask)


def layer(rows=4, columns=8, sequences=6, method="obs", **own):
    """A layer's weights, its inputs with gradient samples, and their Fisher matrix `[RC, RC]`."""
    w, x = example(rows, columns, tokens=12 * sequences)
    options = MethodOptions(own=OWN[method](**own))
    g = output_gradients(rows, x)
    made = statistic(method, x, g, sequences, options)
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x).with_gradient(made)
    return w, inputs, fisher(x, g, sequences, made.targets, own.get("samples", 16))


def fisher(x, g, sequences, targets, samples):
    """The undamped sum of outer products, from scratch."""
    parts = [gn.T @ xn for gn, xn in zip(g.chunk(sequences), x.chunk(sequences), strict=True)]
    sums = [sum(parts[k::samples]).flatten() for k in range(min(samples, sequences))]
    return sum(torch.outer(s, s) for s in sums) / targets


def shrunk(f, shrinkage=0.5, damping=0.01):
    diagonal = torch.diag(f.diagonal())
    eye = torch.eye(len(f), dtype=f.dtype)
    return (1 - shrinkage) * f + shrinkage * diagonal + damping * f.diagonal().mean() * eye


def least_squares(w, f, mask):
    """The best weights of a layer for a mask, by a general solver."""
    flat, kept = w.flatten(), mask.flatten()
    d = torch.where(kept, 0, -flat)
    d[kept] = torch.linalg.solve(f[kept][:, kept], -(f @ d)[kept])
    return (flat + d).view_as(w)


def loss(change, f):
    return 0.5 * float(change.flatten() @ f @ change.flatten())


def block_diagonal(f, columns, size):
    """`f` without what couples weights of different blocks of a row."""
    block = torch.arange(len(f)) % columns // size + torch.arange(len(f)) // columns * len(f)
    return torch.where(block[:, None] == block, f, 0)


# Closed forms.


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("samples", [16, 4])
def test_obs_of_a_mask_is_least_squares(samples, shrinkage):
    own = {"samples": samples, "shrinkage": shrinkage}
    w, inputs, f = layer(**own)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    got = solve("obs", Unstructured(0.5, "global"), w, inputs, mask=mask, **own)
    want = least_squares(w, shrunk(f, shrinkage), mask)
    torch.testing.assert_close(got.weight, want, rtol=1e-7, atol=1e-9)
    assert got.damping == 0.01 and torch.equal(got.mask, mask)


@pytest.mark.parametrize("size", [3, 4, 8, 32])
def test_woodfisher_of_a_mask_is_least_squares_in_its_blocks(size):
    own = {"block_size": size, "shrinkage": 0.25}
    w, inputs, f = layer(method="woodfisher", **own)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    got = solve("woodfisher", Unstructured(0.5, "global"), w, inputs, mask=mask, **own)
    blocks = shrunk(block_diagonal(f, 8, size), 0.25)
    torch.testing.assert_close(got.weight, least_squares(w, blocks, mask), rtol=1e-7, atol=1e-9)


def test_the_inverse_diagonal_is_that_of_the_weights_still_there():
    w, inputs, f = layer()
    survivors = Survivors(w, LowRankFisher.of("obs", inputs, MethodOptions()))
    f = shrunk(f)
    want = torch.linalg.inv(f).diagonal()
    torch.testing.assert_close(survivors.inverse_diagonal().flatten(), want)
    kept = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    survivors.keep(kept)
    flat = kept.flatten()
    want = torch.linalg.inv(f[flat][:, flat]).diagonal()
    torch.testing.assert_close(survivors.inverse_diagonal()[kept], want)


def test_joint_is_sequential_in_any_order():
    w, inputs, _ = layer()
    made = LowRankFisher.of("obs", inputs, MethodOptions())
    gone = [3, 17, 8, 25]
    results = []
    for order in (gone, gone[::-1], [gone]):
        survivors = Survivors(w, made)
        for q in order:
            mask = survivors.kept.flatten().clone()
            mask[q] = False
            survivors.keep(mask.view_as(w))
        results.append(survivors.x)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_losses_single_joint_and_without_compensation():
    w, inputs, f = layer()
    made = LowRankFisher.of("obs", inputs, MethodOptions())
    f, scores = shrunk(f), Survivors(w, made).scores().flatten()
    gone = [3, 17, 8, 25]
    for q in gone:  # the score is what removing one weight achieves
        mask = torch.ones(32, dtype=torch.bool)
        mask[q] = False
        x = least_squares(w, f, mask.view_as(w))
        assert float(scores[q]) == pytest.approx(loss(x - w, f))
    mask = torch.ones(32, dtype=torch.bool)
    mask[gone] = False
    x = least_squares(w, f, mask.view_as(w))
    joint = loss(x - w, f)
    inverse = torch.linalg.inv(f)[gone][:, gone]
    wq = w.flatten()[gone]
    assert joint == pytest.approx(0.5 * float(wq @ torch.linalg.solve(inverse, wq)))
    assert joint >= float(scores[gone].max())
    assert joint <= loss(torch.where(mask.view_as(w), 0, -w), f)
    # Nothing pulls at the kept weights any more.
    assert float((f @ (x - w).flatten())[mask].abs().max()) < 1e-12


# What is chosen.


def greedy(w, f, count, nm=None):
    """One weight of the whole layer after the other, by a fresh inverse each time."""
    kept = torch.ones(w.numel(), dtype=torch.bool)
    x = w.clone()
    for _ in range(count):
        inverse = torch.zeros(len(f), dtype=f.dtype)
        inverse[kept] = torch.linalg.inv(f[kept][:, kept]).diagonal()
        scores = torch.where(kept, x.flatten().square() / inverse, float("inf"))
        if nm is not None:
            closed = kept.view(-1, nm.m).sum(1) <= nm.n
            scores[closed.repeat_interleave(nm.m)] = float("inf")
        kept[scores.argmin()] = False
        x = least_squares(w, f, kept.view_as(w))
    return x, kept.view_as(w)


def test_obs_one_weight_a_round_is_greedy():
    own = {"rounds": 16}
    w, inputs, f = layer(**own)
    got = solve("obs", HALF, w, inputs, **own)
    weight, mask = greedy(w, shrunk(f), 16)
    assert torch.equal(got.mask, mask)
    torch.testing.assert_close(got.weight, weight)


def test_one_weight_at_a_time_costs_less_than_all_at_once():
    losses = []
    for rounds in (1, 64):
        own = {"rounds": rounds, "shrinkage": 0.0, "samples": 32}
        w, inputs, f = layer(rows=8, columns=16, sequences=32, **own)
        got = solve("obs", HALF, w, inputs, **own)
        losses.append(loss(got.weight - w, shrunk(f, 0.0)))
    assert losses[0] > 1.1 * losses[1]


@pytest.mark.parametrize("pattern", [HALF, Unstructured(0.5, "row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("size", [4, 8])
def test_woodfisher_is_greedy_in_its_blocks(pattern, size):
    own = {"block_size": size, "shrinkage": 0.25}
    w, inputs, f = layer(method="woodfisher", **own)
    f = shrunk(block_diagonal(f, 8, size), 0.25)
    got = solve("woodfisher", pattern, w, inputs, **own)
    if pattern == HALF:
        weight, mask = greedy(w, f, 16)
    elif isinstance(pattern, NM):
        weight, mask = greedy(w, f, 16, pattern)
    else:
        parts = [greedy(w[i : i + 1], f[8 * i : 8 * i + 8, 8 * i : 8 * i + 8], 4) for i in range(4)]
        weight, mask = (torch.cat(t) for t in zip(*parts, strict=True))
    assert torch.equal(got.mask, mask)
    torch.testing.assert_close(got.weight, weight)


def test_woodfisher_as_in_the_paper_adds_up_single_updates():
    own = {"joint": False, "shrinkage": 0.0}
    w, inputs, f = layer(method="woodfisher", **own)
    f = shrunk(block_diagonal(f, 8, 32), 0.0)
    inverse = torch.linalg.inv(f)
    flat = w.flatten()
    kept = torch.ones(32, dtype=torch.bool)
    kept[(flat.square() / inverse.diagonal()).argsort()[:16]] = False
    x = flat.clone()
    for q in (~kept).nonzero()[:, 0]:
        x -= flat[q] / inverse[q, q] * inverse[:, q]
    got = solve("woodfisher", HALF, w, inputs, **own)
    assert torch.equal(got.mask, kept.view_as(w))
    torch.testing.assert_close(got.weight, torch.where(kept, x, 0).view_as(w))
    joint = solve("woodfisher", HALF, w, inputs, shrinkage=0.0)
    assert loss(joint.weight - w, f) < 0.95 * loss(got.weight - w, f)


def test_woodfisher_is_the_rank_one_recursion():
    """F^-1 by Sherman-Morrison, sample by sample, as the paper builds it."""
    _, inputs, _ = layer(method="woodfisher")
    made = LowRankFisher.of("woodfisher", inputs, MethodOptions(own=SampleOptions(shrinkage=0.0)))
    s = made.s[:, 1]
    inverse = torch.eye(8, dtype=s.dtype) / float(made.d[0, 0])
    for g in s:
        v = inverse @ g
        inverse = inverse - torch.outer(v, v) / (1 + g @ v)
    direct = torch.linalg.inv(s.T @ s + torch.diag(made.d[1]))
    torch.testing.assert_close(inverse, direct, rtol=1e-6, atol=1e-8 * float(direct.abs().max()))


def test_full_shrinkage_is_obd_without_any_update():
    own = {"shrinkage": 1.0}
    w, inputs, f = layer(**own)
    got = solve("obs", HALF, w, inputs, damping=1e-9, **own)
    order = (w.flatten().square() * f.diagonal()).argsort(stable=True)[:16]
    mask = torch.ones(32, dtype=torch.bool)
    mask[order] = False
    assert torch.equal(got.mask, mask.view_as(w))
    assert torch.equal(got.weight, w * got.mask)


# ExactOBS.


def exact(w, x, pattern, **options):
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    options = MethodOptions(**options)
    METHODS["exactobs"].check(pattern, options)
    return METHODS["exactobs"].solve(w, inputs, pattern, options, None, None)


def test_exactobs_golden():
    w, x = golden()
    got = exact(w, x, Unstructured(0.5, "layer"))
    assert show(got.mask) == ".1...... / .1..1..1 / 11...111 / 111.1111"
    assert quadratic(got.weight - w, damped(hessian(x))) == pytest.approx(2.333360064961)


@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.7, 0.95])
def test_a_layers_budget_goes_by_one_heap_over_its_rows(sparsity):
    w, x = example(rows=6, columns=10, tokens=40)
    f = torch.block_diag(*[damped(x.T @ x)] * 6)
    weight, mask = greedy(w, f, pruned_count(60, sparsity))
    got = exact(w, x, Unstructured(sparsity, "layer"))
    assert torch.equal(got.mask, mask)
    torch.testing.assert_close(got.weight, weight)


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4), NM(1, 4)], ids=str)
def test_exactobs_beats_the_sweep_and_the_score(pattern):
    w, x = example()
    h = damped(x.T @ x)
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    losses = {}
    for method in ("exactobs", "sparsegpt", "wanda"):
        solved = METHODS[method].solve(w, inputs, pattern, MethodOptions(), None, None)
        losses[method] = quadratic(solved.weight - w, h)
    assert losses["exactobs"] < losses["sparsegpt"] < losses["wanda"]
    got = exact(w, x, pattern)
    assert got.loss * len(x) == pytest.approx(losses["exactobs"])
    torch.testing.assert_close(got.weight, exact_reconstruction(w, got.mask, h))


def test_putting_a_weight_back_lowers_the_error():
    w, x = example(rows=3, columns=12, tokens=60)
    h = damped(x.T @ x)
    got = exact(w, x, HALF)
    least = quadratic(got.weight - w, h)
    for i, j in (~got.mask).nonzero().tolist():
        mask = got.mask.clone()
        mask[i, j] = True
        assert quadratic(exact_reconstruction(w, mask, h) - w, h) < least


def test_exactobs_is_near_the_best_of_all_masks():
    w, x = example(rows=5, columns=9, tokens=40)
    h = damped(x.T @ x)
    got = exact(w, x, Unstructured(4 / 9, "row"))
    total = 0.0
    for i in range(5):
        best = float("inf")
        for gone in itertools.combinations(range(9), 4):
            mask = torch.ones(1, 9, dtype=torch.bool)
            mask[0, list(gone)] = False
            best = min(best, quadratic(exact_reconstruction(w[i : i + 1], mask, h) - w[i], h))
        total += best
    found = quadratic(got.weight - w, h)
    assert total * (1 - 1e-9) <= found < 1.1 * total


# The oracle on sampled rows.


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=str)
def test_gaps_are_those_of_the_whole_layer(pattern):
    w, x = example()
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    gaps = gap_to_exact(w, inputs, pattern, ("wanda", "sparsegpt", "exactobs"), rows=1000)
    h = damped(x.T @ x)
    row = pattern if isinstance(pattern, NM) else Unstructured(0.5, "row")
    best = quadratic(exact(w, x, row).weight - w, h)
    for name, gap in gaps.items():
        got = METHODS[name].solve(w, inputs, row, MethodOptions(), None, None)
        error = quadratic(got.weight - w, h)
        assert gap.error == pytest.approx(error / best)
        assert gap.relative_error == pytest.approx(error / quadratic(w, h))
        least = quadratic(exact_reconstruction(w, got.mask, h) - w, h)
        assert gap.mask_error == pytest.approx(least / best)
        assert gap.error >= gap.mask_error * (1 - 1e-9)
    assert gaps["exactobs"].error == pytest.approx(1) and gaps["exactobs"].agreement == 1
    assert 1 < gaps["sparsegpt"].error < gaps["wanda"].error
    assert 0.5 < gaps["wanda"].agreement < 1


def test_sampled_rows_depend_on_the_seed_only():
    w, x = example()
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    some = [gap_to_exact(w, inputs, HALF, rows=4, seed=s)["wanda"].error for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2]


@pytest.mark.parametrize(
    ("pattern", "methods", "message"),
    [
        (Unstructured(0.5, "layer"), ("wanda",), "scope: expected row, got 'layer'"),
        (Unstructured(0.0), ("wanda",), "expected one that costs something"),
        (HALF, ("gblm",), "need no gradients, got 'gblm'"),
    ],
)
def test_the_oracle_says_what_is_wrong(pattern, methods, message):
    w, x = example()
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    with pytest.raises(UserError, match=message):
        gap_to_exact(w, inputs, pattern, methods)


# Bad input.


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("obs", {"samples": 0}, "obs samples: expected at least 1, got 0"),
        ("obs", {"rounds": 0}, "obs rounds: expected at least 1, got 0"),
        ("woodfisher", {"shrinkage": 1.5}, r"shrinkage: expected a number in \[0, 1\], got 1.5"),
        ("woodfisher", {"block_size": 0}, "block_size: expected at least 1, got 0"),
        ("exactobs", {"max_columns": 0}, "max_columns: expected at least 1, got 0"),
    ],
)
def test_options_are_checked(method, values, message):
    with pytest.raises(UserError, match=message):
        build_options(method, OWN[method], values)


@pytest.mark.parametrize("method", ["obs", "woodfisher"])
def test_no_damping_becomes_the_least_one_and_no_gradient_is_refused(method):
    w, inputs, _ = layer(method=method)
    assert solve(method, HALF, w, inputs, damping=0.0).damping == 1e-6
    inputs.gradient.samples.zero_()
    with pytest.raises(NotPositiveDefiniteError, match=f"{method}: expected gradients"):
        solve(method, HALF, w, inputs)


def test_a_layer_too_wide_for_exactobs_is_named_before_anything_runs():
    model = tiny_model("llama")
    with pytest.raises(LayerError, match=r"layers\.0\.mlp\.down_proj: expected at most 32 inputs"):
        prune(model, [tiny_tokens(8, 16)], "exactobs", 0.5, method_options={"max_columns": 32})


def test_gradients_that_do_not_fit_are_refused_before_they_are_taken():
    with pytest.raises(UserError, match=r"gradient statistics: need .* GB, .* GB are free"):
        prune(tiny_model("llama"), [tiny_tokens(2, 8)], "obs", 0.5,
              method_options={"samples": 10**9})  # fmt: skip
