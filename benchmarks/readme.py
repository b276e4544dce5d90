"""Writes the tables of README, docs/quality.md and docs/measurements.md from benchmarks/results/.

python benchmarks/readme.py            # rewrite them
python benchmarks/readme.py --check    # exit 1 if they are not what the rows say
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from _headlines import headlines
from _quality_tables import (
    QUALITY,
    REMOVED,
    depth_quality,
    healed,
    quality,
    structure_details,
    width_quality,
)
from _run_tables import (
    backward,
    blockpruner,
    exactobs,
    load,
    memory,
    prune_model,
    reconstruct_model,
    sparse_linear,
    surgeon,
    vllm,
    walk,
)
from _tables import Row, device_of, table

from pyprune.sparse.bench import BenchResult, Protocol, Rate
from pyprune.sparse.plot import plot

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- end results -->"
OURS = ("cuda", "triton", "native")
KERNELS = {
    "obs": "SparseGPT solve, H given",
    "obs_greedy": "Exact greedy OBS of some rows",
    "gram": "Gram matrix",
    "fisher": "Gradient magnitudes",
    "select": "Mask selection",
    "pack": "Packing",
    "reconstruct": "Least-squares weights of a mask",
    "kron": "Quadratic forms and updates of LLM Surgeon",
}


def demo(result: dict[str, Any]) -> list[str]:
    """Where the time of `make demo` goes."""
    phases = [[name, f"{seconds:.0f}"] for name, seconds in result["seconds"].items()]
    total = sum(result["seconds"].values())
    runs = [
        [str(r["pattern"]), f"{r['perplexity']:.2f}", f"{r['seconds']:.0f}",
         f"{r['peak_memory_bytes'] / 2**30:.2f}"]
        for r in result["rows"] if "seconds" in r
    ]  # fmt: skip
    bench = result["bench"]
    return [
        "### `make demo` by phase",
        "",
        f"{device_of([bench | {'torch': bench['torch_version']}])}, without "
        "the set-up. SparseGPT, 64 x 512 calibration tokens.",
        "",
        *table([*result["seconds"], "in all"], [[*(p[1] for p in phases), f"{total:.0f}"]]),
        *table(["pattern", "perplexity", "pruning, seconds", "peak GiB"], runs),
        *comparison(bench),
    ]


def comparison(bench: dict[str, Any]) -> list[str]:
    """Whole models, dense beside compressed, as `pyprune bench` measures them."""

    def label(row: Row) -> tuple[str, str]:
        """Dense layers run on PyTorch's kernels or on ours."""
        own = row["name"] == "dense" and row.get("kernels") == "pyprune"
        return row["name"], f"{row['dtype']}, own kernel" if own else row["dtype"]

    rates = {(*label(r), r["phase"], r["batch"]): r["median"] for r in bench["rates"]}
    lines = [(p, b) for p in ("decode", "prefill") for b in bench["protocol"]["batches"]]
    fastest = {
        line: max(
            rate for (name, _, *of), rate in rates.items() if name == "dense" and (*of,) == line
        )
        for line in lines
    }
    body = []
    for model in bench["models"]:
        cells = []
        for line in lines:
            rate = rates[(*label(model), *line)]
            cells.append(f"{rate:.0f} ({rate / fastest[line]:.2f}x)")
        body.append([" ".join(label(model)), f"{model['weight_bytes'] / 1e6:.0f}", *cells])
    torch_dense = [r for (n, dtype, *of), r in rates.items()
                   if n == "dense" and "own" not in dtype and (*of,) == ("decode", 1)]  # fmt: skip
    gains = [
        f"{name} {dtype} {rates[name, dtype, 'decode', 1] / max(torch_dense):.2f}x"
        for name, dtype in (label(m) for m in bench["models"])
        if name != "dense"
    ]
    protocol = bench["protocol"]
    return [
        f"Side by side, tokens/s (over the fastest dense one's); prompts of "
        f"{protocol['prompt']} tokens, {protocol['steps']} decoded, medians of "
        f"{protocol['rounds']} rounds:",
        "",
        *table(["model", "weights MB", *(f"{p}, batch {b}" for p, b in lines)], body),
        "Decoding at batch 1 over the fastest dense model on PyTorch's own kernels: "
        f"{', '.join(gains)}.",
        "",
    ]


def case_of(row: Row) -> tuple[str, ...]:
    known = {"op", "provider", "shape", "dtype", "seconds_median", "seconds_min", "seconds_max",
             "repetitions", "flops", "flops_rate", "bytes", "bytes_rate", "share_of_limit", "limit",
             "baseline", "ratio_to_baseline", "device", "threads", "torch", "commit",
             "ratio_to_reference", "share_of_floor", "mask_agreement", "max_error",
             "others_share", "ceiling", "quack"}  # fmt: skip
    note = " ".join(f"{k} {v}" for k, v in row.items() if k not in known)
    return row["op"], note, "x".join(map(str, row["shape"])), row["dtype"]


