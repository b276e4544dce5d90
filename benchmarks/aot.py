"""Compiles every Triton and CUDA C++ kernel for GPUs that are not there and reads what came of it.

    python benchmarks/aot.py            # table; exit 1 if a kernel does not compile or spills
    python benchmarks/aot.py --json benchmarks/results/aot.json --markdown docs/aot.md

Each `pyprune/kernels/<family>.py` lists the configurations it launches in `AOT`: dicts with
`kernel`, `signature`, `constexprs`, and optionally `num_warps`, `num_stages` (a number, or a
function of the compute capability's first), `label`, `targets` (the only ones that it is launched
on), and `aligned` (integer arguments that are multiples of 16 in practice; pointers always are).
Strides that are 1 in practice belong in `constexprs`, as Triton specialises them when it launches.
Registers, spills and shared memory come from ptxas, as Triton and nvcc call it; the instruction mix
is counted in the PTX. As many processes as there are cores compile.
`csrc/cuda/<file>.cu` is the family `cuda/<file>`; where there is no nvcc those are left out, and
said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("unset TRITON_INTERPRET: under it Triton's decorator makes interpreted functions")

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# A compilation from the cache would not run ptxas, whose log is what is read here.
triton.knobs.compilation.always_compile = True
triton.knobs.nvidia.dump_ptxas_log = True

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.(?:sp[\w:]*\.)?sync",  # dense or sparse
    "cp.async": r"\bcp\.async\.c[ag]",
    "bulk": r"\bcp\.async\.bulk",
    "ld.v4": r"\bld\.global[\w.:]*\.v4",
}


def usage(log: str) -> dict[str, int]:
    """Registers and spills (bytes) from what ptxas printed of one kernel."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas printed no usage:\n{log}")
    return {"registers": int(registers[1]), "spill_bytes": int(spills[1]) + int(spills[2])}


def instructions(ptx: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()}


def compile_one(family: str, spec: dict, target: str) -> list[dict]:
    """The row of a Triton kernel in one configuration."""
    capability = TARGETS[target]
    kernel, constexprs = spec["kernel"], spec.get("constexprs", {})
    signature = {n: "constexpr" if n in constexprs else spec["signature"][n]
                 for n in kernel.arg_names}  # fmt: skip
    aligned = set(spec.get("aligned", ()))
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*") or n in aligned
    }
    stages = spec.get("num_stages", 3)
    if callable(stages):
        stages = stages(capability // 10)
    options = {"num_warps": spec.get("num_warps", 4), "num_stages": stages}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attrs)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=options | {"enable_fp_fusion": True},  # as every launch says
        )
    return [
        {
            "family": family,
            "kernel": kernel.__name__,
            "label": spec.get("label", ""),
            "target": target,
            **options,
            **usage(log.getvalue()),
            "shared_bytes": compiled.metadata.shared,
            **instructions(compiled.asm["ptx"]),
        }
    ]


def nvcc(source: Path, target: str) -> tuple[str, str]:
    """The PTX of a CUDA C++ file and what ptxas printed of it."""
    # Hopper and later have instructions that only the target with an `a` knows; CMake builds those.
    arch = target if TARGETS[target] < 90 else f"{target}a"
    with tempfile.TemporaryDirectory() as tmp:
        command = ["nvcc", "-std=c++17", f"-arch={arch}", "--cubin", "--expt-relaxed-constexpr",
                   "-Xptxas=-v", "--keep", f"--keep-dir={tmp}", f"-I{ROOT / 'csrc'}", str(source),
                   "-o", str(Path(tmp) / "kernels.cubin")]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log}")
        return (Path(tmp) / f"{source.stem}.ptx").read_text(), log


def compile_cuda(source: Path, target: str) -> list[dict]:
    """A row for every kernel in a CUDA C++ file."""
    ptx, log = nvcc(source, target)
    bodies = dict(re.findall(r"\.entry (\w+)(.*?)(?=\.entry |\Z)", ptx, re.DOTALL))
    entries = re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL
    )
    names = subprocess.run(
        ["c++filt", *(mangled for mangled, _ in entries)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = names.replace("(anonymous namespace)::", "").replace("pyprune::", "")
    rows = []
    for (mangled, entry), name in zip(entries, names.splitlines(), strict=True):
        parts = re.match(r"(?:void )?(\w+)(?:<(.*)>)?\(", name)
        shared = re.search(r"(\d+) bytes smem", entry)
        rows.append(
            {
                "family": f"cuda/{source.stem}",
                "kernel": parts[1] if parts else name,
                "label": parts[2] or "" if parts else "",
                "target": target,
                "num_warps": "",
                "num_stages": "",
                **usage(entry),
                "shared_bytes": int(shared[1]) if shared else 0,
                **instructions(bodies[mangled]),
            }
        )
    return rows


def cuda_sources(families: list[str]) -> list[Path]:
    found = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    found = [path for path in found if not families or f"cuda/{path.stem}" in families]
    if found and shutil.which("nvcc") is None:
        print("no nvcc: left out", *(path.name for path in found), file=sys.stderr)
        return []
    return found


def specs(families: list[str]) -> list[tuple[str, dict]]:
    found = []
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if families and path.stem not in families:
            continue
        module = importlib.import_module(f"pyprune.kernels.{path.stem}")
        found += [(path.stem, spec) for spec in module.AOT]
    return found


Task = Callable[[], list[dict]]
TASKS: list[Task] = []


def run_task(i: int) -> list[dict]:
    return TASKS[i]()


def run_all(tasks: list[Task]) -> list[list[dict]]:
    """What each task returns, done by one process a core. A specification holds functions that
    cannot be pickled: processes inherit the tasks and are told which is next."""
    TASKS[:] = tasks
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=fork) as pool:
        return list(pool.map(run_task, range(len(tasks))))


COLUMNS = ("kernel", "label", "target", "num_warps", "num_stages", "registers", "spill_bytes",
           "shared_bytes", *INSTRUCTIONS)  # fmt: skip


def markdown(rows: list[dict]) -> str:
    lines = [
        "# What the compiler makes of the GPU kernels",
        "",
        f"Written by `make aot` with Triton {triton.__version__}, no GPU needed. Registers are per "
        "thread; spills and shared memory are bytes; the other columns count PTX instructions. "
        "Rows without warps are CUDA C++; what these ask of shared memory when launched is not in "
        "them.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="kernel files to compile; default all")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()

    targets = args.target or list(TARGETS)
    triton_tasks = [
        partial(compile_one, family, spec, target)
        for family, spec in specs(args.families)
        for target in targets
        if target in spec.get("targets", TARGETS)
    ]
    cuda_tasks = [
        partial(compile_cuda, source, target)
        for source in cuda_sources(args.families)
        for target in targets
    ]
    # nvcc's files take longest: first, so that no process waits for the last of them.
    results = run_all([*cuda_tasks, *triton_tasks])
    rows = [
        row for made in (*results[len(cuda_tasks) :], *results[: len(cuda_tasks)]) for row in made
    ]
    if not rows:
        parser.error(f"no kernel configurations found for {args.families}")
    table = Table(*COLUMNS, title="ahead-of-time compilation")
    for row in rows:
        table.add_row(*(str(row[c]) for c in COLUMNS), style="red" if row["spill_bytes"] else "")
    Console(width=180).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    spilled = [f"{r['kernel']} ({r['label']}, {r['target']})" for r in rows if r["spill_bytes"]]
    if spilled:
        print("spills:", ", ".join(spilled), file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
