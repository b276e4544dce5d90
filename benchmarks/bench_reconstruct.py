"""Exact least-squares weights for a 50 % mask, H given, starting from SparseGPT's weights.

    python benchmarks/bench_reconstruct.py              # synthetic layers of SmolLM2-135M's shapes
    python benchmarks/bench_reconstruct.py --model      # every linear of the packaged model

Providers: ours, per backend, and `products` (a dense product an iteration, the path above
`NATIVE_COLUMNS`), at a tolerance that gives 1e-4 of the weights; `default`, ours at the tolerance
that pruning uses; `loop`, one `torch.linalg.cholesky` and solve a row. All get the damped factor
that SparseGPT has made already. Before timing, every result is checked against fp64 solves.

`share_of_limit` is what the loop's flops would take at the measured GEMM rate over a provider's
time: above 100 % where conjugate gradients need fewer.

`--model` times the loop on `--rows` rows of each matrix and scales by the number of rows; ours runs
on all of them, in turns with the loop, matrix by matrix. At most MODEL_TURNS turns each: what
counts is the sum over the matrices.
"""

import importlib
import statistics
import time

import torch
from _harness import (
    Bench,
    Case,
    correlated_layer,
    environment,
    forced_backend,
    gemm_rate,
    our_backends,
    parse,
)
from rich.table import Table

from pyprune import ops
from pyprune.methods.update import TOLERANCE

SHAPES = {
    "cpu": [(576, 576), (1536, 576), (192, 1536)],
    "cuda": [(576, 576), (1536, 576), (576, 1536), (4096, 4096)],
}
# Proven fractions of the loss, which is far more than what is left: the first gives 1e-4 of the
# weights, the second is what pruning uses.
TIGHT, DEFAULT = 3e-6, TOLERANCE
WEIGHT_ERROR = 1e-4
CHECKED_ROWS = 16
MODEL_TURNS = 2
NATIVE = importlib.import_module("pyprune.ops.obs_reconstruct")


def damped(h, factor):
    h = h.clone()
    alive = h.diagonal().masked_fill(factor.dead, 1).double().mean()
    h.diagonal().add_((factor.dead + factor.damping * alive).to(h.dtype))
    return h


def direct_flops(rows, cols):
    """Of a Cholesky factorisation a row, half of it kept, and the right-hand sides."""
    return rows * cols**3 / 24 + 2 * rows * cols**2


def loop(w, h, mask):
    """One Cholesky factorisation and solve a row; `h` damped."""
    out = torch.zeros_like(w)
    target = w @ h
    for i, kept in enumerate(mask):
        s = kept.nonzero()[:, 0]
        lower = torch.linalg.cholesky(h[s][:, s])
        out[i, s] = torch.cholesky_solve(target[i, s, None], lower)[:, 0]
    return out


class Problem:
    def __init__(self, w, h):
        self.w, self.h = w, h
        self.factor = ops.obs_factor(h)
        self.damped = damped(h, self.factor)
        swept = ops.obs_sweep(w, self.factor.u, sparsity=0.5)
        self.mask, self.start = swept.mask, swept.weight
        n = min(CHECKED_ROWS, len(w))
        exact = damped(h.double(), self.factor)
        self.want = loop(w[:n].double(), exact, self.mask[:n])

    def ours(self, tolerance=TIGHT):
        return ops.obs_reconstruct(
            self.w, self.h, self.mask, start=self.start, factor=self.factor, tolerance=tolerance
        )

    def products(self):
        columns, NATIVE.NATIVE_COLUMNS = NATIVE.NATIVE_COLUMNS, 0
        try:
            return self.ours()
        finally:
            NATIVE.NATIVE_COLUMNS = columns

    def error(self, weight):
        """Of the weights, relative, in the rows that were solved in fp64."""
        change = weight[: len(self.want)].double() - self.want
        return float(change.norm() / self.want.norm())


def case(rows, cols, device):
    problem = Problem(*correlated_layer(rows, cols, device))

    def on(backend):
        def run(i):
            with forced_backend(backend):
                return problem.ours()

        return run

    def check(name, got):
        weight = got if isinstance(got, torch.Tensor) else got.weight
        error, limit = problem.error(weight), 1e-2 if name == "default" else WEIGHT_ERROR
        assert error <= limit, f"{name}: weights off by {error:.1e}, expected {limit:.0e}"

    backends = [b for b in our_backends("obs_reconstruct", device, torch.float32)
                if b != "reference"]  # fmt: skip
    providers = {name: on(name) for name in backends}
    if device == "cpu":
        providers["products"] = lambda i: problem.products()
    providers["default"] = lambda i: problem.ours(DEFAULT)
    return Case(
        shape=(rows, cols),
        dtype=torch.float32,
        flops=direct_flops(rows, cols),
        bytes=4 * (3 * rows * cols + 2 * cols**2) + rows * cols,
        providers={**providers, "loop": lambda i: loop(problem.w, problem.damped, problem.mask)},
        check=check,
        baseline="loop",
        note={"pattern": "50%"},
    )


