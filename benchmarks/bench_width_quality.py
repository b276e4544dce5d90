"""What narrower layers cost in perplexity and bring in size and speed, for every width method, on
the packaged model.

    python benchmarks/bench_width_quality.py --json benchmarks/results/width_quality.json
    python benchmarks/bench_width_quality.py --variants flap wanda-sp --ratios 0.2

Rows are those of `bench_depth_quality.py`, measured in the same way, and like there kept from an
earlier file. One more per ratio is no saved model: SliceGPT in its published form, with a basis per
branch, computed by projecting the residual stream of the dense model; at the width that the stock
form has at this ratio (the matrices that it needs on residual connections are not counted).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import environment
from bench_depth_quality import (
    PROTOCOL,
    RATIOS,
    SEQLEN,
    SMOKE_PROTOCOL,
    TEXTS,
    add_protocol,
    evaluate,
    file_bytes,
    load,
    rates,
)
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel

from pyprune.calibration.configured import configured_tokens
from pyprune.calibration.tokens import Batch
from pyprune.config import CalibrationConfig
from pyprune.depth.graph import ResidualGraph
from pyprune.evaluate import text_ids
from pyprune.packaged import packaged_model_dir
from pyprune.sparse.bench import DENSE
from pyprune.width.config import WidthConfig
from pyprune.width.slicegpt import fitting_width
from pyprune.width.stream import Stream, basis_per_branch, projected_states

PER_BRANCH = "slicegpt, basis per branch"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda-sp": ("wanda-sp", {}),
    "wanda-sp, mlp": ("wanda-sp", {"units": "mlp"}),
    "flap": ("flap", {}),
    "flap, mlp": ("flap", {"units": "mlp"}),
    "flap, no bias": ("flap", {"bias": False}),
    "flap, adaptive": ("flap", {"structure": "adaptive"}),
    "slicegpt": ("slicegpt", {"multiple": 1}),
    "disp-llm": ("disp-llm", {"iterations": 200, "rate": 5e-3}),
    "multipruner": ("multipruner", {}),
}

# In a process of its own: peak memory is then that of this run alone.
CHILD = """
import sys
from pyprune.width.config import WidthConfig
from pyprune.width.run import prune_width_checkpoint
config = WidthConfig.from_yaml(sys.stdin.read())
prune_width_checkpoint(sys.argv[1], sys.argv[2], config)
"""


def prune(folder: Path, config: WidthConfig) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(packaged_model_dir()), str(folder)],
        input=config.to_yaml(), text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    report: dict[str, Any] = json.loads((folder / "pyprune.json").read_text())
    return report


def shown(args: argparse.Namespace, batch_size: int = 8) -> CalibrationConfig:
    return CalibrationConfig(nsamples=args.nsamples, seqlen=args.seqlen, batch_size=batch_size)


def run(
    name: str, ratio: float, dense: PreTrainedModel, args: argparse.Namespace
) -> dict[str, Any]:
    method, options = VARIANTS[name]
    if args.smoke and method == "disp-llm":
        options = {"iterations": 1}
    config = WidthConfig(
        method, ratio=ratio, method_options=options, device=args.device, dtype="float32",
        # An iteration of DISP-LLM trains on one batch: one sequence, as published.
        calibration=shown(args, 1 if method == "disp-llm" else 8),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "pruned"
        report = prune(folder, config)
        pruned = load(folder, args.device)
        parameters = report["parameters"]
        return {
            "sizes": report["decision"]["sizes"],
            "options": options,
            "parameters": parameters["after"],
            "zeros": parameters["zeros"],
            "removed_share": parameters["removed_share"],
            "realised_share": parameters["realised_share"],
            "file_bytes": file_bytes(folder),
            "seconds": report["run"]["seconds"]["total"],
            "peak_memory_bytes": report["run"]["peak_rss_bytes"],
            "calibration_sha256": report["calibration"]["sha256"],
            "perplexity": evaluate(folder, args),
            **rates(dense, pruned, SMOKE_PROTOCOL if args.smoke else PROTOCOL),
        }


@torch.no_grad()
def per_branch(ratio: float, dense: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    stream = Stream.of(dense)
    graph = ResidualGraph.of(dense)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model_dir())
    width = fitting_width(stream, (1 - ratio) * sum(p.numel() for p in dense.parameters()), 1)
    tokens = configured_tokens(tokenizer, shown(args), dense.config)
    batches = [Batch(b.input_ids.to(graph.device), b.attention_mask) for b in tokens.batches]
    bases = basis_per_branch(graph, batches, width)
    found = {}
    for text in TEXTS:
        ids = text_ids(text, tokenizer, args.tokens).to(graph.device)
        losses = []
        for window in ids[: len(ids) // SEQLEN * SEQLEN].view(-1, 1, SEQLEN):
            states = projected_states(graph, Batch(window), bases)
            logits = graph.logits(graph.finish(states, Batch(window)), window)
            losses.append(F.cross_entropy(logits[0, :-1], window[0, 1:]))
        ppl = float(torch.stack(losses).mean().exp())
        found[text] = {"ppl": ppl, "tokens": len(losses) * (SEQLEN - 1), "seqlen": SEQLEN,
                       "dtype": "float32"}  # fmt: skip
    return {"sizes": {"hidden_size": [stream.width, width]}, "perplexity": found}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "ratio", *TEXTS, "removed", "realised", "MB", "prefill x", "decode x",
                  "s")  # fmt: skip
    for row in rows:
        texts = [f"{row['perplexity'][t]['ppl']:.2f}" for t in TEXTS]
        cells = [row["variant"], f"{row['ratio']:.0%}", *texts]
        if "removed_share" in row:
            cells += [f"{row[k]:.1%}" for k in ("removed_share", "realised_share")]
            cells += [f"{row['file_bytes'] / 1e6:,.0f}"]
            cells += [f"{row[phase]['over_dense']:.2f}" for phase in ("prefill", "decode")]
            cells += [f"{row['seconds']:.0f}"]
        table.add_row(*cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two variants, a few tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    names = [*VARIANTS, PER_BRANCH]
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    add_protocol(parser)
    args = parser.parse_args()
    if args.smoke:
        args.variants, args.ratios = ["wanda-sp", "disp-llm"], [0.1]
        args.nsamples, args.seqlen, args.tokens = 2, 32, SEQLEN
    rows: list[dict[str, Any]] = []
    if args.json is not None and args.json.exists() and not args.smoke:
        rows = json.loads(args.json.read_text())
    done = {(row["variant"], row["ratio"]) for row in rows}
    dense = load(packaged_model_dir(), args.device)
    common = {**environment(args.device), "calibration_tokens": args.nsamples * args.seqlen}
    if (DENSE, 0.0) not in done:
        perplexity = evaluate(packaged_model_dir(), args)
        rows.append({"variant": DENSE, "ratio": 0.0, "perplexity": perplexity, **common})
    for ratio in sorted(args.ratios):
        for name in args.variants:
            if (name, ratio) in done:
                continue
            if name == PER_BRANCH:
                row = per_branch(ratio, dense, args)
            else:
                row = run(name, ratio, dense, args)
            rows.append({"variant": name, "ratio": ratio, **row, **common})
            if args.json is not None:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
