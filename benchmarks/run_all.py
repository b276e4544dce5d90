"""Runs every benchmark in this folder, each in its own process, and keeps its rows. Smoke runs are
forks of one process that has imported what takes seconds, as many at a time as there are cores.

python benchmarks/run_all.py                  # all, rows into benchmarks/results/<device>/
python benchmarks/run_all.py --smoke          # tiny sizes, rows thrown away: do they still run?
python benchmarks/run_all.py gram obs         # some of them, in this order

One that fails, or is stopped after --limit seconds, keeps the rows that it has written by then; the
others run, and the exit status says that not all went well.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import wait
from pathlib import Path

import torch
from _harness import device_name

HERE = Path(__file__).resolve().parent

# What a GPU is for: running and pruning a model of billions of weights, the kernels. About ten
# minutes, and no network. By worth: a GPU may be lent for less.
CUDA = ["model", "sparse_linear", "prune_model", "obs", "gram", "reconstruct", "fisher", "kron",
        "pack", "select"]  # fmt: skip

# Benchmarks with an option of their own: name of the rows, script, what to add. On a CPU only.
VARIANTS = {"reconstruct_model": ("reconstruct", ["--model"])}
# Left out, unless asked for, where the package is not installed that they measure in.
NEEDS = {"vllm": "vllm"}
SMOKE_VARIANTS = {"reconstruct_model": ["--tokens", "512", "--every", "200", "--rows", "2"]}


def device_slug(device: str) -> str:
    """A file-name-safe name of the device that the rows were measured on."""
    name = device_name(device)
    if device == "cpu":
        name += f" {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# What nearly every benchmark imports.
PRELOADED = ("transformers.models.llama.modeling_llama", "pyprune.prune", "pyprune.sparse.bench")


def as_script(command: list[str], log: Path) -> None:
    """Runs `command`, a Python file and its arguments, in this process; what it prints, and what
    its children do, goes to a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)  # a core has another benchmark
    os.environ["OMP_NUM_THREADS"] = "1"  # for its children
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run_forked(commands: Mapping[str, list[str]], logs: Path) -> list[str]:
    """Runs all; returns the names of those that failed. What each printed is shown at its end."""
    for module in PRELOADED:
        importlib.import_module(module)
    context = multiprocessing.get_context("fork")
    waiting, running, failed = list(commands), {}, []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name = waiting.pop(0)
            log = logs / f"{name}.log"
            process = context.Process(target=as_script, args=(commands[name], log))
            process.start()
            running[process.sentinel] = (name, process, log, time.perf_counter())
        for sentinel in wait(list(running)):
            name, process, log, started = running.pop(sentinel)
            process.join()
            print(log.read_text(), end="")
            report(name, process.exitcode, started)
            if process.exitcode != 0:
                failed.append(name)
    return failed


def run_one_by_one(commands: Mapping[str, list[str]], limit: float | None) -> list[str]:
    """As `run_forked`, each in a new process with all cores, stopped after `limit` seconds."""
    failed = []
    for name, command in commands.items():
        started = time.perf_counter()
        try:
            code = subprocess.call([sys.executable, *command], timeout=limit)
        except subprocess.TimeoutExpired:  # it has been killed
            code = None
        report(name, code, started)
        if code != 0:
            failed.append(name)
    return failed


def runnable(names: Iterable[str]) -> list[str]:
    """Those whose packages are installed; the others are told."""
    found = []
    for name in names:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            print(f"{name}: left out, {NEEDS[name]} is not installed", flush=True)
        else:
            found.append(name)
    return found


def report(name: str, code: int | None, started: float) -> None:
    end = "stopped" if code is None else f"exit {code}"
    print(f"{name}: {end}, {time.perf_counter() - started:.1f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", help="bench_<name>.py or a variant; default all, on a GPU the kernels"
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the rows")
    parser.add_argument("--repetitions", type=int, help="timed samples of each provider")
    parser.add_argument("--limit", type=float, help="seconds after which one is stopped")
    args = parser.parse_args()

    scripts = {p.stem.removeprefix("bench_"): p for p in sorted(HERE.glob("bench_*.py"))}
    options: dict[str, list[str]] = {}
    if args.device == "cpu":
        for name, (script, extra) in VARIANTS.items():
            scripts[name] = scripts[script]
            options[name] = extra + (SMOKE_VARIANTS.get(name, []) if args.smoke else [])
    if unknown := set(args.names) - set(scripts):
        parser.error(f"no such benchmark: {sorted(unknown)}; there are {sorted(scripts)}")
    with tempfile.TemporaryDirectory() as tmp:
        if args.out is not None:
            out = args.out
        elif args.smoke:
            out = Path(tmp)
        else:
            out = HERE / "results" / device_slug(args.device)
        out.mkdir(parents=True, exist_ok=True)
        commands = {}
        for name in args.names or (CUDA if args.device == "cuda" else runnable(scripts)):
            command = [str(scripts[name]), "--device", args.device]
            command += ["--json", str(out / f"{name}.json")]
            command += ["--smoke"] if args.smoke else []
            command += options.get(name, [])
            if args.repetitions and name not in ("model", "vllm"):
                command += ["--repetitions", str(args.repetitions)]
            commands[name] = command
        # CUDA does not survive a fork.
        if args.smoke and args.device == "cpu":
            failed = run_forked(commands, Path(tmp))
        else:
            failed = run_one_by_one(commands, args.limit)
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
