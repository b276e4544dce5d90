"""Prefill and decode rates of compressed checkpoints in vLLM, beside vLLM's own dense layers.

    python benchmarks/bench_vllm.py --json vllm.json

Needs vLLM in the environment; the others of this folder do not. The model is `bench_model.py`'s, a
random bf16 Llama of 1.8 GB whose blocks' weights are half zero: dense as vLLM runs it, 2:4,
bitmaps, and both with int8 values. Each is served by an engine of its own, one after the other, in
`--turns` turns; within a turn every figure is the median of several rounds. Prompts of 64 random
tokens, 16 decoded. Without prefix caching, and eager: compiling takes minutes, and is the same for
all.

The tokens of the compressed 2:4 model are compared with those of the dense one, whose weights are
the same: greedy, they may part where two are equally likely, so the share that agrees is reported,
and the first token of every prompt has to be among the dense model's likeliest.

On the CPU, vLLM asks for Intel's OpenMP to be loaded first; where its wheel is installed this does
so, for all models alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import environment, write_rows
from bench_memory import SIZES, make_checkpoint
from rich.console import Console
from rich.table import Table

from pyprune.sparse.convert import compress_checkpoint

DENSE = "dense"
BATCHES, SMOKE_BATCHES = (1, 4, 16), (1, 2)
PROMPT, STEPS, ROUNDS = 64, 16, 3
# Of the vocabulary, what the first token has to be among: bf16 sums in another order.
LIKELIEST = 5
# vLLM's attention takes heads of 32 and more.
SMOKE_SIZES = {**SIZES, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2}
# Printed by an engine's process in front of its results.
RESULT = "RESULT "
# Not this file as a script: what is sent to the engine's workers has to be in a module.
SERVE = """
import json, pathlib, sys
import bench_vllm as bench
print(bench.RESULT + json.dumps(bench.serve(pathlib.Path(sys.argv[1]), "--smoke" in sys.argv)))
"""


def make_models(folder: Path, smoke: bool) -> dict[str, Path]:
    """Checkpoints by name. The dense one has the zeros of 2:4: to a dense product they are numbers
    like any other."""
    models = {}
    for name, zeros, layout in (("2:4", "2:4", "sparse24"), ("50% bitmap", "random", "bitmap")):
        source = folder / f"{layout}-dense"
        source.mkdir()
        make_checkpoint(source, SMOKE_SIZES if smoke else SIZES, zeros)
        models.setdefault(DENSE, source)
        for int8 in (False, True):
            small = folder / f"{layout}{'-int8' if int8 else ''}"
            compress_checkpoint(source, small, allowed=(layout,), int8=int8)
            models[name + (" int8" if int8 else "")] = small
        if source is not models[DENSE]:
            shutil.rmtree(source)
    return models


def prompts(batch: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, vocabulary, (batch, PROMPT), generator=generator)
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def rates_of(outputs: list[Any]) -> dict[str, float]:
    """Tokens/s by the engine's own clock: of the prompts until the last has its first token, and
    from there on."""
    times = [output.metrics for output in outputs]
    begin = min(t.scheduled_ts for t in times)
    first = max(t.first_token_ts for t in times)
    if min(t.first_token_ts for t in times) < first:
        raise RuntimeError("expected all prompts in one step: the figures would overlap")
    decoding = max(t.last_token_ts for t in times) - first
    batch = len(outputs)
    return {"prefill": batch * PROMPT / (first - begin), "decode": batch * STEPS / decoding}


def resident(model: Any) -> dict[str, int]:
    """What the engine's process holds that is not a file's: its weights, the cache and Python."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return {"rss": int(line.split()[1]) * 1024, "threads": torch.get_num_threads()}


def serve(path: Path, smoke: bool) -> dict[str, Any]:
    """One engine's figures; run in a process of its own."""
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        str(path), dtype="bfloat16", max_model_len=256, max_num_seqs=max(BATCHES),
        enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False,
        disable_log_stats=False,
    )  # fmt: skip
    loaded = time.perf_counter() - begin
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def generate(batch: int, seed: int, logprobs: int | None = None) -> list[Any]:
        sampling = SamplingParams(
            temperature=0, max_tokens=1 + STEPS, ignore_eos=True, detokenize=False,
            logprobs=logprobs,
        )  # fmt: skip
        return llm.generate(prompts(batch, vocabulary, seed), sampling, use_tqdm=False)

    batches = SMOKE_BATCHES if smoke else BATCHES
    answers = [output.outputs[0] for output in generate(4, 0, LIKELIEST)]  # and warms up
    rates: dict[str, list[dict[str, float]]] = {}
    for seed in range(1 if smoke else ROUNDS):
        for batch in batches:
            rates.setdefault(str(batch), []).append(rates_of(generate(batch, seed)))
    (held,) = llm.apply_model(resident)
    return {
        "load_s": loaded,
        **held,
        "tokens": [list(answer.token_ids) for answer in answers],
        "likeliest": [sorted(answer.logprobs[0]) for answer in answers],
        "rates": rates,
    }


