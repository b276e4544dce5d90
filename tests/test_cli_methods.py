"""`pyprune methods`: what there is, and what each option means."""

import dataclasses
import inspect
import json

from pyprune import cli, cli_prune
from pyprune.config import CalibrationConfig
from pyprune.families import families


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def test_methods(capsys):
    assert run("methods", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} >= {"magnitude", "wanda", "sparsegpt"}
    (gblm,) = (row for row in rows if row["name"] == "gblm")
    assert gblm["gradient"] and gblm["options"]["norm"] == "l1 or l2; by default l1"
    assert run("methods") == 0
    out = capsys.readouterr().out
    assert "sparsegpt" in out and "gblm -O alpha=...: a number; by default 100.0" in out
    (ecoflap,) = (row for row in rows if row["name"] == "ecoflap")
    assert ecoflap["kind"] == "allocation"
    assert ecoflap["options"]["order"] == "zeroth or first; by default zeroth"
    assert "besa -A steps=...: a whole number; by default 32" in out and "alphapruning" in out


def test_methods_give_sentences_room(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("methods") == 0
    tables = capsys.readouterr().out
    assert "smallest |w| times input " in tables  # not a word or two a line
    assert max(len(line) for line in tables.splitlines() if line[:1] == " ") <= 80


def test_methods_explains_the_options_of_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("methods", "blockpruner") == 0
    out = capsys.readouterr().out
    assert "blockpruner -O looks=...: a whole number; by default 4\n  candidates that fast" in out
    assert "blockpruner -O margin=...: a number; by default 2.0\n  standard errors, over" in out
    assert "sleb" not in out and "--allocation" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert run("methods", "besa", "--json") == 0
    (besa,) = json.loads(capsys.readouterr().out)
    assert besa["meanings"]["steps"].startswith("of the optimiser (Adam) in each block")
    assert run("methods", "blokpruner") == 2
    error = capsys.readouterr().err
    assert "did you mean blockpruner?" in error and "or an allocation: uniform, " in error


def test_the_length_of_a_text_is_refused_in_the_words_of_the_help(capsys):
    assert run("eval", "nowhere", "--max-tokens", "-1") == 2
    assert "--max-tokens: expected 0 (all of the text) or more, got -1" in capsys.readouterr().err


def test_every_option_of_every_method_has_a_meaning(capsys):
    assert run("methods", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    for row in rows:
        for name in row["options"]:
            meaning = row["meanings"].get(name, "")
            # The whole of it: neither another option's, nor the docstring's last words.
            assert len(meaning) > 3 and "And those" not in meaning and "add-ons" not in meaning, (
                row["name"], name, meaning,
            )  # fmt: skip


def test_every_field_of_a_configuration_has_an_option():
    parameters = set(inspect.signature(cli_prune.prune).parameters) - {"ctx"}
    assert parameters > {*cli_prune.NO_FIELDS, *cli_prune.RENAMED}
    given = cli_prune._fields_of({key: ["name=1"] for key in parameters})
    fields = {f.name for family in families() for f in dataclasses.fields(family.config)}
    shown = {f.name for f in dataclasses.fields(CalibrationConfig)}
    assert not fields & shown and set(given) == fields - {"calibration"} | shown
