"""How far layer-wise methods are from exact greedy OBS, on sampled rows of the packaged model.

    python benchmarks/bench_exactobs.py --json exactobs.json
    python benchmarks/bench_exactobs.py --blocks 0 14 29 --rows 64 --patterns 0.7

A row for every matrix of the chosen blocks and pattern, with the inputs of the dense model: each
method's layer error over that of ExactOBS, the same with the best weights for its mask, and the
share of ExactOBS's removals that it makes too (`methods.oracle.gap_to_exact`).
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch
from _harness import environment, parse, write_rows
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune.calibration.stats import GramStatistic
from pyprune.calibration.tokens import calibration_tokens
from pyprune.calibration.walk import Group, InMemoryStore, walk
from pyprune.layer_pruner import layer_inputs
from pyprune.methods.oracle import gap_to_exact
from pyprune.models.adapter import Adapter
from pyprune.packaged import packaged_model_dir
from pyprune.patterns import Pattern, Unstructured, parse_nm

METHODS = ("magnitude", "wanda", "sparsegpt")


def pattern_of(text: str) -> Pattern:
    return parse_nm(text) if ":" in text else Unstructured(float(text))


def main() -> None:
    args = parse(
        __doc__,
        blocks={"type": int, "nargs": "+", "default": [0, 10, 20, 29]},
        rows={"type": int, "default": 32, "help": "sampled of each matrix"},
        patterns={"nargs": "+", "default": ["0.5", "2:4"]},
        nsamples={"type": int, "default": 16},
        seqlen={"type": int, "default": 512},
    )
    if args.smoke:
        args.blocks, args.rows, args.nsamples, args.seqlen = [0], 1, 2, 64
        args.patterns = ["2:4"]
    folder = packaged_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = calibration_tokens(
        "wiki", AutoTokenizer.from_pretrained(folder), nsamples=args.nsamples, seqlen=args.seqlen,
        seed=0, batch_size=8, padding="windows", bos=None,
    )  # fmt: skip
    whole = Adapter.of(model)
    names = {ref.name for i in args.blocks for ref in whole.linears(i)}
    if args.smoke:
        names = {name for name in names if name.endswith("k_proj")}
    made: list[dict[str, Any]] = []

    def measure(group: Group) -> None:
        """Nothing is pruned: later layers see the dense model's outputs."""
        inputs = layer_inputs(group.statistic, group.linears[0].name)
        assert inputs is not None
        for ref in group.linears:
            if ref.name not in names:
                continue
            for text in args.patterns:
                gaps = gap_to_exact(ref.weight(), inputs, pattern_of(text), METHODS, rows=args.rows)
                made.extend(
                    {
                        "op": "exactobs",
                        "layer": ref.name,
                        "shape": list(ref.weight().shape),
                        "rows": min(args.rows, len(ref.weight())),
                        "pattern": text,
                        "method": method,
                        **asdict(gap),
                        "calibration_tokens": tokens.tokens,
                        **environment(args.device),
                    }
                    for method, gap in gaps.items()
                )

    adapter = whole.restricted(names)
    with InMemoryStore(adapter, args.device) as store:
        walk(
            adapter, tokens.batches, statistic=GramStatistic, prune_group=measure, store=store,
            device=args.device,
        )  # fmt: skip
    show(made)
    write_rows(args.json, made)


def show(made: list[dict[str, Any]]) -> None:
    table = Table(title="layer error / ExactOBS's, median (largest) over the matrices",
                  title_justify="left", box=box.SIMPLE)  # fmt: skip
    for header in ("pattern", "method", "as it is", "best weights for its mask", "same removals"):
        table.add_column(header, justify="right")
    for key in dict.fromkeys((row["pattern"], row["method"]) for row in made):
        mine = [row for row in made if (row["pattern"], row["method"]) == key]
        cells = [
            f"{statistics.median(r[name] for r in mine):.3f} ({max(r[name] for r in mine):.3f})"
            for name in ("error", "mask_error")
        ]
        same = statistics.median(r["agreement"] for r in mine)
        table.add_row(*key, *cells, f"{same:.1%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
