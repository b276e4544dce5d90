"""Tables of perplexity: of pruned weights, and of fewer branches or narrower layers."""

from __future__ import annotations

from collections.abc import Iterator

from _tables import Row, device_of, table

# What benchmarks/results/<name>.json of bench_quality.py is called.
QUALITY = {
    "quality": "Perplexity",
    "gradient_quality": "Perplexity of gradient and Fisher methods",
    "allocation_quality": "Shares among blocks (`--allocation`, all with Wanda's scores)",
    "reconstruct_quality": "Least-squares weights after SparseGPT (`--reconstruct`)",
}
# Shares of rows and columns, or of an eigenbasis: nobody removes so few single weights.
REMOVED = ("0.1", "0.2", "0.3")
TRAINED = {None: "nothing", "lora": "LoRA", "all": "all kept weights"}
LEARNT = {None: "", "text": "the text", "teacher": "the dense model (`--teacher`)"}
RECONSTRUCTED = {"default": "", "on": ", reconstructed", "off": ", not reconstructed"}


def quality(title: str, rows: list[Row]) -> list[str]:
    """A line per method, two columns per pattern: perplexity of each text, and seconds."""
    first = rows[0]["perplexity"]
    texts = list(first)
    protocol = first[texts[0]]
    patterns = [p for p in dict.fromkeys(r["pattern"] for r in rows) if p != "-"]
    # Rows are added over time: each place names the patterns that it was measured for.
    places: dict[str, list[str]] = {}
    for row in rows:
        found = places.setdefault(device_of([row]), [])
        if row["pattern"] not in ("-", *found):
            found.append(row["pattern"])
    shown = sorted({r["calibration_tokens"] for r in rows if r["pattern"] != "-"})
    timed = any("cpu_seconds" in r for r in rows)
    vary = len(shown) > 1
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        name = row["method"] + RECONSTRUCTED[row.get("reconstruct", "default")]
        tokens = "" if row["method"] == "dense" else f"{row['calibration_tokens']:,}"
        lines.setdefault((name, tokens) if vary else (name,), {})[row["pattern"]] = row
    header = ["method", *(["calibration tokens"] if vary else [])]
    for pattern in patterns:
        header += [f"{pattern}: {' / '.join(texts)}", *(["CPU s"] if timed else [])]
    header += ["peak GiB"] if timed else []

    def cells(found: dict[str, Row]) -> Iterator[str]:
        for pattern in patterns:
            row = found.get(pattern, found.get("-"))
            yield " / ".join(f"{row['perplexity'][t]['ppl']:.2f}" for t in texts) if row else ""
            if timed:
                yield f"{row['cpu_seconds']:.0f}" if row and "cpu_seconds" in row else ""
        if timed:
            peaks = [r["peak_memory_bytes"] for r in found.values() if "peak_memory_bytes" in r]
            yield f"{max(peaks) / 2**30:.2f}" if peaks else ""

    body = [[*key, *cells(found)] for key, found in lines.items()]
    where = [f"{place} ({', '.join(found)})" for place, found in places.items() if found]
    return [
        f"### {title}",
        "",
        f"SmolLM2-135M (dequantised 4-bit release), evaluated in {protocol.get('dtype', 'float32')}"
        f" on {protocol['tokens']:,} tokens of each text in windows of {protocol['seqlen']}, no "
        f"BOS. Calibration: {' or '.join(f'{n:,}' for n in shown)} tokens of other Wikipedia "
        f"articles, seed 0. {'; '.join(where)}. "
        "`benchmarks/bench_quality.py`.",
        "",
        *table(header, body),
    ]


def healed(rows: list[Row]) -> list[str]:
    """A line per way of healing, two columns per pattern: perplexity of each text, and seconds."""
    (dense,) = (r for r in rows if r["method"] == "dense")
    texts = list(dense["perplexity"])
    protocol = dense["perplexity"][texts[0]]
    rows = [r for r in rows if r is not dense]
    patterns = list(dict.fromkeys(r["pattern"] for r in rows))
    ways = list(dict.fromkeys((r.get("train"), r.get("learnt")) for r in rows))
    body = []
    for train, learnt in ways:
        cells = []
        for pattern in patterns:
            way = (pattern, train, learnt)
            found = (r for r in rows if (r["pattern"], r.get("train"), r.get("learnt")) == way)
            row = next(found, None)
            cells += [perplexities(row, texts), f"{row['cpu_seconds']:.0f}" if row else ""]
        body.append([TRAINED[train], LEARNT[learnt], *cells])
    header = ["trained", "learns from"]
    for pattern in patterns:
        header += [f"{pattern}: {' / '.join(texts)}", "CPU s"]
    example = next(r for r in rows if "train" in r)
    rates = {TRAINED[r["train"]]: r["learning_rate"] for r in rows if "train" in r}
    return [
        "### Healed (`pyprune heal`)",
        "",
        f"SmolLM2-135M as SparseGPT leaves it (its default, {example['calibration_tokens']:,} "
        f"calibration tokens), then healed in bf16: {example['steps']} steps, "
        f"{example['tokens']:,} tokens of Wikipedia articles that are not evaluated, each seen "
        f"once; learning rates {', '.join(f'{rate:g} ({name})' for name, rate in rates.items())}. "
        f"Dense {perplexities(dense, texts)}. {protocol['tokens']:,} tokens of each text in "
        f"windows of {protocol['seqlen']}, {protocol['dtype']}, no BOS. {device_of(rows)}. "
        "`benchmarks/bench_heal.py`.",
        "",
        *table(header, body),
    ]


