"""The layout decisions of setup.py, checked from the outside."""

import subprocess
import sys
import tarfile
from pathlib import Path

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


def test_version_is_a_string():
    assert pyprune.__version__.count(".") == 2


def test_native_module_links_neither_torch_nor_cudart():
    from pyprune import _native

    assert _native.MODULE is not None, _native.MISSING
    binary = Path(_native.MODULE.__file__ or "").read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in binary
