"""README's first table: the few figures that say whether the package is worth a look."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _quality_tables import TRAINED
from _tables import Row, device_of, table

Rows = list[Row]


# Ours in the rows of an op, fastest first.
OURS = ("cuda", "triton", "native")


def headlines(folder: Path, results: Path | None) -> list[str]:
    """folder: of one device's rows; results: of the quality benches, which are of no device."""

    def rows(name: str, where: Path | None = folder) -> Any:
        path = where / f"{name}.json" if where else None
        return json.loads(path.read_text()) if path and path.exists() else []

    lines = [
        *_model(rows("model")), *_served(rows("vllm")), *_layers(rows("sparse_linear")),
        *_pruning(rows("prune_model")), *_solve(rows("obs")), *_gram(rows("gram")),
        *_reconstruction(rows("reconstruct_model")), *_search(rows("blockpruner")),
        *_perplexity(rows("gradient_quality", results)), *_healed(rows("heal_quality", results)),
        *_structure(rows("depth_quality", results)),
    ]  # fmt: skip
    if not lines:
        return []
    of_device = next(filter(None, map(rows, ("obs", "sparse_linear", "prune_model", "model"))))
    return [f"### At a glance: {of_device[0]['device']}", "", f"{device_of(of_device)}.", "",
            *table(["what", "measured", "beside"], [list(line) for line in lines])]  # fmt: skip


Line = tuple[str, str, str]


def _model(rows: Rows) -> Iterator[Line]:
    for row in rows:
        rates = [r for r in row["rates"] if (r["phase"], r["batch"]) == ("decode", 1)]
        dense = [r for r in rates if r["name"] == "dense"]
        best = max(r["median"] for r in dense)
        torch = max(r["median"] for r in dense if r["kernels"] == "torch")
        sizes = {m["name"]: m["weight_bytes"] for m in row["models"]}
        for rate in rates:
            if rate["name"] != "dense":
                mine = rate["median"]
                ours = f"{mine / best:.2f}x our dense kernel, " if best > torch else ""
                yield (
                    f"{sizes['dense'] / 1e9:.1f} GB model decoding in {rate['name']}",
                    f"{mine / torch:.2f}x PyTorch's fastest dense, {ours}"
                    f"{sizes[rate['name']] / sizes['dense']:.2f} of the bytes",
                    f"{mine:.0f} tokens/s at batch 1, bf16",
                )


def _served(rows: Rows) -> Iterator[Line]:
    for row in rows:
        dense, *others = row["models"]
        for m in others:
            gains = {
                kind: [
                    m["rates"][batch][kind][0] / dense["rates"][batch][kind][0]
                    for batch in dense["rates"]
                ]
                for kind in ("decode", "prefill")
            }
            batches = ", ".join(dense["rates"])
            decode = ", ".join(f"{gain:.2f}x" for gain in gains["decode"])
            least, most = min(gains["prefill"]), max(gains["prefill"])
            yield (
                f"the same served by vLLM in {m['name']}",
                f"decoding {decode} at batch {batches}; prefill {_span(least, most)}x",
                f"vLLM's own dense layers ({dense['rates']['1']['decode'][0]:.0f} tokens/s at "
                "batch 1)",
            )


def _layers(rows: Rows) -> Iterator[Line]:
    for name, words in (("sparse24", "2:4"), ("bitmap50", "50 % bitmap")):
        mine = [r for r in rows if r["provider"] == name]
        by_rows = {n: [r for r in mine if r["rows"] == n] for n in (1, 8, 16, 64, 512, 4096)}
        counts = [n for n, found in by_rows.items() if found]
        cells = [
            f"{_span(least, most)}x at {count}"
            for count in counts
            for least, most in [
                _range(r["ratio_to_best_dense"] for r in mine if r["rows"] == count)
            ]
        ]
        if cells:
            isa = f", {mine[0]['isa'].upper()} alone" if "isa" in mine[0] else ""
            yield (f"linear layer, {words}, bf16{isa}", ", ".join(cells) + " rows of x",
                   "the fastest dense product of PyTorch's and ours" if mine[0].get("threads")
                   else "cuBLAS's dense product")  # fmt: skip


def _fastest(rows: Rows) -> Rows:
    """Of every case our fastest provider's row."""
    names = {r["provider"] for r in rows}
    mine = next((name for name in OURS if name in names), None)
    return [r for r in rows if r["provider"] == mine]


