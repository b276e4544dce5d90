"""Gradient statistics of a whole model against the bare forward and backward pass.

    python benchmarks/bench_backward.py --json backward.json
    python benchmarks/bench_backward.py --nsamples 4 --seqlen 2048

bare: one forward and backward a sequence with the weight gradients of the block matrices, thrown
away. That is the time to beat: the products of a weight gradient are those of a statistic.
reference: as GBLM-Pruner's code runs it: every weight gradient stored, then copied to the CPU,
scaled by 100 and its magnitude added to a sum there (its l2 sum is left out).
gblm, obd, k-obd, factors: ours, factors being the full Kronecker ones of EigenDamage and LLM
Surgeon; gblm+ckpt runs every block again instead of keeping its activations.

All run on the packaged model in turns (`--turns`; --repetitions is not used), one sequence at a
time; first the sums of `reference` and `gblm` are compared. By default that is one sequence of 512
tokens and five turns, less than four minutes on two threads: what a statistic adds to the making of
a weight's gradient is the same for every sequence, so longer ones look better. Memory is measured
in a process per provider: the highest resident size (on a GPU: allocated bytes) above what the
loaded model and the tokens take, sums and gradients included.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from _harness import environment, parse, ratio, time_turns, write_rows
from _memory import peaks, print_peak
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pyprune.calibration.backward import PassOptions
from pyprune.calibration.batches import as_token_set
from pyprune.calibration.factors import collect_factors
from pyprune.calibration.gradient_stats import MagnitudeStatistic
from pyprune.calibration.gradients import collect_gradients
from pyprune.calibration.tokens import TokenSet
from pyprune.methods import METHODS, MethodOptions
from pyprune.models.adapter import Adapter
from pyprune.packaged import packaged_model_dir

BASELINE = "bare"
SCALE = 100.0  # of GBLM-Pruner's code
TOLERANCE = 2e-3  # of the largest sum


def build(args: Namespace) -> tuple[nn.Module, TokenSet]:
    torch.manual_seed(0)
    if args.smoke:
        config = LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model, shape = LlamaForCausalLM(config), (2, 16)
    else:
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(packaged_model_dir(), dtype=dtype)
        shape = (args.nsamples, args.seqlen)
    ids = torch.randint(0, model.config.vocab_size, shape)
    tokens = as_token_set([ids], vocabulary=model.config.vocab_size, positions=None)
    return model.eval().to(args.device), tokens


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    adapter = Adapter.of(model)
    refs = [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
    return {ref.name: getattr(ref.module, ref.parameter) for ref in refs}


def with_weight_gradients(
    model: nn.Module, tokens: TokenSet, visit: Callable[[dict[str, nn.Parameter]], None]
) -> None:
    """`visit` after the backward pass of each sequence, all gradients in place."""
    weights = matrices(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    device = next(model.parameters()).device
    for batch in tokens.batches:
        for ids in batch.input_ids.to(device):
            model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
            visit(weights)
            for weight in weights.values():
                weight.grad = None


def bare(model: nn.Module, tokens: TokenSet) -> None:
    with_weight_gradients(model, tokens, lambda weights: None)


def reference(model: nn.Module, tokens: TokenSet) -> dict[str, Tensor]:
    sums = {name: torch.zeros(w.shape, dtype=w.dtype) for name, w in matrices(model).items()}

    def add(weights: dict[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            assert weight.grad is not None
            sums[name] += (SCALE * weight.grad.float()).abs().to("cpu", sums[name].dtype)

    with_weight_gradients(model, tokens, add)
    return sums


def ours(name: str, checkpointing: bool = False) -> Callable[[nn.Module, TokenSet], Any]:
    make = METHODS[name].gradient
    assert make is not None

    def run(model: nn.Module, tokens: TokenSet) -> Any:
        return collect_gradients(
            Adapter.of(model),
            tokens,
            make(MethodOptions()),
            PassOptions(checkpointing, next(model.parameters()).device),
        )

    return run


def factors(model: nn.Module, tokens: TokenSet) -> Any:
    adapter = Adapter.of(model)
    refs = [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
    return collect_factors(
        adapter, tokens, refs, PassOptions(device=next(model.parameters()).device)
    )


PROVIDERS: dict[str, Callable[[nn.Module, TokenSet], Any]] = {
    "bare": bare,
    "reference": reference,
    "gblm": ours("gblm"),
    "gblm+ckpt": ours("gblm", checkpointing=True),
    "obd": ours("obd"),
    "k-obd": ours("k-obd"),
    "factors": factors,
}


def check(model: nn.Module, tokens: TokenSet) -> None:
    want, got = reference(model, tokens), ours("gblm")(model, tokens)
    coarse = torch.finfo(next(model.parameters()).dtype).eps
    for name, total in want.items():
        statistic = got[name]
        assert isinstance(statistic, MagnitudeStatistic)
        mine, theirs = SCALE * statistic.total.double(), total.double()
        error = float((mine - theirs).abs().max() / theirs.max())
        # The reference's sums have the model's dtype.
        if error > max(TOLERANCE, 4 * coarse):
            raise SystemExit(f"{name}: gblm differs from reference by {error:.1e} of the largest")


def print_memory(args: Namespace) -> None:
    model, tokens = build(args)
    with torch.no_grad():  # thread pools and libraries set themselves up
        model(tokens.batches[0].input_ids[:1, :8].to(args.device))
    print_peak(args.device, lambda: PROVIDERS[args.memory_of](model, tokens))


def rows(args: Namespace) -> list[dict[str, Any]]:
    model, tokens = build(args)
    check(model, tokens)
    calls = {n: (lambda i, p=provider: p(model, tokens)) for n, provider in PROVIDERS.items()}
    peak_bytes = peaks(PROVIDERS, args.smoke)
    samples = time_turns(calls, args.device, 1 if args.smoke else args.turns)
    return [
        {
            "op": "backward",
            "provider": name,
            "model": "random" if args.smoke else "SmolLM2-135M",
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "sequences": tokens.nsamples,
            "seqlen": tokens.seqlen,
            "weight_bytes": sum(w.nbytes for w in matrices(model).values()),
            "seconds_median": statistics.median(taken),
            "seconds_min": min(taken),
            "seconds_max": max(taken),
            "repetitions": len(taken),
            "baseline": BASELINE,
            "ratio_to_baseline": ratio(taken, samples[BASELINE]),
            "peak_bytes": peak_bytes[name],
            **environment(args.device),
        }
        for name, taken in samples.items()
    ]


def show(made: list[dict[str, Any]]) -> None:
    first = made[0]
    title = (
        f"{first['model']} {first['dtype']}, {first['sequences']} x {first['seqlen']} tokens; "
        f"block matrices {first['weight_bytes'] / 1e6:,.1f} MB"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("provider", no_wrap=True)
    for header in ("median s", "min", "max", f"time / {BASELINE}", "peak MB above the model"):
        table.add_column(header, justify="right")
    for row in made:
        table.add_row(
            row["provider"],
            *(f"{row[f'seconds_{k}']:.2f}" for k in ("median", "min", "max")),
            f"{row['ratio_to_baseline']:.3f}",
            f"{row['peak_bytes'] / 1e6:,.1f}",
        )
    Console(width=120).print(table)


def main() -> None:
    args = parse(
        __doc__,
        nsamples={"type": int, "default": 1, "help": "sequences in a timed call"},
        seqlen={"type": int, "default": 512},
        turns={"type": int, "default": 5, "help": "timed calls of each provider"},
        memory_of={"choices": sorted(PROVIDERS), "help": "print this provider's peak and exit"},
    )
    if args.memory_of is not None:
        print_memory(args)
        return
    made = rows(args)
    show(made)
    write_rows(args.json, made)


if __name__ == "__main__":
    main()
