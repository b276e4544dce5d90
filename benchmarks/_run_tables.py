"""Tables of benches whose rows are not a kernel's times alone."""

from __future__ import annotations

from itertools import groupby
from statistics import median

from _tables import Row, device_of, table


def sparse_linear(rows: list[Row]) -> list[str]:
    """Best dense time over each compressed format's, by rows of x."""
    formats = ("sparse24", "bitmap", "dense_int8", "cusparselt", "torch_sparse24")
    names = [n for n in dict.fromkeys(r["provider"] for r in rows) if n.startswith(formats)]
    body = []
    for (shape, m), members in groupby(rows, key=lambda r: (r["shape"], r["rows"])):
        by = {r["provider"]: r for r in members}
        best = by[by[names[0]]["best_dense"]]
        body.append(
            ["x".join(map(str, shape)), str(m), f"{best['seconds_median'] * 1e3:.3g} "
             f"({best['provider']})",
             *(f"{by[n]['ratio_to_best_dense']:.2f}" if n in by else "-" for n in names)]
        )  # fmt: skip
    first = rows[0]
    dense = "PyTorch fp32 and bf16, our bf16 kernel" if first.get("threads") else "cuBLAS, bf16"
    isa = f" with {first['isa'].upper()} alone" if "isa" in first else ""
    return [
        f"### Sparse linear layers{isa}",
        "",
        f"How many times faster than the fastest dense product ({dense}). Weights rotate through "
        f"{first['rotated_bytes'] / 2**20:,.0f} MiB; last-level cache "
        f"{first['cache_bytes'] / 2**20:,.0f} MiB; reading {first['read_bandwidth'] / 1e9:.1f} "
        f"GB/s. {device_of(rows)}. "
        "`benchmarks/bench_sparse_linear.py`.",
        "",
        *table(["weight", "rows of x", "best dense, ms", *names], body),
    ]


def vllm(rows: list[Row]) -> list[str]:
    """Each model's rates in vLLM, and over its dense one's."""
    lines = []
    for row in rows:
        dense, batches = row["models"][0], list(row["models"][0]["rates"])
        cells = [(kind, batch) for kind in ("decode", "prefill") for batch in batches]
        body = []
        for m in row["models"]:
            rates = [(m["rates"][b][k][0], dense["rates"][b][k][0]) for k, b in cells]
            body.append(
                [m["name"], f"{m['file_bytes'] / 1e6:,.0f}", f"{m['resident_bytes'] / 1e6:,.0f}",
                 *(f"{mine:.0f} ({mine / base:.2f}x)" for mine, base in rates)]
            )  # fmt: skip
        lines += [
            "### In vLLM",
            "",
            f"The same model in vLLM {row['vllm']}, eager: tokens/s (over vLLM's own dense "
            f"layers); prompts of {row['prompt']} tokens, {row['steps']} decoded; medians of "
            f"{row['turns']} turns, each with an engine of its own and {row['rounds']} rounds. "
            "Resident is what the engine's process has that is no file's, 1 GiB of it for the "
            f"cache. Greedy, {row['agreement']:.0%} of the 2:4 model's tokens are those of the "
            f"dense one with its weights. {device_of(rows)}. `benchmarks/bench_vllm.py`.",
            "",
            *table(["model", "file MB", "resident MB", *(f"{k}, batch {b}" for k, b in cells)],
                   body),
        ]  # fmt: skip
    return lines


def prune_model(rows: list[Row]) -> list[str]:
    first = rows[0]
    phases = ("forward", "statistics", "prune")
    body = [
        [r["method"], f"{r['seconds']:.1f}", *(f"{r['phases'].get(p, 0):.1f}" for p in phases),
         f"{r['floor_seconds']:.1f}", f"{r['share_of_floor']:.0%}",
         f"{r['peak_cuda_bytes'] / 1e9:.0f}" if r["peak_cuda_bytes"] else "-"]
        for r in rows
    ]  # fmt: skip
    sizes = first["sizes"]
    return [
        "### Pruning a whole model",
        "",
        f"2:4, random bf16 Llama: {sizes['num_hidden_layers']} blocks of width "
        f"{sizes['hidden_size']} and {sizes['intermediate_size']}; {first['sequences']} x "
        f"{first['tokens']} random tokens. The floor is one forward and half of each Gram product "
        f"at the measured rate of bf16 products. {device_of(rows)}. "
        "`benchmarks/bench_prune_model.py`.",
        "",
        *table(["method", "seconds", *phases, "floor", "of its speed", "peak GB"], body),
    ]


