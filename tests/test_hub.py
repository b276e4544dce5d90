"""Hub ids, over HTTP with the real client: a server on localhost takes the place of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from hub_server import COMMIT, hub
from safetensors.torch import load_file
from test_prune_checkpoint import CUSTOM_CODE
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune.report import Report

PRUNE = "prune {} -m wanda -p 2:4 --calibration text.txt --nsamples 8 --seqlen 16 --out {}"
COMMANDS = {
    "sharded": PRUNE.format("org/sharded", "sharded"),
    "again": PRUNE.format("org/sharded", "again"),
    "pickled": "inspect org/pickled",
    "nobody's": "eval org/nothing",
    "untrusted": "inspect org/own",
    "trusted": "prune org/own -m magnitude -s 0.5 --trust-remote-code --out own",
    "inspected": "inspect org/own --trust-remote-code",
}
# One process, to import transformers once. huggingface_hub reads its settings when it is imported.
RUN = """
import contextlib, io, json, sys
from pyprune import cli
done = {}
for name, line in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(line.split())
    done[name] = [status, out.getvalue(), err.getvalue()]
print(json.dumps(done))
"""


@dataclass(frozen=True)
class Outcome:
    """What the commands did (status, stdout, stderr), where, and what the hub was asked for."""

    folder: Path
    commands: dict[str, tuple[int, str, str]]
    asked: list[tuple[str, str]]

    def refused(self, name: str) -> str:
        """The one line of a command that was refused."""
        status, out, err = self.commands[name]
        assert (status, out) == (2, "") and err.startswith("pyprune: ") and err.count("\n") == 1
        return err


def fill(root: Path) -> None:
    """The repositories: one in shards, one with pickles only, one that brings its own code."""
    model = tiny_model("llama", vocab_size=258)
    model.save_pretrained(root / "org" / "sharded", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(root / "org" / "sharded")
    (root / "org" / "sharded" / "pytorch_model.bin").write_bytes(b"a pickle")
    (root / "org" / "sharded" / "onnx").mkdir()
    (root / "org" / "sharded" / "onnx" / "model.safetensors").write_bytes(b"another format")

    model.config.save_pretrained(root / "org" / "pickled")
    torch.save({}, root / "org" / "pickled" / "pytorch_model.bin")

    own = root / "org" / "own"
    model.save_pretrained(own)
    (own / "own.py").write_text(CUSTOM_CODE)
    values = json.loads((own / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    values |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (own / "config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("hub")
    fill(folder / "served")
    (folder / "text.txt").write_text("all work and no play makes a dull model\n\n" * 20)
    with hub(folder / "served") as server:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            # Seconds: machines that run tests are busy.
            "HF_HUB_ETAG_TIMEOUT": "300",
            "HF_HUB_DOWNLOAD_TIMEOUT": "300",
        }
        done = subprocess.run(
            [sys.executable, "-c", RUN],
            input=json.dumps(COMMANDS),
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, **settings},
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        commands = {name: tuple(result) for name, result in json.loads(done.stdout).items()}
        return Outcome(folder, commands, server.asked)


def test_a_hub_id_is_pruned(outcome):
    assert outcome.commands["sharded"][0] == 0, outcome.commands["sharded"]
    out = outcome.folder / "sharded"
    report = Report.from_json((out / "pyprune.json").read_text())
    assert report.model == "org/sharded" and report.sparsity == 0.5
    assert 'base_model: "org/sharded"' in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    assert AutoTokenizer.from_pretrained(out)("a").input_ids
    for shard in (outcome.folder / "served" / "org" / "sharded").glob("*.safetensors"):
        assert load_file(out / shard.name).keys() == load_file(shard).keys()


def test_only_what_is_needed_is_fetched_and_only_once(outcome):
    got = [
        path for method, path in outcome.asked if method == "GET" and "/sharded/resolve/" in path
    ]
    served = outcome.folder / "served" / "org" / "sharded"
    names = {file.name for file in served.iterdir() if file.is_file()} - {"pytorch_model.bin"}
    assert sorted(got) == sorted(f"/org/sharded/resolve/{COMMIT}/{name}" for name in names)
    assert outcome.commands["again"][0] == 0
    first, again = (outcome.folder / name for name in ("sharded", "again"))
    for file in first.glob("*.safetensors"):
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_pickled_weights_are_not_fetched(outcome):
    line = outcome.refused("pickled")
    assert "org/pickled: expected model.safetensors" in line and "pickled weights" in line
    assert not [path for _, path in outcome.asked if path.endswith(".bin")]


def test_no_such_repository(outcome):
    line = outcome.refused("nobody's")
    assert "org/nothing: no such directory, and the hub did not give it: Repository" in line


def test_model_code_is_fetched_only_if_trusted(outcome):
    assert "model_type 'own'" in outcome.refused("untrusted")
    assert outcome.commands["trusted"][0] == 0, outcome.commands["trusted"]
    assert (outcome.folder / "own" / "own.py").read_text() == CUSTOM_CODE
    assert outcome.commands["inspected"][0] == 0, outcome.commands["inspected"]
    names = [path.rsplit("/", 1)[1] for _, path in outcome.asked if "/own/resolve/" in path]
    assert names.index("own.py") > names.index("model.safetensors")  # not by the first command
