"""Gram matrices: `out += X^T diag(weight) X`, one triangle of tiles.

tensor | dtype            | shape                   | layout
-------|------------------|-------------------------|------------------------------------------
x      | fp32, bf16, fp16 | [B, T, C]               | any strides
weight | fp32             | [B, T]                  | contiguous, optional
out    | fp32             | [B, N, N]               | contiguous, symmetric; N = C, or C + 1 with
       |                  |                         | a virtual column of ones
part   | fp32             | [S, B, P, M, N of tile] | tiles of the token splits, when S > 1

A program owns one tile on or below the diagonal, walks all tokens (of its split), and stores the
tile and its mirror image. 16-bit inputs go to the matrix units as they are: their products are
exact in the fp32 accumulator.
"""

import torch
import triton
import triton.language as tl

# How fp32 operands are multiplied. "ieee" keeps full fp32 products; "tf32x3" runs on the matrix
# units and loses the products' last two or three bits.
FP32_PRECISION = "ieee"

# Tiles of a square of this many column tiles run next to each other, so that the panels they share
# are still in the L2 cache.
GROUP = 8

# Fewer tokens than this a split are not worth a second stage.
MIN_SPLIT_TOKENS = 1024

WEIGHT_NONE, WEIGHT_MASK, WEIGHT_ANY = 0, 1, 2


