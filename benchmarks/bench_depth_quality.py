"""What removing branches and layers costs in perplexity and brings in size and speed, for every
method, on the packaged model.

    python benchmarks/bench_depth_quality.py --json benchmarks/results/depth_quality.json
    python benchmarks/bench_depth_quality.py --variants blockpruner shortgpt --ratios 0.2

Every row: perplexity on two texts (evaluated in bfloat16 unless --dtype says
otherwise), parameters, bytes of the weights on disk, and tokens per second in float32 in prefill
and decoding, the dense model taking turns with the pruned one. Calibration is the same for all.
Rows already in the JSON file are kept, so that an interrupted run goes on where it stopped.
Searches continue from one ratio to the next: a greedy list is, but for its end, a prefix of a
longer one. Add-ons and other ways of saving continue from the plain variant's search and take only
their own time; --states DIR keeps the searches, so that rows can be made in several runs.
--rates-only times the rows of the JSON file again, on random weights, for an idle moment. --again
makes its rows again, all of them that --variants and --ratios name, and keeps the speeds of those
whose shape stays.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _structure import Row, measure_all, parse, prune_and_measure, shown
from transformers import PreTrainedModel

from pyprune.depth.config import StructureConfig
from pyprune.depth.registry import DEPTH_METHODS
from pyprune.depth.run import prune_structure_checkpoint

# Similarities that LaCo accepts a fold at: the highest that reaches the target.
THRESHOLDS = (0.85, 0.75, 0.65, 0.55, 0.45, 0.3, 0.0, -1.0)


@dataclass(frozen=True)
class Variant:
    """method, and what is not as by default. searched: whether it continues from a state file."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    fill: str = "packed"
    searched: bool = False


FAST = {"mode": "fast"}
GREEDY = {**FAST, "refine": "none"}
PUBLISHED = {**FAST, "compare": "score"}
NOT_THE_LAST = {"fold": 2, "highest": 26}
VARIANTS: dict[str, Variant] = {
    **{name: Variant(name) for name in DEPTH_METHODS.load()},
    "blockpruner": Variant("blockpruner", FAST, searched=True),
    "blockpruner, greedy": Variant("blockpruner", GREEDY, searched=True),
    "blockpruner, published": Variant("blockpruner", PUBLISHED, searched=True),
    "blockpruner, zeros": Variant("blockpruner", FAST, fill="zeros", searched=True),
    "sleb": Variant("sleb", FAST, searched=True),
    "blockpruner, compensate": Variant("blockpruner", {**FAST, "compensate": True}, searched=True),
    "blockpruner, refit": Variant("blockpruner", {**FAST, "refit": True}, searched=True),
    "sleb, refit": Variant("sleb", {**FAST, "refit": True}, searched=True),
    "llm-drop, mixed": Variant("llm-drop", {"blocks": "mixed"}),
    "shortgpt, compensate": Variant("shortgpt", {"compensate": True}),
    "shortgpt, refit": Variant("shortgpt", {"refit": True}),
    "laco": Variant("laco", {"fold": 3}),
    "laco, compensate": Variant("laco", {"fold": 3, "compensate": True}),
    "laco, refit": Variant("laco", {"fold": 3, "refit": True}),
    "laco, not the last": Variant("laco", NOT_THE_LAST),
    "laco, not the last, compensate": Variant("laco", {**NOT_THE_LAST, "compensate": True}),
    "laco, not the last, refit": Variant("laco", {**NOT_THE_LAST, "refit": True}),
    "llm-streamline, compensate": Variant("llm-streamline", {"compensate": True}),
    "llm-streamline, refit": Variant("llm-streamline", {"refit": True}),
    "llm-streamline, untrained": Variant("llm-streamline", {"epochs": 0}),
    "llm-streamline, untrained, refit": Variant("llm-streamline", {"epochs": 0, "refit": True}),
}


def configurations(
    variant: Variant, ratio: float, args: argparse.Namespace, states: Path
) -> Iterator[StructureConfig]:
    """To be tried one after the other."""
    options = dict(variant.options)
    if variant.searched:
        of = [options[name] for name in ("compare", "refine") if name in options]
        options["state"] = str(states / f"{'-'.join([variant.method, *of])}.json")
    tries = [options]
    if variant.method == "laco":
        tries = [{**options, "threshold": threshold} for threshold in THRESHOLDS]
    for given in tries:
        yield StructureConfig(
            variant.method, ratio=ratio, fill=variant.fill, method_options=given,
            device=args.device, dtype="float32",
            # What trains takes a step a batch.
            calibration=shown(args, 1 if variant.method == "llm-streamline" else 8),
        )  # fmt: skip


def own(report: Row, pruned: PreTrainedModel) -> Row:
    return {
        "steps": len(report["decision"]["steps"]),
        "removed": [step["unit"] for step in report["decision"]["steps"]],
        "layers": pruned.config.num_hidden_layers,
        "score": report["decision"]["steps"][-1]["score"],
        "refinement": report["decision"]["refinement"],
        "options": {k: v for k, v in report["config"]["method_options"].items() if k != "state"},
    }


def with_states(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--states", type=Path, metavar="DIR", help="where searches are kept")


def main() -> None:
    args = parse(__doc__, VARIANTS, smoke=["llm-drop"], more=with_states)
    with tempfile.TemporaryDirectory() as passing:
        states = args.states or Path(passing)
        states.mkdir(parents=True, exist_ok=True)

        def measure(name: str, ratio: float, dense: PreTrainedModel) -> Row:
            tries = configurations(VARIANTS[name], ratio, args, states)
            return prune_and_measure(prune_structure_checkpoint, tries, dense, args, own)

        measure_all(args, measure)


if __name__ == "__main__":
    main()
