"""Tables of README and docs: cells, what cannot be reached, and where links lead."""

import re

import _headlines
import pytest
import readme


def row(variant, ratio, ppl=None, **more):
    found = {"variant": variant, "ratio": ratio, "device": "CPU", "torch": "2", **more}
    found["calibration_tokens"] = 2048
    if ppl is not None:
        texts = zip(("wiki", "sotu"), ppl, strict=True)
        found["perplexity"] = {
            text: {"ppl": value, "tokens": 8184, "seqlen": 1024} for text, value in texts
        }
    return found


def saved(less, prefill, decode):
    return {
        "realised_share": less,
        "prefill": {"over_dense": prefill},
        "decode": {"over_dense": decode},
    }


ROWS = [
    row("dense", 0.0, (15.788, 25.24)),
    row("a", 0.1, (20.0, 31.25), **saved(0.1, 1.1, 1.08)),
    row("b", 0.1, (80.5, 1234.5), **saved(0.0, 1.0, 1.0)),
    row("a", 0.2, (99.994, 100.4), **saved(0.203, 1.25, 1.234)),
    row("b", 0.2, impossible="expected to remove at most 0.197 of the parameters, got 0.2"),
    row("b", 0.3, impossible="expected to remove at most 0.197 of the parameters, got 0.3"),
    row("projected", 0.2, (17.0, 1.45e10)),
]


def test_ratios_are_side_by_side():
    for function in (readme.depth_quality, readme.width_quality):
        lines = function(ROWS)
        assert "dense 15.79 / 25.24" in lines[2]
        cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
                 for line in lines if line.startswith("| ")}  # fmt: skip
        assert cells["method"] == ["10%", "20%", "30%", "smaller at 20%", "prefill x", "decode x"]
        assert cells["a"] == ["20.00 / 31.25", "99.99 / 100", "", "20.3%", "1.25", "1.23"]
        assert cells["b"] == ["80.50 / 1,234", "-", "-", "", "", ""]
        assert cells["projected"] == ["", "17.00 / 1e+10", "", "", "", ""]


def test_what_is_impossible_is_said_below():
    lines = readme.depth_quality(ROWS)
    (line,) = (line for line in lines if line.startswith("- "))
    assert line.startswith("- b does not reach 20%, 30%: expected to remove at most 0.197 of")
    assert lines.index(line) == len(lines) - 2 and lines[-1] == ""
    assert not any(line.startswith("- ") for line in readme.depth_quality(ROWS[:4]))


def test_a_range_of_one_number_is_one_number():
    rows = [
        {"provider": "sparse24", "rows": count, "ratio_to_best_dense": ratio, "threads": 2}
        for count, ratios in ((1, (1.5, 1.75)), (8, (0.961, 0.964)))
        for ratio in ratios
    ]
    ((_, cells, _),) = _headlines._layers(rows)
    assert cells == "1.50-1.75x at 1, 0.96x at 8 rows of x"


def test_figures_of_the_first_screen_are_in_the_tables():
    page = (readme.ROOT / "README.md").read_text()
    figures = re.findall(r"\d+\.\d+", page.split("## Start")[0])
    tables = readme.at_a_glance() + readme.perplexities()
    assert len(figures) > 5 and not [figure for figure in figures if figure not in tables]


PAGES = [readme.ROOT / "README.md", *sorted((readme.ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            # As GitHub makes anchors of titles.
            anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in anchors, link


def test_healed_models_stand_beside_what_they_were():
    def healed(pattern, ppl, train=None, learnt=None):
        found = row("", 0.5, ppl) | {
            "method": "sparsegpt",
            "pattern": pattern,
            "cpu_seconds": 700.4,
        }
        for text in found["perplexity"].values():
            text["dtype"] = "bfloat16"
        if train is None:
            return found
        return found | {"train": train, "learnt": learnt, "steps": 64, "tokens": 65408,
                        "learning_rate": 3e-4}  # fmt: skip

    dense = healed("-", (15.8, 25.2)) | {"method": "dense"}
    rows = [dense, healed("2:4", (87.5, 83.5)), healed("2:4", (47.25, 51.0), "all", "teacher"),
            healed("2:4", (60.0, 66.0), "all", "text"), healed("0.5", (40.0, 45.0))]  # fmt: skip
    lines = readme.healed(rows)
    assert "64 steps, 65,408 tokens" in lines[2] and "0.0003 (all kept weights)" in lines[2]
    assert [line for line in lines if line.startswith("| ")] == [
        "| trained | learns from | 2:4: wiki / sotu | CPU s | 0.5: wiki / sotu | CPU s |",
        "| nothing |  | 87.50 / 83.50 | 700 | 40.00 / 45.00 | 700 |",
        "| all kept weights | the dense model (`--teacher`) | 47.25 / 51.00 | 700 |  |  |",
        "| all kept weights | the text | 60.00 / 66.00 | 700 |  |  |",
    ]
    assert list(_headlines._healed(rows)) == [
        ("the same after SparseGPT 2:4, healed", "before 87.5, all kept weights 47.2",
         "65,408 tokens in 64 steps")
    ]  # fmt: skip
    assert not list(_headlines._healed([]))
