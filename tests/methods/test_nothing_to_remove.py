"""Asked to remove nothing, every method leaves every weight as it was, not only nearly."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from pyprune.config import PruneConfig
from pyprune.depth.config import StructureConfig
from pyprune.eigendamage import EigenDamageConfig, prune_eigendamage
from pyprune.errors import UserError
from pyprune.methods import METHODS, SHOT_METHODS
from pyprune.prune import prune
from pyprune.width.config import WidthConfig

RUNS = {
    **{name: {"method": name} for name in (*METHODS, *SHOT_METHODS)},
    "wanda, reconstructed": {"method": "wanda", "reconstruct": True},
    "wanda, sequential update": {"method": "wanda", "update": "iterative"},
    "wanda, score mass": {"method": "wanda", "score_mass": True},
    "sparsegpt, reconstructed": {"method": "sparsegpt", "reconstruct": True},
    "llm-surgeon, groups": {"method": "llm-surgeon", "method_options": {"update": "grouped"}},
    "llm-surgeon, rows and columns": {
        "method": "llm-surgeon", "method_options": {"structure": "rows-columns"}
    },
    "alphapruning": {"method": "wanda", "allocation": "alphapruning"},
    "owl": {"method": "wanda", "allocation": "owl"},
    "ecoflap": {"method": "wanda", "allocation": "ecoflap"},
    "besa": {"method": "wanda", "allocation": "besa", "allocation_options": {"steps": 2}},
}  # fmt: skip


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, before):
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("run", RUNS)
def test_sparsity_zero_changes_no_weight(run):
    model = tiny_model("llama")
    before = weights(model)
    report = prune(model, [tiny_tokens(8, 32)], config=PruneConfig(sparsity=0.0, **RUNS[run]))
    assert_same(model, before)
    assert report.sparsity == 0


@pytest.mark.parametrize(
    "own", [{}, {"reestimate": True}, {"unit": "elements"}, {"factored": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eigendamage_at_zero_changes_no_weight(own, dtype):
    model = tiny_model("llama").to(dtype)
    before = weights(model)
    config = EigenDamageConfig(sparsity=0.0, method_options=own)
    report = prune_eigendamage(model, [tiny_tokens(8, 32)], config)
    assert_same(model, before)
    assert report.sparsity == 0


@pytest.mark.parametrize("config", [StructureConfig, WidthConfig])
def test_structure_asks_for_more_than_nothing(config):
    with pytest.raises(UserError, match=r"ratio: expected a number between 0 and 1, got 0\.0"):
        config(ratio=0.0)