def model_layers(tokens):
    """Weight and Gram matrix of every linear in the blocks of the packaged model, dense."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pyprune.calibration.batches import as_token_set
    from pyprune.calibration.tokens import calibration_tokens
    from pyprune.models.adapter import Adapter
    from pyprune.packaged import packaged_model_dir

    folder = packaged_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = Adapter.of(model)
    refs = [ref for i in range(len(adapter.blocks)) for ref in adapter.linears(i)]
    grams = {}

    def collect(name):
        def hook(module, args):
            x = args[0].reshape(-1, args[0].shape[-1])
            grams[name] = ops.gram(x, out=grams.get(name))

        return hook

    for ref in refs:
        model.get_submodule(ref.name).register_forward_pre_hook(collect(ref.name))
    drawn = calibration_tokens(
        "wiki", AutoTokenizer.from_pretrained(folder), nsamples=tokens // 512, seqlen=512,
        seed=0, batch_size=8, padding="windows", bos=None,
    )  # fmt: skip
    positions = model.config.max_position_embeddings
    shown = as_token_set(drawn, vocabulary=model.config.vocab_size, positions=positions)
    with torch.no_grad():
        for batch in shown.batches:
            model.model(batch.input_ids)
    return [(ref.name, ref.weight(), grams[ref.name]) for ref in refs]


def whole_model(args):
    """Rows for the model as one: seconds in all its linears by provider."""
    layers = model_layers(args.tokens)[:: args.every]
    turns = min(args.repetitions, MODEL_TURNS)
    seconds = {"native": 0.0, "default": 0.0, "loop": 0.0}
    errors = []
    for _, w, h in layers:
        problem = Problem(w.detach(), h)
        sample = min(args.rows, len(w))
        runs = {
            "native": (problem.ours, 1.0),
            "default": (lambda: problem.ours(DEFAULT), 1.0),  # noqa: B023
            "loop": (lambda: loop(problem.w[:sample], problem.damped, problem.mask[:sample]),  # noqa: B023
                     len(w) / sample),
        }  # fmt: skip
        taken = {name: [] for name in runs}
        for _ in range(turns):
            for name, (run, scale) in runs.items():
                started = time.perf_counter()
                got = run()
                taken[name].append(scale * (time.perf_counter() - started))
                if name == "native":
                    errors.append(problem.error(got.weight))
        for name, values in taken.items():
            seconds[name] += statistics.median(values)
    worst = max(errors)
    flops = sum(direct_flops(*w.shape) for _, w, _ in layers)
    limit = flops / gemm_rate(args.device, torch.float32, args.smoke)
    rows = [
        {
            "op": "reconstruct_model", "provider": name, "matrices": len(layers),
            "calibration_tokens": args.tokens, "loop_rows": args.rows,
            "repetitions": turns, "seconds": total, "baseline": "loop",
            "ratio_to_baseline": total / seconds["loop"],
            "flops": flops, "share_of_limit": limit / total, "limit": "gemm",
            "weight_error_median": statistics.median(errors), "weight_error_worst": worst,
            **environment(args.device),
        }
        for name, total in seconds.items()
    ]  # fmt: skip
    return rows


def main():
    args = parse(
        __doc__,
        model={"action": "store_true", "help": "every linear of the packaged model, on the CPU"},
        tokens={"type": int, "default": 8192, "help": "calibration tokens, with --model"},
        rows={"type": int, "default": 32, "help": "rows the loop is timed on, with --model"},
        every={"type": int, "default": 1, "help": "every n-th matrix only, with --model"},
    )
    bench = Bench("obs_reconstruct", args)
    if args.model:
        rows = whole_model(args)
        bench.rows += rows
        table = Table("provider", "seconds", "loop's time over it", title="all linears at 50 %")
        for row in rows:
            table.add_row(row["provider"], f"{row['seconds']:.2f}",
                          f"{1 / row['ratio_to_baseline']:.1f}")  # fmt: skip
        bench.console.print(table)
        bench.console.print(
            f"weights off by {rows[0]['weight_error_median']:.1e} (median), "
            f"{rows[0]['weight_error_worst']:.1e} at most"
        )
    else:
        for rows, cols in [(24, 96)] if args.smoke else SHAPES[args.device]:
            bench.run(case(rows, cols, args.device))
    bench.finish()


if __name__ == "__main__":
    main()
