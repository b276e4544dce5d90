"""docs/aot.md, which `make aot` writes, is of the kernels that there are."""

import importlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"sm_80", "sm_90", "sm_100"}
ROWS = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())


def launched():
    """Kernel, label, target and stages of every configuration that a launcher says it uses."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for spec in importlib.import_module(f"pyprune.kernels.{path.stem}").AOT:
            name = getattr(spec["kernel"], "fn", spec["kernel"]).__name__
            for target in spec.get("targets", TARGETS):
                stages = spec.get("num_stages", 3)
                if callable(stages):
                    stages = stages(int(target[3:]) // 10)
                yield path.stem, name, spec.get("label", ""), target, stages


def entries():
    """Kernels of the CUDA C++ files, by file."""
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for name in re.findall(
            r"__global__\s+void\s+(?:__\w+__\([^)]*\)\s+)?(\w+)", path.read_text()
        ):
            yield f"cuda/{path.stem}", name


def test_every_configuration_has_a_row_for_every_target():
    columns = ("family", "kernel", "label", "target", "num_stages")
    found = {tuple(row[column] for column in columns) for row in ROWS}
    triton = {row for row in found if not row[0].startswith("cuda/")}
    assert triton == set(launched())
    cuda = {(family, kernel, target) for family, kernel, _, target, _ in found - triton}
    assert cuda == {(*one, target) for one in entries() for target in TARGETS}


def test_no_kernel_spills():
    assert not [row for row in ROWS if row["spill_bytes"] or not 0 < row["registers"] <= 255]


def test_the_page_has_the_same_rows():
    page = (ROOT / "docs" / "aot.md").read_text()
    assert page.count("\n| ") == len(ROWS) + 2  # the head, and the line below it
    for row in ROWS:
        assert f"| {row['kernel']} | {row['label']} | {row['target']} |" in page
