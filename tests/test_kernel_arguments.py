"""What the compiler makes of the Triton kernels' arguments and the interpreter does not show."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_every_integer_argument_may_be_one():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "benchmarks"), *sys.path])
    done = subprocess.run(
        [sys.executable, HERE / "kernels_of_ones.py"],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *failed, tried = map(json.loads, done.stdout.splitlines())
    assert failed == []
    assert tried > 100
