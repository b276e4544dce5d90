"""What holds for every method, whatever the numbers."""

from itertools import pairwise

import pytest
import torch
from methods.golden import damped, exact_reconstruction, quadratic
from methods.gradients import attach

from pyprune.methods import METHODS, LayerInputs, MethodOptions
from pyprune.patterns import NM, Unstructured, pruned_count

SCOPES = [(name, scope) for name, row in METHODS.items() for scope in row.scopes]
LAYER_SCOPES = [(name, scope) for name, scope in SCOPES if scope != "global"]
UPDATES = [(name, update) for name, row in METHODS.items() for update in row.updates]
# Gradients have rows and a scale of their own: see test_gradient_methods.
LAYERWISE = [u for u in UPDATES if METHODS[u[0]].gradient is None]
OPTIONS = {"block_size": 16}


def example(rows=24, columns=48, tokens=200, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=gen, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=gen, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=gen, dtype=torch.float64) @ (
        mix / columns**0.5 + torch.eye(columns, dtype=torch.float64)
    )
    return w.to(dtype), x.to(dtype)


def inputs_of(x):
    return LayerInputs(x.square().sum(0), len(x), x.T @ x)


def solve(method, pattern, w, x, preserve=None, mask=None, **options):
    options = MethodOptions(**{**OPTIONS, **options})
    METHODS[method].check(pattern, options)
    inputs = attach(inputs_of(x), method, w, x, options)
    return METHODS[method].solve(w, inputs, pattern, options, preserve, mask)


def groups(mask, scope):
    """The parts of a mask whose counts are exact."""
    return list(mask) if scope == "row" else [mask.flatten()]


@pytest.mark.parametrize("sparsity", [0, 0.13, 0.5, 0.77, 0.99])
@pytest.mark.parametrize(("method", "scope"), LAYER_SCOPES)
def test_counts_are_exact(method, scope, sparsity):
    w, x = example(rows=7, columns=50)
    solution = solve(method, Unstructured(sparsity, scope), w, x)
    for group in groups(solution.mask, scope):
        assert int((~group).sum()) == pruned_count(len(group), sparsity)
    assert torch.equal(solution.weight == 0, ~solution.mask)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 3), NM(5, 12), NM(7, 16)])
@pytest.mark.parametrize(("method", "update"), UPDATES)
def test_every_group_keeps_n_of_m(method, update, pattern):
    w, x = example()
    solution = solve(method, pattern, w, x, update=update)
    kept = solution.mask.view(len(w), -1, pattern.m).sum(-1)
    assert torch.equal(kept, torch.full_like(kept, pattern.n))
    assert torch.equal(solution.weight == 0, ~solution.mask)


@pytest.mark.parametrize("method", list(METHODS))
def test_n_of_n_changes_nothing(method):
    w, x = example()
    solution = solve(method, NM(4, 4), w, x)
    assert torch.equal(solution.weight, w) and bool(solution.mask.all())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_iterative_rows_lose_their_exact_count(sparsity):
    w, x = example(columns=50)
    for method in ("magnitude", "wanda"):
        mask = solve(method, Unstructured(sparsity), w, x, update="iterative").mask
        assert (~mask).sum(1).unique().tolist() == [pruned_count(50, sparsity)]


# Their later choices depend on the updates after the earlier ones, and on how many those were.
STEPWISE = ("sparsegpt", "obs")


@pytest.mark.parametrize(("method", "scope"), [s for s in LAYER_SCOPES if s[0] not in STEPWISE])
def test_masks_are_nested(method, scope):
    w, x = example()
    masks = [solve(method, Unstructured(s, scope), w, x).mask for s in (0.2, 0.4, 0.6, 0.8)]
    for looser, tighter in pairwise(masks):
        assert not bool((tighter & ~looser).any())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.3), NM(2, 4)], ids=str)
@pytest.mark.parametrize(("method", "update"), UPDATES)
def test_pruning_again_changes_nothing(method, update, pattern):
    w, x = example()
    once = solve(method, pattern, w, x, update=update)
    twice = solve(method, pattern, once.weight, x, update=update)
    assert torch.equal(twice.weight, once.weight)
    assert torch.equal(twice.mask, once.mask)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize(("method", "update"), LAYERWISE)
