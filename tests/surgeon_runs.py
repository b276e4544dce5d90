"""Runs of LLM Surgeon over tiny models, for its tests."""

from __future__ import annotations

import torch
from tiny_models import tiny_tokens

from pyprune.models.adapter import Adapter
from pyprune.prune import prune


def tokens(rows=4, length=16):
    return [tiny_tokens(rows, length, seed) for seed in range(2)]


def surgeon(model, target=0.5, batches=None, config=None, state=None, **own):
    options = {"method_options": own, **(config or {})}
    return prune(model, batches or tokens(), "llm-surgeon", target, state=state, **options)


def refs_of(model):
    adapter = Adapter.of(model)
    return [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]


def same(a, b):
    state = b.state_dict()
    return all(torch.equal(state[name], value) for name, value in a.state_dict().items())


def loss(model, batches):
    with torch.no_grad():
        return sum(float(model(input_ids=ids, labels=ids).loss) for ids in batches)
