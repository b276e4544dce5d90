"""BlockPruner's search three ways on the packaged model: naive, exact and fast.

    python benchmarks/bench_blockpruner.py
    python benchmarks/bench_blockpruner.py --count 12 --nsamples 8 --json blockpruner.json

naive: a forward of the whole model for every candidate, as published.
exact: one sweep a round, from cached states (`pyprune.depth.walkdown`); it must remove the same
branches in the same order, which is asserted, with the same scores to 1e-4.
fast: lazy greedy after successive halving; its list may differ, its perplexity is given.

All run on the same model and tokens in turns. Time is also given without the head: for naive what
its forwards spend in the decoder, for exact and fast everything but what they spend on scoring.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _harness import environment, parse, ratio, write_rows
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.configured import configured_tokens
from pyprune.calibration.tokens import TokenSet
from pyprune.config import CalibrationConfig
from pyprune.depth.config import StructureConfig
from pyprune.depth.decision import DepthDecision
from pyprune.depth.registry import run_search
from pyprune.depth.score import Scorer
from pyprune.models.adapter import Adapter

MODES = ("naive", "exact", "fast")
TOLERANCE = 1e-4  # of scores, relative
Sample = dict[str, float]  # seconds, and those without the head


def build(args: Namespace) -> tuple[Any, TokenSet]:
    if args.smoke:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
        model = LlamaForCausalLM(config).eval()
        batches = list(torch.randint(0, 256, (4, 2, 16)))
        return model, as_token_set(batches, vocabulary=256, positions=None)
    from pyprune.packaged import packaged_model_dir

    folder = packaged_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
    wanted = CalibrationConfig(nsamples=args.nsamples, seqlen=args.seqlen, batch_size=args.batch)
    tokens = configured_tokens(AutoTokenizer.from_pretrained(folder), wanted, model.config)
    return model.eval(), tokens


class Clock:
    """Seconds spent inside some calls."""

    def __init__(self, device: str) -> None:
        self.seconds, self._device = 0.0, device

    def now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += self.now() - started

        return timed


@contextmanager
def timed(holder: Any, name: str, clock: Clock) -> Iterator[None]:
    own = getattr(holder, name)
    setattr(holder, name, clock.around(own))
    try:
        yield
    finally:
        setattr(holder, name, own)


def search(
    model: Any, tokens: TokenSet, mode: str, args: Namespace
) -> tuple[DepthDecision, Sample]:
    config = StructureConfig("blockpruner", count=args.count, method_options={"mode": mode})
    adapter = Adapter.of(model)
    clock = Clock(args.device)
    # Of naive's time the decoder's counts, of the others' all but that of scoring.
    inside = (adapter.decoder, "forward") if mode == "naive" else (Scorer, "rows")
    started = clock.now()
    with timed(*inside, clock):
        decision = run_search(model, adapter, tokens, config)
    seconds = clock.now() - started
    body = clock.seconds if mode == "naive" else seconds - clock.seconds
    return decision, {"seconds": seconds, "without_head": body}


def check(decisions: dict[str, DepthDecision]) -> None:
    naive, exact = decisions["naive"], decisions["exact"]
    if exact.removed != naive.removed:
        raise AssertionError(f"exact removed {exact.removed}, naive {naive.removed}")
    for a, b in zip(exact.steps, naive.steps, strict=True):
        for name, score in a.candidates.items():
            if abs(score - b.candidates[name]) > TOLERANCE * abs(b.candidates[name]):
                raise AssertionError(f"{name}: exact {score}, naive {b.candidates[name]}")


def rows(args: Namespace) -> list[dict[str, Any]]:
    model, tokens = build(args)
    samples: dict[str, list[Sample]] = {mode: [] for mode in MODES}
    decisions: dict[str, DepthDecision] = {}
    for _ in range(1 if args.smoke else args.repetitions):
        for mode in MODES:
            decisions[mode], sample = search(model, tokens, mode, args)
            samples[mode].append(sample)
        check(decisions)
    made = []
    for mode, taken in samples.items():
        decision = decisions[mode]
        row: dict[str, Any] = {
            "op": "blockpruner",
            "provider": mode,
            "layers": decision.layers,
            "removed": [str(branch) for branch in decision.removed],
            "calibration_tokens": tokens.tokens,
            "evaluations": decision.evaluations,
            "dense": decision.dense,
            "perplexity": decision.steps[-1].score,
            "perplexity_over_naive": decision.steps[-1].score / decisions["naive"].steps[-1].score,
            "repetitions": len(taken),
        }
        for key in ("seconds", "without_head"):
            found = [sample[key] for sample in taken]
            base = [sample[key] for sample in samples["naive"]]
            row |= {
                f"{key}_median": statistics.median(found),
                f"{key}_min": min(found),
                f"{key}_max": max(found),
                f"{key}_naive_over_this": ratio(base, found),
            }
        made.append({**row, **environment(args.device)})
    return made


def show(made: list[dict[str, Any]]) -> None:
    first = made[0]
    table = Table(
        title=f"BlockPruner: {len(first['removed'])} of {2 * first['layers']} branches, "
        f"{first['calibration_tokens']:,} tokens; exact removes what naive does",
        title_justify="left",
        box=box.SIMPLE,
    )
    headers = ("mode", "evaluations", "median s", "naive / this", "without head s",
               "naive / this", "perplexity", "/ naive")  # fmt: skip
    for header in headers:
        table.add_column(header, justify="left" if header == "mode" else "right")
    for row in made:
        table.add_row(
            row["provider"],
            str(row["evaluations"]),
            f"{row['seconds_median']:.2f}",
            f"{row['seconds_naive_over_this']:.2f}",
            f"{row['without_head_median']:.2f}",
            f"{row['without_head_naive_over_this']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_over_naive']:.4f}",
        )
    Console(width=110).print(table)


def main() -> None:
    args = parse(
        __doc__,
        repetitions=1,  # three searches are some 6 minutes on two cores, naive most of it
        count={"type": int, "default": 6, "help": "branches to remove"},
        nsamples={"type": int, "default": 1},
        seqlen={"type": int, "default": 256},
        batch={"type": int, "default": 1, "help": "sequences in a batch"},
    )
    if args.smoke:
        args.count = 3
    made = rows(args)
    show(made)
    write_rows(args.json, made)


if __name__ == "__main__":
    main()