def structure(rows: list[Row], title: str, words: str, script: str) -> list[str]:
    """A line per method, ratios side by side; what a method cannot reach is said below."""
    (dense,) = (r for r in rows if r["variant"] == "dense")
    texts = list(dense["perplexity"])
    protocol = dense["perplexity"][texts[0]]
    ratios = sorted({r["ratio"] for r in rows if r is not dense})
    middle = 0.2 if 0.2 in ratios else ratios[len(ratios) // 2]
    body, impossible = [], []
    for name in dict.fromkeys(r["variant"] for r in rows if r is not dense):
        own = {r["ratio"]: r for r in rows if r["variant"] == name}
        refused = {ratio: r["impossible"] for ratio, r in own.items() if "impossible" in r}
        cells = ["-" if ratio in refused else perplexities(own.get(ratio), texts)
                 for ratio in ratios]  # fmt: skip
        at = own.get(middle, {})
        speed = [f"{at[phase]['over_dense']:.2f}" if phase in at else ""
                 for phase in ("prefill", "decode")]  # fmt: skip
        less = f"{at['realised_share']:.1%}" if "realised_share" in at else ""
        body.append([name, *cells, less, *speed])
        if refused:
            these = ", ".join(f"{ratio:.0%}" for ratio in refused)
            impossible.append(f"- {name} does not reach {these}: {next(iter(refused.values()))}.")
    header = ["method", *(f"{ratio:.0%}" for ratio in ratios), f"smaller at {middle:.0%}",
              "prefill x", "decode x"]  # fmt: skip
    return [
        f"### {title}",
        "",
        f"SmolLM2-135M: perplexity on {' / '.join(texts)} by the share of all parameters that went;"
        f" dense {perplexities(dense, texts)}. {protocol['tokens']:,} tokens of each text in "
        f"windows of {protocol['seqlen']}, {protocol.get('dtype', 'float32')}, no BOS. "
        f"Calibration: {dense['calibration_tokens']:,} tokens of other Wikipedia articles, seed 0. "
        f"{words} Of the models at {middle:.0%}: by how much the saved one is smaller, and "
        f"tokens/s over the dense model's (float32, batch 1). {device_of(rows)}. "
        f"`benchmarks/{script}`.",
        "",
        *table(header, body),
        *impossible,
        *([""] if impossible else []),
    ]


def perplexities(row: Row | None, texts: list[str]) -> str:
    """On all texts; a wrecked model's as a power of ten."""
    if row is None:
        return ""
    found = [row["perplexity"][text]["ppl"] for text in texts]
    return " / ".join(
        f"{ppl:.2f}" if ppl < 100 else f"{ppl:,.0f}" if ppl < 1e5 else f"{ppl:.0e}" for ppl in found
    )


def depth_quality(rows: list[Row]) -> list[str]:
    return structure(
        rows,
        "Branches and layers removed",
        "Where a layer keeps one branch the other is zero, and still there.",
        "bench_depth_quality.py",
    )


def width_quality(rows: list[Row]) -> list[str]:
    return structure(
        rows,
        "Channels and heads removed",
        "A stock model has one size for all layers: what narrower ones lack is zero, and still "
        "there. A basis per branch is no stock model, and not saved.",
        "bench_width_quality.py",
    )


def structure_details(title: str, rows: list[Row]) -> list[str]:
    """Size, speed and cost of every row, ratio by ratio."""
    body = []
    for row in sorted(rows, key=lambda r: float(r["ratio"])):
        if "prefill" not in row:
            continue
        speeds = [f"{row[phase]['tokens_per_second']:,.1f} ({row[phase]['over_dense']:.2f}x)"
                  for phase in ("prefill", "decode")]  # fmt: skip
        body.append([
            f"{row['ratio']:.0%}", row["variant"], perplexities(row, list(row["perplexity"])),
            f"{row['parameters'] / 1e6:.1f}", f"{row['file_bytes'] / 1e6:.0f}", *speeds,
            f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
        ])  # fmt: skip
    header = ["share", "method", "perplexity", "parameters, M", "file MB", "prefill tokens/s",
              "decode tokens/s", "CPU s", "peak GiB"]  # fmt: skip
    return [f"### {title}: sizes, speeds and costs", "", *table(header, body)]
