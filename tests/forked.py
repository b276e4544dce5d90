"""Scripts in processes of their own, none of which has imported anything of pyprune: forks of one
that has imported torch and transformers, since that takes seconds."""

import subprocess
import sys

CHILD = """
import os, sys, warnings
from transformers import AutoModelForCausalLM, PreTrainedModel

# Of forks in a process with threads: those that libraries wait with.
warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
assert not any(name.partition(".")[0] == "pyprune" for name in sys.modules)
expected, *scripts = sys.argv[1:]
for script in scripts:
    if not (child := os.fork()):
        sys.argv[:] = ["script"]
        exec(script, {"__name__": "__main__"})
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != int(expected):
        sys.exit(f"ended with {status} instead of {expected}: {script}")
"""


def run_forked(*scripts: str, status: int = 0, **options) -> subprocess.CompletedProcess[str]:
    """Runs one after the other; ends with 0 if each of them ended with `status`."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = [sys.executable, "-c", CHILD, str(status), *scripts]
    return subprocess.run(command, text=True, check=False, **options)
