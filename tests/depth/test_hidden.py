"""States between layers and statistics over them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, tiny_model, tiny_tokens

from pyprune.calibration.tokens import Batch
from pyprune.depth.hidden import (
    angular_distances,
    block_influence,
    last_tokens,
    real_tokens,
    token_states,
    visit_states,
)
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter


def states_of(adapter, batch):
    found = []
    visit_states(adapter, batch, lambda at, h: found.append((at, h.clone())))
    assert [at for at, _ in found] == list(range(len(adapter.blocks) + 1))
    return [h for _, h in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_last_state_is_not_normed(family):
    model = tiny_model(family)
    adapter, ids = Adapter.of(model), tiny_tokens()
    states = states_of(adapter, Batch(ids))
    with torch.no_grad():
        theirs = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for ours, other in zip(states[:-1], theirs[:-1], strict=True):
        assert torch.equal(ours, other)
    assert states[-1].shape == states[0].shape
    if family != "opt":  # whose decoder projects its output
        assert not torch.allclose(states[-1], theirs[-1], atol=1e-3)


def llama(**more):
    return tiny_model("llama", num_hidden_layers=4, **more)


def test_block_influence_by_hand_and_without_padding():
    adapter, ids = Adapter.of(llama()), tiny_tokens(4, 12)
    states = states_of(adapter, Batch(ids))
    expected = [
        1 - F.cosine_similarity(a.double(), b.double(), dim=-1).mean()
        for a, b in itertools.pairwise(states)
    ]
    got = block_influence(adapter, [Batch(ids)])
    torch.testing.assert_close(got, torch.stack(expected))
    padded = torch.cat([ids, torch.zeros(4, 5, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones(4, 12), torch.zeros(4, 5)], 1).long()
    split = [Batch(padded[2:], mask[2:]), Batch(padded[:2], mask[:2])]
    torch.testing.assert_close(block_influence(adapter, split), got, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        angular_distances(adapter, split), angular_distances(adapter, [Batch(ids)]),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_layer_that_adds_nothing_has_no_influence():
    model = llama()
    layer = model.model.layers[2]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        for parameter in linear.parameters():
            parameter.data.zero_()
    influence = block_influence(Adapter.of(model), [Batch(tiny_tokens())])
    assert abs(float(influence[2])) < 1e-12 and int(influence.argmin()) == 2
    assert ((influence > -1e-12) & (influence <= 2)).all()


def test_angular_windows_by_hand():
    adapter, ids = Adapter.of(llama()), tiny_tokens(3, 9)
    states = [h[:, -1].double() for h in states_of(adapter, Batch(ids))]
    got = angular_distances(adapter, [Batch(ids[:1]), Batch(ids[1:])])
    assert got.shape == (5, 5)
    for width in range(1, 5):
        expected = [
            (F.cosine_similarity(states[i], states[i + width]).arccos() / math.pi).mean()
            for i in range(5 - width)
        ]
        torch.testing.assert_close(got.diagonal(width), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_token_states():
    adapter, ids = Adapter.of(llama()), tiny_tokens(3, 9)
    drawn = token_states(adapter, [Batch(ids[:2]), Batch(ids[2:])], 8)
    assert drawn.shape == (5, 8, 32)
    rows = states_of(adapter, Batch(ids))[0].flatten(0, 1)
    assert all(any(torch.allclose(x, r) for r in rows) for x in drawn[0])


def test_not_finite_is_refused():
    state = torch.zeros(1, 2, 3)
    state[0, 1, 2] = float("nan")
    ids = torch.zeros(1, 2, dtype=torch.int64)
    for mask in (None, torch.ones_like(ids)):
        for states_of_tokens in (real_tokens, last_tokens):
            with pytest.raises(UserError, match="NaN"):
                states_of_tokens(state, Batch(ids, mask))
    padded = torch.tensor([[1, 0]])
    assert real_tokens(state, Batch(ids, padded)).isfinite().all()
    assert last_tokens(state, Batch(ids, padded)).isfinite().all()