def walk(rows: list[Row]) -> list[str]:
    first = rows[0]
    body = [
        [r["provider"], f"{r['seconds_median']:.2f}", f"{r['ratio_to_baseline']:.2f}",
         f"{r['passes']:.2f}", f"{r['peak_bytes'] / 1e6:.0f}"]
        for r in rows
    ]  # fmt: skip
    return [
        "### Calibration walk",
        "",
        f"Llama of {first['blocks']} blocks of width {first['hidden']} (random), "
        f"{first['tokens']:,} tokens, {first['statistic']}. `single`, `single+disk` and `naive` "
        f"are true-sequential and end with equal bits. {device_of(rows)}. "
        "`benchmarks/bench_walk.py`.",
        "",
        *table(["mode", "seconds", "time / two-pass", "passes", "peak MB above the model"], body),
    ]


def memory(rows: list[Row]) -> list[str]:
    body = [
        [r["method"], f"{r['model_bytes'] / 1e6:,.0f}", f"{r['peak_rss_bytes'] / 1e6:,.0f}",
         f"{r['imports_rss_bytes'] / 1e6:,.0f}"]
        for r in rows
    ]  # fmt: skip
    return [
        "### Memory of pruning a checkpoint",
        "",
        f"bf16 Llama of {rows[0]['blocks']} blocks (random), {rows[0]['calibration_tokens']:,} "
        f"tokens, 50 %. {device_of(rows)}. `benchmarks/bench_memory.py`.",
        "",
        *table(["method", "checkpoint MB", "peak MB", "of which imports"], body),
    ]


def load(rows: list[Row]) -> list[str]:
    body = [
        [r["provider"], f"{r['tensor_bytes'] / 1e6:,.0f}",
         f"{(r['peak_rss_bytes'] - r['imports_rss_bytes']) / 1e6:,.0f}",
         f"{r['peak_share']:.2f}", f"{r['seconds']:.1f}"]
        for r in rows
    ]  # fmt: skip
    return [
        "### Memory of loading a checkpoint",
        "",
        f"bf16 Llama (random), half of its blocks' weights zero, loaded and every weight touched. "
        f"{device_of(rows)}. `benchmarks/bench_load.py`.",
        "",
        *table(["stored as", "checkpoint MB", "peak MB above imports", "peak / checkpoint",
                "seconds"], body),
    ]  # fmt: skip


def backward(rows: list[Row]) -> list[str]:
    first = rows[0]
    body = [
        [r["provider"], f"{r['seconds_median']:.2f}", f"{r['ratio_to_baseline']:.3f}",
         f"{r['peak_bytes'] / 1e6:,.0f}"]
        for r in rows
    ]  # fmt: skip
    return [
        "### Gradient statistics",
        "",
        f"{first['model']} {first['dtype']}, {first['sequences']} x {first['seqlen']} tokens, "
        f"block matrices {first['weight_bytes'] / 1e6:,.0f} MB. `bare`: forward and backward with "
        "weight gradients thrown away; `reference`: each stored, its magnitude added up on the "
        f"CPU. {device_of(rows)}. `benchmarks/bench_backward.py`.",
        "",
        *table(["provider", "seconds", "time / bare", "peak MB above the model"], body),
    ]


