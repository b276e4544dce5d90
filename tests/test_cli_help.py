"""What the command line says of itself: help, and what runs here."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import typer

from pyprune import cli
from pyprune.config import CalibrationConfig, PruneConfig
from pyprune.depth.config import StructureConfig
from pyprune.heal import HealConfig
from pyprune.width.config import WidthConfig


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


@pytest.mark.parametrize("command", [[], ["prune"], ["eval"], ["inspect"], ["methods"], ["doctor"]])
def test_help(command, capsys):
    assert run(*command, "--help") == 0
    assert "Usage: pyprune" in capsys.readouterr().out


def test_help_cuts_no_option_short(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("prune", "heal", "bench"):
        assert run(command, "-h") == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert "…" not in out and "Examples:\n    pyprune " + command in out
    assert run("-h") == 0
    assert "..." not in capsys.readouterr().out.split("Commands:")[1]


def test_help_says_every_default(capsys):
    def check(command: str, name: str, default: object) -> None:
        if isinstance(default, str | int | float) and not isinstance(default, bool):
            options = typer.main.get_command(cli.app).commands[command].params
            (option,) = [option for option in options if option.name == name]
            text = " ".join(option.help.split())
            said = default if isinstance(default, str) else f"{float(default):g}"
            assert f"Default: {said}" in text, (name, text)

    shown = {"source": "calibration", "training": "text"}
    for field in dataclasses.fields(PruneConfig):
        if field.name not in ("reconstruct", "calibration"):
            check("prune", field.name, field.default)
    for field in dataclasses.fields(StructureConfig):
        if field.name in ("by", "fill"):
            check("prune", field.name, field.default)
    for field in dataclasses.fields(CalibrationConfig):
        check("prune", shown.get(field.name, field.name), field.default)
    structures = StructureConfig(count=1).calibration
    assert structures == WidthConfig().calibration
    own = {"nsamples": structures.nsamples, "seqlen": structures.seqlen}
    assert structures == CalibrationConfig(**own)
    assert run("prune", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for size in own.values():
        assert f"; {size} for methods that remove structure" in text
    config = HealConfig()
    for field in dataclasses.fields(HealConfig):
        if field.name not in ("warmup", "weight_decay", "clip", "held_out", "training"):
            check("heal", field.name, field.default)
    for field in dataclasses.fields(CalibrationConfig):
        if field.name not in ("padding", "bos"):
            name = "text" if field.name == "source" else field.name
            check("heal", name, getattr(config.training, field.name))


def test_doctor_says_a_reason_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert 1 <= out.count("TRITON_INTERPRET=1") <= 4 and len(out.splitlines()) < 90


def test_doctor(capsys):
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    rows = {(b["op"], b["device"], b["backend"]): b["reason"] for b in found["backends"]}
    assert rows["column_norms", "cpu", "reference"] == ""
    assert rows["column_norms", "cpu", "native"] == ""
    assert "no cuda implementation" in rows["column_norms", "cpu", "cuda"]
    if not torch.cuda.is_available():
        assert rows["column_norms", "cuda", "triton"] == "no CUDA device here"
    assert run("doctor") == 0
    assert "column_norms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("isa", "machine", "says"),
    [
        ("avx2", "x86_64", "avx2"),
        ("portable", "aarch64", "portable, with NEON, which is in the baseline of aarch64; the"),
        ("neon_bf16", "aarch64", "neon_bf16: portable with NEON, which is in the baseline of aar"),
        ("portable", "riscv64", "portable, the only one for riscv64"),
        ("portable", "x86_64", "portable: of AVX2, FMA, F16C, BMI, BMI2 and POPCNT"),
    ],
)
def test_doctor_says_which_instruction_set_and_why(capsys, monkeypatch, isa, machine, says):
    module = SimpleNamespace(isa=lambda: isa, has_cuda=False)
    monkeypatch.setattr("pyprune._native.MODULE", module)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["native"]["pyprune._C isa"].startswith(says)
