"""Per-sequence gradient magnitudes: `acc += |scale * G[n]^T X[n]|^power`, summed over sequences n.

tensor | dtype            | shape     | layout
-------|------------------|-----------|-----------
g      | fp32, bf16, fp16 | [N, T, R] | any strides
x      | as g             | [N, T, C] | any strides
acc    | fp32             | [R, C]    | contiguous

A program owns one tile of acc. It reduces the tile over a sequence's tokens in registers, takes
the magnitude there and adds it to a second register tile, so that acc is read and written once
whatever the number of sequences, and a gradient never reaches memory.
"""

import torch
import triton
import triton.language as tl

from pyprune.kernels.gram import indexable, large_stages

# Tiles of this many tile rows run next to each other, so that the panels they share are still in
# the L2 cache.
GROUP = 8


@triton.jit
def _fisher_accumulate_kernel(
    acc_ptr,
    g_ptr,
    x_ptr,
    N,
    T,
    R,
    C,
    scale,
    g_stride_n,
    g_stride_t,
    g_stride_r,
    x_stride_n,
    x_stride_t,
    x_stride_c,
    POWER: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(R, BLOCK_M), tl.cdiv(C, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = pid % (GROUP * tiles_n)
    first_r = (group * GROUP + inside % height) * BLOCK_M
    first_c = inside // height * BLOCK_N
    r, c = first_r + tl.arange(0, BLOCK_M), first_c + tl.arange(0, BLOCK_N)
    # Where a tile starts takes 64 bits; inside it 32 do (the launcher sees to that).
    k = tl.arange(0, BLOCK_K)
    g_ptrs = g_ptr + first_r.to(tl.int64) * g_stride_r
    x_ptrs = x_ptr + first_c.to(tl.int64) * x_stride_c
    g_ptrs += k[:, None] * g_stride_t + tl.arange(0, BLOCK_M)[None, :] * g_stride_r
    x_ptrs += k[:, None] * x_stride_t + tl.arange(0, BLOCK_N)[None, :] * x_stride_c
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for _ in range(N):
        gradient = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        a_ptrs, b_ptrs = g_ptrs, x_ptrs
        for left in range(T, 0, -BLOCK_K):
            live = (k < left)[:, None]
            a = tl.load(a_ptrs, mask=live & (r < R)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=live & (c < C)[None, :], other=0.0)
            a_ptrs += BLOCK_K * g_stride_t
            b_ptrs += BLOCK_K * x_stride_t
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            gradient = tl.dot(tl.trans(a), b, gradient, input_precision="ieee")
        gradient *= scale
        g_ptrs += g_stride_n
        x_ptrs += x_stride_n
        total += tl.abs(gradient) if POWER == 1 else gradient * gradient
    mask = (r < R)[:, None] & (c < C)[None, :]
    pointers = acc_ptr + r.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + total, mask=mask)


def _blocks(x: torch.Tensor, interpreted: bool) -> dict[str, int]:
    if interpreted:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    if x.dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    stages = large_stages(torch.cuda.get_device_capability(x.device)[0])
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages}


def fisher_accumulate_triton(
    acc: torch.Tensor, g: torch.Tensor, x: torch.Tensor, power: int, scale: float
) -> None:
    g3, x3 = (indexable(t if t.dim() == 3 else t[None]) for t in (g, x))
    target = acc.contiguous()
    interpreted = not isinstance(_fisher_accumulate_kernel, triton.JITFunction)
    blocks = _blocks(x3, interpreted)
    sequences, tokens, rows = g3.shape
    columns = x3.shape[2]
    grid = (triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(columns, blocks["BLOCK_N"]),)
    _fisher_accumulate_kernel[grid](
        target,
        g3,
        x3,
        sequences,
        tokens,
        rows,
        columns,
        scale,
        *g3.stride(),
        *x3.stride(),
        POWER=power,
        UPCAST=interpreted,
        GROUP=GROUP,
        **blocks,
        enable_fp_fusion=True,
    )
    if target is not acc:
        acc.copy_(target)


def _aot(dtype: str, label: str, warps: int, **constexprs: int | bool) -> dict:
    pointers = {"acc_ptr": "*fp32", "g_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    sizes = dict.fromkeys(["N", "T", "R", "C"], "i32") | {"scale": "fp32"}
    strides = {
        "g_stride_n": "i32",
        "g_stride_t": "i32",
        "g_stride_r": "constexpr",
        "x_stride_n": "i32",
        "x_stride_t": "i32",
        "x_stride_c": "constexpr",
    }
    fixed = {"g_stride_r": 1, "x_stride_c": 1, "POWER": 1, "UPCAST": False}
    return {
        "kernel": _fisher_accumulate_kernel,
        "signature": pointers | sizes | strides,
        "constexprs": fixed | {"GROUP": GROUP} | constexprs,
        "num_warps": warps,
        "num_stages": large_stages if warps == 8 else 3,
        "aligned": [*pointers, "R", "C", *(k for k, v in strides.items() if v == "i32")],
        "label": label,
    }


AOT = [
    _aot("bf16", "bf16 128x128x64", 8, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
    _aot("fp16", "fp16 128x128x64 square", 8, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, POWER=2),
    _aot("fp32", "fp32 64x64x32", 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
]
