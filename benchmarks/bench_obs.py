"""SparseGPT's solve with H given: factor the Hessian, sweep the weights.

Providers: ours, per backend; `algorithm`, what the original code runs, written down here from the
published mathematics: Cholesky, inverse, Cholesky of the inverse, then a Python loop over the
columns; `llmcompressor`, the function that its SparseGPTModifier calls for each layer, where that
package is installed (0.14 takes transformers 5.15 to 5.17, which this package takes too); `floor`,
the least dense work there is: one Cholesky factorisation, one triangular inverse and one
[R, C] x [C, C/2] product.
`share_of_limit` is the floor's time over a provider's: above 100 % where fusing Cholesky and
inverse into products pays.

`ceiling`, with our rows, is how many times faster than `algorithm` the same work would be at the
measured GEMM rate (2/3 C^3 + R C^2 flops): no fp32 solve on this device can be further ahead.

Two extra columns anchor correctness against `algorithm`, before anything is timed:
`mask_agreement`, the share of equal mask bits (its unstructured rule prunes one weight more a
block), and `max_error`, the largest difference of a weight when ours is given its mask.
llm-compressor runs the same column loop and is held to its weights.
"""

from importlib.util import find_spec

import torch
from _harness import (
    Bench,
    Case,
    copies,
    correlated_layer,
    forced_backend,
    gemm_rate,
    our_backends,
    parse,
)

from pyprune import ops

# Rows x columns: SmolLM2-135M's attention, gate/up and down_proj; a 2k model; Llama-3-8B's
# attention and gate/up; gate or up of some experts of Qwen3-30B-A3B, each with its own Hessian.
SHAPES = {
    "cpu": [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (4, 768, 2048)],
    # The column loop takes a sixth of a millisecond a column.
    "cuda": [(576, 576), (1536, 576), (2048, 2048), (4096, 4096), (14336, 4096), (2, 768, 2048)],
}  # fmt: skip
RULES = {"2:4": {"nm": (2, 4)}, "50%": {"sparsity": 0.5}}
BLOCK = 128
# Two fp32 solves of C columns agree to about this, relative to the largest weight.
TOLERANCE = 2e-3
MASK_AGREEMENT = 0.995


def algorithm(w, h, rule):
    """The reference algorithm: `(weights, mask of kept weights)`."""
    w, h = w.clone(), h.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    w[:, dead] = 0
    diagonal += 0.01 * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    kept = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        block, local = w[:, start:end].clone(), u[start:end, start:end]
        errors, losses, new = (torch.zeros_like(block) for _ in range(3))
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if "sparsity" in rule:
            scores = block**2 / local.diagonal() ** 2
            threshold = scores.flatten().sort().values[int(scores.numel() * rule["sparsity"])]
            pruned = scores <= threshold
        for j in range(end - start):
            column, d = block[:, j], local[j, j]
            if "nm" in rule and j % rule["nm"][1] == 0:
                n, m = rule["nm"]
                scores = block[:, j : j + m] ** 2 / local.diagonal()[j : j + m] ** 2
                pruned.scatter_(1, j + scores.topk(m - n, dim=1, largest=False).indices, True)
            q = column.clone()
            q[pruned[:, j]] = 0
            new[:, j] = q
            losses[:, j] = (column - q) ** 2 / d**2
            error = (column - q) / d
            block[:, j:] -= error[:, None] @ local[j, j:][None]
            errors[:, j] = error
        w[:, start:end] = new
        kept[:, start:end] = ~pruned
        w[:, end:] -= errors @ u[start:end, end:]
    return w, kept


def llm_compressor(rule):
    """llm-compressor's function for one layer, `(w, h)` to weights, imported before it is called:
    that takes seconds. Its N:M counts the pruned weights."""
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    n, m = rule.get("nm", (0, 0))

    def solve(w, h):
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w, requires_grad=False)
        hessians = {layer: h.clone()}
        share = rule.get("sparsity", 0.5)
        return sparsify_weight(layer, hessians, share, m - n, m, BLOCK, 0.01, False)[1]

    return solve


def triangular_inverse(lower):
    """The faster way that PyTorch offers at each size, so that the floor is one."""
    n = len(lower)
    if n <= 512:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = n // 2
    out = torch.zeros_like(lower)
    out[:half, :half] = triangular_inverse(lower[:half, :half])
    out[half:, half:] = triangular_inverse(lower[half:, half:])
    out[half:, :half] = -(out[half:, half:] @ (lower[half:, :half] @ out[:half, :half]))
    return out