def exactobs(rows: list[Row]) -> list[str]:
    body = []
    for key in dict.fromkeys((r["pattern"], r["method"]) for r in rows):
        mine = [r for r in rows if (r["pattern"], r["method"]) == key]
        cells = [f"{median(r[name] for r in mine):.2f}" for name in ("error", "mask_error")]
        body.append([*key, *cells, f"{median(r['agreement'] for r in mine):.0%}"])
    layers = len({r["layer"] for r in rows})
    return [
        "### Layer error over that of exact greedy OBS",
        "",
        f"Medians over {layers} matrices of SmolLM2-135M, {max(r['rows'] for r in rows)} rows of "
        f"each, {rows[0]['calibration_tokens']:,} tokens. {device_of(rows)}. "
        "`benchmarks/bench_exactobs.py`.",
        "",
        *table(["pattern", "method", "as it is", "best weights for its mask", "same removals"],
               body),
    ]  # fmt: skip


def blockpruner(rows: list[Row]) -> list[str]:
    first = rows[0]
    body = [
        [r["provider"], str(r["evaluations"]), f"{r['seconds_median']:.1f}",
         f"{r['seconds_naive_over_this']:.2f}", f"{r['without_head_naive_over_this']:.2f}",
         f"{r['perplexity']:.3f}"]
        for r in rows
    ]  # fmt: skip
    return [
        "### BlockPruner's search",
        "",
        f"{len(first['removed'])} of {2 * first['layers']} branches of SmolLM2-135M, "
        f"{first['calibration_tokens']:,} tokens; `exact` removes the same branches as `naive` in "
        f"the same order. {device_of(rows)}. `benchmarks/bench_blockpruner.py`.",
        "",
        *table(["mode", "evaluations", "seconds", "naive / this", "without the head",
                "perplexity"], body),
    ]  # fmt: skip


def surgeon(rows: list[Row]) -> list[str]:
    """What a shot takes over forward and backward, and where its time goes."""
    first = rows[0]
    body = []
    for row in rows:
        phases = row.get("seconds_by_phase", {})
        more = row.get("projected", {})
        body.append([
            row["provider"], f"{row['seconds_median']:.1f}", f"{row['ratio_to_baseline']:.2f}",
            *(f"{phases[p]:.1f}" if phases.get(p) else "" for p in ("factors", "costs", "update")),
            *(f"{at['ratio_to_baseline']:.2f} ({at['share_after_factors']:.0%})"
              for at in more.values()),
            *([""] * (2 - len(more))),
        ])  # fmt: skip
    tokens = next(list(row["projected"]) for row in rows if "projected" in row)
    header = ["provider", "seconds", "time / forward and backward", "factors", "costs", "update",
              *(f"at {int(n):,} tokens" for n in tokens)]  # fmt: skip
    return [
        "### A shot of LLM Surgeon",
        "",
        f"SmolLM2-135M, {first['sequences']} x {first['tokens'] // first['sequences']} tokens, one "
        "run. Of more tokens (projected: forward, backward and factors grow with them, the rest "
        "does not): the same ratio, and in brackets the share of costs, threshold and update. "
        "`element`: 50 % of the weights; `rows-columns`: 10 %. `reference`: what the authors' code "
        "does before its update (weight gradients made, eigendecompositions). "
        f"{device_of(rows)}. `benchmarks/bench_surgeon.py`.",
        "",
        *table(header, body),
    ]


def reconstruct_model(rows: list[Row]) -> list[str]:
    first = rows[0]
    body = [
        [r["provider"], f"{r['seconds']:.1f}", f"{1 / r['ratio_to_baseline']:.1f}x"] for r in rows
    ]
    return [
        "### Least-squares weights of a whole model (`obs_reconstruct`)",
        "",
        f"All {first['matrices']} matrices of SmolLM2-135M at 50 %, {first['calibration_tokens']:,}"
        " calibration tokens. `loop`: a Cholesky solve per row (timed on "
        f"{first['loop_rows']} rows of each matrix, times their number); `native`: to "
        f"{first['weight_error_worst']:.0e} of the loop's weights at worst; `default`: as "
        f"`--reconstruct` does. {device_of(rows)}. `benchmarks/bench_reconstruct.py`.",
        "",
        *table(["provider", "seconds", "faster than the loop"], body),
    ]
