"""What the compiler makes of the Triton kernels' arguments and the interpreter does not show."""

import ast
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


def test_every_launch_asks_for_fused_multiply_adds():
    # Triton 3.9 warns a user of a launch that says nothing of them, 3.10 multiplies and adds apart:
    # the sums of the sparse products, whose loops are multiply-adds, would take twice as many
    # instructions and round twice.
    launches, silent = 0, []
    for path in sorted((HERE.parent / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                launches += 1
                if said.get("enable_fp_fusion") != "True":
                    silent.append(f"{path.name}:{node.lineno}")
    assert silent == []
    assert launches > 20
