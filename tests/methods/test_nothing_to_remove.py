"""Asked to remove nothing, every method leaves every weight as it was, not only nearly."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from pyprune import cli
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
    assert report.notes.count("nothing is to be removed: the target is 0%") == 1


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
    assert report.notes[0] == "nothing is to be removed: the target is 0%"


@pytest.mark.parametrize("config", [StructureConfig, WidthConfig])
def test_structure_asks_for_more_than_nothing(config):
    with pytest.raises(UserError, match=r"ratio: expected a number between 0 and 1, got 0\.0"):
        config(ratio=0.0)


@pytest.mark.parametrize(
    ("target", "note"),
    [
        ({"pattern": "4:4"}, "nothing is to be removed: the target is 4:4"),
        ({"sparsity": 1e-6}, "nothing was removed: the target was 0.0001%"),
        ({"sparsity": 0.5}, ""),
    ],
)
def test_it_is_said(target, note):
    report = prune(tiny_model("llama"), None, config=PruneConfig(method="magnitude", **target))
    assert [n for n in report.notes if "remove" in n] == [note][: bool(note)]


def test_zeros_that_were_there_do_not_silence_it():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0
    config = PruneConfig(method="magnitude", sparsity=0.0)
    assert "nothing is to be removed: the target is 0%" in prune(model, None, config=config).notes


def test_masks_remove_something_at_zero():
    model = tiny_model("llama")
    mask = torch.ones(64, 32, dtype=torch.bool)
    mask[3] = False
    name = "model.layers.0.mlp.up_proj"
    config = PruneConfig(method="magnitude", sparsity=0.0)
    report = prune(model, None, config=config, preserve_mask={name: mask})
    assert not bool(model.get_submodule(name).weight[3].any())
    assert [note for note in report.notes if "remove" in note] == []


@pytest.mark.parametrize("target", [["-s", "0"], ["--pattern", "4:4"], ["-s", "0.5"]])
def test_the_command_says_so_before_it_begins(target, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "in")
    command = ["prune", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "-m", "magnitude"]
    assert cli.main([*command, *target]) == 0
    err = capsys.readouterr().err
    assert ("pyprune: nothing is to be removed: the target is" in err) == (target[-1] != "0.5")
