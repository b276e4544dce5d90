"""Ridges chosen by the loss of held-out tokens: which tokens, what loss, which ridge."""

import copy
import json
import math

import pytest
import torch
from depth_streams import model_of
from tiny_models import tiny_model, tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth.given import Given
from pyprune.depth.graph import KINDS, Branch, ResidualGraph, gaps
from pyprune.depth.heldout import HeldOut, least, parts_of, unchanged
from pyprune.depth.refit import choose_ridge, moments_of, multiply_branch, refit
from pyprune.depth.ridge import LADDER, Moments
from pyprune.depth.score import Scorer

SPECIAL = 1  # the token whose state becomes huge


def layers(*indices):
    return {Branch(kind, i) for i in indices for kind in KINDS}


# ---- which tokens


def test_whole_sequences_are_held_out():
    ids = tiny_tokens(10, 8)
    batches = [Batch(ids[:3]), Batch(ids[3:4]), Batch(ids[4:8]), Batch(ids[8:])]
    parts = parts_of(batches)
    assert torch.equal(torch.cat([p.batch.input_ids for p in parts if p.held.all()]), ids[[3, 7]])
    rest = torch.cat([p.batch.input_ids for p in parts if not p.held.any()])
    assert torch.equal(rest, ids[[0, 1, 2, 4, 5, 6, 8, 9]])
    assert all(p.held.all() or not p.held.any() for p in parts)
    few = parts_of([Batch(ids[:3])])  # the last of fewer than four
    assert [p.batch.input_ids.tolist() for p in few] == [ids[:2].tolist(), ids[2:3].tolist()]
    assert [p.held.all().item() for p in few] == [False, True]


def test_of_one_sequence_the_last_quarter_is_held_out():
    ids = tiny_tokens(1, 8)
    (part,) = parts_of([Batch(ids)])
    assert part.held.tolist() == [[False] * 6 + [True] * 2]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    (part,) = parts_of([Batch(ids, mask)])
    assert part.held.tolist() == [[False] * 3 + [True] + [False] * 4]
    assert part.held_rows().tolist() == [False, False, False, True]


