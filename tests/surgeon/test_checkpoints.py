"""LLM Surgeon on checkpoints: what is written, and runs that go on after an interruption."""

import json

import pytest
import torch
from limited_files import limited_files
from safetensors.torch import load_file, save_file
from surgeon_runs import same, surgeon, tokens
from tiny_models import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from pyprune.calibration.batches import as_token_set
from pyprune.config import PruneConfig
from pyprune.errors import UserError
from pyprune.prune import prune, prune_checkpoint
from pyprune.report import Report, model_card
from pyprune.surgeon import run as run_module
from pyprune.surgeon.run import STORED_AS_ZEROS
from pyprune.surgeon.state import Record, ShotsDone, State


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt", "gpt_oss"])
def test_a_checkpoint_is_the_model_pruned_in_memory(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "in")
    own = {"structure": "rows-columns", "shots": 2}
    config = PruneConfig(method="llm-surgeon", sparsity=0.3, method_options=own)
    report = prune_checkpoint(tmp_path / "in", tmp_path / "out", config, batches=tokens())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    prune(model, tokens(), config=config)
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    old, new = (load_file(tmp_path / at / "model.safetensors") for at in ("in", "out"))
    assert old.keys() == new.keys()
    assert Report.from_json((tmp_path / "out" / "pyprune.json").read_text()).layers
    card = model_card(report)
    assert "norms and routers are those of the original" in card
    assert "- Options: structure rows-columns, shots 2" in card
    assert "structure rows-columns, shots 2: 2" in str(report.table().title)
    assert STORED_AS_ZEROS in (tmp_path / "out" / "README.md").read_text()


def test_bf16_checkpoints_are_pruned_in_fp32_or_bf16(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "in")
    for dtype in ("auto", "float32"):
        config = PruneConfig(
            method="llm-surgeon", pattern="2:4", dtype=dtype, method_options={"shots": 2}
        )
        out = tmp_path / dtype
        prune_checkpoint(tmp_path / "in", out, config, batches=tokens())
        for name, value in load_file(out / "model.safetensors").items():
            assert value.dtype == torch.bfloat16
            if "proj.weight" in name:
                assert (value == 0).view(-1, 4).sum(1).unique().tolist() == [2]


class Interrupted(Exception):
    pass


def interrupted_in(shot, monkeypatch):
    """The run breaks in the middle of the update of `shot`, counted from 1."""
    real, seen = run_module.Surgeon._cut, []

    def cut(self, matrix, *rest):
        seen.append(matrix)
        if len(seen) == (shot - 1) * len(self.matrices) + 3:
            raise Interrupted
        return real(self, matrix, *rest)

    monkeypatch.setattr(run_module.Surgeon, "_cut", cut)


@pytest.mark.parametrize(
    "own",
    [{}, {"structure": "rows-columns"}, {"corrections": 2, "fisher_samples": 1}],
    ids=["element", "rows", "lora"],
)
def test_an_interrupted_run_ends_with_the_same_bytes(own, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "in")
    config = PruneConfig(method="llm-surgeon", sparsity=0.4, method_options={"shots": 4, **own})

    def run(out, state=None):
        return prune_checkpoint(
            tmp_path / "in", tmp_path / out, config, batches=tokens(), state=state
        )

    whole = run("whole")
    with monkeypatch.context() as patch:
        interrupted_in(3, patch)
        with pytest.raises(Interrupted):
            run("broken", tmp_path / "state")
    assert not (tmp_path / "broken").exists()
    saved = json.loads((tmp_path / "state" / "state.json").read_text())
    assert saved["shots"] == 2
    assert [p.name for p in (tmp_path / "state").glob("*.safetensors")] == ["shot-2.safetensors"]
    counted = []
    real = run_module.Surgeon._shot
    monkeypatch.setattr(
        run_module.Surgeon, "_shot", lambda self, t: counted.append(t) or real(self, t)
    )
    resumed = run("resumed", tmp_path / "state")
    assert counted == [3, 4]
    a, b = ((tmp_path / at / "model.safetensors").read_bytes() for at in ("whole", "resumed"))
    assert a == b
    first, second = (report.to_dict() for report in (whole, resumed))
    assert {**first, "run": None} == {**second, "run": None}
    counted.clear()
    run("finished", tmp_path / "state")  # nothing is left to do
    assert counted == []
    assert (tmp_path / "finished" / "model.safetensors").read_bytes() == a


def test_the_state_of_something_else_is_refused(tmp_path):
    state = tmp_path / "state"
    surgeon(tiny_model("llama"), state=state, shots=2)
    with pytest.raises(UserError, match=r"belongs to another model: expected model [0-9a-f]+, got"):
        surgeon(tiny_model("llama", seed=1), state=state, shots=2)
    with pytest.raises(UserError, match="another configuration: method_options is"):
        surgeon(tiny_model("llama"), state=state, shots=3)
    with pytest.raises(UserError, match="belongs to another text"):
        surgeon(tiny_model("llama"), batches=[tiny_tokens(2, 8)], state=state, shots=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="expected an empty directory or that of an interrupted"):
        surgeon(tiny_model("llama"), state=tmp_path / "full")
    (state / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        surgeon(tiny_model("llama"), state=state, shots=2)


def test_a_state_that_was_killed_before_its_first_manifest_begins_anew(tmp_path):
    whole = tiny_model("llama")
    surgeon(whole, shots=2)
    for name in ("shot-1.safetensors", ".shot-1.safetensors.tmp", ".state.json.tmp"):
        state = tmp_path / name.strip(".")
        state.mkdir()
        (state / name).write_bytes(b"half")
        model = tiny_model("llama")
        surgeon(model, state=state, shots=2)
        assert same(model, whole)
        assert {"state.json", "shot-2.safetensors"} <= {file.name for file in state.iterdir()}


def test_a_full_disk_leaves_the_state_before(tmp_path):
    surgeon(tiny_model("llama"), state=tmp_path / "state", shots=1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    config, seen = PruneConfig(sparsity=0.5), as_token_set(tokens(), vocabulary=64, positions=128)
    state = State(tmp_path / "state", tiny_model("llama"), config, seen)
    for nbytes in (1000, 10_000):  # in the weights, in the manifest
        weights = {"w": torch.zeros(2000)}
        with (
            pytest.raises(UserError, match=r"state: cannot write into \S+: File too large"),
            limited_files(nbytes),
        ):
            state.save(ShotsDone(2, {"w": Record(notes=["x" * 20_000])}, []), weights)
        after = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
        assert before.items() <= after.items()
        assert after.keys() - before.keys() <= {"shot-2.safetensors"}


def test_weights_that_are_missing_from_the_state_are_an_error(tmp_path):
    state = tmp_path / "state"
    surgeon(tiny_model("llama"), state=state, shots=1)
    (file,) = state.glob("*.safetensors")
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="holds other matrices"):
        surgeon(tiny_model("llama"), state=state, shots=1)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"shot-1\.safetensors cannot be read"):
        surgeon(tiny_model("llama"), state=state, shots=1)
    file.unlink()
    with pytest.raises(UserError, match=r"shot-1\.safetensors cannot be read"):
        surgeon(tiny_model("llama"), state=state, shots=1)


def test_a_method_on_a_walk_has_no_state(tmp_path):
    with pytest.raises(UserError, match="state: wanda is not pruned in shots, expected none"):
        prune(tiny_model("llama"), tokens(), "wanda", 0.5, state=tmp_path)
