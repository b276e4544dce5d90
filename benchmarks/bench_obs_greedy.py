"""Greedy OBS traces of some rows to half their weights.

Providers: ours, per backend; `downdates`, the algorithm as the OBC code runs it: every row has an
inverse of its own, downdated after each weight by one outer product. The limit is the arithmetic of
our formulation, C K^2 / 2 multiply-adds a row for K of C weights, at the measured GEMM rate.
"""

import torch
from _harness import Bench, Case, forced_backend, our_backends, parse

from pyprune import ops

# Rows, columns: the inputs of SmolLM2-135M's matrices, and a square one of a 1B model's.
SHAPES = {"cpu": [(64, 576), (8, 1536), (4, 2048)], "cuda": [(256, 576), (64, 1536), (32, 4096)]}
TOLERANCE = 1e-2  # relative, of the summed losses: rounding decides near ties


def downdates(w: torch.Tensor, inverse: torch.Tensor, steps: int) -> torch.Tensor:
    """Summed losses of each row `[P]`."""
    x, total = w.clone(), w.new_zeros(len(w))
    h = inverse.expand(len(w), -1, -1).clone()
    gone = torch.zeros_like(w, dtype=torch.bool)
    rows = torch.arange(len(w), device=w.device)
    for _ in range(steps):
        score = (x.square() / h.diagonal(dim1=1, dim2=2)).masked_fill_(gone, float("inf"))
        j = score.argmin(1)
        column = h[rows, j] * h[rows, j, j].rsqrt()[:, None]
        change = x[rows, j] * h[rows, j, j].rsqrt()
        total += change.square() / 2
        x -= column * change[:, None]
        h.baddbmm_(column[:, :, None], column[:, None, :], alpha=-1)
        gone[rows, j] = True
    return total


def case(shape: tuple[int, int], device: str) -> Case:
    rows, cols = shape
    steps = cols // 2
    w = torch.randn(rows, cols, device=device)
    x = torch.randn(4 * cols, cols, device=device)
    x = x @ (torch.randn(cols, cols, device=device) / cols**0.5 + torch.eye(cols, device=device))
    u = ops.obs_factor(ops.gram(x)).u
    inverse = u.T @ u
    want = downdates(w.double(), inverse.double(), steps)

    def ours(backend):
        def run(i):
            with forced_backend(backend):
                return ops.obs_greedy(w, inverse, steps=steps).loss.sum(1)

        return run

    def check(name, got):
        error = (got.double() / want - 1).abs().max()
        assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"

    providers = {name: ours(name) for name in our_backends("obs_greedy", device, torch.float32)}
    return Case(
        shape=shape,
        dtype=torch.float32,
        flops=rows * cols * steps**2,
        bytes=4 * (rows * cols + cols * cols + 3 * rows * steps),
        providers={**providers, "downdates": lambda i: downdates(w, inverse, steps)},
        check=check,
    )


def main() -> None:
    args = parse(__doc__)
    bench = Bench("obs_greedy", args)
    torch.manual_seed(0)
    for shape in [(3, 64)] if args.smoke else SHAPES[args.device]:
        bench.run(case(shape, args.device))
    bench.finish()


if __name__ == "__main__":
    main()
