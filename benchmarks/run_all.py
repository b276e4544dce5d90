"""Runs every benchmark in this folder, each in its own process, and keeps its rows.

python benchmarks/run_all.py                  # all, rows into benchmarks/results/<device>/
python benchmarks/run_all.py --smoke          # tiny sizes, rows thrown away: do they still run?
python benchmarks/run_all.py gram obs         # some of them
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent

# What a GPU is for: the kernels, pruning and running a model of billions of weights. Minutes, and
# no network.
CUDA = ["gram", "fisher", "kron", "obs", "reconstruct", "select", "pack", "sparse_linear",
        "prune_model", "model"]  # fmt: skip

# Benchmarks with an option of their own: name of the rows, script, what to add. On a CPU only.
VARIANTS = {
    "reconstruct_model": ("reconstruct", ["--model"]),
    "sparse_linear_avx2": ("sparse_linear", ["--isa", "avx2"]),
}
SMOKE_VARIANTS = {"reconstruct_model": ["--tokens", "512", "--every", "200", "--rows", "2"]}


def device_slug(device: str) -> str:
    """A file-name-safe name of the device that the rows were measured on."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = f"{found[1] if found else 'cpu'} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", help="bench_<name>.py or a variant; default all, on a GPU the kernels"
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the rows")
    parser.add_argument("--repetitions", type=int, help="timed samples of each provider")
    args = parser.parse_args()

    scripts = {p.stem.removeprefix("bench_"): p for p in sorted(HERE.glob("bench_*.py"))}
    options: dict[str, list[str]] = {}
    if args.device == "cpu":
        for name, (script, extra) in VARIANTS.items():
            scripts[name] = scripts[script]
            options[name] = extra + (SMOKE_VARIANTS.get(name, []) if args.smoke else [])
    if unknown := set(args.names) - set(scripts):
        parser.error(f"no such benchmark: {sorted(unknown)}; there are {sorted(scripts)}")
    failed = []
    with tempfile.TemporaryDirectory() as tmp:
        if args.out is not None:
            out = args.out
        elif args.smoke:
            out = Path(tmp)
        else:
            out = HERE / "results" / device_slug(args.device)
        out.mkdir(parents=True, exist_ok=True)
        for name in args.names or (CUDA if args.device == "cuda" else scripts):
            started = time.perf_counter()
            command = [sys.executable, str(scripts[name]), "--device", args.device,
                       "--json", str(out / f"{name}.json")]  # fmt: skip
            command += ["--smoke"] if args.smoke else []
            command += options.get(name, [])
            if args.repetitions and name != "model":
                command += ["--repetitions", str(args.repetitions)]
            code = subprocess.call(command)
            print(f"{name}: exit {code}, {time.perf_counter() - started:.1f} s", flush=True)
            if code != 0:
                failed.append(name)
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
