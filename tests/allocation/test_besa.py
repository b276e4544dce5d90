"""BESA: its pieces against brute force, and whole models block by block."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, MOE_FAMILIES, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.allocation.besa import (
    BesaOptions,
    Masking,
    Ranked,
    exact_counts,
    initial_logits,
    learn_block,
)
from pyprune.config import PruneConfig
from pyprune.errors import LayerError, UserError
from pyprune.methods import METHODS
from pyprune.methods.selection import select_mask
from pyprune.models.adapter import Adapter
from pyprune.patterns import Unstructured, pruned_count
from pyprune.prune import prune, prune_checkpoint


def matrix(rows=5, columns=12, seed=0, scores=None, name="w"):
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=gen, dtype=torch.float64)
    scores = w.abs() if scores is None else scores
    return Ranked.of(name, w, scores, torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("target", [0.01, 0.3, 0.5, 0.7, 0.99])
def test_starts_from_the_flattest_distribution_with_the_mean(target):
    logits, rates = initial_logits(101, target), torch.linspace(0, 1, 101, dtype=torch.float64)
    beta = logits.softmax(0)
    assert float(beta @ rates) == pytest.approx(target, abs=1e-9)
    # log beta is linear in the rate: what maximises the entropy at a given mean.
    steps = beta.log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(100), atol=1e-9, rtol=0)
    if target == 0.5:
        assert float(logits.abs().max()) < 1e-9


def test_at_its_start_it_is_wanda():
    m, rates = matrix(4, 16), torch.linspace(0, 1, 101, dtype=torch.float64)
    beta = initial_logits(101, 0.5).softmax(0).expand(4, 101)
    masked = Masking.apply(beta, m, rates)
    mask = select_mask(m.weight, Unstructured(0.5), scope="row")
    assert torch.equal(masked, torch.where(mask, m.weight, 0))


@pytest.mark.parametrize("groups", [5, 1])
def test_gradient_is_that_of_the_expected_mask(groups):
    m, rates = matrix(), torch.linspace(0, 1, 11, dtype=torch.float64)
    gen = torch.Generator().manual_seed(1)
    logits = torch.randn(groups, 11, generator=gen, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(5, 12, generator=gen, dtype=torch.float64)
    Masking.apply(logits.softmax(1), m, rates).backward(upstream)
    found, logits.grad = logits.grad, None
    beta = logits.softmax(1).expand(5, 11)
    order = m.weight.abs().argsort(1)
    for row in range(5):
        for rank in range(12):
            gone = sum(beta[row, d] for d in range(11) if rank < int(12 * (d / 10) + 1e-9))
            column = order[row, rank]
            part = (1 - gone) * m.weight[row, column] * upstream[row, column]
            if torch.is_tensor(gone):
                part.backward(retain_graph=True)
    torch.testing.assert_close(found, logits.grad, atol=1e-12, rtol=1e-10)


def test_masks_are_nested():
    m = matrix(3, 300, scores=torch.zeros(3, 300))  # ties: the lower column goes first
    assert m.ranks.dtype == torch.int16
    previous = m.mask(torch.tensor([0, 0, 0]))
    assert bool(previous.all())
    for count in (1, 7, 299):
        mask = m.mask(torch.tensor([count] * 3))
        assert not bool((mask & ~previous).any()) and not bool(mask[:, :count].any())
        assert int(mask.sum()) == 3 * (300 - count)
        previous = mask


@settings(max_examples=60)
@given(st.data())
def test_counts_are_exact_within_their_bounds(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1))
    wanted, lowest = [], []
    for rows, columns in shapes:
        wanted.append(torch.tensor(data.draw(_list(st.floats(0, 1), rows)), dtype=torch.float64))
        lowest.append(torch.tensor(data.draw(_list(st.integers(0, columns // 3), rows))))
    total = sum(rows * columns for rows, columns in shapes)
    count = data.draw(st.integers(0, int(0.9 * total)))
    columns = [c for _, c in shapes]
    found = exact_counts(wanted, columns, lowest, count)
    least = sum(int(rows.sum()) for rows in lowest)
    assert sum(int(rows.sum()) for rows in found) == max(count, least)
    for counts, rows, width, w in zip(found, lowest, columns, wanted, strict=True):
        assert bool((counts >= rows).all()) and bool((counts <= width).all())
        free = counts > rows
        order = w[free].argsort()
        if least <= count:  # a row that wants more gets no less, but for rounding
            assert bool((counts[free][order].diff() >= -1).all())


def _list(elements, n):
    return st.lists(elements, min_size=n, max_size=n)


def test_uniform_counts_split_what_is_left_over():
    (found,) = exact_counts(
        [torch.full((4,), 0.7, dtype=torch.float64)], [10], [torch.zeros(4)], 27
    )
    assert found.tolist() == [7, 7, 7, 6] and found.dtype == torch.int64


def linear_block(m, tokens=64, seed=2):
    """`run` of a block that is one matrix, on two batches."""
    gen = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(tokens, m.weight.shape[1], generator=gen).double() for _ in range(2)]

    def run(k, weights):
        return inputs[k] @ (m.weight if weights is None else weights[m.name]).T

    return run, [tokens, tokens]


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_takes_from_the_row_that_hardly_matters(target):
    m = matrix(2, 40)
    m.weight[0] *= 0.01
    run, tokens = linear_block(m)
    count = int(80 * target)
    learned = learn_block("block", [m], run, tokens, count, BesaOptions(steps=60))
    mask = learned.masks["w"]
    removed = (~mask).sum(1).tolist()
    assert sum(removed) == count
    assert removed[0] > removed[1] + 5
    assert learned.learned < 0.7 * learned.uniform
    error = sum(
        float((run(k, {"w": m.weight * mask}) - run(k, None)).square().sum()) for k in (0, 1)
    )
    assert learned.learned == pytest.approx(error) and learned.ratio < 0.7


def test_never_worse_than_uniform():
    m = matrix(6, 30)
    run, tokens = linear_block(m)
    wild = BesaOptions(steps=1, learning_rate=1e4, penalty=0.0)
    learned = learn_block("block", [m], run, tokens, 90, wild)
    assert learned.learned > learned.uniform and learned.ratio == 1.0
    assert torch.equal(learned.masks["w"], select_mask(m.weight, Unstructured(0.5), scope="row"))


def test_learns_in_fp16_too():
    """The loss is relative, so gradients of large outputs are below the smallest of fp16."""
    wide = matrix(6, 40)
    wide.weight[0] *= 0.01
    learned = []
    for dtype in (torch.float16, torch.float32):
        w = wide.weight.half().to(dtype)
        m = Ranked.of("w", w, wide.weight.abs(), torch.zeros(6, dtype=torch.int64))
        gen = torch.Generator().manual_seed(2)
        x = 1000 * torch.randn(4096, 40, generator=gen).to(dtype)

        def run(k, weights, m=m, x=x):
            return x @ (m.weight if weights is None else weights["w"]).T

        learned.append(learn_block("block", [m], run, [4096], 120, BesaOptions(steps=40)))
    half, single = learned
    assert single.ratio < 0.9 and half.ratio == pytest.approx(single.ratio, rel=0.02)


def test_the_penalty_holds_the_mean_while_it_learns():
    m = matrix(6, 30)
    means = []
    for penalty in (0.0, 50.0):
        options = BesaOptions(steps=40, penalty=penalty)
        means.append(learn_block("block", [m], *linear_block(m), 90, options).mean)
    assert means[0] < 0.4 and means[1] == pytest.approx(0.5, abs=0.05)


def test_what_is_not_finite_names_the_block():
    m = matrix()
    plain, tokens = linear_block(m)

    def broken(k, weights):
        return plain(k, weights) * (1.0 if weights is None or k == 0 else float("nan"))

    with pytest.raises(LayerError, match=r"^block: expected a finite error of its output, got nan"):
        learn_block("block", [m], broken, tokens, 30, BesaOptions())
    calls = []

    def later(k, weights):
        calls.append(k)
        return plain(k, weights) * (1.0 if len(calls) < 6 else float("inf"))

    with pytest.raises(LayerError, match="block: expected a finite loss, got inf in step 1"):
        learn_block("block", [m], later, tokens, 30, BesaOptions())


def tokens(rows=2, length=32):
    return [tiny_tokens(rows, length, seed) for seed in range(2)]


def refs_of(model):
    adapter = Adapter.of(model)
    return [adapter.linears(i) for i in range(len(adapter.blocks))]


def options(**own):
    return {"allocation": "besa", "allocation_options": {"steps": 8, **own}}


def ratio(report):
    """Mean error of the blocks over that of uniform pruning."""
    return float(re.search(r"sparsity: ([\d.]+) on average", report.notes[0])[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_meets_the_count_of_every_block(family):
    model = tiny_model(family)
    dense = [[ref.weight().clone() for ref in block] for block in refs_of(model)]
    report = prune(model, tokens(), "wanda", 0.5, **options())
    for block, before in zip(refs_of(model), dense, strict=True):
        zeros = sum(int((ref.weight() == 0).sum()) for ref in block)
        assert zeros == pruned_count(sum(w.numel() for w in before), 0.5)
        for ref, w in zip(block, before, strict=True):
            kept = ref.weight() != 0
            assert torch.equal(ref.weight()[kept], w[kept])
    assert ratio(report) < 0.95
    sparsities = {layer.sparsity for layer in report.layers}
    assert len(sparsities) > 3 and report.sparsity == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("granularity", ["row", "layer"])
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_other_targets(granularity, target):
    model = tiny_model("llama")
    report = prune(model, tokens(), "wanda", target, **options(granularity=granularity))
    zeros = sum(layer.zeros for layer in report.layers)
    elements = [sum(ref.weight().numel() for ref in block) for block in refs_of(model)]
    assert zeros == sum(pruned_count(n, target) for n in elements)
    assert ratio(report) < 1
    for ref in refs_of(model)[0]:
        counts = (ref.weight() == 0).sum(1)
        if granularity == "layer":
            assert int(counts.max() - counts.min()) <= 1


def weights_of(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(p, b[name]) for name, p in a.items())


def pruned(family="llama", data=None, method="wanda", own=None, **more):
    model = tiny_model(family)
    prune(model, data or tokens(), method, 0.5, **options(**(own or {})), **more)
    return weights_of(model)


def test_repeats_bit_for_bit_in_every_walk():
    single = pruned()
    assert same(single, pruned()) and same(single, pruned(walk="naive"))
    assert same(single, pruned(spill="disk"))
    assert not same(single, pruned(own={"learning_rate": 0.05}))
    two_pass = pruned(walk="two-pass")
    # Wanda's masks are those learned at the block's entry: how statistics are taken is the same.
    assert same(single, two_pass)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *[(name, {}) for name in METHODS if name != "wanda"],
        ("wanda", {"update": "sequential"}),
        ("wanda", {"reconstruct": True}),
    ],
)
def test_methods_rank_and_update(method, more):
    model = tiny_model("llama")
    dense = weights_of(model)
    report = prune(model, tokens(), method, 0.5, **options(), **more)
    assert report.sparsity == 0.5 and ratio(report) < 1
    assert {layer.method for layer in report.layers} == {method}
    changed = any(
        bool(((p != dense[name]) & (p != 0)).any()) for name, p in model.state_dict().items()
    )
    assert changed == (METHODS[method].updates_weights or bool(more))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_without_tokens_go_by_magnitude_and_count(family):
    model = tiny_model(family)
    report = prune(model, [tiny_tokens(1, 6)], "wanda", 0.5, **options())
    by_magnitude = [layer for layer in report.layers if layer.method == "magnitude"]
    assert by_magnitude and all("tokens that wanda needs" in x.notes[0] for x in by_magnitude)
    for block in refs_of(model):
        zeros = sum(int((ref.weight() == 0).sum()) for ref in block)
        assert zeros == pruned_count(sum(ref.weight().numel() for ref in block), 0.5)


def test_masks_of_an_earlier_pruning_go_first():
    model = tiny_model("llama")
    gen = torch.Generator().manual_seed(3)
    refs = [ref for block in refs_of(model) for ref in block]
    masks = {r.name: torch.rand(r.weight().shape, generator=gen) >= 0.2 for r in refs}
    prune(model, tokens(), "wanda", 0.5, preserve_mask=masks, **options())
    for ref in refs:
        assert not bool(ref.weight()[~masks[ref.name]].any())
    zeros = sum(int((ref.weight() == 0).sum()) for ref in refs)
    assert zeros == pruned_count(sum(ref.weight().numel() for ref in refs), 0.5)


def test_padding_has_no_part():
    ids = tiny_tokens(2, 20)
    pad = torch.zeros(2, 6, dtype=ids.dtype)
    mask = (torch.arange(26) < 20).long().expand(2, 26)
    padded = [{"input_ids": torch.cat([ids, pad], 1), "attention_mask": mask}]
    found, plain = pruned(data=padded), pruned(data=[ids])
    flips = sum(int(((p == 0) != (plain[n] == 0)).sum()) for n, p in found.items())
    assert flips <= 0.01 * sum(p.numel() for p in plain.values())


def test_streamed_and_narrow_weights(tmp_path):
    tiny_model("mixtral").bfloat16().save_pretrained(tmp_path / "in")
    config = PruneConfig(method="wanda", sparsity=0.5, **options())
    report = prune_checkpoint(tmp_path / "in", tmp_path / "out", config, batches=tokens())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
    prune(model, tokens(), config=config)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert same(weights_of(model), weights_of(other))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.notes[0].startswith("besa: squared error of the blocks' outputs")


def test_layers_that_are_left_out_stay():
    model = tiny_model("llama")
    dense = weights_of(model)
    report = prune(model, tokens(), "wanda", 0.5, include=["*.1.mlp.*"], **options())
    assert len(report.layers) == 3 and report.sparsity == 0.5
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, dense[name])}
    assert changed == {f"{layer.name}.weight" for layer in report.layers}


def test_a_model_that_is_not_finite_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e30)
    with pytest.raises(LayerError, match=r"^model\.layers\.1"):
        prune(model, tokens(), "wanda", 0.5, **options())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"allocation_options": {"steps": 0}}, "besa steps: expected at least 1, got 0"),
        ({"allocation_options": {"candidates": 1}}, "besa candidates: expected at least 2"),
        ({"allocation_options": {"learning_rate": 0.0}}, "learning_rate: expected a positive"),
        ({"allocation_options": {"penalty": -1.0}}, "besa penalty: expected 0 or more"),
        ({"allocation_options": {"granularity": "head"}}, "granularity: expected row or layer"),
        ({"allocation_strength": 0.2}, "allocation_strength: expected none for besa"),
        ({"scope": "layer"}, "scope: besa compares within rows, expected row, got 'layer'"),
        ({"score_mass": True}, "score_mass: besa counts what goes"),
        ({"update": "iterative"}, "update: besa scores once, got 'iterative'"),
        ({"sparsity": 0.995}, r"sparsity: expected at most 0\.99 with an allocation, got 0.995"),
    ],
)
def test_what_cannot_be_learned(values, message):
    with pytest.raises(UserError, match=message):
        PruneConfig(**{"method": "wanda", "sparsity": 0.5, "allocation": "besa", **values})
