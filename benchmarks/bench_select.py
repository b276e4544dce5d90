"""Mask selection: 2:4, 4:8, exact per row, exact per layer.

Providers: ours, per backend; `torch`, the composition of PyTorch's own calls (group topk or row
sort, then scatter); `loop`, what the reference code of the papers runs for N:M (a topk and a
scatter for each group of columns in a Python loop); `same_copy`, a copy that reads and writes as
many bytes as the op must (weights in, mask bytes out), timed in turns with the others: the limit.
"""

import math

import torch
from _harness import Bench, Case, copies, forced_backend, our_backends, parse

from pyprune import ops

# Linear layers of SmolLM2-135M, Llama-3-8B (two) and Llama-3-70B (one, on a GPU only); gate or up
# of some experts of Qwen3-30B-A3B, each with column scales of its own.
SHAPES = {
    "cpu": [(576, 576), (1536, 576), (4096, 4096), (4096, 14336), (4, 768, 2048)],
    "cuda": [(1536, 576), (4096, 4096), (4096, 14336), (8192, 28672), (16, 768, 2048)],
}
DTYPES = (torch.bfloat16, torch.float32)
# The Python loop takes seconds beyond this many groups a row.
MAX_LOOP_COLUMNS = 4096


def score_of(w, scale):
    return w.float().abs() * scale[..., None, :]


def torch_nm(w, scale, n, m):
    groups = score_of(w, scale).view(-1, m)
    lowest = groups.topk(m - n, dim=1, largest=False).indices
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, lowest, False).view(w.shape)


def loop_nm(w, scale, n, m):
    score, mask = score_of(w, scale), torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[-1], m):
        lowest = score[..., start : start + m].topk(m - n, dim=-1, largest=False).indices
        mask.scatter_(-1, start + lowest, False)
    return mask


def torch_rows(w, scale, pruned):
    score = score_of(w, scale)
    order = score.sort(dim=-1, stable=True).indices[..., :pruned]
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, order, False)


def torch_layer(w, scale, pruned):
    score = score_of(w, scale)
    flat = score.view(1, -1).sort(dim=1, stable=True).indices[:, :pruned]
    mask = torch.ones(1, score.numel(), dtype=torch.bool, device=w.device)
    return mask.scatter_(1, flat, False).view(w.shape)


def selections(cols, numel):
    """Name, registered op, ours, the composition, the loop."""
    half, layer_half = cols // 2, numel // 2

    def nm(n, m):
        return (
            "mask_nm",
            lambda w, s: ops.mask_nm(w, n, m, column_scale=s),
            lambda w, s: torch_nm(w, s, n, m),
            (lambda w, s: loop_nm(w, s, n, m)) if cols <= MAX_LOOP_COLUMNS else None,
        )

    def rows(w, s):
        return ops.mask_topk(w, half, column_scale=s)

    def layer(w, s):
        return ops.mask_global([w], layer_half, column_scales=[s])[0]

    return {
        "2:4": nm(2, 4),
        "4:8": nm(4, 8),
        "row 50%": ("mask_topk", rows, lambda w, s: torch_rows(w, s, half), None),
        "layer 50%": ("mask_global", layer, lambda w, s: torch_layer(w, s, layer_half), None),
    }


def case(shape, dtype, device, pattern) -> Case:
    *experts, _, cols = shape
    numel = math.prod(shape)
    op, ours, composition, loop = selections(cols, numel)[pattern]
    nbytes = numel * (dtype.itemsize + 1)
    count = copies(nbytes, device)
    weights = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    scale = torch.rand(*experts, cols, device=device) + 0.5
    source = [torch.ones(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(count)]
    target = torch.empty_like(source[0])
    want = [None]

    def run(backend):
        def call(i):
            with forced_backend(backend):
                return ours(weights[i % count], scale)

        return call

    def check(name, mask):
        if name == "same_copy":
            return
        kept = int(mask.sum())
        assert abs(kept - numel // 2) <= numel // cols, f"{name}: {kept} kept"
        if name in ("torch", "loop"):  # topk breaks ties as it likes
            agreement = (mask == want[0]).double().mean().item()
            assert agreement > 0.98, f"{name}: agrees in {agreement:.2%}"
        else:
            want[0] = mask if want[0] is None else want[0]
            assert torch.equal(mask, want[0]), f"{name}: differs from the first backend"

    names = [b for b in our_backends(op, device, dtype) if b != "reference"]
    providers = {backend: run(backend) for backend in names}
    providers["same_copy"] = lambda i: target.copy_(source[i % count])
    if loop is not None:
        providers["loop"] = lambda i: loop(weights[i % count], scale)
    providers["torch"] = lambda i: composition(weights[i % count], scale)
    note = {"pattern": pattern}
    return Case(shape, dtype, 0.0, nbytes, providers, "same_copy", check, "torch", note)


def main() -> None:
    args = parse(__doc__)
    bench = Bench("select", args)
    shapes = [(64, 64), (2, 16, 64)] if args.smoke else SHAPES[args.device]
    for shape in shapes:
        for dtype in DTYPES:
            for pattern in ("2:4", "4:8", "row 50%", "layer 50%")[: 3 if len(shape) == 3 else 4]:
                bench.run(case(shape, dtype, args.device, pattern))
    bench.finish()


if __name__ == "__main__":
    main()
