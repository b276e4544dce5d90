"""What a user meets in a notebook: names and help, wrong arguments, calibration data as it comes,
reports as they are shown."""

import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_forked
from tiny_models import tiny_model, tiny_tokens
from torch.utils.data import DataLoader, TensorDataset

import pyprune
from pyprune import (
    EigenDamageConfig,
    HealConfig,
    PruneConfig,
    StructureConfig,
    UserError,
    WidthConfig,
    prune,
)
from pyprune.calibration.batches import as_token_set
from pyprune.config import CalibrationConfig

IDS = [tiny_tokens(1, 12, seed)[0] for seed in range(4)]
ROWS = [ids.tolist() for ids in IDS]


def tokens():
    return [tiny_tokens(8, 32, seed) for seed in range(2)]


def test_names_are_listed_before_they_are_used():
    code = (
        "import sys, pyprune; names = dir(pyprune); print('torch' in sys.modules); "
        "print(set(pyprune.__all__) <= set(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\nTrue\n"


def test_help_shows_every_function_and_configuration():
    text = pydoc.render_doc(pyprune, renderer=pydoc.plaintext)
    for name in pyprune.__all__:
        if name not in ("__version__", "ops"):
            assert f"\n    {name}(" in text or f"\n    class {name}(" in text, name
            if name.islower():
                assert name in pyprune.__doc__, name


def train_pair(ids):
    """As `get_loaders` of the SparseGPT and Wanda repositories makes it."""
    targets = ids[None].clone()
    targets[:, :-1] = -100
    return ids[None], targets


class Rows:
    """A dataset of `datasets` without a format: its rows are mappings of lists."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {"input_ids": ROWS[i], "attention_mask": [1] * len(ROWS[i])}

    def __iter__(self):
        return (self[i] for i in range(len(self)))


@pytest.mark.parametrize("data", [
    ROWS,
    [[row] for row in ROWS],
    [np.array(row) for row in ROWS],
    [{"input_ids": row} for row in ROWS],
    [{"input_ids": [row], "attention_mask": [[1] * 12], "labels": row} for row in ROWS],
    [{"input_ids": np.array(row, dtype=np.int32)} for row in ROWS],
    [train_pair(ids) for ids in IDS],
    [(ids[None], ids[None].clone()) for ids in IDS],  # GBLM-Pruner's, for gradients
    DataLoader(TensorDataset(torch.stack(IDS)), batch_size=2),
    Rows(),
    iter(Rows()),
])  # fmt: skip
def test_token_ids_in_other_containers(data):
    wanted = as_token_set([torch.stack(IDS)], vocabulary=64, positions=128)
    found = as_token_set(data, vocabulary=64, positions=128)
    assert (found.sha256, found.tokens, found.nsamples) == (wanted.sha256, 48, 4)
    assert all(batch.input_ids.dtype == torch.int64 for batch in found.batches)


@pytest.mark.parametrize(("item", "message"), [
    ("a text", "got text: tokenise it first, or name a file of it as calibration.source"),
    ({"text": "a text", "id": 3}, "expected .* a mapping with input_ids, got one with text, id"),
    ({}, "got one with nothing"),
    ([[1, 2], [3]], r"expected token ids as integers \[B, T\], got a list that is none"),
    (["a", "b"], r"expected token ids as integers \[B, T\], got a list that is none"),
    ([0.5, 1.5], r"expected token ids as integers \[B, T\], got torch.float32 \(2,\)"),
    (torch.ones(2, 3, dtype=torch.bool), "expected token ids as integers .* got torch.bool"),
    ({"input_ids": [1, 2], "attention_mask": [0.0, 1.0]}, "attention_mask as integers"),
    # A mask in the place of the targets is not passed over.
    ((IDS[0][None], torch.ones(1, 12, dtype=torch.int64)), "expected token ids, got 2 tensors"),
    ((IDS[0], IDS[0], IDS[0]), "expected token ids, got 3 tensors: give a mapping with input_ids"),
    ((1, 2), "expected a tensor of token ids or a mapping with input_ids, got tuple"),
])  # fmt: skip
def test_what_are_no_token_ids(item, message):
    with pytest.raises(UserError, match=f"calibration batch 1: .*{message}"):
        as_token_set([IDS[0], item], vocabulary=64, positions=128)


CONFIGS = [
    (PruneConfig, {"sparsity": 0.5}),
    (StructureConfig, {"count": 1}),
    (WidthConfig, {}),
    (EigenDamageConfig, {}),
]


@pytest.mark.parametrize(("kind", "given"), CONFIGS)
def test_a_configuration_takes_its_calibration_as_a_mapping(kind, given):
    default = kind(**given).calibration
    config = kind(**given, calibration={"seqlen": 8, "seed": 3})
    assert config.calibration == CalibrationConfig(
        nsamples=default.nsamples, seqlen=8, batch_size=default.batch_size, seed=3
    )
    assert kind.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="calibration: unknown key 'seqlem', did you mean seqlen"):
        kind(**given, calibration={"seqlem": 8})
    with pytest.raises(UserError, match=r"calibration: expected a mapping or Calib.*, got 'wiki'"):
        kind(**given, calibration="wiki")


@pytest.mark.parametrize("call", [
    lambda pairs: prune(tiny_model("llama"), method="wanda", sparsity=0.5, calibration=pairs),
    lambda pairs: StructureConfig(count=1, calibration=pairs),
])  # fmt: skip
def test_token_ids_in_the_place_of_the_calibration(call):
    """In one line, whatever the size of the data."""
    pairs = [train_pair(tiny_tokens(1, 128, seed)[0]) for seed in range(16)]
    with pytest.raises(UserError, match="calibration: expected a mapping") as raised:
        call(pairs)
    got = "got a list: token ids are given as such, not in the configuration"
    assert str(raised.value).endswith(got)


def test_healing_is_told_what_is_wrong_with_its_configuration():
    assert HealConfig(training={"seqlen": 8}).training.nsamples == HealConfig().training.nsamples
    wrong = {
        "dropout": "a",
        "learning_rate": "fast",
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "steps": 1.5,
        "training": "wiki",
    }
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"{name}: expected .*, got"):
            HealConfig(**{name: value})


CALLS = {
    "prune": lambda model, config, **more: prune(model, tokens(), config=config, **more),
    "structure": lambda model, config, **more: pyprune.prune_structure(
        model, tokens(), config, **more
    ),
    "width": lambda model, config, **more: pyprune.prune_width(model, tokens(), config, **more),
    "eigendamage": lambda model, config, **more: pyprune.prune_eigendamage(
        model, tokens(), config, **more
    ),
    "heal": lambda model, config, **more: pyprune.heal_model(model, tokens(), config, **more),
}
RIGHT = dict(zip(CALLS, [kind(**given) for kind, given in CONFIGS] + [HealConfig()], strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_the_wrong_kind_of_configuration(call):
    model = tiny_model("llama")
    kind = type(RIGHT[call]).__name__
    for wrong in (
        {"method": "wanda", "sparsity": 0.5},
        RIGHT["width" if call == "heal" else "heal"],
    ):
        with pytest.raises(
            UserError, match=f"config: expected a {kind}, got {type(wrong).__name__}$"
        ):
            CALLS[call](model, wrong)
    with pytest.raises(UserError, match="progress: expected a function or None, got False"):
        CALLS[call](model, RIGHT[call], progress=False)


@pytest.mark.parametrize("call", ["prune", "structure", "width", "eigendamage"])
def test_the_wrong_kind_of_configuration_for_a_checkpoint(call, tmp_path):
    run = getattr(pyprune, f"prune_{call}_checkpoint".replace("prune_prune", "prune"))
    for config, progress, message in (
        ({"count": 1}, None, "config: expected a .*, got dict"),
        (RIGHT[call], 3, "progress: expected a function or None, got 3"),
    ):
        with pytest.raises(UserError, match=message):
            run("not there", tmp_path / "out", config, progress)


def test_a_configuration_in_the_place_of_the_method():
    with pytest.raises(UserError, match=r"expected a name, got a PruneConfig: give it as config="):
        prune(tiny_model("llama"), tokens(), PruneConfig(sparsity=0.5))


@pytest.mark.parametrize(("kind", "method", "call", "other"), [
    (PruneConfig, "flap", "prune_width", "WidthConfig"),
    (PruneConfig, "eigendamage", "prune_eigendamage", "EigenDamageConfig"),
    (PruneConfig, "blockpruner", "prune_structure", "StructureConfig"),
    (StructureConfig, "wanda", "prune", "PruneConfig"),
    (WidthConfig, "shortgpt", "prune_structure", "StructureConfig"),
    (EigenDamageConfig, "llm-surgeon", "prune", "PruneConfig"),
])  # fmt: skip
def test_a_method_of_another_function_is_said_to_be(kind, method, call, other):
    target = {"sparsity": 0.5} if kind is PruneConfig else {}
    target = {"count": 1} if kind is StructureConfig else target
    with pytest.raises(UserError, match=rf"got '{method}': pyprune\.{call} does .* a {other}$"):
        kind(method=method, **target)


def test_an_allocation_is_no_method_and_letters_may_be_large():
    with pytest.raises(UserError, match="besa is an allocation, which shares out"):
        PruneConfig(method="besa", sparsity=0.5)
    with pytest.raises(UserError, match=r"got 'SparseGPT' \(did you mean sparsegpt\?\)"):
        PruneConfig(method="SparseGPT", sparsity=0.5)


def test_masks_of_another_kind_and_weights_of_eight_bits():
    with pytest.raises(UserError, match=r"preserve_mask: expected bool tensors by .*, got list"):
        prune(tiny_model("llama"), None, "magnitude", 0.5, preserve_mask=[1])
    with pytest.raises(UserError, match=r"got torch\.float8_e4m3fn of .*; load the model without"):
        prune(tiny_model("llama").to(torch.float8_e4m3fn), None, "magnitude", 0.5)


def test_reports_are_short_to_look_at_and_go_into_other_tools():
    report = prune(tiny_model("llama"), tokens(), "sparsegpt", "2:4")
    assert repr(report) == (
        "<Report of LlamaForCausalLM: sparsegpt, 2:4: 50.00% of 14 matrices is zero>"
    )
    assert json.loads(report.to_json())["sparsity"] == 0.5
    model = tiny_model("llama", num_hidden_layers=4)
    config = StructureConfig(method="shortgpt", count=1)
    layers = pyprune.prune_structure(model, tokens(), config)
    assert repr(layers) == (
        "<StructureReport of LlamaForCausalLM: shortgpt, 4 -> 3 layers, 22.6% of the parameters "
        "less>"
    )
    channels = pyprune.prune_width(tiny_model("llama"), tokens(), WidthConfig(ratio=0.1))
    assert repr(channels).startswith("<WidthReport of LlamaForCausalLM: flap, ")
    directions = pyprune.prune_eigendamage(tiny_model("llama"), tokens(), EigenDamageConfig())
    assert "% of the entries of 14 matrices removed>" in repr(directions)
    for shown in (layers, channels, directions):
        assert len(repr(shown)) < 400
        json.dumps(shown.to_dict())


def test_names_in_the_readme_are_there():
    """After its own import lines alone: another test may have imported more here."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    imports = sorted(set(re.findall(r"^from pyprune\S* import \w+", text, re.MULTILINE)))
    calls = sorted(set(re.findall(r"\bpyprune(?:\.\w+)+(?=\()", text)))
    ops = sorted(set(re.findall(r"`(ops\.\w+)`", text)))
    assert len(imports) >= 3 and len(calls) >= 2 and len(ops) >= 4
    bare = "\n".join(["import pyprune", *calls])
    done = run_forked(bare, "\n".join([*imports, "from pyprune import ops", *ops]))
    assert done.returncode == 0, done.stderr