def test_rows_in_another_order(method, update, pattern):
    w, x = example()
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(5))
    straight = solve(method, pattern, w, x, update=update)
    permuted = solve(method, pattern, w[order], x, update=update)
    assert torch.equal(permuted.mask, straight.mask[order])
    torch.testing.assert_close(permuted.weight, straight.weight[order])


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_columns_in_another_order(method):
    w, x = example()
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(5))
    straight = solve(method, Unstructured(0.5), w, x)
    permuted = solve(method, Unstructured(0.5), w[:, order], x[:, order])
    assert torch.equal(permuted.mask, straight.mask[:, order])


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize(("method", "update"), LAYERWISE)
def test_scale_of_weights_and_inputs_does_not_matter(method, update, pattern):
    w, x = example()
    plain = solve(method, pattern, w, x, update=update)
    scaled = solve(method, pattern, 3.7 * w, 0.21 * x, update=update)
    assert torch.equal(scaled.mask, plain.mask)
    torch.testing.assert_close(scaled.weight, 3.7 * plain.weight)
    if plain.loss is not None:
        assert scaled.loss == pytest.approx(plain.loss * (3.7 * 0.21) ** 2)


def test_wanda_sees_the_product_of_weight_and_input():
    w, x = example()
    scale = torch.rand(w.shape[1], dtype=w.dtype) + 0.5
    plain = solve("wanda", Unstructured(0.5), w, x)
    assert torch.equal(solve("wanda", Unstructured(0.5), w / scale, x * scale).mask, plain.mask)
    rows = torch.rand(len(w), 1, dtype=w.dtype) + 0.5
    assert torch.equal(solve("wanda", Unstructured(0.5), w * rows, x).mask, plain.mask)


def test_wanda_with_equal_norms_is_magnitude_by_row():
    w, _ = example()
    x = torch.ones(3, w.shape[1], dtype=w.dtype)
    wanda = solve("wanda", Unstructured(0.5), w, x)
    magnitude = METHODS["magnitude"].solve(
        w, None, Unstructured(0.5, "row"), MethodOptions(), None, None
    )
    assert torch.equal(wanda.mask, magnitude.mask)


def test_sparsegpt_with_uncorrelated_inputs_is_a_wanda_threshold():
    w, _ = example()
    x = torch.diag(torch.rand(w.shape[1], dtype=w.dtype) + 0.1)
    solution = solve("sparsegpt", Unstructured(0.5, "layer"), w, x, damping=1e-9)
    torch.testing.assert_close(solution.weight, w * solution.mask)
    assert torch.equal(solution.mask, solve("wanda", Unstructured(0.5, "layer"), w, x).mask)


@pytest.mark.parametrize(("method", "update"), [u for u in LAYERWISE if u != ("magnitude", "none")])
def test_ties_go_to_the_lower_index(method, update):
    w = torch.ones(3, 8, dtype=torch.float64)
    x = torch.eye(8, dtype=torch.float64)
    mask = solve(method, NM(2, 4), w, x, update=update).mask
    assert mask.tolist() == [[False, False, True, True] * 2] * 3


@pytest.mark.parametrize("update", ["none", "sequential", "iterative"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_updates_lower_the_error(update, pattern):
    w, x = example()
    h = x.T @ x
    solution = solve("wanda", pattern, w, x, update=update)
    zeroed = quadratic(w * ~solution.mask, h)
    error = quadratic(solution.weight - w, h)
    best = quadratic(exact_reconstruction(w, solution.mask, damped(h)) - w, damped(h))
    if update == "none":
        assert error == pytest.approx(zeroed)
    else:
        assert error < zeroed
        assert quadratic(solution.weight - w, damped(h)) > best
        assert solution.loss * len(x) == pytest.approx(quadratic(solution.weight - w, damped(h)))


def iterative_oracle(w, x, pattern, scale, block):
    """Column by column, the scores of each panel taken when the sweep reaches it."""
    w, h = w.clone(), damped(x.T @ x)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    panel = pattern.m if isinstance(pattern, NM) else block
    for a in range(0, columns, panel):
        b = min(a + panel, columns)
        if isinstance(pattern, NM):
            count = pattern.m - pattern.n
        else:
            # The row's count, shared out by rounding the running total.
            whole = pruned_count(columns, pattern.sparsity)
            count = pruned_count(b, whole / columns) - pruned_count(a, whole / columns)
        order = (w[:, a:b].abs() * scale[a:b]).sort(dim=1, stable=True).indices[:, :count]
        mask[:, a:b].scatter_(1, order, False)
        for c in range(a, b):
            error = torch.where(mask[:, c], 0, w[:, c] / u[c, c])
            w[:, c:] -= error[:, None] * u[c, c:]
            w[~mask[:, c], c] = 0
    return w, mask


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4), NM(1, 5)], ids=str)
@pytest.mark.parametrize("block", [7, 16, 128])
def test_iterative_is_the_column_by_column_sweep(method, pattern, block):
    w, x = example(columns=60)
    scale = x.square().sum(0).sqrt() if method == "wanda" else torch.ones(60, dtype=w.dtype)
    weight, mask = iterative_oracle(w, x, pattern, scale, block)
    solution = solve(method, pattern, w, x, update="iterative", block_size=block)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize(("method", "update"), UPDATES)
