import io
import json
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from pyprune.config import PruneConfig
from pyprune.errors import UserError
from pyprune.report import CalibrationReport, LayerReport, Report, RunReport, model_card

LAYERS = (
    LayerReport(
        name="model.layers.0.q",
        shape=(4, 6),
        pattern="50%",
        method="sparsegpt",
        sparsity=0.5,
        zeros=12,
        elements=24,
        tokens=77.0,
        relative_error_before_update=0.125,
        relative_error_after=0.0625,
        error_basis="gram",
        damping=0.1,
        loss=1e-3,
        dead_inputs=1,
        notes=("1 inputs were zero",),
        seconds=0.25,
    ),
    LayerReport("model.layers.0.k", (2, 6), "50%", "magnitude", 0.25, 3, 12),
)


def report():
    return Report(
        model="org/model",
        config=PruneConfig(sparsity=0.5, exclude=("*.o_proj",)),
        versions={"torch": "2.13.0"},
        layers=LAYERS,
        calibration=CalibrationReport("wiki", "ab12", 1234, 3, 512),
        run=RunReport({"forward": 1.5, "total": 2.0}, 10**9, None),
    )


def test_round_trips_through_json():
    assert Report.from_json(report().to_json()) == report()
    bare = Report("m", PruneConfig(method="magnitude", pattern="2:4"), {}, ())
    assert Report.from_json(bare.to_json()) == bare
    assert bare.sparsity == 0


def test_overall_sparsity_is_weighted_by_size():
    assert report().sparsity == 15 / 36
    assert json.loads(report().to_json())["sparsity"] == 15 / 36


def test_what_varies_between_equal_runs_is_in_one_section():
    slower = replace(
        report(),
        layers=tuple(replace(layer, seconds=9.0) for layer in LAYERS),
        run=RunReport({"forward": 30.0}, 5, 6),
    )
    first, second = json.loads(report().to_json()), json.loads(slower.to_json())
    assert first.pop("run") != second.pop("run")
    assert first == second


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"schema": 1, "model": "m"}'])
def test_refuses_what_is_no_report(text):
    with pytest.raises(UserError, match=r"pyprune.json: expected a report"):
        Report.from_json(text)


def test_refuses_another_schema():
    with pytest.raises(UserError, match=r"pyprune.json: expected schema 1, got 99"):
        Report.from_json('{"schema": 99}')


def shown(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_table_shows_every_kind_of_matrix_and_every_note():
    text = shown(report().table(), 200)
    whole = "sparsegpt, 50%: 41.67% of 2 matrices is zero, 25.0% to 50.0% of each"
    assert whole in " ".join(text.split())
    alike = replace(report(), layers=(LAYERS[0], replace(LAYERS[0], sparsity=0.5004)))
    assert "of each" not in shown(alike.table(), 200)
    for expected in ("1 q", "4x6", "12.50%", "6.25%", "0.1", "1 inputs were zero"):
        assert expected in text


def test_table_is_readable_in_80_columns():
    """Names on one line, and what is said of a layer not squeezed into a column."""
    name = "model.layers.29.self_attn.q_proj"
    note = "reconstruction stopped after 100 iterations in 41 of 576 rows [sic]"
    layer = replace(LAYERS[0], name=name, shape=(14336, 4096), notes=(note,), seconds=1234.56)
    noted = replace(report(), layers=(layer,), notes=("loaded whole: [experts] differ",))
    lines = shown(noted.table(), 80).splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "14336x4096" in line)
    assert row.split() == ["1", "self_attn.q_proj", "14336x4096", "0.5000", "12.50%", "6.25%",
                           "0.1", "1234.56"]  # fmt: skip
    below = " ".join(" ".join(lines[lines.index(row) + 1 :]).split())
    assert below == f"loaded whole: [experts] differ {name}: {note}"


def test_model_card_has_a_yaml_header_and_says_what_was_done():
    card = model_card(report())
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "base_model": "org/model",
        "base_model_relation": "finetune",
        "tags": ["pruned", "sparse", "sparsegpt"],
    }
    for expected in (
        "# org/model, pruned: sparsegpt 50%",
        "41.67% of the 36 weights",
        "arXiv 2301.00774",
        "wiki, 1,234 tokens in 3 sequences of up to 512, sha256 `ab12`",
        "torch: 2.13.0",
        "`model.layers.0.q`: 1 inputs were zero",
    ):
        assert expected in body


def test_model_card_says_what_became_of_the_kept_weights():
    """Wanda leaves them alone by itself: with these it is another model."""
    for more, words in (
        ({"reconstruct": True}, "reconstruction"),
        ({"update": "iterative"}, "update iterative"),
        ({"score_mass": True}, "score mass"),
    ):
        config = PruneConfig(method="wanda", sparsity=0.5, **more)
        assert f"\n- Options: {words}\n" in model_card(replace(report(), config=config))
    plain = PruneConfig(method="wanda", sparsity=0.5)
    assert "- Options" not in model_card(replace(report(), config=plain))


def test_model_card_names_a_text_without_its_folders():
    for source, words in (
        ("/home/someone/texts/a.jsonl", "- Calibration: a.jsonl, "),
        ("hub:org/set:main", "- Calibration: hub:org/set:main, "),
    ):
        shown_text = replace(report().calibration, source=source)
        card = model_card(replace(report(), calibration=shown_text))
        assert words in card and "/home" not in card


def test_model_card_is_the_same_for_equal_runs():
    assert model_card(report()) == model_card(replace(report(), run=RunReport()))
