"""bf16 products and sums by AMX, where the processor has it or with its instructions emulated."""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pyprune import _native

HERE = Path(__file__).resolve().parent


def best_isa():
    if _native.MODULE is None:
        return "none"
    _native.MODULE.set_isa("best")
    return _native.MODULE.isa()


pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or best_isa() not in ("avx512_bf16", "avx512_amx"),
    reason="needs AVX-512 with BF16, which spreads the weights",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The emulator; "-" where there is nothing to emulate."""
    if best_isa() == "avx512_amx":
        return "-"
    built = tmp_path_factory.mktemp("amx") / "emulator.so"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra",
         "-Werror", HERE / "amx_emulator.cpp", "-o", built],
        check=True,
    )  # fmt: skip
    return built


@pytest.fixture(scope="module")
def rows(library):
    done = subprocess.run(
        [sys.executable, HERE / "amx_child.py", library],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_products_are_right(rows):
    cases = [r for r in rows if "tokens" in r]
    assert Counter((r["format"], r["int8"]) for r in cases).keys() == {
        (f, i) for f in ("dense", "sparse24", "bitmap") for i in (False, True)
    }
    wrong = [r for r in cases if not r["error"] <= 1]
    assert not wrong, wrong[:5]


def test_tiles_are_used_from_nine_rows_on(rows, library):
    if library == "-":
        pytest.skip("a processor does not count its instructions")
    for r in rows:
        if "tokens" not in r:
            continue
        compressed = r["int8"] and r["format"] != "dense"
        assert (r["products"] > 0) == (r["tokens"] > (16 if compressed else 8)), r


def test_sums_are_right(rows, library):
    cases = [r for r in rows if "op" in r]
    assert {r["op"] for r in cases} == {"gram", "fisher_accumulate"}
    wrong = [r for r in cases if not r["error"] <= 1]
    assert not wrong, wrong
    assert library == "-" or all(r["products"] > 0 for r in cases)


def test_tiles_are_given_back(rows, library):
    if library == "-":
        pytest.skip("a processor does not count its instructions")
    (last,) = (r for r in rows if "configurations" in r)
    assert last["configurations"] > 100 and last["configurations"] == last["releases"]
    assert not last["configured"]
