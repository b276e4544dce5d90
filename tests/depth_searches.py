"""Searches over tiny models, for the tests of depth pruning."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model, tiny_tokens

from pyprune.calibration.batches import as_token_set
from pyprune.depth.config import StructureConfig
from pyprune.depth.registry import run_search
from pyprune.models.adapter import Adapter


def model_of(family, layers=3):
    more = {"n_layer": layers} if family in ("gpt2", "bloom") else {"num_hidden_layers": layers}
    if "gemma" in family:
        kinds = ["sliding_attention", "full_attention"]
        more["layer_types"] = [kinds[i % 2] for i in range(layers)]
    return tiny_model(family, **more)


def tokens(rows=(2, 2), length=12):
    data = [tiny_tokens(r, length, seed=k) for k, r in enumerate(rows)]
    return as_token_set(data, vocabulary=None, positions=None)


def search(model, config, data=None):
    return run_search(model, Adapter.of(model), data or tokens(), config)


def config(method="blockpruner", count=3, **options):
    return StructureConfig(method, count=count, method_options=options)


def close(a, b):
    assert a.removed == b.removed
    for x, y in zip(a.steps, b.steps, strict=True):
        assert x.candidates.keys() == y.candidates.keys()
        for name, score in x.candidates.items():
            assert score == pytest.approx(y.candidates[name], rel=1e-4)


def of_share(ratio, by="params", method="blockpruner", **options):
    """The greedy list alone: exchanges have tests of their own."""
    alone = {"refine": "none"} if method == "blockpruner" else {}
    return StructureConfig(method, ratio=ratio, by=by, method_options=alone | options)


def seconds_of(graph, _batch):
    """Instead of timing: attention twice an MLP, later layers a little longer."""
    seconds = {b: (2.0 if b.kind == "attention" else 1.0) + b.layer / 100 for b in graph.branches}
    return seconds, sum(seconds.values()) + 3.0
