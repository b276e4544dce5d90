"""The command line: its results, its one-line errors, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import run_forked
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pyprune
from pyprune import cli, cli_prune

WORDS = [f"w{i}" for i in range(VOCAB - 3)]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, and a text of its words."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_model("llama").save_pretrained(folder)
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    drawn = torch.randint(len(WORDS), (2000,), generator=torch.Generator().manual_seed(0))
    paragraphs = [" ".join(WORDS[i] for i in part) for part in drawn.split(50)]
    (folder.parent / "text.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_bytes((original.parent / "text.txt").read_bytes())
    (tmp_path / "list.yaml").write_text("method: [wanda]\n")
    return folder


def run(*arguments: str | Path) -> int:
    return cli.main([str(a) for a in arguments])


def calibration(model: Path) -> list[str]:
    text = str(model.parent / "text.txt")
    return ["--calibration", text, "--nsamples", "16", "--seqlen", "16", "--batch-size", "4"]


def shell(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyprune.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
        check=False,
    )


def test_help_needs_no_torch():
    code = (
        "import sys; from pyprune import cli; status = cli.main(['prune', '--help']);"
        "sys.exit(status or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        "--sparsity" in done.stdout
        and "Examples" in done.stdout
        and "--pattern 2:4" in (" ".join(done.stdout.split()))
    )


def test_the_hub_is_quiet():
    """Its line for each retry would break the one line of an error, and --json."""
    hub_logging.set_verbosity_warning()
    cli.quiet()
    assert hub_logging.get_verbosity() == hub_logging.ERROR


def test_python_m_pyprune():
    done = subprocess.run(
        [sys.executable, "-m", "pyprune", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"pyprune {pyprune.__version__}\n"


def test_every_public_name_is_there():
    for name in pyprune.__all__:
        assert getattr(pyprune, name) is not None
    assert {"compress_checkpoint", "decompress_checkpoint"} < set(pyprune.__all__)


def test_no_command_is_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pyprune"])
    assert cli.main() == 0
    assert "Usage: pyprune" in capsys.readouterr().out


def test_inspect(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run("inspect", model, "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert len(found["layers"]) == 14 and captured.err == ""
    assert run("inspect", model) == 0
    assert "everything else" in capsys.readouterr().out


PRUNINGS = [
    ("magnitude", ["--sparsity", "0.5"]),
    ("wanda", ["--pattern", "2:4"]),
    ("sparsegpt", ["--pattern", "2:4"]),
    ("gblm", ["--sparsity", "0.5", "-O", "norm=l2", "-O", "alpha=50", "--gradient-checkpointing"]),
]


@pytest.mark.parametrize("method, target", PRUNINGS, ids=[m for m, _ in PRUNINGS])
def test_prune(model, tmp_path, capsys, method, target):
    out = tmp_path / "new" / "out"
    arguments = ["-m", method, *target, *calibration(model), "--dtype", "float32", "--out", out]
    assert run("prune", model, *arguments, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    saved = json.loads((out / "pyprune.json").read_text())
    assert report["config"] == saved["config"] and report["layers"] == saved["layers"]
    assert len(report["layers"]) == 14 and report["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert method in (out / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(out)

    assert run("inspect", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sparsity"] == pytest.approx(report["sparsity"])
    if "2:4" in target:
        assert all("2:4" in layer["patterns"] for layer in found["layers"])

    text = str(model.parent / "text.txt")
    assert run("eval", out, "--text", text, "--seqlen", "32", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ppl"] > 1 and result["seqlen"] == 32 and result["windows"] > 1


def test_prune_prints_a_table(model, tmp_path, capsys):
    assert run("prune", model, "-m", "magnitude", "-s", "0.5", "--out", tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "Saved in" in captured.out and "magnitude" in captured.out and captured.err == ""


def test_sequences_longer_than_the_model_are_cut_and_that_is_said(model, tmp_path, capsys, caplog):
    text = model.parent / "text.txt"
    shown = ["--calibration", text, "--nsamples", "4", "--seqlen", "500"]
    arguments = ["-m", "wanda", "-s", "0.5", *shown, "--out", tmp_path / "out"]
    assert run("prune", model, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["seqlen"] == 128
    assert "sequences of 128 tokens instead of 500" in caplog.text

    assert run("eval", model, "--text", text) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "in 15 windows of 128" in said and "The model has 128 positions" in said
    assert run("eval", model, "--text", text, "--seqlen", "128") == 0
    assert "positions" not in capsys.readouterr().out


def test_options_of_an_allocation(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "sparsity: 0.5\nallocation: ecoflap\nallocation_options: {order: first, samples: 4}\n"
    )
    _, config = cli_prune._prune_config(file, {"allocation_options": {"samples": 2}})
    assert config.allocation_options == {"order": "first", "samples": 2}
    _, config = cli_prune._prune_config(file, {"allocation": "besa"})
    assert (config.allocation, config.allocation_options) == ("besa", {})
    wrong = ["-s", "0.5", "--allocation", "ecoflap", "-A", "max_sparsity=0.4"]
    assert run("prune", "nowhere", "-m", "wanda", *wrong, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "expected at least the sparsity 0.5, got 0.4" in error and len(error.splitlines()) == 1
    more = ["--ratio", "0.2", "-A", "steps=3", "--out", tmp_path / "out"]
    assert run("prune", "nowhere", "-m", "blockpruner", *more) == 2
    assert "--allocation-option: not for blockpruner" in capsys.readouterr().err


def test_options_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: wanda\nsparsity: 0.3\nscope: layer\ncalibration: {nsamples: 4, seqlen: 64}\n"
    )
    _, config = cli_prune._prune_config(file, {"sparsity": 0.6, "nsamples": 9})
    assert (config.method, config.sparsity, config.scope) == ("wanda", 0.6, "layer")
    assert (config.calibration.nsamples, config.calibration.seqlen) == (9, 64)
    _, config = cli_prune._prune_config(file, {"pattern": "2:4"})
    assert (config.pattern, config.sparsity, config.scope) == ("2:4", None, None)


# arguments (MODEL, OUT and TEXT are replaced), what the line says
BAD = [
    ("prune MODEL --out OUT", "exactly one of sparsity and pattern, got neither"),
    ("prune MODEL -s 0.5 -p 2:4 --out OUT", "one of sparsity and pattern, got 0.5 and 2:4"),
    ("prune MODEL -m shortgpt --out OUT", "exactly one of ratio and count, got neither"),
    ("prune MODEL -m magnitued -s 0.5 --out OUT", "did you mean magnitude"),
    ("prune MODEL -m owl -s 0.5 --out OUT", "expected e.g. -m wanda --allocation owl"),
    ("prune MODEL -m magnitude -s 1 --out OUT", "fraction in [0, 1)"),
    ("prune MODEL -m magnitude -s -0.1 --out OUT", "fraction in [0, 1)"),
    ("prune MODEL -m magnitude -s 50 --out OUT", "got 50.0 (50 % is 0.5)"),
    ("prune MODEL -m magnitude -s 50% --out OUT", "expected a fraction such as 0.5, got '50%'"),
    ("prune MODEL -m shortgpt --ratio 20 --out OUT", "got 20.0 (20 % is 0.2)"),
    ("prune MODEL -m flap --ratio 20 --out OUT", "got 20.0 (20 % is 0.2)"),
    ("prune MODEL -m flap --ratio x --out OUT", "expected a fraction such as 0.5, got 'x'"),
    ("prune MODEL -m magnitude -s nan --out OUT", "expected a number"),
    ("prune MODEL -m magnitude -s half --out OUT", "--sparsity"),
    ("prune MODEL -m magnitude -p 5:4 --out OUT", "N:M"),
    ("prune MODEL -m magnitude -p 0:4 --out OUT", "1 <= N <= M"),
    ("prune MODEL -m magnitude -p two --out OUT", "such as 2:4"),
    ("prune MODEL -m magnitude -p 2:5 --out OUT", "model.layers.0.self_attn.q_proj"),
    ("prune MODEL -m magnitude -s 0.5 --scope rows --out OUT", "scope"),
    ("prune MODEL -m magnitude -s 0.5 --exclude * --out OUT", "all are excluded"),
    ("prune MODEL -m magnitude -s 0.5 --include nothing --out OUT", "no layer matches 'nothing'"),
    ("prune MODEL -m magnitude -s 0.5 --device tpu --out OUT", "device"),
    ("prune MODEL -m magnitude -s 0.5 --device cuda --out OUT", "cuda"),
    ("prune MODEL -m magnitude -s 0.5 --dtype int8 --out OUT", "dtype"),
    ("prune MODEL -m magnitude -s 0.5 --out TEXT", "expected a new or an empty directory"),
    ("prune MODEL -m magnitude -s 0.5 --out MODEL", "it is not empty"),
    ("prune MODEL -m magnitude -s 0.5 --out TEXT/out", "cannot create the output"),
    ("prune MODEL -m magnitude -s 0.5 --config no.yaml --out OUT", "cannot read no.yaml"),
    ("prune MODEL -m magnitude -s 0.5 --config TEXT --out OUT", "expected a mapping"),
    ("prune MODEL -m magnitude -s 0.5", "Missing option '--out'"),
    ("prune MODEL -m magnitude -s 0.5 --outt OUT", "No such option"),
    ("prune ./nowhere -m magnitude -s 0.5 --out OUT", "./nowhere: no such directory"),
    ("prune TEXT -m magnitude -s 0.5 --out OUT", "expected a directory"),
    ("prune MODEL -m wanda -s 0.5 --calibration no.txt --out OUT", "no.txt"),
    ("prune MODEL -m wanda -s 0.5 --calibration TEXT --seqlen 9999999 --out OUT", "token"),
    ("prune MODEL -m gblm -s 0.5 -O alhpa=3 --out OUT", "did you mean alpha?"),
    ("prune MODEL -m gblm -s 0.5 -O alpha --out OUT", "--option: expected name=value, got 'alpha'"),
    ("prune MODEL -m gblm -s 0.5 -O alpha=[1] --out OUT", "--option alpha: expected a number or"),
    ("prune MODEL -s 0.5 -A x --out OUT", "--allocation-option: expected name=value, got 'x'"),
    ("prune MODEL -m wanda -s 0.5 -O alpha=1 --out OUT", "wanda has no option 'alpha'"),
    ("prune MODEL -m wanda -s 0.5 --nsamples 0 --out OUT", "nsamples: expected at least 1"),
    ("eval ./nowhere", "no such directory"),
    ("eval MODEL --text no.txt --seqlen 64", "no.txt"),
    ("eval MODEL --text TEXT --seqlen 9999", "seqlen"),
    ("eval MODEL --text TEXT --seqlen 64 --max-tokens 5", "token"),
    ("eval MODEL --text TEXT --seqlen 0", "seqlen"),
    ("eval MODEL --text TEXT --dtype int8", "dtype"),
    ("eval MODEL --text TEXT --seqlen 64 --device tpu", "device: expected auto, cpu, cuda"),
    ("generate MODEL w1 --device tpu", "device: expected auto, cpu, cuda"),
    ("prune MODEL -s 0.5 --config LIST --out OUT", "method: expected one of"),
    ("prune MODEL -m magnitude -s 0.5 --out /proc/no/out", "/proc/no: cannot create the output"),
    ("inspect TEXT", "expected a directory"),
    ("inspect", "Missing argument 'MODEL'"),
    ("inspekt MODEL", "No such command 'inspekt'"),
]


def words(line: str, model: Path, out: Path) -> list[str]:
    text = str(model.parent / "text.txt")
    names = {"MODEL": str(model), "OUT": str(out), "TEXT": text, "TEXT/out": f"{text}/out"}
    names["LIST"] = str(model.parent / "list.yaml")
    return [names.get(word, word) for word in line.split()]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None
        for f in folder.rglob("*")
    }


def one_line(text: str, message: str) -> None:
    assert text.count("\n") == 1 and text.startswith("pyprune: "), text
    assert message in text


@pytest.mark.parametrize("line, message", BAD, ids=[line for line, _ in BAD])
def test_bad_request(model, tmp_path, capsys, monkeypatch, line, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = tree(tmp_path)
    assert run(*words(line, model, tmp_path / "out")) == 2
    captured = capsys.readouterr()
    one_line(captured.err, message)
    assert captured.out == "" and tree(tmp_path) == before


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scramble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10" * 1000)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def unknown(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "unheard_of"}))


def lost_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def infinite(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def short_text(folder: Path) -> None:
    (folder.parent / "text.txt").write_text("w1 w2")


SPOILED = [
    (truncate, "truncated: tensor"),
    (scramble, "corrupt safetensors"),
    (only_pickle, "only pickled weights"),
    (no_weights, "no weights"),
    (unknown, "unknown architecture"),
    (lost_tensor, "model.layers.1.mlp.up_proj.weight"),
    (infinite, "model.layers.1.self_attn"),
    (no_tokenizer, "tokenizer"),
    (short_text, "smaller nsamples or seqlen"),
]


@pytest.mark.parametrize("spoil, message", SPOILED, ids=[s.__name__ for s, _ in SPOILED])
def test_bad_checkpoint(model, tmp_path, capsys, spoil, message):
    spoil(model)
    before = tree(tmp_path)
    arguments = ["-m", "sparsegpt", "-s", "0.5", *calibration(model), "--out", tmp_path / "out"]
    assert run("prune", model, *arguments) == 2
    one_line(capsys.readouterr().err, message)
    assert tree(tmp_path) == before


def test_disk_full(model, tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    before = tree(tmp_path)
    assert run("prune", model, "-m", "magnitude", "-s", "0.5", "--out", tmp_path / "out") == 2
    one_line(capsys.readouterr().err, "1,000 bytes free")
    assert tree(tmp_path) == before


def test_bad_request_in_a_shell(model, tmp_path):
    done = shell("prune", model, "-m", "magnitude", "-s", "2", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    one_line(done.stderr, "fraction in [0, 1), got 2.0")
    assert not (tmp_path / "out").exists()


NO_SPACE = "cannot write to standard output: No space left on device"


@pytest.mark.parametrize("line", [["--version"], ["--help"]])
def test_standard_output_that_takes_nothing(line):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pyprune", *line],
            check=False, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    one_line(done.stderr, NO_SPACE)


def test_standard_output_that_takes_no_table():
    script = "import sys; from pyprune import cli; sys.exit(cli.main({}))"
    with Path("/dev/full").open("w") as full:
        lines = (["methods"], ["methods", "--json"])
        done = run_forked(*map(script.format, lines), status=2, stdout=full)
    assert done.returncode == 0, done.stderr
    for line in done.stderr.splitlines(keepends=True):
        one_line(line, NO_SPACE)
    assert done.stderr.count("\n") == 2


def test_what_a_killed_run_left_is_said(model, tmp_path, capsys):
    left = tmp_path / ".out.0123456789abcdef"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"x" * 1234)
    said = "out: 1,234 bytes are left of runs that were killed, unless one is writing just now: "
    # The last two are refused afterwards: the model is dense, the text too short.
    for command in ("compress", "prune", "decompress", "heal"):
        options = {"prune": ["-m", "magnitude", "-s", "0.5"], "heal": ["--nsamples", "1"]}
        run(command, model, *options.get(command, []), "--out", tmp_path / "out")
        assert f"{said}{left}\n" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert (left / "model.safetensors").exists()


@pytest.mark.parametrize("method", [["-m", "blockpruner", "--count", "1"],
                                    ["-m", "llm-surgeon", "-s", "0.5"]])  # fmt: skip
def test_a_state_inside_the_output(model, tmp_path, capsys, method):
    before = tree(tmp_path)
    where = ["--out", tmp_path / "out", "--state", tmp_path / "out" / "state"]
    assert run("prune", model, *method, *calibration(model), *where) == 2
    one_line(capsys.readouterr().err, "state: expected a place outside of the output")
    assert tree(tmp_path) == before


def test_json_in_a_shell_is_pure(model, tmp_path):
    done = shell(
        *("prune", model, "-m", "wanda", "-s", "0.5", "--json", "--out", tmp_path / "out"),
        *calibration(model),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_defects_keep_their_traceback(monkeypatch, capsys):
    def defect() -> None:
        int("x")

    monkeypatch.setattr("pyprune.doctor.diagnose", defect)
    with pytest.raises(ValueError, match="invalid literal"):
        run("doctor")


def test_refusals_of_ops_are_the_users(monkeypatch, capsys):
    from pyprune import ops

    monkeypatch.setattr("pyprune.doctor.diagnose", lambda: ops.column_norms(torch.ones(3)))
    assert run("doctor") == 2
    assert capsys.readouterr().err.count("\n") == 1


# Each stops at the first pruned layer until the test has sent its signal; forks, to import once.
SLOW = """
import os, signal, sys, time, warnings
from pyprune import cli, prune
from pyprune.checkpoint import StreamingStore
warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
def flush(self, i):
    print("writing", os.getpid(), flush=True)
    time.sleep(120)
StreamingStore.flush = flush
for _ in range(3):
    if not (child := os.fork()):
        # A shell that starts the tests in the background has them, and so this process, ignore
        # Ctrl-C; under nohup it ignores the terminal's end too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.exit(cli.main(sys.argv[1:]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_interrupt_leaves_nothing(model, tmp_path):
    before = tree(tmp_path)
    arguments = ["prune", model, "-m", "magnitude", "-s", "0.5", "--out", tmp_path / "a" / "out"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            writer = int(process.stdout.readline().split("writing ")[1])  # not an exit status
            assert tree(tmp_path) != before
            os.kill(writer, number)
            assert process.stdout.readline() == "130\n", number
            assert tree(tmp_path) == before
        assert process.stderr.read() == "pyprune: interrupted\n" * 3
        assert process.wait(timeout=600) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{pyprune.__version__}"\n' in project
    assert capsys.readouterr().out == f"pyprune {pyprune.__version__}\n"