def _pruning(rows: Rows) -> Iterator[Line]:
    for row in rows:
        if row["method"].startswith("sparsegpt"):
            sizes = row["sizes"]
            yield (
                f"{row['method']} 2:4 of {sizes['num_hidden_layers']} blocks of width "
                f"{sizes['hidden_size']:,} and {sizes['intermediate_size']:,}",
                f"{row['seconds']:.1f} s; the least arithmetic takes {row['floor_seconds']:.1f} s",
                f"{row['sequences']} x {row['tokens']} tokens, end to end",
            )


def _gram(rows: Rows) -> Iterator[Line]:
    mine = [r for r in _fastest(rows) if r["dtype"] == "bfloat16" and r["shape"][-1] >= 4096]
    if mine and mine[0]["provider"] != "native":
        least, most = _range(1 / r["ratio_to_baseline"] for r in mine)
        columns = [r["shape"][-1] for r in mine]
        what = f"bf16 Gram matrix, {min(columns):,} to {max(columns):,} columns"
        yield what, f"{least:.2f}-{most:.2f}x", "cuBLAS's whole product (limit 2)"


def _solve(rows: Rows) -> Iterator[Line]:
    mine = _fastest(rows)
    gains = [1 / r["ratio_to_baseline"] for r in mine]
    if gains:
        columns = [r["shape"][-1] for r in mine]
        what = f"SparseGPT solve, {min(columns):,} to {max(columns):,} columns"
        gain = f"{min(gains):.0f}-{max(gains):.0f}x"
        yield what, gain, "the reference algorithm, column by column"


def _reconstruction(rows: Rows) -> Iterator[Line]:
    for row in rows:
        if row["provider"] == "native":
            yield (
                "least-squares weights of a whole model",
                f"{1 / row['ratio_to_baseline']:.1f}x, within {row['weight_error_worst']:.0e} of "
                "the weights",
                "a Cholesky solve per row",
            )


def _search(rows: Rows) -> Iterator[Line]:
    for row in rows:
        if row["provider"] in ("exact", "fast"):
            gain = f"{row['seconds_naive_over_this']:.1f}x"
            yield f"BlockPruner's search, {row['provider']}", gain, "every candidate from scratch"


def _perplexity(rows: Rows) -> Iterator[Line]:
    # More text for some methods would be no comparison: the least that any had.
    tokens = min((r["calibration_tokens"] for r in rows if r["pattern"] == "0.5"), default=0)
    by = {
        (r["method"], r["pattern"]): r["perplexity"]["wiki"]["ppl"]
        for r in rows
        if r["method"] == "dense" or r["calibration_tokens"] == tokens
    }
    names = [n for n in ("magnitude", "wanda", "sparsegpt", "llm-surgeon-1shot", "llm-surgeon")
             if (n, "0.5") in by]  # fmt: skip
    if names:
        yield ("perplexity of SmolLM2-135M at 50 %",
               ", ".join(f"{n} {by[n, '0.5']:.1f}" for n in names),
               f"dense {by['dense', '-']:.1f}; {tokens:,} calibration tokens")  # fmt: skip


def _healed(rows: Rows) -> Iterator[Line]:
    """By what trains, from whatever taught it best."""
    trained = [r for r in rows if "train" in r]
    wiki = {
        (r["pattern"], r.get("train"), r.get("learnt")): r["perplexity"]["wiki"]["ppl"]
        for r in rows
    }
    for pattern in dict.fromkeys(r["pattern"] for r in trained):
        after = []
        for train in ("lora", "all"):
            found = [ppl for (p, t, _), ppl in wiki.items() if (p, t) == (pattern, train)]
            after += [f"{TRAINED[train]} {min(found):.1f}"] if found else []
        shown = pattern if ":" in pattern else f"{float(pattern):.0%}".replace("%", " %")
        yield (f"the same after SparseGPT {shown}, healed",
               f"before {wiki[pattern, None, None]:.1f}, {', '.join(after)}",
               f"{trained[0]['tokens']:,} tokens in {trained[0]['steps']} steps")  # fmt: skip


def _structure(rows: Rows) -> Iterator[Line]:
    by = {(r["variant"], r["ratio"]): r for r in rows}
    names = [n for n in ("shortgpt", "sleb", "blockpruner", "blockpruner, refit")
             if (n, 0.1) in by]  # fmt: skip
    if names:
        dense = by["dense", 0.0]
        yield ("perplexity without 10 % of the parameters",
               ", ".join(f"{n} {by[n, 0.1]['perplexity']['wiki']['ppl']:.1f}" for n in names),
               f"dense {dense['perplexity']['wiki']['ppl']:.1f}; "
               f"{dense['calibration_tokens']:,} calibration tokens")  # fmt: skip


def _span(least: float, most: float) -> str:
    low, high = f"{least:.2f}", f"{most:.2f}"
    return low if low == high else f"{low}-{high}"


def _range(values: Iterator[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)
