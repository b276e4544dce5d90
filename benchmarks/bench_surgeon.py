"""One shot of LLM Surgeon on the packaged model (`--smoke`: a tiny random one).

    python benchmarks/bench_surgeon.py --json surgeon.json
    python benchmarks/bench_surgeon.py --nsamples 16 --turns 2 --shots element 2:4

forward_backward: the loss's forward and backward by plain autograd, weight gradients included, the
    time a shot is compared with.
activation_gradients: the pass that ours stands on, with statistics of nothing.
element, 2:4, rows-columns (`--shots`): a whole shot of ours, to 50 %, 2:4 and 10 %; the share of it
    that is costs, threshold and update is given.
reference: what the authors' code does before its update: weight gradients made and dropped, full
    products for A of every module and for G, eigendecompositions of all damped factors, the
    inverses and costs from them, these of `--reference-blocks` blocks and multiplied up to all. Its
    update is left out.

All run on the same weights and tokens in turns (`--turns`; --repetitions is not used). The passes
take time in proportion to the tokens, and what follows the factors does not depend on their number:
so the times measured at a few tokens also say how a shot compares at more, and from how many tokens
on it takes at most 2.5 times the forward and backward, and what follows the factors at most a
quarter of it. By default that is 2,048 tokens and one turn, less than four minutes on two threads.
"""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _harness import environment, gemm_rate, parse, time_turns, write_rows
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pyprune.calibration.backward import PassOptions, backward_pass
from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import TokenSet, calibration_tokens
from pyprune.config import PruneConfig
from pyprune.measure import Measure
from pyprune.models.adapter import Adapter
from pyprune.ops.kron_multipliers import has_fast_bfloat16
from pyprune.surgeon.run import Surgeon

BASELINE = "forward_backward"
AFTER = ("costs", "threshold", "update")
DAMPING = 0.01
# Bars: a shot over forward and backward, and what follows the factors over the shot.
RATIO, SHARE = 2.5, 0.25
# Tokens at which shots are compared besides those measured: 16 x 512, and the paper's 128 x 2048.
AT = (8192, 262144)
SHOTS: dict[str, dict[str, Any]] = {
    "element": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "rows-columns": {"sparsity": 0.1, "structure": "rows-columns"},
}


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
    backward_pass(Adapter.of(model), tokens.batches, visitors, PassOptions(device=device))


def reference(model: Any, tokens: TokenSet, blocks: int) -> dict[str, float]:
    """Seconds by phase, those after the factors of all blocks as `blocks` of them take."""
    start = time.perf_counter()
    factors = reference_factors(model, tokens)
    made = time.perf_counter()
    every, total = linears(model), 0.0
    adapter = Adapter.of(model)
    some = every[: sum(len(adapter.linears(i)) for i in range(min(blocks, len(adapter.blocks))))]
    for ref in some:
        w = ref.weight()
        inverses = []
        for h in factors[ref.name]:
            h.diagonal().add_(DAMPING * h.diagonal().mean())
            values, vectors = torch.linalg.eigh(h)
            inverses.append((vectors / values) @ vectors.T)
        a, g = factors[ref.name]
        total += float(((w @ a) * w).sum(1).div(inverses[1].diagonal()).sum())
        total += float(((g @ w) * w).sum(0).div(inverses[0].diagonal()).sum())
    if not math.isfinite(total):
        raise SystemExit(f"reference: expected finite costs, got {total}")
    after = (time.perf_counter() - made) * len(every) / len(some)
    return {"factors": made - start, "costs": after}


def reference_factors(model: Any, tokens: TokenSet) -> dict[str, list[torch.Tensor]]:
    """A and G of every module, full products of each."""
    factors: dict[str, list[torch.Tensor]] = {}
    handles = []
    for ref in linears(model):
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
    return factors


def shot(model: Any, tokens: TokenSet, name: str, device: str) -> dict[str, Any]:
    """Seconds by phase, and what the updates report of themselves."""
    asked = dict(SHOTS[name])
    own = {"shots": 1, "factor_memory": 64.0}
    if "structure" in asked:
        own["structure"] = asked.pop("structure")
    config = PruneConfig(method="llm-surgeon", method_options=own, **asked)
    measure = Measure()
    surgeon = Surgeon(
        config, Adapter.of(model), tokens, device=torch.device(device), measure=measure
    )
    layers = surgeon.run()
    made: dict[str, Any] = dict(measure.seconds)
    steps = [layer for layer in layers if layer.iterations is not None]
    if steps:
        made["iterations_mean"] = statistics.mean(layer.iterations for layer in steps)
        made["gap_max"] = max(layer.gap for layer in steps)
        # The image of each direction, and of what is answered or started from.
        made["update_flops"] = sum(
            2 * (layer.iterations + 1) * layer.elements * sum(layer.shape) for layer in steps
        )
    return made


