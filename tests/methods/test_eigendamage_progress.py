"""EigenDamage says where it is while it computes, not only while the model runs."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from pyprune.calibration.batches import as_token_set
from pyprune.eigendamage import EigenDamageConfig, damage
from pyprune.eigendamage import layers as module
from pyprune.models.adapter import Adapter

MATRICES = 14  # of two layers


@pytest.mark.parametrize("memory", [8.0, 1e-9])  # all matrices at once, and a layer at a time
def test_every_matrix_is_told_of_twice(memory, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=2)
    tokens = as_token_set([tiny_tokens(4, 16)], vocabulary=64, positions=None)
    config = EigenDamageConfig(sparsity=0.3, method_options={"factor_memory": memory})
    told, eigenvectors = [], module.eigenvectors
    monkeypatch.setattr(
        module, "eigenvectors", lambda m: told.append(("taken", len(m), 0)) or eigenvectors(m)
    )
    damage(Adapter.of(model), tokens, config, progress=lambda *step: told.append(step))
    steps = [(done, total) for said, done, total in told if said == "eigenvectors"]
    begins = [0] if memory == 8.0 else [0, MATRICES // 2]
    wanted = sorted([*begins, *range(1, MATRICES + 1)])
    assert steps == [(n, MATRICES) for n in wanted]
    assert [(done, total) for said, done, total in told if said == "weights"] == [
        (n, MATRICES) for n in range(1, MATRICES + 1)
    ]
    # Between two words there are at most the two decompositions of one matrix.
    said = [step[0] for step in told]
    assert said.count("taken") > MATRICES and "taken taken taken" not in " ".join(said)


def test_a_matrix_that_is_kept_is_told_of_when_it_is_passed():
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    tokens = as_token_set([tiny_tokens(4, 16)], vocabulary=64, positions=None)
    told = []
    layers = damage(
        Adapter.of(model), tokens, EigenDamageConfig(), progress=lambda *step: told.append(step)
    )
    kept = sum(layer.form == "kept" for layer in layers)
    assert kept > 0
    done = [n for said, n, _ in told if said == "eigenvectors"]
    assert done == list(range(MATRICES - kept + 1))
    assert [n for said, n, _ in told if said == "weights"] == list(range(1, MATRICES + 1))
