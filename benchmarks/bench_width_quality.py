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
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _structure import SEQLEN, TEXTS, Row, measure_all, parse, prune_and_measure, shown
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from pyprune.calibration.configured import configured_tokens
from pyprune.calibration.tokens import Batch
from pyprune.depth.graph import ResidualGraph
from pyprune.errors import UserError
from pyprune.evaluate import text_ids
from pyprune.packaged import packaged_model_dir
from pyprune.width.config import WidthConfig
from pyprune.width.run import prune_width_checkpoint
from pyprune.width.slicegpt import fitting_width
from pyprune.width.stream import Stream, StreamGram, projected, projected_states

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
    "multipruner, compensate": ("multipruner", {"compensate": True}),
    "multipruner, refit": ("multipruner", {"refit": True}),
    "llm-surgeon-width": ("llm-surgeon-width", {}),
}


def configuration(name: str, ratio: float, args: argparse.Namespace) -> WidthConfig:
    method, options = VARIANTS[name]
    if args.smoke and method == "disp-llm":
        options = {"iterations": 1}
    return WidthConfig(
        method, ratio=ratio, method_options=options, device=args.device, dtype="float32",
        # An iteration of DISP-LLM trains on one batch: one sequence, as published.
        calibration=shown(args, 1 if method == "disp-llm" else 8),
    )  # fmt: skip


def own(report: Row, _pruned: PreTrainedModel) -> Row:
    return {
        "sizes": report["decision"]["sizes"],
        "options": report["config"]["method_options"],
    }


@torch.no_grad()
def basis_per_branch(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    count: int,
    normalised: bool = True,
    centred: bool = False,
) -> list[Tensor]:
    """A basis in front of every branch and of the final norm, each from a stream that the earlier
    ones have sliced already (SliceGPT's own form; it needs a matrix on every residual connection,
    which no stock model has). The branches of a parallel layer have one together."""
    running = [(batch, *graph.start(batch)) for batch in batches]
    bases: list[Tensor] = []
    for branch in [*graph.branches, None]:
        if branch is not None and graph.second_of_parallel(branch):
            bases.append(bases[-1])
        else:
            found = StreamGram(running[0][1].total.shape[-1], normalised, centred)
            for batch, state, _ in running:
                found.add(state.total, batch)
            bases.append(found.basis(count))
        running = [(b, projected(s, bases[-1]), c) for b, s, c in running]
        if branch is not None:
            running = [(b, graph.run(branch, s, c), c) for b, s, c in running]
    return bases


@torch.no_grad()
def per_branch(ratio: float, dense: PreTrainedModel, args: argparse.Namespace) -> Row:
    stream = Stream.of(dense)
    graph = ResidualGraph.of(dense)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model_dir())
    width = fitting_width(stream, (1 - ratio) * sum(p.numel() for p in dense.parameters()), 1)
    tokens = configured_tokens(tokenizer, shown(args), dense.config)
    batches = [b.to(graph.device) for b in tokens.batches]
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


def main() -> None:
    args = parse(__doc__, [*VARIANTS, PER_BRANCH], smoke=["disp-llm"])

    def measure(name: str, ratio: float, dense: PreTrainedModel) -> Row:
        if name == PER_BRANCH:
            try:
                return per_branch(ratio, dense, args)
            except UserError as error:  # no stream is narrow enough
                return {"impossible": str(error)}
        tries = [configuration(name, ratio, args)]
        return prune_and_measure(prune_width_checkpoint, tries, dense, args, own)

    measure_all(args, measure)


if __name__ == "__main__":
    main()
