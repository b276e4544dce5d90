"""One shot of LLM Surgeon on the packaged model (`--smoke`: a tiny random one).

    python benchmarks/bench_surgeon.py --nsamples 128 --seqlen 2048 --json surgeon.json

forward_backward: the loss's forward and backward by plain autograd, weight gradients included, the
    time a shot is compared with.
activation_gradients: the pass that ours stands on, with statistics of nothing.
element, rows-columns: a whole shot of ours, to 10 %; the share of it that is costs, threshold and
    update is given.
reference: what the authors' code does before its update: weight gradients made and dropped, full
    products for A of every module and for G, eigendecompositions of all damped factors, the
    inverses and costs from them. Its update is left out.

All run on the same weights and tokens in turns. What follows the factors does not depend on the
number of tokens: its share falls with more text.
"""

from __future__ import annotations

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _harness import environment, parse, ratio
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pyprune.calibration.backward import backward_pass
from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import TokenSet, calibration_tokens
from pyprune.config import PruneConfig
from pyprune.measure import Measure
from pyprune.models.adapter import Adapter
from pyprune.surgeon.run import Surgeon

BASELINE = "forward_backward"
AFTER = ("costs", "threshold", "update")
DAMPING = 0.01
MOST_REPETITIONS = 3


def build(args: Namespace) -> tuple[Any, TokenSet]:
    torch.manual_seed(0)
    if args.smoke:
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        ids = torch.randint(0, 128, (2, 32))
        return LlamaForCausalLM(config).eval(), as_token_set([ids], vocabulary=128, positions=None)
    from pyprune.packaged import packaged_model_dir

    folder = packaged_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
    tokens = calibration_tokens(
        "wiki", AutoTokenizer.from_pretrained(folder), nsamples=args.nsamples,
        seqlen=args.seqlen, seed=0, batch_size=1,
    )  # fmt: skip
    return model.eval(), tokens


def linears(model: Any) -> list[Any]:
    adapter = Adapter.of(model)
    return [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]


def autograd(model: Any, tokens: TokenSet) -> None:
    """Sequence by sequence; every matrix's gradient is made, and dropped."""
    weights = [getattr(ref.module, ref.parameter) for ref in linears(model)]
    for p in model.parameters():
        p.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    for batch in tokens.batches:
        ids = batch.input_ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for weight in weights:
            weight.grad = None


def activation_gradients(model: Any, tokens: TokenSet, device: str) -> None:
    visitors = {ref.name: lambda sample: None for ref in linears(model)}
    backward_pass(Adapter.of(model), tokens.batches, visitors, device=device)


def reference(model: Any, tokens: TokenSet) -> float:
    """The sum of all costs, so that nothing is made for nothing."""
    refs = linears(model)
    factors: dict[str, list[torch.Tensor]] = {}
    handles = []
    for ref in refs:
        rows, columns = ref.weight().shape
        device = ref.weight().device
        factors[ref.name] = [torch.zeros(n, n, device=device) for n in (columns, rows)]

        def hook(_: Any, args: Any, output: torch.Tensor, name: str = ref.name) -> None:
            x = args[0].detach().flatten(0, 1)

            def arrived(g: torch.Tensor) -> None:
                scale = 1 / tokens.tokens
                factors[name][0] += torch.einsum("bu,bv->uv", x * scale, x)
                flat = g.flatten(0, 1)
                factors[name][1] += torch.einsum("bu,bv->uv", flat * scale, flat)

            output.register_hook(arrived)

        handles.append(ref.module.register_forward_hook(hook))
    try:
        autograd(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    total = 0.0
    for ref in refs:
        w = ref.weight()
        inverses = []
        for h in factors[ref.name]:
            h.diagonal().add_(DAMPING * h.diagonal().mean())
            values, vectors = torch.linalg.eigh(h)
            inverses.append((vectors / values) @ vectors.T)
        a, g = factors[ref.name]
        total += float(((w @ a) * w).sum(1).div(inverses[1].diagonal()).sum())
        total += float(((g @ w) * w).sum(0).div(inverses[0].diagonal()).sum())
    return total


def shot(model: Any, tokens: TokenSet, structure: str, device: str) -> dict[str, float]:
    """Seconds by phase."""
    own = {"structure": structure, "shots": 1, "factor_memory": 64.0}
    config = PruneConfig(method="llm-surgeon", sparsity=0.1, method_options=own)
    measure = Measure()
    Surgeon(config, Adapter.of(model), tokens, device=torch.device(device), measure=measure).run()
    return measure.seconds


def timed(
    model: Any, tokens: TokenSet, args: Namespace
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, float]]]]:
    dense = {key: t.clone() for key, t in model.state_dict().items()}
    providers: dict[str, Callable[[], Any]] = {
        "forward_backward": lambda: autograd(model, tokens),
        "activation_gradients": lambda: activation_gradients(model, tokens, args.device),
        "element": lambda: shot(model, tokens, "element", args.device),
        "rows-columns": lambda: shot(model, tokens, "rows-columns", args.device),
        "reference": lambda: reference(model, tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    phases: dict[str, list[dict[str, float]]] = {}
    for _ in range(1 if args.smoke else min(args.repetitions, MOST_REPETITIONS)):
        for name, provider in providers.items():
            model.load_state_dict(dense)
            start = time.perf_counter()
            result = provider()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            if isinstance(result, dict):
                phases.setdefault(name, []).append(result)
    return seconds, phases


def rows(args: Namespace) -> list[dict[str, Any]]:
    model, tokens = build(args)
    seconds, phases = timed(model, tokens, args)
    made = []
    for name, taken in seconds.items():
        row = {
            "op": "surgeon_shot",
            "provider": name,
            "model": "random" if args.smoke else "packaged",
            "tokens": tokens.tokens,
            "sequences": tokens.nsamples,
            "seconds_median": statistics.median(taken),
            "seconds_min": min(taken),
            "seconds_max": max(taken),
            "repetitions": len(taken),
            "baseline": BASELINE,
            "ratio_to_baseline": ratio(taken, seconds[BASELINE]),
            "ratio_to_activation_gradients": ratio(taken, seconds["activation_gradients"]),
            **environment(args.device),
        }
        if name in phases:
            parts = {
                phase: statistics.median(p.get(phase, 0.0) for p in phases[name])
                for phase in ("factors", *AFTER)
            }
            row["seconds_by_phase"] = parts
            row["share_after_factors"] = sum(parts[p] for p in AFTER) / sum(parts.values())
        made.append(row)
    return made


def show(made: list[dict[str, Any]]) -> None:
    first = made[0]
    table = Table(
        title=f"LLM Surgeon, one shot: {first['model']} model, {first['tokens']} tokens",
        title_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    for header in ("median s", "min", "max", f"time / {BASELINE}", "/ activation_gradients",
                   "costs, threshold, update"):  # fmt: skip
        table.add_column(header, justify="right")
    for row in made:
        share = row.get("share_after_factors")
        table.add_row(
            row["provider"],
            *(f"{row[f'seconds_{k}']:.2f}" for k in ("median", "min", "max")),
            f"{row['ratio_to_baseline']:.2f}",
            f"{row['ratio_to_activation_gradients']:.2f}",
            "-" if share is None else f"{share:.0%}",
        )
    Console(width=120).print(table)


def main() -> None:
    args = parse(
        __doc__,
        nsamples={"type": int, "default": 16},
        seqlen={"type": int, "default": 512},
    )
    made = rows(args)
    show(made)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
