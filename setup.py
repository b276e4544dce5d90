"""Builds pyprune._C (csrc/) through CMake and Ninja. Everything else is in pyproject.toml.

Environment:
  PYPRUNE_CUDA=AUTO|ON|OFF   build the CUDA objects (AUTO: whenever nvcc is found)
  PYPRUNE_CUDA_ARCHS         which of them, e.g. 90a-real; default all that CMakeLists.txt names
  PYPRUNE_NATIVE=ON|OFF      OFF installs without pyprune._C: the reference and Triton remain
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NEEDED = """
pyprune._C was not built: {}.
It takes a C++17 compiler with OpenMP (GCC 11 or later with binutils 2.36; CXX names one), CMake,
Ninja and pybind11.
PYPRUNE_NATIVE=OFF installs pyprune without it: the reference and Triton remain."""


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        out_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("PYPRUNE_CUDA", "AUTO").upper()
        if cuda not in {"AUTO", "ON", "OFF"}:
            raise SystemExit(f"PYPRUNE_CUDA must be AUTO, ON or OFF, got {cuda!r}")
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise SystemExit(NEEDED.format(f"{tool} was not found"))
        try:
            import pybind11  # only a build dependency
        except ImportError as error:
            raise SystemExit(NEEDED.format("pybind11 was not found")) from error
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYPRUNE_CUDA={cuda}",
            # Also if empty: an earlier configuration may have been told which.
            f"-DPYPRUNE_CUDA_ARCHS={os.environ.get('PYPRUNE_CUDA_ARCHS', '')}",
            f"-DPYPRUNE_OUTPUT_DIR={out_dir}",
        ]  # fmt: skip
        cache = build_dir / "CMakeCache.txt"
        configured = cache.exists()
        failed = subprocess.call(configure) != 0
        # A build directory configured by another (build-isolation) environment names tools that
        # may be gone by now: start over rather than fail on them.
        if failed and configured:
            cache.unlink(missing_ok=True)
            failed = subprocess.call(configure) != 0
        if failed:
            raise SystemExit(NEEDED.format("CMake's messages above say what it misses"))
        if subprocess.call(["cmake", "--build", str(build_dir), "--target", "_C"]) != 0:
            raise SystemExit(NEEDED.format("the compiler's messages above say why"))


WITH_NATIVE = os.environ.get("PYPRUNE_NATIVE", "ON").upper() != "OFF"

setup(
    packages=[
        "pyprune",
        "pyprune.allocation",
        "pyprune.calibration",
        "pyprune.checkpoint",
        "pyprune.data",
        "pyprune.depth",
        "pyprune.eigendamage",
        "pyprune.integrations",
        "pyprune.integrations.vllm",
        "pyprune.kernels",
        "pyprune.methods",
        "pyprune.models",
        "pyprune.ops",
        "pyprune.sparse",
        "pyprune.surgeon",
        "pyprune.width",
    ],
    package_data={"pyprune.data": ["sotu.jsonl.xz", "SOTU.md"]},
    ext_modules=[Extension("pyprune._C", sources=[])] if WITH_NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
)
