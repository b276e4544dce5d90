"""Labels drawn from the model's own distribution: the Fisher information itself."""

import pytest
import torch
from calibration.test_backward import model64
from calibration.test_factors import collect
from tiny_models import tiny_tokens

from pyprune.calibration import head
from pyprune.calibration.backward import PassOptions, backward_pass
from pyprune.calibration.head import draw_labels
from pyprune.calibration.tokens import Batch
from pyprune.errors import UserError
from pyprune.models import running
from pyprune.models.adapter import Adapter

NAME = "model.layers.0.mlp.up_proj"


def weight_gradients(model, ids, fisher_samples, seed=0):
    """Of `NAME`, one for each draw of one sequence, as the visits give them: `[draws, R C]`."""
    seen = []

    def visit(sample):
        assert sample.draw == len(seen)
        assert sample.new_tokens == (0 if sample.draw else ids.numel())
        seen.append((sample.g.T @ sample.x).flatten())

    options = PassOptions(fisher_samples=fisher_samples, seed=seed)
    backward_pass(Adapter.of(model), [Batch(ids)], {NAME: visit}, options)
    return torch.stack(seen)


def exact_fisher(model, ids):
    """sum over targets t and labels v of p_t(v) vec(d log p_t(v)) vec(d log p_t(v))^T."""
    weight = model.get_submodule(NAME).weight
    log_p = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    total = 0.0
    for t in range(log_p.shape[0]):
        for v in range(log_p.shape[1]):
            (g,) = torch.autograd.grad(log_p[t, v], weight, retain_graph=True)
            total = total + log_p[t, v].detach().exp() * torch.outer(g.flatten(), g.flatten())
    return total


def distance(drawn, want):
    return float((drawn.T @ drawn - want).norm() / want.norm())


def test_the_mean_over_draws_is_the_fisher_information(monkeypatch):
    """Exact by enumeration of a toy vocabulary. Means of gradients over the draws, as the paper's
    code takes them, would have 1 / draws of it, and the text's labels are no sample of it."""
    model = model64(vocab_size=6, hidden_size=8, intermediate_size=8)
    ids = tiny_tokens(1, 5) % 6
    want = exact_fisher(model, ids)
    assert distance(weight_gradients(model, ids, 500), want) < 0.15
    assert distance(weight_gradients(model, ids, 0), want) > 0.5
    # One target and evenly spread numbers instead of random ones: no noise is left.
    even = (torch.arange(400, dtype=torch.float64) + 0.5).div(400)[:, None, None]
    monkeypatch.setattr(head.Head, "_uniform", lambda *_: even)
    drawn = weight_gradients(model, ids[:, :2], 400)
    assert distance(drawn, exact_fisher(model, ids[:, :2])) < 0.01


def test_labels_are_drawn_by_their_probability():
    logits = torch.tensor([[[0.0, 1.0, -1.0, float("-inf"), 2.0]]], dtype=torch.float64)
    uniform = (torch.arange(10_000, dtype=torch.float64) / 10_000)[:, None, None]
    drawn = draw_labels(logits, uniform)
    assert drawn.shape == (10_000, 1, 1)
    share = torch.bincount(drawn.flatten(), minlength=5) / 10_000
    torch.testing.assert_close(share.double(), logits[0, 0].softmax(0), rtol=0, atol=2e-4)
    last = draw_labels(logits, torch.full((1, 1, 1), 1 - 2.0**-53, dtype=torch.float64))
    assert last.tolist() == [[[4]]]


def test_neither_batches_nor_padding_nor_pieces_of_the_head_change_the_draws(monkeypatch):
    ids, mask = tiny_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0

    def sums(batches, **options):
        found = {}

        def visitor(name):
            def visit(sample):
                found[name] = found.get(name, 0.0) + sample.g.T @ sample.g

            return visit

        adapter = Adapter.of(model64())
        names = [ref.name for i in range(2) for ref in adapter.linears(i)]
        visitors = {name: visitor(name) for name in names}
        backward_pass(adapter, batches, visitors, PassOptions(fisher_samples=3, **options))
        return found

    batched = sums([Batch(ids, mask)])
    other = sums([Batch(ids, mask)], seed=1)
    monkeypatch.setattr(running, "LOGITS_BYTES", 4 * 3 * 64)
    alone = [Batch(ids[:1]), Batch(ids[1:2, :7]), Batch(ids[2:])]
    for checkpointing in (False, True):
        again = sums(alone, checkpointing=checkpointing)
        for name, want in batched.items():
            scale = float(want.abs().max())
            torch.testing.assert_close(again[name], want, rtol=1e-4, atol=1e-5 * scale)
            assert not torch.allclose(other[name], want, rtol=1e-2, atol=1e-3 * scale)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_factors_count_inputs_once_and_gradients_as_means(family):
    model, ids = model64(family), [tiny_tokens(2, 12)]
    text, drawn = collect(model, ids), collect(model, ids, fisher_samples=5)
    for name, factors in drawn.items():
        torch.testing.assert_close(factors.a, text[name].a)
        assert (factors.tokens, factors.targets) == (text[name].tokens, 22)
    one, many = (
        collect(model, ids, fisher_samples=s, seed=s)["model.layers.0.self_attn.o_proj"]
        for s in (1, 40)
    )
    # Means, not sums: as large with 40 draws as with one.
    assert 0.5 < float(one.g.trace() / many.g.trace()) < 2
    same = collect(model, ids, fisher_samples=5)
    assert all(torch.equal(same[name].g, factors.g) for name, factors in drawn.items())


def test_refinement_sees_the_draws_of_the_first_pass():
    """Nearest factors of the very gradients that the independent ones are made of."""
    model, ids = model64(), tiny_tokens(1, 8)
    visits = []

    def visit(sample):
        visits.append((sample.x, sample.g))

    backward_pass(Adapter.of(model), [Batch(ids)], {NAME: visit}, PassOptions(fisher_samples=2))
    x, g = (torch.cat(parts) for parts in zip(*visits, strict=True))
    near = collect(model, [ids], biases=(), refinements=1, fisher_samples=2)[NAME]
    a = visits[0][0].T @ visits[0][0]
    left = g.T @ ((x @ a / a.norm() * x).sum(1)[:, None] * g)
    left /= left.norm()
    right = x.T @ ((g @ left * g).sum(1)[:, None] * x)
    for got, want in ((near.g, left), (near.a, right)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_a_negative_number_of_draws_is_refused():
    with pytest.raises(UserError, match="fisher_samples: expected 0 or more, got -1"):
        weight_gradients(model64(), tiny_tokens(1, 4), -1)
