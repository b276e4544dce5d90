"""How much memory loading takes, compressed against dense.

    python benchmarks/bench_load.py --json load.json

A random bf16 Llama (1.8 GB), half of its weights zero, is written shard by shard and compressed: to
2:4, to bitmaps, and to each with int8 values. Each is loaded by `pyprune.load` in a process of its
own, which touches every weight (transformers maps files: what nobody reads is not there) and
reports its peak resident memory, less what it had after importing. `peak_share` is that over the
bytes of the checkpoint's tensors: 1 means that nothing but the weights was ever in memory.
Before it counts, one decoding step of every compressed model is compared with the dense one's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _harness import environment, write_rows
from bench_memory import SIZES, SMOKE_SIZES, make_checkpoint
from rich.console import Console
from rich.table import Table

from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.stored import StoredCheckpoint

FORMATS: dict[str, dict | None] = {
    "dense": None,
    "sparse24": {"allowed": ("sparse24",)},
    "bitmap": {"allowed": ("bitmap",)},
    "sparse24 int8": {"allowed": ("sparse24",), "int8": True},
    "bitmap int8": {"allowed": ("bitmap",), "int8": True},
}
# Each takes a process; both layouts, both limits of `check`.
SMOKE_FORMATS = {name: FORMATS[name] for name in ("dense", "sparse24", "bitmap int8")}

CHILD = """
import sys, json, time, torch
import pyprune
from pyprune.measure import Measure
from pyprune.sparse.bench import touch
from pyprune.sparse.load import load
from transformers import LlamaForCausalLM
torch.set_num_threads(int(sys.argv[2]))
before = Measure.rss_bytes()
measure = Measure()
started = time.perf_counter()
model = load(sys.argv[1])
touch(model)
seconds = time.perf_counter() - started
peak, after = Measure.peak_rss_bytes(), Measure.rss_bytes()
with torch.inference_mode():
    logits = model(torch.arange(1, 9)[None]).logits[0, -1].float()
print(json.dumps({"before": before, "peak": peak, "after": after, "seconds": seconds,
                  "logits": logits.tolist()}))
"""


def measure(folder: Path) -> dict:
    command = [sys.executable, "-c", CHILD, str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"loading {folder.name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def check(name: str, got: list[float], want: list[float]) -> None:
    a, b = torch.tensor(got), torch.tensor(want)
    error = float((a - b).norm() / b.norm())
    limit = 0.1 if "int8" in name else 0.05
    assert error < limit, f"{name}: logits are off by {error:.3f} of the dense model's"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    sizes, rows = (SMOKE_SIZES if args.smoke else SIZES), []
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp) / "dense"
        source.mkdir()
        make_checkpoint(source, sizes, zeros="2:4")
        want = None
        for name, options in (SMOKE_FORMATS if args.smoke else FORMATS).items():
            folder = source
            if options is not None:
                folder = Path(tmp) / "small"
                compress_checkpoint(source, folder, **options)
            nbytes, found = StoredCheckpoint.open(folder).nbytes, measure(folder)
            want = want or found["logits"]
            check(name, found["logits"], want)
            rows.append({
                "op": "load", "provider": name, "dtype": "bfloat16", "tensor_bytes": nbytes,
                "imports_rss_bytes": found["before"], "peak_rss_bytes": found["peak"],
                "resident_rss_bytes": found["after"],
                "peak_share": (found["peak"] - found["before"]) / nbytes,
                "seconds": found["seconds"], **environment(args.device),
            })  # fmt: skip
            if folder != source:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
    show(rows)
    write_rows(args.json, rows)


def show(rows: list[dict]) -> None:
    table = Table("checkpoint", "tensors MB", "peak MB above imports", "peak / tensors",
                  "peak / dense tensors", "s")  # fmt: skip
    for row in rows:
        peak = row["peak_rss_bytes"] - row["imports_rss_bytes"]
        table.add_row(row["provider"], f"{row['tensor_bytes'] / 1e6:,.0f}", f"{peak / 1e6:,.0f}",
                      f"{row['peak_share']:.2f}", f"{peak / rows[0]['tensor_bytes']:.2f}",
                      f"{row['seconds']:.2f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