def kernels(name: str, rows: list[Row]) -> list[str]:
    """A line per case: our time, how many times longer the others take, share of the limit."""
    body = []
    for case, members in groupby(rows, key=case_of):
        times = {r["provider"]: r for r in members}
        ours = next((times[b] for b in OURS if b in times), None)
        if ours is None:
            continue
        others = ", ".join(
            f"{r['seconds_median'] / ours['seconds_median']:.2f}x {p}"
            for p, r in times.items()
            if r is not ours and p not in ("reference", *OURS)
        )
        body.append([*case, ours["provider"], f"{ours['seconds_median'] * 1e3:.3f}", others,
                     f"{ours['share_of_limit']:.0%} of {ours['limit']}"])  # fmt: skip
    header = ["op", "case", "shape", "dtype", "ours", "ms", "time of others / ours", "limit"]
    title = f"### {KERNELS[name]}"
    return [
        title,
        "",
        f"{device_of(rows)}. `benchmarks/bench_{name}.py`.",
        "",
        *table(header, body),
    ]


PROPORTIONS = {"1b": "Llama-3.2-1B", "8b": "Llama-3-8B"}


def model(rows: list[Row]) -> list[str]:
    (row,) = rows
    size = next(m["weight_bytes"] for m in row["models"] if m["name"] == "dense")
    how = " Decoding by CUDA graphs." if row["protocol"].get("graph") else ""
    return [
        f"### Decoding a {size / 1e9:.1f} GB model",
        "",
        f"Random bf16 Llama in the proportions of {PROPORTIONS[row.get('size', '1b')]}, half of "
        f"its blocks' weights zero.{how} {device_of(rows)}. `benchmarks/bench_model.py`.",
        "",
        *comparison(row),
    ]


RUNS = {
    "vllm": vllm,
    "sparse_linear": sparse_linear,
    "prune_model": prune_model,
    "walk": walk,
    "memory": memory,
    "load": load,
    "backward": backward,
    "surgeon": surgeon,
    "exactobs": exactobs,
    "reconstruct_model": reconstruct_model,
    "blockpruner": blockpruner,
}
STRUCTURES = {
    "depth_quality": (depth_quality, "Branches and layers removed"),
    "width_quality": (width_quality, "Channels and heads removed"),
}
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "model.png"


def at_a_glance() -> str:
    """README's: the headlines of each device, and whole models dense beside sparse."""
    lines = [BEGIN, ""]
    for place, folder in enumerate(sorted({p.parent for p in RESULTS.glob("*/*.json")})):
        lines += headlines(folder, None if place else RESULTS)
    lines += [f"![Prefill and decoding of a 1.8 GB model](docs/{PICTURE.name})", ""]
    for _, rows in rows_of(["model"]):
        lines += model(rows)
    return "\n".join([*lines, END])


def perplexities() -> str:
    """docs/quality.md's: every method beside the others."""
    lines = [BEGIN, ""]
    for name, title in QUALITY.items():
        for path in sorted(RESULTS.glob(f"**/{name}.json")):
            rows = json.loads(path.read_text())
            lines += quality(title, [r for r in rows if r["pattern"] not in REMOVED])
            if structures := [r for r in rows if r["pattern"] in ("-", *REMOVED)][1:]:
                lines += quality(
                    "Rows, columns and eigendirections removed", [rows[0], *structures]
                )
    for path in sorted(RESULTS.glob("**/heal_quality.json")):
        lines += healed(json.loads(path.read_text()))
    for name, (lines_of, _) in STRUCTURES.items():
        for path in sorted(RESULTS.glob(f"**/{name}.json")):
            lines += lines_of(json.loads(path.read_text()))
    return "\n".join([*lines, END])


def measurements() -> str:
    lines = [
        "# Measurements in detail",
        "",
        "Generated from `benchmarks/results/` by `benchmarks/readme.py`. Providers of one line ran",
        "side by side in one process; their results were checked before they were timed.",
        "",
    ]
    for name, rows in rows_of(RUNS):
        lines += RUNS[name](rows)
    for path in sorted(RESULTS.glob("**/demo.json")):
        lines += demo(json.loads(path.read_text()))
    for name, rows in rows_of(KERNELS):
        lines += kernels(name, rows)
    for name, (_, title) in STRUCTURES.items():
        for path in sorted(RESULTS.glob(f"**/{name}.json")):
            lines += structure_details(title, json.loads(path.read_text()))
    return "\n".join(lines)


def rows_of(names: Iterable[str]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each of these benchmarks, device by device."""
    for folder in sorted({p.parent for p in RESULTS.glob("*/*.json")}):
        for name in names:
            path = folder / f"{name}.json"
            if path.exists() and (rows := json.loads(path.read_text())):
                yield name, rows


def picture(bench: dict[str, Any], file: Path) -> None:
    """What `pyprune bench` drew, from its row."""
    fields = bench | {
        "rates": [Rate(**rate) for rate in bench["rates"]],
        "protocol": Protocol(**bench["protocol"]),
    }
    plot(BenchResult(**{f.name: fields[f.name] for f in dataclasses.fields(BenchResult)}), file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    new = {ROOT / "docs" / "measurements.md": measurements()}
    for page, text in (
        (ROOT / "README.md", at_a_glance()),
        (ROOT / "docs/quality.md", perplexities()),
    ):
        before, rest = page.read_text().split(BEGIN)
        new[page] = before + text + rest.split(END)[1]
    stale = [p for p, text in new.items() if not p.exists() or p.read_text() != text]
    for path in stale:
        if args.check:
            print(f"{path.name} is not what benchmarks/results/ says: run benchmarks/readme.py")
        else:
            path.write_text(new[path])
    if not args.check:
        # One picture is enough, of the first device.
        _, (row,) = next(rows_of(["model"]))
        picture(row, PICTURE)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