def run_engine(path: Path, smoke: bool) -> dict[str, Any]:
    """`serve` in a process of its own."""
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    preload = [str(openmp)] if openmp.exists() else []
    env = {
        **os.environ,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for `apply_model`
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Else prompts are begun as they arrive, not all in one step.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        "LD_PRELOAD": ":".join([*preload, *filter(None, [os.environ.get("LD_PRELOAD")])]),
    }  # fmt: skip
    command = [sys.executable, "-c", SERVE, str(path), *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not found:
        raise RuntimeError(f"{path.name}: the engine failed:\n{done.stdout}\n{done.stderr}"[-4000:])
    result: dict[str, Any] = json.loads(found[-1].removeprefix(RESULT))
    return {**result, "openmp": openmp.name if preload else "as linked"}


def agreement(result: dict[str, Any], dense: dict[str, Any]) -> float:
    """The share of greedy tokens that are the dense model's. Raises unless every prompt's first is
    among its likeliest."""
    for tokens, likeliest in zip(result["tokens"], dense["likeliest"], strict=True):
        if tokens[0] not in likeliest:
            raise AssertionError(f"first token {tokens[0]}: expected one of {likeliest}")
    pairs = [
        (a, b)
        for x, y in zip(result["tokens"], dense["tokens"], strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def summary(name: str, path: Path, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over turns of each figure, and the least and most for the rates."""
    rates: dict[str, dict[str, list[float]]] = {}
    for batch in turns[0]["rates"]:
        rates[batch] = {}
        for kind in ("prefill", "decode"):
            medians = [statistics.median(r[kind] for r in t["rates"][batch]) for t in turns]
            rates[batch][kind] = [statistics.median(medians), min(medians), max(medians)]
    return {
        "name": name,
        "file_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "resident_bytes": int(statistics.median(t["rss"] for t in turns)),
        "load_s": statistics.median(t["load_s"] for t in turns),
        "threads": turns[0]["threads"],
        "openmp": turns[0]["openmp"],
        "rates": rates,
    }


def table(models: list[dict[str, Any]]) -> Table:
    shown = Table(
        "model", "file MB", "resident MB", "load s", title="tokens/s in vLLM (over dense)"
    )
    batches = list(models[0]["rates"])
    for kind in ("decode", "prefill"):
        for batch in batches:
            shown.add_column(f"{kind}, batch {batch}", justify="right")
    for m in models:
        cells = []
        for kind in ("decode", "prefill"):
            for batch in batches:
                rate, base = (x["rates"][batch][kind][0] for x in (m, models[0]))
                cells.append(f"{rate:.1f} ({rate / base:.2f}x)")
        sizes = [f"{m[kind] / 1e6:.0f}" for kind in ("file_bytes", "resident_bytes")]
        shown.add_row(m["name"], *sizes, f"{m['load_s']:.0f}", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="that vLLM finds")
    args = parser.parse_args()
    import vllm

    with tempfile.TemporaryDirectory() as tmp:
        models = make_models(Path(tmp), args.smoke)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
        for turn in range(1, args.turns + 1):
            for name, path in models.items():
                turns[name].append(run_engine(path, args.smoke))
                Console().print(f"turn {turn}: {name}")
            found = [summary(name, models[name], results) for name, results in turns.items()]
            agreed = agreement(turns["2:4"][0], turns[DENSE][0])
            row = {
                "op": "vllm", "vllm": vllm.__version__, "prompt": PROMPT, "steps": STEPS,
                "rounds": 1 if args.smoke else ROUNDS, "turns": turn, "agreement": agreed,
                "models": found, **environment(args.device),
            }  # fmt: skip
            write_rows(args.json, [row])  # one that is stopped keeps its turns
    Console().print(table(found), f"2:4: {agreed:.0%} of the greedy tokens are the dense model's")


if __name__ == "__main__":
    main()
