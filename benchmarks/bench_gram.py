"""Gram matrix of calibration activations: `H += X^T X`.

Providers: ours, per backend; `torch_mm`, the plain product `X.T @ X` in the input's dtype (MKL,
cuBLAS); `toolkits`, what the pruning toolkits run: the input converted to fp32, scaled by
sqrt(2 / n) and multiplied into an fp32 H with addmm_; `quack`, its symmetric GEMM (quack-kernels,
the published interface: `A @ A.T` in the input's dtype), for 16-bit inputs on a GPU where it is
installed, and otherwise a note in every row of the case that says why not. The limit is half a
matrix product's work at the measured GEMM rate: `share_of_limit` of `torch_mm` is therefore at
most 50 %.
"""

import math
from importlib.util import find_spec

import torch
from _harness import Bench, Case, copies, forced_backend, our_backends, parse

from pyprune import ops

# Tokens x columns: inputs of SmolLM2-135M's attention and down_proj, of 2k and 4k models, of
# Llama-3-70B's attention and Llama-3-8B's down_proj (on a GPU only: 14336 columns take half a
# minute a call on two cores); of some experts of Qwen3-30B-A3B, with tokens of their own.
SHAPES = {
    "cpu": [(2048, 576), (2048, 1536), (2048, 2048), (2048, 4096), (4, 512, 2048)],
    "cuda": [
        (16384, 576), (16384, 2048), (16384, 4096), (16384, 8192), (16384, 14336), (16, 1024, 2048),
    ],
}  # fmt: skip
DTYPES = {
    "cpu": [torch.float32, torch.bfloat16],
    "cuda": [torch.bfloat16, torch.float32],
}
TOLERANCE = 3e-5  # of the largest entry, for a sum of 16384 products in fp32
MATRIX_UNITS = 1e-4  # where a GPU's matrix units add them up, which do not round to nearest


def quack_missing(dtype: torch.dtype, device: str) -> str:
    """Why quack does not take part; empty if it does."""
    if device != "cuda":
        return "needs a GPU"
    if find_spec("quack") is None:
        return "not installed"
    return "" if dtype.itemsize == 2 else "16-bit inputs only"


def case(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    *experts, tokens, columns = shape
    size = math.prod(shape) * dtype.itemsize
    count = copies(size, device)
    inputs = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    out = torch.zeros(*experts, columns, columns, device=device)
    scale = math.sqrt(2 / tokens)
    want = inputs[0].double().mT @ inputs[0].double()

    def ours(backend):
        def run(i):
            with forced_backend(backend):
                return ops.gram(inputs[i % count], out=out)

        return run

    def torch_mm(i):
        x = inputs[i % count]
        return x.mT @ x

    def toolkits(i):
        x = inputs[i % count].float() * scale
        return out.baddbmm_(x.mT, x) if experts else out.addmm_(x.T, x)

    def quack(i):
        from quack.gemm_interface import gemm_symmetric

        x = inputs[i % count]
        return gemm_symmetric(x.mT, x)

    def check(name, got):
        # `out` accumulates over the providers, so it starts from zero for each first call.
        factor = scale**2 if name == "toolkits" else 1.0
        error = (got.double() / factor - want).abs().max() / want.abs().max()
        # A 16-bit product is rounded to its dtype on the way out.
        limit = MATRIX_UNITS if device == "cuda" and dtype.itemsize == 2 else 0.0
        if name in ("torch_mm", "quack"):
            limit = torch.finfo(dtype).eps
        assert error <= max(TOLERANCE, limit), f"{name}: relative error {error:.1e}"
        out.zero_()

    providers = {name: ours(name) for name in our_backends("gram", device, dtype)}
    missing = quack_missing(dtype, device)
    if not missing:
        providers["quack"] = quack
    return Case(
        shape=shape,
        dtype=dtype,
        flops=math.prod(shape) * (columns + 1),
        bytes=size + 8 * out.numel(),
        providers={**providers, "toolkits": toolkits, "torch_mm": torch_mm},
        check=check,
        note={"quack": missing} if missing else {},
    )


def main() -> None:
    args = parse(__doc__)
    bench = Bench("gram", args)
    shapes = [(256, 128), (2, 64, 32)] if args.smoke else SHAPES[args.device]
    for shape in shapes:
        for dtype in DTYPES[args.device]:
            bench.run(case(shape, dtype, args.device))
    bench.finish()


if __name__ == "__main__":
    main()
