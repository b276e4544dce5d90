"""Allocations: exact means, the published figures, and what they measure."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, tiny_tokens

from pyprune.allocation import AlphaPruning, Owl, power_law_exponent, spread
from pyprune.allocation.alphapruning import eigenvalues
from pyprune.config import PruneConfig
from pyprune.errors import LayerError, UserError
from pyprune.prune import prune

# Mean exponents of the 32 blocks of LLaMA-7B in AlphaPruning's released metrics, and what its rule
# makes of them at 70 % with epsilon 0.2.
LLAMA_7B = [
    2.6222, 2.8899, 2.9690, 2.9645, 3.0900, 3.0638, 2.9606, 2.7456, 2.7752, 2.6086, 2.7167,
    2.7297, 2.7843, 2.8517, 2.8966, 3.1767, 3.1230, 3.4461, 3.8715, 3.6060, 3.8945, 4.0660,
    3.7551, 3.7146, 3.9941, 4.2204, 4.1024, 4.1604, 3.8508, 4.0934, 4.1601, 3.5374,
]  # fmt: skip
LLAMA_7B_SPARSITIES = [
    .5704, .6176, .6315, .6307, .6529, .6482, .6301, .5922, .5974, .5680, .5871, .5894, .5990,
    .6109, .6188, .6681, .6587, .7156, .7906, .7438, .7946, .8248, .7701, .7629, .8122, .8521,
    .8313, .8415, .7869, .8297, .8414, .7317,
]  # fmt: skip


def test_published_allocation_of_llama_7b():
    allocation = AlphaPruning(0.2)
    allocation.exponents = LLAMA_7B
    found = allocation.sparsities(0.7, [1] * 32)
    torch.testing.assert_close(found, LLAMA_7B_SPARSITIES, atol=2e-4, rtol=0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 2), st.integers(1, 10**9)), min_size=1, max_size=20),
    st.floats(0, 0.99),
    st.sampled_from(["scale", "shift"]),
)
def test_spread_meets_the_mean_within_its_bounds(blocks, target, mode):
    ratios, sizes = [r for r, _ in blocks], [n for _, n in blocks]
    found = spread(ratios, sizes, target, mode)
    mean = sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes)
    assert abs(mean - target) < 1e-9
    assert all(0 <= s <= 0.99 for s in found)
    order = sorted(range(len(ratios)), key=ratios.__getitem__)
    assert all(found[a] <= found[b] for a, b in pairwise(order))


def test_spread_refuses_more_than_every_block_may_lose():
    with pytest.raises(UserError, match=r"expected at most 0\.99 with an allocation, got 0.995"):
        spread([1.0], [1], 0.995, "scale")


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_exponent_of_pareto_samples(alpha):
    n = 4000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = (1 - uniform).pow(-1 / (alpha - 1)).sort().values
    assert power_law_exponent(values) == pytest.approx(alpha, abs=6 * (alpha - 1) / n**0.5)


def test_exponent_does_not_change_with_scale_or_transposition():
    w = torch.randn(48, 80, generator=torch.Generator().manual_seed(1))
    expected = power_law_exponent(eigenvalues(w))
    assert power_law_exponent(eigenvalues(w.T)) == pytest.approx(expected, rel=1e-6)
    assert power_law_exponent(eigenvalues(w * 8)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "w", [torch.eye(8), torch.zeros(8, 8), torch.ones(8, 8)], ids=["equal", "zero", "rank 1"]
)
def test_spectra_without_an_exponent(w):
    assert power_law_exponent(eigenvalues(w)) != power_law_exponent(eigenvalues(w))
    allocation = AlphaPruning()
    allocation.measure([(w, None)])
    allocation.measure([(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), None)])
    assert allocation.sparsities(0.5, [64, 64]) == pytest.approx([0.5, 0.5])


def test_owl_gives_blocks_with_outliers_less_sparsity():
    smooth, spiky = torch.ones(4, 50), torch.ones(4, 50)
    norms = torch.ones(50)
    norms[3] = 100.0
    allocation = Owl(0.1)
    allocation.measure([(smooth, torch.ones(50))])
    allocation.measure([(spiky, norms)])
    assert allocation.shares == [0.0, 4 / 200]
    assert allocation.sparsities(0.6, [200, 200]) == pytest.approx([0.7, 0.5])


def test_weights_that_are_no_numbers_are_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(LayerError, match=r"^model.layers.1.mlp.up_proj: expected finite weights"):
        prune(model, method="magnitude", pattern=0.5, allocation="alphapruning")


@pytest.mark.parametrize("allocation", ["alphapruning", "owl"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruning_follows_the_allocation(allocation, method):
    model = tiny_model("llama")
    report = prune(
        model,
        [tiny_tokens(4, 32, 0)],
        method=method,
        pattern=0.5,
        allocation=allocation,
        allocation_strength=0.2,
    )
    by_block = {}
    for layer in report.layers:
        by_block.setdefault(layer.name.split(".")[2], []).append(layer)
    means = [
        sum(x.zeros for x in block) / sum(x.elements for x in block) for block in by_block.values()
    ]
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert max(means) - min(means) > 0.1
    for block in by_block.values():
        assert max(x.sparsity for x in block) - min(x.sparsity for x in block) < 0.04
    assert len({layer.pattern for layer in report.layers}) == len(by_block)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "allocation": "owl"}, "block by block, got pattern 2:4"),
        ({"sparsity": 0.5, "scope": "global", "allocation": "owl"}, "got scope global"),
        ({"sparsity": 0.5, "allocation": "best"}, "allocation: expected one of uniform"),
        ({"sparsity": 0.5, "allocation_strength": 0.1}, "expected none for uniform"),
        ({"sparsity": 0.5, "allocation": "owl", "allocation_strength": 1.5}, r"in \[0, 1\)"),
    ],
)
def test_what_cannot_be_allocated(options, message):
    with pytest.raises(UserError, match=message):
        PruneConfig(method="wanda", **options)