def timed(
    model: Any, tokens: TokenSet, args: Namespace
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, float]]]]:
    dense = {key: t.clone() for key, t in model.state_dict().items()}
    phases: dict[str, list[dict[str, float]]] = {}

    def provider(name: str) -> Callable[[int], None]:
        def run(turn: int) -> None:
            if name == "forward_backward":
                autograd(model, tokens)
            elif name == "activation_gradients":
                activation_gradients(model, tokens, args.device)
            elif name == "reference":
                found = reference(model, tokens, args.reference_blocks)
                phases.setdefault(name, []).append(found)
            else:
                phases.setdefault(name, []).append(shot(model, tokens, name, args.device))
                model.load_state_dict(dense)

        return run

    names = (BASELINE, "activation_gradients", *args.shots, "reference")
    seconds = time_turns(
        {name: provider(name) for name in names}, args.device, 1 if args.smoke else args.turns
    )
    # Its costs are those of some blocks: the phases say what all of them take.
    seconds["reference"] = [sum(found.values()) for found in phases["reference"]]
    return seconds, phases


def rows(args: Namespace) -> list[dict[str, Any]]:
    model, tokens = build(args)
    seconds, phases = timed(model, tokens, args)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    rate = medians[BASELINE] / tokens.tokens
    made = []
    for name, taken in seconds.items():
        row = {
            "op": "surgeon_shot",
            "provider": name,
            "model": "random" if args.smoke else "packaged",
            "target": SHOTS.get(name),
            "tokens": tokens.tokens,
            "sequences": tokens.nsamples,
            "seconds_median": medians[name],
            "seconds_min": min(taken),
            "seconds_max": max(taken),
            "repetitions": len(taken),
            "baseline": BASELINE,
            "ratio_to_baseline": medians[name] / medians[BASELINE],
            "ratio_to_activation_gradients": medians[name] / medians["activation_gradients"],
            **environment(args.device),
        }
        if name in phases:
            row |= parts(phases[name], tokens.tokens, rate)
        if name == "reference":
            row["costs_of_blocks"] = args.reference_blocks
        if "update_flops" in row:
            products = gemm_rate(args.device, update_dtype(args), args.smoke, widened=False)
            floor = row["update_flops"] / products
            row["update_floor_seconds"] = floor
            row["update_share_of_floor"] = floor / row["seconds_by_phase"]["update"]
        made.append(row)
    return made


def update_dtype(args: Namespace) -> torch.dtype:
    """Of the fastest products that the update takes."""
    fast = has_fast_bfloat16(torch.empty(0, device=args.device))
    return torch.bfloat16 if fast else torch.float32


def parts(found: list[dict[str, Any]], tokens: int, rate: float) -> dict[str, Any]:
    """What the phases of a shot say of it at any number of tokens. rate: seconds of forward and
    backward per token."""
    by_phase = {
        phase: statistics.median(p.get(phase, 0.0) for p in found) for phase in ("factors", *AFTER)
    }
    after, own = sum(by_phase[phase] for phase in AFTER), by_phase["factors"] / tokens
    more = RATIO * rate - own
    kept = ("iterations_mean", "gap_max", "update_flops")
    extra = {key: found[-1][key] for key in kept if key in found[-1]}
    return {
        "seconds_by_phase": by_phase,
        "share_after_factors": after / (after + by_phase["factors"]),
        "projected": {
            str(n): {
                "ratio_to_baseline": (after + n * own) / (n * rate),
                "share_after_factors": after / (after + n * own),
            }
            for n in AT
        },
        # None: with no number of tokens.
        "tokens_for_ratio_bar": math.ceil(after / more) if more > 0 else None,
        "tokens_for_share_bar": math.ceil((1 / SHARE - 1) * after / own),
        **extra,
    }


def bar_ratio(row: dict[str, Any]) -> str:
    tokens = row["tokens_for_ratio_bar"]
    return "never" if tokens is None else f"{tokens:,}"


def show(made: list[dict[str, Any]]) -> None:
    first = made[0]
    table = Table(
        title=f"LLM Surgeon, one shot: {first['model']} model, {first['tokens']} tokens",
        title_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    headers = ["median s", "/ forward,\nbackward", "/ gradients\nalone", "after\nfactors"]
    headers += [f"at {n:,}:\nratio, share" for n in AT]
    for header in (*headers, f"tokens for\n{RATIO}x, {SHARE:.0%}"):
        table.add_column(header, justify="right")
    for row in made:
        share = row.get("share_after_factors")
        at = row.get("projected", {}).values()
        table.add_row(
            row["provider"],
            f"{row['seconds_median']:.2f}",
            f"{row['ratio_to_baseline']:.2f}",
            f"{row['ratio_to_activation_gradients']:.2f}",
            "-" if share is None else f"{share:.0%}",
            *(f"{p['ratio_to_baseline']:.2f}, {p['share_after_factors']:.0%}" for p in at),
            *([] if share is None else [f"{bar_ratio(row)}, {row['tokens_for_share_bar']:,}"]),
        )
    Console(width=120).print(table)


def main() -> None:
    args = parse(
        __doc__,
        nsamples={"type": int, "default": 4},
        seqlen={"type": int, "default": 512},
        shots={"nargs": "+", "choices": list(SHOTS), "default": ["element", "rows-columns"]},
        turns={"type": int, "default": 1, "help": "timed calls of each provider"},
        reference_blocks={"type": int, "default": 2, "help": "blocks of the reference's costs"},
    )
    made = rows(args)
    show(made)
    write_rows(args.json, made)


if __name__ == "__main__":
    main()