def each(solve, w, h):
    """`solve(w, h)`, expert after expert where there are several."""
    if w.dim() == 2:
        return solve(w, h)
    found = [solve(*one) for one in zip(w, h, strict=True)]
    if isinstance(found[0], tuple):
        return tuple(torch.stack(part) for part in zip(*found, strict=True))
    return torch.stack(found)


def solve_case(shape, label, device):
    rule = RULES[label]
    *experts, rows, cols = shape
    number = experts[0] if experts else 1
    count = copies(number * (8 * rows * cols + 8 * cols * cols), device)
    inputs = [correlated_layer(rows, cols, device) for _ in range(count * number)]
    if experts:
        inputs = [
            tuple(torch.stack(part) for part in zip(*inputs[k::count], strict=True))
            for k in range(count)
        ]
    reference, anchors = {}, {}

    def ours(backend):
        def run(i):
            w, h = inputs[i % count]
            with forced_backend(backend):
                return ops.obs_sweep(w, ops.obs_factor(h).u, **rule)

        return run

    def least(w, h):
        inverse = triangular_inverse(torch.linalg.cholesky_ex(h).L)
        return w @ inverse[:, : cols // 2]

    def check(name, got):
        if name == "algorithm":
            reference["weight"], reference["mask"] = got
        elif name in backends:
            anchors[name] = anchor(name, got.mask, reference, *inputs[0])
        elif name == "llmcompressor":
            error = float((got - reference["weight"]).abs().max())
            scale = float(reference["weight"].abs().max())
            assert error <= TOLERANCE * scale, f"{name}: error {error}"

    backends = {name: ours(name) for name in our_backends("obs_sweep", device, torch.float32)
              if name != "reference"}  # fmt: skip

    def one_by_one(solve):
        return lambda i: each(solve, *inputs[i % count])

    providers = {"algorithm": one_by_one(lambda w, h: algorithm(w, h, rule)), **backends}
    if find_spec("llmcompressor") is not None:
        providers["llmcompressor"] = one_by_one(llm_compressor(rule))
    case = Case(
        shape=tuple(shape),
        dtype=torch.float32,
        flops=number * (2 / 3 * cols**3 + rows * cols**2),
        bytes=number * (4 * (cols**2 + 2 * rows * cols) + rows * cols),
        providers={**providers, "floor": one_by_one(least)},
        limit="floor",
        check=check,
        baseline="algorithm",
        note={"pattern": label},
    )
    return case, anchors


def anchor(name, mask, reference, w, h):
    """The two correctness columns of one of our providers."""
    agreement = float((mask == reference["mask"]).double().mean())
    with forced_backend(name):
        same = ops.obs_sweep(w, ops.obs_factor(h).u, mask=reference["mask"])
    error = float((same.weight - reference["weight"]).abs().max())
    scale = float(reference["weight"].abs().max())
    assert error <= TOLERANCE * scale, f"{name}: error {error}"
    assert agreement >= MASK_AGREEMENT, f"{name}: masks {agreement:.2%}"
    return {"mask_agreement": agreement, "max_error": error}


def main():
    args = parse(__doc__)
    bench = Bench("sparsegpt_solve", args)
    shapes = [(48, 160), (3, 24, 80)] if args.smoke else SHAPES[args.device]
    for shape in shapes:
        for label in RULES:
            case, anchors = solve_case(shape, label, args.device)
            rows_of_case = bench.run(case)
            slow = next(r for r in rows_of_case if r["provider"] == "algorithm")
            rate = gemm_rate(args.device, torch.float32, args.smoke)
            for row in rows_of_case:
                if row["provider"] in anchors:
                    row |= anchors[row["provider"]]
                    row["ceiling"] = slow["seconds_median"] * rate / case.flops
                    bench.console.print(
                        f"  {row['provider']}: {1 / row['ratio_to_baseline']:.1f} times as fast as "
                        f"the algorithm, at most {row['ceiling']:.1f} at the rate of GEMM; masks "
                        f"agree {row['mask_agreement']:.4%}, max error {row['max_error']:.1e} with "
                        "the reference's mask"
                    )
    bench.finish()


if __name__ == "__main__":
    main()
