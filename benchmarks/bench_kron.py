"""LLM Surgeon's quadratic forms `(W A W^T)_ii` and `(W^T G W)_jj`, and its update for removed rows
and columns.

Providers of the forms: ours, per backend; `torch`, the whole product `(W @ A * W).sum(1)`. The
limit is half a matrix product's work, which is what a symmetric A needs. Providers of the update:
ours; `two_steps`, first the rows, then the columns, as `ops.kron_remove`'s reference does; the
limit is reading and writing W once.
"""

import torch
from _harness import Bench, Case, copies, forced_backend, our_backends, parse

from pyprune import ops

# Rows x columns: SmolLM2-135M's gate/up and down_proj; a 2k model; Llama-3-8B's layers;
# Llama-3-70B's attention (on a GPU only).
SHAPES = {
    "cpu": [(1536, 576), (576, 1536), (2048, 2048), (4096, 4096)],
    "cuda": [(1536, 576), (2048, 2048), (4096, 4096), (14336, 4096), (8192, 8192)],
}
REMOVED = 64  # one in 64 rows and columns, about what one of LLM Surgeon's shots takes
TOLERANCE = 1e-5


def weights(rows, cols, device):
    gen = torch.Generator(device=device).manual_seed(0)
    return torch.randn(rows, cols, generator=gen, device=device)


def factor(side, device):
    """A factor and its inverse, of inputs that share a few strong directions."""
    x = weights(2 * side, side, device)
    x += 0.3 * weights(2 * side, side // 8 + 1, device) @ weights(side // 8 + 1, side, device)
    a = ops.gram(x) / len(x)
    u = ops.obs_factor(a).u
    return a, u.mT @ u


def quadratic(w, a, of_columns):
    """One case: all rows of `w`, or its columns by way of a transposed view."""
    rows, cols = w.shape
    device = w.device.type
    count = copies(4 * w.numel() + 4 * a.numel(), device)
    inputs = [(w.clone().T if of_columns else w.clone(), a.clone()) for _ in range(count)]
    first = inputs[0][0].double()
    want = (first @ a.double() * first).sum(1)
    side = len(a)

    def ours(backend):
        def run(i):
            with forced_backend(backend):
                return ops.kron_quadratic(*inputs[i % count])

        return run

    def plain(i):
        v, h = inputs[i % count]
        return (v @ h).mul_(v).sum(1)

    def check(name, got):
        error = float(((got.double() - want).abs() / want).max())
        assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"

    providers = {name: ours(name) for name in our_backends("kron_quadratic", device, w.dtype)}
    return Case(
        shape=(rows, cols),
        dtype=w.dtype,
        flops=w.numel() * (side + 2),
        bytes=4 * w.numel() + 2 * side * (side + 1),
        providers={**providers, "torch": plain},
        check=check,
        note={"form": "columns" if of_columns else "rows"},
    )


def update(w, a_inverse, g_inverse):
    rows, cols = w.shape
    device = w.device.type
    p, q = (torch.arange(0, n, REMOVED, device=device) for n in (rows, cols))
    want = ops.kron_remove(*(t.double() if t.is_floating_point() else t
                             for t in (w, p, q, a_inverse, g_inverse)))  # fmt: skip

    def on(backend):
        def run(i):
            with forced_backend(backend):
                return ops.kron_remove(w, p, q, a_inverse, g_inverse)

        return run

    def check(name, got):
        error = float((got.double() - want).abs().max() / want.abs().max())
        assert error <= 1e-4, f"{name}: off by {error:.1e} of the largest weight"

    backends = our_backends("kron_remove", device, w.dtype)
    providers = {name: on(name) for name in backends if name != "reference"}
    return Case(
        shape=(rows, cols),
        dtype=w.dtype,
        flops=2 * w.numel() * (len(p) + len(q)),
        bytes=8 * w.numel(),
        providers={**providers, "two_steps": on("reference")},
        limit="copy",
        check=check,
        note={"removed": f"1/{REMOVED}"},
    )


def main():
    args = parse(__doc__)
    forms, updates = Bench("kron_quadratic", args), Bench("kron_remove", args)
    updates.rows = forms.rows  # one file: what one writes must not lose the other's
    for rows, cols in [(96, 160)] if args.smoke else SHAPES[args.device]:
        w = weights(rows, cols, args.device)
        (a, a_inverse), (g, g_inverse) = (factor(n, args.device) for n in (cols, rows))
        forms.run(quadratic(w, a, of_columns=False))
        forms.run(quadratic(w, g, of_columns=True))
        updates.run(update(w, a_inverse, g_inverse))
    forms.finish()


if __name__ == "__main__":
    main()
