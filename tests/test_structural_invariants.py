"""What holds for every method that removes structure, whatever it goes by."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from pyprune.calibration.batches import as_token_set
from pyprune.depth.config import StructureConfig
from pyprune.depth.registry import DEPTH_METHODS
from pyprune.depth.run import prune_structure
from pyprune.models.adapter import Adapter
from pyprune.width.config import WidthConfig
from pyprune.width.registry import WIDTH_METHODS
from pyprune.width.run import prune_width

OPTIONS = {
    "laco": {"threshold": -1.0, "fold": 2},
    "llm-streamline": {"epochs": 1},
    "disp-llm": {"iterations": 2},
    "llm-drop": {"blocks": "mixed"},
}
DEPTH, WIDTH = list(DEPTH_METHODS.load()), list(WIDTH_METHODS.load())
BATCHES = [tiny_tokens(2, 16), tiny_tokens(2, 16, seed=1)]


def pruned(method, ratio):
    """The model, with an untied head (SliceGPT unties it), and the report."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model = tiny_model("qwen2", **sizes, tie_word_embeddings=False)
    run, config = (
        (prune_structure, StructureConfig) if method in DEPTH else (prune_width, WidthConfig)
    )
    options = OPTIONS.get(method, {})
    return model, run(model, BATCHES, config(method, ratio=ratio, method_options=options))


def sizes_of(report):
    parameters = report.to_dict()["parameters"]
    return parameters["before"], parameters["after"] - parameters["zeros"]


@pytest.mark.parametrize("method", DEPTH + WIDTH)
def test_same_again_without_nan_and_smaller_for_more(method):
    model, report = pruned(method, 0.2)
    again, other = pruned(method, 0.2)
    assert report.decision == other.decision
    if method in DEPTH:
        branches_go_once_and_no_unit_too_many(report)
    else:
        units_go_once_in_groups_that_there_are(report)
    names = dict(again.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, names[name]) and p.isfinite().all()
    with torch.no_grad():
        assert model(tiny_tokens()).logits.isfinite().all()
    before, little = sizes_of(report)
    _, much = sizes_of(pruned(method, 0.4)[1])
    assert much < little <= 0.8 * before and much <= 0.6 * before
    expected = as_token_set(BATCHES, vocabulary=None, positions=None)
    assert report.decision.calibration["sha256"] == expected.sha256
    for i, block in enumerate(Adapter.of(model).blocks):
        assert {m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")} == {i}


def branches_go_once_and_no_unit_too_many(report):
    decision, (before, _) = report.decision, report.parameters
    removed = decision.removed
    assert len(set(removed)) == len(removed) and all(0 <= b.layer < 4 for b in removed)
    sizes = [before, *(step.parameters for step in decision.steps)]
    assert sizes == sorted(set(sizes), reverse=True)
    if decision.refinement is None:  # exchanges look for another set, not for a longer list
        assert sizes[-1] <= 0.8 * before < sizes[-2]


def units_go_once_in_groups_that_there_are(report):
    decision = report.decision
    assert decision.removed.keys() <= decision.units.keys()
    for name, gone in decision.removed.items():
        assert gone == sorted(set(gone)) and gone[0] >= 0 and gone[-1] < decision.units[name]