@triton.jit
def _locate_tile(pid, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column tile of program `pid`: groups of the lower triangle row by row, tiles of a
    group row by row."""
    rows_in_group: tl.constexpr = GROUP * (BLOCK_N // BLOCK_M)
    group = pid // (rows_in_group * GROUP)
    inside = pid % (rows_in_group * GROUP)
    i = ((tl.sqrt(8.0 * group.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root is rounded: settle i(i+1)/2 <= group < (i+1)(i+2)/2 in integers.
    i = tl.where(i * (i + 1) // 2 > group, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= group, i + 1, i)
    j = group - i * (i + 1) // 2
    return i * rows_in_group + inside // GROUP, j * GROUP + inside % GROUP


@triton.jit
def _load_columns(x_ptrs, live, cols, C, ONES: tl.constexpr):
    """`[BLOCK_K, BLOCK]` of x at the live tokens, the virtual column of ones included."""
    x = tl.load(x_ptrs, mask=live[:, None] & (cols < C)[None, :], other=0.0)
    if ONES:
        x = tl.where(live[:, None] & (cols == C)[None, :], 1.0, x).to(x.dtype)
    return x


@triton.jit
def _store_mirrored(out_ptr, acc, rows, cols, N):
    """Adds the tile to the lower triangle and copies it to its mirror image. What the tile holds
    above the diagonal is dropped: both halves come from one value, so they are equal bits."""
    r, c = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    keep = (r >= c) & (r < N) & (c < N)
    acc += tl.load(out_ptr + r * N + c, mask=keep, other=0.0)
    tl.store(out_ptr + r * N + c, acc, mask=keep)
    tl.store(out_ptr + c * N + r, acc, mask=keep & (r > c))


@triton.jit
def _gram_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    part_ptr,
    T,
    C,
    N,
    stride_b,
    stride_t,
    stride_c,
    tokens_per_split,
    ONES: tl.constexpr,
    WEIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = _locate_tile(tl.program_id(0), GROUP, BLOCK_M, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    # Above the diagonal, or past the matrix's edge: part of a group, but no work.
    if (tile_m + 1) * BLOCK_M > tile_n * BLOCK_N and tile_m * BLOCK_M < N:
        rows_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        first = split.to(tl.int64) * tokens_per_split
        last = tl.minimum(first + tokens_per_split, T)
        # Where a tile starts takes 64 bits; inside it 32 do (`gram_triton` sees to that).
        x_ptr += batch * stride_b + first * stride_t
        weight_ptr += batch * T + first
        k = tl.arange(0, BLOCK_K)
        a_ptrs = x_ptr + (tile_m * BLOCK_M).to(tl.int64) * stride_c
        b_ptrs = x_ptr + (tile_n * BLOCK_N).to(tl.int64) * stride_c
        a_ptrs += k[:, None] * stride_t + tl.arange(0, BLOCK_M)[None, :] * stride_c
        b_ptrs += k[:, None] * stride_t + tl.arange(0, BLOCK_N)[None, :] * stride_c
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for left in range((last - first).to(tl.int32), 0, -BLOCK_K):
            live = k < left
            if WEIGHT != 0:
                w = tl.load(weight_ptr + k, mask=live, other=0.0)
                live = live & (w != 0.0)
                weight_ptr += BLOCK_K
            a = _load_columns(a_ptrs, live, rows_m, C, ONES)
            b = _load_columns(b_ptrs, live, cols_n, C, ONES)
            a_ptrs += BLOCK_K * stride_t
            b_ptrs += BLOCK_K * stride_t
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            if WEIGHT == 2:
                a = a * w[:, None]
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        if SPLIT:
            slot = (split * tl.num_programs(1) + batch) * tl.num_programs(0) + tl.program_id(0)
            m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
            tl.store(part_ptr + slot * (BLOCK_M * BLOCK_N) + m * BLOCK_N + n, acc)
        else:
            _store_mirrored(out_ptr + batch * N * N, acc, rows_m, cols_n, N)


@triton.jit
def _gram_reduce_kernel(
    part_ptr,
    out_ptr,
    N,
    SPLITS,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Second stage: sums ROWS rows of a tile over the splits in order, adds and mirrors them."""
    tile_m, tile_n = _locate_tile(tl.program_id(0), GROUP, BLOCK_M, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * ROWS
    if (tile_m + 1) * BLOCK_M > tile_n * BLOCK_N and tile_m * BLOCK_M < N:
        m, n = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
        acc = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
        for split in range(SPLITS):
            slot = (split * tl.num_programs(1) + batch) * tl.num_programs(0) + tl.program_id(0)
            tile_ptr = part_ptr + slot * (BLOCK_M * BLOCK_N)
            acc += tl.load(tile_ptr + m[:, None] * BLOCK_N + n[None, :])
        _store_mirrored(out_ptr + batch * N * N, acc, tile_m * BLOCK_M + m, tile_n * BLOCK_N + n, N)


def _is_interpreted() -> bool:
    return not isinstance(_gram_kernel, triton.JITFunction)


def _blocks(x: torch.Tensor, upcast: bool) -> dict[str, int]:
    """Tile sides and launch options. 16-bit: two warpgroups of 64 rows each feed the matrix units;
    fp32 runs on the ordinary multipliers and wants smaller tiles."""
    if _is_interpreted():
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    if x.dtype == torch.float32 or upcast:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    stages = 4 if torch.cuda.get_device_capability(x.device)[0] >= 9 else 3
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages}


def _group(side: int, tile: int) -> int:
    return 1 if _is_interpreted() else min(GROUP, triton.cdiv(side, tile))


def _weight_mode(weight: torch.Tensor | None) -> int:
    """A mask of zeros and ones leaves 16-bit inputs as they are; other weights need fp32 products.
    Telling them apart waits for the device once a call."""
    if weight is None:
        return WEIGHT_NONE
    return WEIGHT_MASK if bool(((weight == 0) | (weight == 1)).all()) else WEIGHT_ANY


def _splits(x: torch.Tensor, programs: int) -> int:
    """Token splits that give every multiprocessor two tiles when the matrix alone does not."""
    wanted = 2
    if x.device.type == "cuda":
        wanted = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count
    return max(1, min(wanted // programs, x.shape[1] // MIN_SPLIT_TOKENS))


def indexable(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if its strides are so large that an offset inside a tile needs over 32 bits."""
    return x if max(x.stride(-1), x.stride(-2)) * 256 < 2**31 else x.contiguous()


def gram_triton(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None) -> None:
    target = (out if out.is_contiguous() else out.contiguous()).view(-1, *out.shape[-2:])
    x3 = indexable(x if x.dim() == 3 else x[None])
    batch, tokens, columns = x3.shape
    side = target.shape[-1]
    mode = _weight_mode(weight)
    w = x3 if weight is None else weight.float().contiguous()
    blocks = _blocks(x3, upcast=mode == WEIGHT_ANY)
    tile_m, tile_n = blocks["BLOCK_M"], blocks["BLOCK_N"]
    group = _group(side, tile_n)
    across = triton.cdiv(triton.cdiv(side, tile_n), group)
    programs = across * (across + 1) // 2 * group * group * (tile_n // tile_m)
    splits = _splits(x3, batch * programs)
    span = triton.cdiv(triton.cdiv(tokens, splits), blocks["BLOCK_K"]) * blocks["BLOCK_K"]
    splits = triton.cdiv(tokens, span)
    part = target
    if splits > 1:
        shape = (splits, batch, programs, tile_m, tile_n)
        part = torch.empty(shape, dtype=torch.float32, device=x.device)
    _gram_kernel[(programs, batch, splits)](
        x3,
        w,
        target,
        part,
        tokens,
        columns,
        side,
        *x3.stride(),
        span,
        ONES=side > columns,
        WEIGHT=mode,
        SPLIT=splits > 1,
        UPCAST=_is_interpreted() or mode == WEIGHT_ANY,
        PRECISION=FP32_PRECISION,
        GROUP=group,
        **blocks,
    )
    if splits > 1:
        rows = min(16, tile_m)
        _gram_reduce_kernel[(programs, batch, tile_m // rows)](
            part, target, side, splits, GROUP=group, BLOCK_M=tile_m, BLOCK_N=tile_n, ROWS=rows
        )
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view_as(out))


def _aot(dtype: str, label: str, warps: int, stages: int, **constexprs: int | bool) -> dict:
    pointers = {"x_ptr": f"*{dtype}", "weight_ptr": "*fp32", "out_ptr": "*fp32"}
    sizes = dict.fromkeys(["T", "C", "N", "stride_b", "stride_t", "tokens_per_split"], "i32")
    fixed = {"ONES": False, "WEIGHT": 0, "SPLIT": False, "UPCAST": False}
    return {
        "kernel": _gram_kernel,
        "signature": pointers | {"part_ptr": "*fp32"} | sizes | {"stride_c": "constexpr"},
        "constexprs": fixed
        | {"stride_c": 1, "PRECISION": FP32_PRECISION, "GROUP": GROUP}
        | constexprs,
        "num_warps": warps,
        "num_stages": stages,
        # Launches find these out by themselves; without them no load is wide enough to be
        # asynchronous.
        "aligned": [*pointers, "part_ptr", "C", "N", "stride_b", "stride_t"],
        "label": label,
    }


_LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
_SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
AOT = [
    _aot("bf16", "bf16 128x128x64", 8, 3, **_LARGE),
    _aot("fp16", "fp16 128x128x64 masked", 8, 3, **_LARGE, WEIGHT=WEIGHT_MASK),
    _aot("bf16", "bf16 128x128x64 split", 8, 3, **_LARGE, SPLIT=True),
    _aot("bf16", "bf16 128x128x64 ones column", 8, 3, **_LARGE, ONES=True),
    _aot("bf16", "bf16 64x64x32 weighted", 4, 3, **_SMALL, WEIGHT=WEIGHT_ANY, UPCAST=True),
    _aot("fp32", "fp32 64x64x32", 4, 3, **_SMALL),
    {
        "kernel": _gram_reduce_kernel,
        "signature": {"part_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32", "SPLITS": "i32"},
        "constexprs": {"GROUP": GROUP, "BLOCK_M": 128, "BLOCK_N": 128, "ROWS": 16},
        "num_warps": 4,
        "num_stages": 3,
        "aligned": ["part_ptr", "out_ptr", "N"],
        "label": "fp32 16x128 of a tile",
    },
]