def test_existing_zeros_stay_and_count(method, update, pattern):
    w, x = example()
    preserve = torch.rand(w.shape, generator=torch.Generator().manual_seed(7)) > 0.2
    preserve[:, 8:12] = torch.tensor([False, False, False, True])  # three of four, more than 2:4
    preserve[:, 12:16] = True
    w = w * preserve
    solution = solve(method, pattern, w, x, preserve=preserve, update=update)
    assert not bool((solution.mask & ~preserve).any())
    assert bool((solution.weight[~preserve] == 0).all())
    pruned = ~solution.mask
    if isinstance(pattern, NM):
        forced = (~preserve).view(len(w), -1, 4).sum(-1)
        assert torch.equal(pruned.view(len(w), -1, 4).sum(-1), forced.clamp_min(2))
    else:
        assert int(pruned.sum()) == pruned_count(w.numel(), 0.5)


def test_more_forced_zeros_than_asked_for_all_stay():
    w, x = example()
    preserve = torch.rand(w.shape, generator=torch.Generator().manual_seed(7)) > 0.5
    for method, scope in LAYER_SCOPES:
        solution = solve(method, Unstructured(0.1, scope), w * preserve, x, preserve=preserve)
        assert torch.equal(solution.mask, preserve)


@pytest.mark.parametrize(("method", "update"), UPDATES)
def test_a_given_mask_is_taken(method, update):
    w, x = example()
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(7)) > 0.5
    update = "sequential" if update == "iterative" else update
    solution = solve(method, Unstructured(0.5, "global"), w, x, mask=mask, update=update)
    assert torch.equal(solution.mask, mask)
    assert torch.equal(solution.weight != 0, mask)


@pytest.mark.parametrize(("method", "update"), [u for u in UPDATES if u[0] != "magnitude"])
def test_dead_inputs_lose_their_weights_first(method, update):
    w, x = example()
    x[:, [3, 17, 30]] = 0
    solution = solve(method, Unstructured(0.5), w, x, update=update)
    assert not bool(solution.mask[:, [3, 17, 30]].any())
    assert bool(solution.weight.isfinite().all())


@pytest.mark.parametrize(("method", "update"), UPDATES)
def test_weights_of_dead_inputs_that_stay_keep_their_value(method, update):
    w, x = example()
    x[:, 4:8] = 0
    solution = solve(method, NM(2, 4), w, x, update=update)
    assert torch.equal(solution.weight == 0, ~solution.mask)
    assert torch.equal(solution.weight[:, 4:8], w[:, 4:8] * solution.mask[:, 4:8])


@pytest.mark.parametrize(("method", "update"), UPDATES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (5, 1), (3, 130)])
def test_awkward_shapes_and_fewer_tokens_than_columns(method, update, shape):
    w, x = example(*shape, tokens=3)
    solution = solve(method, Unstructured(0.5), w, x, update=update)
    assert bool(solution.weight.isfinite().all())
    assert torch.equal(solution.weight == 0, ~solution.mask)


@pytest.mark.parametrize("method", list(METHODS))
def test_single_precision_agrees_with_double(method):
    w, x = example(rows=64, columns=96, tokens=400)
    double = solve(method, Unstructured(0.5), w, x)
    single = solve(method, Unstructured(0.5), w.float(), x.float())
    assert (single.mask == double.mask).double().mean() > 0.999
    if double.loss is not None:
        assert single.loss == pytest.approx(double.loss, rel=1e-3)


