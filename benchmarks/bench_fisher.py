"""Per-sequence gradient magnitudes: `acc += |G^T X|` for each of N sequences.

Providers: ours, per backend; `torch`, the plain composition (gradient, magnitude, sum);
`toolkits`, as GBLM-Pruner runs it: the gradient leaves in the model's dtype, is converted to fp32,
scaled by 100 and added; `bare_gemm`, the products `G^T X` alone, which is the time to beat. The
limit is their work at the measured GEMM rate.
"""

import torch
from _harness import Bench, Case, copies, forced_backend, our_backends, parse

from pyprune import ops

# Sequences, tokens, rows (out features), columns (in features): SmolLM2-135M, a 2k model,
# Llama-3-8B, Llama-3-70B's attention (on a GPU only).
SHAPES = {
    "cpu": [
        (2, 2048, 576, 576),
        (2, 2048, 1536, 576),
        (1, 2048, 2048, 2048),
        (1, 2048, 4096, 4096),
    ],
    "cuda": [
        (8, 2048, 1536, 576),
        (8, 2048, 4096, 4096),
        (8, 2048, 14336, 4096),
        (4, 2048, 8192, 8192),
    ],
}
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16, torch.float32]}
TOLERANCE = 3e-5
SCALE = 100.0


def case(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Case:
    sequences, tokens, rows, columns = shape
    size = sequences * tokens * (rows + columns) * dtype.itemsize
    count = copies(size, device)
    gs = [torch.randn(sequences, tokens, rows, device=device).to(dtype) for _ in range(count)]
    xs = [torch.randn(sequences, tokens, columns, device=device).to(dtype) for _ in range(count)]
    acc = torch.zeros(rows, columns, device=device)
    want = sum((g.double().T @ x.double()).abs() for g, x in zip(gs[0], xs[0], strict=True))

    def ours(backend):
        def run(i):
            with forced_backend(backend):
                return ops.fisher_accumulate(acc, gs[i % count], xs[i % count])

        return run

    def composition(i):
        for g, x in zip(gs[i % count], xs[i % count], strict=True):
            acc.add_((g.T @ x).abs_())
        return acc

    def toolkits(i):
        for g, x in zip(gs[i % count], xs[i % count], strict=True):
            acc.add_(((g.T @ x).float() * SCALE).abs_())
        return acc

    def bare_gemm(i):
        for g, x in zip(gs[i % count], xs[i % count], strict=True):
            gradient = g.T @ x
        return gradient

    def check(name, got):
        if name != "bare_gemm":
            factor = SCALE if name == "toolkits" else 1.0
            error = (got.double() / factor - want).abs().max() / want.max()
            # A composition's 16-bit gradient is rounded to its dtype on the way.
            limit = torch.finfo(dtype).eps if name in ("torch", "toolkits") else 0.0
            assert error <= max(TOLERANCE, limit), f"{name}: relative error {error:.1e}"
        acc.zero_()

    providers = {name: ours(name) for name in our_backends("fisher_accumulate", device, dtype)}
    baselines = {"torch": composition, "toolkits": toolkits, "bare_gemm": bare_gemm}
    return Case(
        shape=shape,
        dtype=dtype,
        flops=2 * sequences * tokens * rows * columns,
        bytes=size + 8 * rows * columns,
        providers={**providers, **baselines},
        check=check,
    )


def main() -> None:
    args = parse(__doc__)
    bench = Bench("fisher_accumulate", args)
    shapes = [(2, 64, 96, 80)] if args.smoke else SHAPES[args.device]
    for shape in shapes:
        for dtype in DTYPES[args.device]:
            bench.run(case(shape, dtype, args.device))
    bench.finish()


if __name__ == "__main__":
    main()