def test_padding_is_not_held_out():
    ids, mask = tiny_tokens(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[0, 5:], mask[2, 3:] = 0, 0
    fitted, held = parts_of([Batch(ids, mask)])
    assert fitted.held_rows().tolist() == [False] * 13
    assert held.held.tolist() == [[True] * 3 + [False] * 5]
    assert held.held_rows().tolist() == [True] * 3
    assert torch.equal(held.batch.attention_mask, mask[2:])


def test_the_first_token_of_a_sequence_is_predicted_by_nothing():
    assert HeldOut.predicted(parts_of([Batch(tiny_tokens(2, 2))]))
    for ids in (tiny_tokens(1, 1), tiny_tokens(5, 1)):
        assert not HeldOut.predicted(parts_of([Batch(ids)]))
        model = model_of("llama")
        before = copy.deepcopy(model.state_dict())
        (fit,) = refit(ResidualGraph.of(model), layers(2), [Batch(ids)])
        assert fit["ridge"] is None and fit["held_out"] is None and fit["before"] == fit["after"]
        assert all(map(torch.equal, before.values(), model.state_dict().values()))


# ---- what loss


@torch.no_grad()
@pytest.mark.parametrize("removed", [layers(2), {Branch("mlp", 1), Branch("attention", 2)}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2_moe"])
def test_a_loss_is_that_of_the_folded_model(family, removed):
    """The branch before the gap changed in its weights, everything run, against the dense model;
    after a gap that stays as it is."""
    removed = removed | {Branch("attention", 0)}
    ids = tiny_tokens(6, 12)
    mask = torch.ones_like(ids)
    mask[3, 7:] = 0
    model = model_of(family)
    graph = ResidualGraph.of(model)
    start = gaps(removed, 4)[-1][0]
    last = graph.branches[start - 1]
    parts = parts_of([Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])])
    width = model.config.hidden_size
    made = torch.Generator().manual_seed(0)
    change = torch.randn(width, width, dtype=torch.float64, generator=made)
    held_out = HeldOut(graph, parts, Given())
    found = held_out.losses(start, removed, None, [unchanged, lambda rows: rows @ change])
    scorer = Scorer(graph, [Batch(ids[3:4], mask[3:4])], "kl")
    for loss, w in zip(found, (0 * change, change), strict=True):
        multiply_branch(graph, last, w)
        assert loss == pytest.approx(scorer.score_naive(removed), rel=1e-3)
    assert abs(found[0] - found[1]) > 0.03 * found[0]


@torch.no_grad()
def test_of_one_sequence_the_loss_is_that_of_its_end():
    ids = tiny_tokens(1, 16)
    graph = ResidualGraph.of(model_of("llama"))
    removed = layers(2)
    (loss,) = HeldOut(graph, parts_of([Batch(ids)]), Given()).losses(4, removed, None, [unchanged])
    dense = graph.model(ids).logits.log_softmax(-1)
    with graph.skipping(removed):
        pruned = graph.model(ids, use_cache=False).logits.log_softmax(-1)
    each = (dense.exp() * (dense - pruned)).sum(-1)[0]
    assert loss == pytest.approx(float(each[11:15].mean()), rel=1e-4)  # they predict 12 to 15
    assert loss != pytest.approx(float(each[:15].mean()), rel=1e-2)


@torch.no_grad()
def test_the_loss_is_against_the_model_as_given():
    ids = tiny_tokens(4, 12)
    model, given = model_of("llama"), Given()
    graph = ResidualGraph.of(model)
    parts = parts_of([Batch(ids)])
    (before,) = HeldOut(graph, parts, Given()).losses(4, layers(2), None, [unchanged])
    weight = model.model.layers[3].mlp.down_proj.weight
    given.hold([weight])
    weight.mul_(1.5)
    (after,) = HeldOut(graph, parts, given).losses(4, layers(2), None, [unchanged])
    with given.back():
        dense = model(ids[3:]).logits.log_softmax(-1)
    with graph.skipping(layers(2)):
        pruned = model(ids[3:], use_cache=False).logits.log_softmax(-1)
    each = (dense.exp() * (dense - pruned)).sum(-1)[0, :-1]
    assert after == pytest.approx(float(each.mean()), rel=1e-4) and after > before


# ---- which ridge


def some_moments(rows, seed):
    made = torch.Generator().manual_seed(seed)
    m, missing = (torch.randn(rows, 4, dtype=torch.float64, generator=made) for _ in range(2))
    return Moments.of(m, missing)


FITTED, HELD = some_moments(9, 0), some_moments(5, 1)


def choice(*losses, of_all=0.0):
    """With these losses of no change and of the ladder, and of the map of all sequences."""
    asked = []

    def measure(changes):
        asked.append(changes)
        return list(losses) if len(asked) == 1 else [of_all]

    ridge, change, told = choose_ridge(FITTED, HELD, measure)
    assert len(asked) == (1 if ridge is None else 2)
    return ridge, change, told


def test_the_least_loss_decides():
    for at, ridge in enumerate(LADDER):
        losses = [1.0 + abs(at - k) for k in range(len(LADDER))]
        found, change, told = choice(5.0, *losses)
        assert found == ridge and told == [5.0, 1.0]
        torch.testing.assert_close(change, (FITTED + HELD).solve(ridge))


def test_no_change_where_every_map_hurts_or_none_helps():
    for losses in ([1.1] * len(LADDER), [1.0] * len(LADDER), [math.nan] * len(LADDER)):
        assert choice(1.0, *losses) == (None, None, [1.0, 1.0])
    assert choice(math.nan, *[math.nan] * len(LADDER))[:2] == (None, None)


def test_a_loss_that_is_not_a_number_is_the_worst():
    ridge, _, _ = choice(math.nan, math.nan, 7.0, math.inf, *[math.nan] * (len(LADDER) - 3))
    assert ridge == LADDER[1]
    assert least([math.nan, math.inf]) == 0 and least([math.nan, 1.0, 1.0]) == 1


def test_of_equals_the_larger_ridge():
    ridge, _, _ = choice(2.0, *[1.0] * len(LADDER))
    assert ridge == max(LADDER)


@pytest.mark.parametrize("of_all", [1.1, math.nan, math.inf])
def test_a_map_of_all_sequences_that_is_worse_is_not_used(of_all):
    ridge, change, told = choice(2.0, *[1.0] * len(LADDER), of_all=of_all)
    torch.testing.assert_close(change, FITTED.solve(ridge))
    assert told == [2.0, 1.0]


def test_a_silent_branch_keeps_its_map():
    nothing = Moments.of(torch.zeros(3, 4), torch.ones(3, 4))
    assert choose_ridge(nothing, nothing, lambda changes: [1.0] * len(changes)) == (
        None,
        None,
        [1, 1],
    )


# ---- what it is for


@torch.no_grad()
def with_a_huge_token(size):
    """A model whose layer 2 writes a state of about `size` where the token `SPECIAL` is, as large
    models do with their first token. Channel 0 says where that is; nothing else writes it."""
    model = tiny_model("llama", num_hidden_layers=4)
    embeddings = model.model.embed_tokens.weight
    embeddings[:, 0] = 0
    embeddings[SPECIAL] = 0
    embeddings[SPECIAL, 0] = 8
    for layer in model.model.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight[0], last.bias[0] = 0, 0
    mlp = model.model.layers[2].mlp
    for name, at, bias in (("gate_proj", 4.0, -4.0), ("up_proj", 4.0, 0.0)):
        linear = mlp.get_submodule(name)
        linear.weight[0], linear.bias[0] = 0, bias
        linear.weight[0, 0] = at
    made = torch.Generator().manual_seed(3)
    mlp.down_proj.weight[:, 0] = size * torch.randn(len(mlp.down_proj.weight), generator=made)
    return model


def huge_text(rows):
    ids = tiny_tokens(rows, 32).clamp(min=SPECIAL + 1)
    ids[:, 0] = SPECIAL
    return ids


@torch.no_grad()
@pytest.mark.parametrize("size, expected", [(1.0, 10.0), (100.0, None)])
def test_one_huge_state_does_not_decide(size, expected):
    """By held-out squared error the least ridge is best, and the model far worse than without a
    map: it was what refit took."""
    model, removed, ids = with_a_huge_token(size), layers(2), huge_text(8)
    graph, parts = ResidualGraph.of(model), parts_of([Batch(ids)])
    fitted, held, _ = moments_of(graph, removed, (4, 6), parts, Given(), None)
    errors = [held.error_of(fitted.solve(ridge)) for ridge in LADDER]
    assert LADDER[least(errors)] == min(LADDER) and min(errors) < 0.8 * float(held.error)
    scorer = Scorer(graph, [Batch(huge_text(24)[8:])], "kl")
    bare = scorer.score_naive(removed)

    def after(ridge):
        graph = ResidualGraph.of(copy.deepcopy(model))
        (fit,) = refit(graph, removed, [Batch(ids)], ridge)
        return fit, Scorer.score_naive(replaced(scorer, graph), removed)

    assert after(min(LADDER))[1] > 1.15 * bare
    fit, loss = after(None)
    assert fit["ridge"] == expected
    assert loss == bare if expected is None else loss < bare
    assert json.loads(json.dumps(fit)) == fit


def replaced(scorer, graph):
    """The scorer, of another graph's model against the same dense one."""
    scorer = copy.copy(scorer)
    scorer.graph = graph
    return scorer


@torch.no_grad()
def test_no_gap_raises_the_held_out_loss():
    """Gap after gap, in the order of the model: what the second is measured by has the first map
    in it."""
    ids = tiny_tokens(8, 32)
    model = tiny_model("llama", num_hidden_layers=6)
    graph, removed = ResidualGraph.of(model), layers(1, 4)
    scorer = Scorer(graph, [Batch(ids[[3, 7]])], "kl")
    bare = scorer.score_naive(removed)
    first, second = refit(graph, removed, [Batch(ids)])
    final = scorer.score_naive(removed)
    assert first["held_out"][0] == pytest.approx(bare, rel=1e-3)
    for fit in (first, second):
        assert fit["ridge"] in LADDER and fit["held_out"][1] < fit["held_out"][0]
    assert second["held_out"][0] < bare and final < second["held_out"][1] * (1 + 1e-3)
    again = tiny_model("llama", num_hidden_layers=6)
    assert refit(ResidualGraph.of(again), removed, [Batch(ids)]) == [first, second]
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