def bisected(scores, target):
    """The appendix's search: alpha in [0, 0.8], until within 0.1 % of the target."""
    ordered = scores.sort(dim=1).values
    running = ordered.cumsum(1)
    low, high, alpha = 0.0, 0.8, 0.4
    for _ in range(60):
        counts = (running <= alpha * running[:, -1:]).sum(1)
        achieved = float(counts.sum()) / scores.numel()
        if abs(achieved - target) <= 0.001 or high - low < 0.001:
            break
        if achieved > target:
            high, alpha = alpha, (alpha + low) / 2
        else:
            low, alpha = alpha, (alpha + high) / 2
    return counts


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_score_mass_is_the_bisection_with_the_exact_count(sparsity):
    w, x = example(rows=80, columns=300)
    w *= torch.linspace(0.1, 3, 80, dtype=w.dtype)[:, None] ** torch.linspace(0, 2, 300)
    mask = solve("wanda", Unstructured(sparsity), w, x, score_mass=True).mask
    assert int((~mask).sum()) == pruned_count(w.numel(), sparsity)
    counts = (~mask).sum(1)
    assert counts.unique().numel() > 1
    scores = w.abs() * x.square().sum(0).sqrt()
    assert (counts - bisected(scores, sparsity)).abs().max() <= 3
    # Within a row it is the smallest scores that go.
    for row, kept in zip(scores, mask, strict=True):
        assert row[~kept].max() <= row[kept].min()


def test_score_mass_leaves_a_row_alone_whose_smallest_score_is_too_large():
    w = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1e-3, 1e-3, 1e-3, 9.0]], dtype=torch.float64)
    x = torch.eye(4, dtype=torch.float64)
    mask = solve("wanda", Unstructured(3 / 8), w, x, score_mass=True).mask
    assert mask.tolist() == [[True] * 4, [False, False, False, True]]


def test_score_mass_prunes_rows_of_zeros_first():
    w = torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 4]], dtype=torch.float64)
    mask = solve("wanda", Unstructured(0.5), w, torch.eye(4).double(), score_mass=True).mask
    assert mask.tolist() == [[False] * 4, [True] * 4]


def test_score_mass_preserves():
    w, x = example()
    preserve = torch.rand(w.shape, generator=torch.Generator().manual_seed(7)) > 0.2
    mask = solve("wanda", Unstructured(0.5), w, x, preserve=preserve, score_mass=True).mask
    assert not bool((mask & ~preserve).any())
    assert int((~mask).sum()) == pruned_count(w.numel(), 0.5)


def test_a_factor_is_shared_by_the_linears_that_read_the_same_input(monkeypatch):
    from pyprune import ops

    calls = []
    factor = ops.obs_factor
    monkeypatch.setattr(ops, "obs_factor", lambda *a, **k: calls.append(1) or factor(*a, **k))
    w, x = example()
    inputs = inputs_of(x)
    for part in (w[:8], w[8:]):
        METHODS["sparsegpt"].solve(part, inputs, NM(2, 4), MethodOptions(), None, None)
    assert len(calls) == 1


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_needs_inputs(method):
    w, _ = example()
    with pytest.raises(ValueError, match=f"{method}: expected calibration inputs, got none"):
        METHODS[method].solve(w, None, Unstructured(0.5), MethodOptions(), None, None)
    with pytest.raises(ValueError, match=r"update .*: expected calibration inputs, got none"):
        METHODS["magnitude"].solve(
            w, None, Unstructured(0.5), MethodOptions(update="iterative"), None, None
        )


@pytest.mark.parametrize("method", list(METHODS))
def test_a_global_scope_needs_the_mask_that_was_selected(method):
    w, x = example()
    with pytest.raises(ValueError, match=r"a mask that was selected|the mask that was selected"):
        solve(method, Unstructured(0.5, "global"), w, x)


def test_norms_are_not_enough_for_a_sweep():
    w, x = example()
    inputs = LayerInputs(x.square().sum(0), len(x))
    with pytest.raises(ValueError, match="it needs the Gram matrix"):
        METHODS["sparsegpt"].solve(w, inputs, Unstructured(0.5), MethodOptions(), None, None)
