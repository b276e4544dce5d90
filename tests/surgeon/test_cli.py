"""LLM Surgeon from the command line."""

import json

from test_cli import calibration, model, original, run  # noqa: F401 (fixtures)

from pyprune import cli_prune


def test_2_of_4_is_no_number_in_base_60():
    given = ["structure=2:4", "shots=3", "cap=0.5", "update=none"]
    want = {"structure": "2:4", "shots": 3, "cap": 0.5, "update": "none"}
    assert cli_prune._named_values("--option", given) == want


def test_prunes_into_a_directory_and_goes_on_from_its_state(model, tmp_path, capsys):  # noqa: F811
    command = [
        "prune", model, "-m", "llm-surgeon", "-s", "0.25", "-O", "structure=2:4", "-O", "shots=2",
        *calibration(model), "--state", tmp_path / "state", "--json", "--out",
    ]  # fmt: skip
    assert run(*command, tmp_path / "out") == 0
    report = json.loads(capsys.readouterr().out)
    assert abs(report["sparsity"] - 0.25) < 1e-3
    assert report["config"]["method_options"] == {"structure": "2:4", "shots": 2}
    assert run(*command, tmp_path / "again") == 0
    files = [tmp_path / at / "model.safetensors" for at in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = [part if part != "shots=2" else "shots=3" for part in command]
    capsys.readouterr()
    assert run(*other, tmp_path / "other") == 2
    assert "belongs to another configuration" in capsys.readouterr().err
    command[command.index("--state") + 1] = "/proc/state"  # before the first shot
    assert run(*command, tmp_path / "other") == 2
    assert capsys.readouterr().err.startswith("pyprune: state: cannot write into /proc: ")


def test_is_in_the_table_of_methods(capsys):
    assert run("methods", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    row = rows["llm-surgeon"]
    assert row["gradient"] and row["scopes"] == ["global"]
    assert row["options"]["gradient_damping"] == "a number or none; by default none"
