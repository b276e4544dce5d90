"""The layout decisions of setup.py, checked from the outside."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import pyprune

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_root_kernels_folder_does_not_shadow_hugging_face_kernels():
    # A namespace portion (no __init__) is all that the root folder may offer, so that an installed
    # `kernels` distribution always wins; our own modules are reached as pyprune.kernels.
    spec = python(
        "from importlib.util import find_spec as f; s = f('kernels'); print(s and s.origin)"
    )
    assert "pyprune" not in spec and str(ROOT) not in spec


def test_kernels_import_as_a_subpackage():
    out = python("import pyprune.kernels.column_norms as k; print(k.__file__)")
    assert Path(out).resolve() == ROOT / "kernels" / "column_norms.py"


def test_every_package_with_code_is_listed_in_setup():
    listed = (ROOT / "setup.py").read_text()
    for folder in (ROOT / "pyprune").rglob("*.py"):
        package = ".".join(folder.parent.relative_to(ROOT).parts)
        assert f'"{package}"' in listed, f"{package} is missing from setup.py"


def test_a_source_distribution_has_what_the_build_reads(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    command += ["sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {m.name.partition("/")[2]: m.isfile() for m in archive.getmembers()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    kernels = ROOT / "pyprune" / "kernels"  # a link here, a folder of files there
    for path in (ROOT / "CMakeLists.txt", *sources, *kernels.glob("*.py")):
        assert held.get(str(path.relative_to(ROOT))), path


def test_cmake_is_new_enough_for_the_cuda_objects():
    """Seen with nvcc 13.0: 3.24 refuses 90a-real, 3.25.0 a toolkit without nvptxcompiler_static."""
    text = (ROOT / "CMakeLists.txt").read_text()
    least = re.search(r"cmake_minimum_required\(VERSION ([0-9.]+)\)", text)[1]
    assert [int(part) for part in least.split(".")] >= [3, 25, 1]
    assert f'"cmake>={least}"' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def build(tmp_path):
    """`setup.py build_ext` on a copy of what it reads, with `settings` in the environment."""
    for name in ("setup.py", "pyproject.toml", "README.md", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")

    def run(**settings: str) -> subprocess.CompletedProcess[str]:
        tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext"],
            cwd=tmp_path,
            env={**os.environ, "PATH": tools, "PYPRUNE_CUDA": "OFF", **settings},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_build_without_a_compiler_says_what_to_do(build):
    pytest.importorskip("pybind11", reason="only builds need it")
    done = build(CXX="/nowhere/c++")
    assert done.returncode != 0
    assert "PYPRUNE_NATIVE=OFF" in done.stderr and "C++17 compiler" in done.stderr
    assert "/nowhere/c++" in done.stderr  # as CMake says it
    assert "Traceback" not in done.stderr


def test_a_build_without_cmake_says_what_to_do(build, tmp_path):
    done = build(PATH=str(tmp_path))
    assert done.returncode != 0
    assert "cmake was not found" in done.stderr and "PYPRUNE_NATIVE=OFF" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_build_with_an_old_assembler_says_so_at_once(build, tmp_path):
    pytest.importorskip("pybind11", reason="only builds need it")
    scripts = {
        "as": 'for f; do case $f in *.s) ! grep -qE "tdpbf16|bfmmla" "$f" || exit 1;; esac; done\n'
        f'exec {shutil.which("as")} "$@"',
        "c++": f'exec {shutil.which("c++")} -B"{tmp_path}" "$@"',
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = build(CXX=str(tmp_path / "c++"))
    assert done.returncode != 0
    assert "GCC 11 or later with binutils 2.36" in done.stderr and "CMake Error" in done.stderr
    assert "Building" not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_build_without_pybind11_says_what_to_do(build, tmp_path):
    (tmp_path / "pybind11.py").write_text("raise ModuleNotFoundError")
    for tool in ("cmake", "ninja"):  # only looked for
        (tmp_path / tool).touch(mode=0o755)
    done = build(PATH=str(tmp_path))
    assert done.returncode != 0
    assert "pybind11 was not found" in done.stderr and "PYPRUNE_NATIVE=OFF" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_native_module_nothing_is_compiled(build, tmp_path):
    done = build(PYPRUNE_NATIVE="OFF", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_version_is_a_string():
    assert pyprune.__version__.count(".") == 2


def test_native_module_links_neither_torch_nor_cudart():
    from pyprune import _native

    assert _native.MODULE is not None, _native.MISSING
    binary = Path(_native.MODULE.__file__ or "").read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in binary
