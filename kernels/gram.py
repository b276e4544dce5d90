"""Gram matrices: `out += X^T diag(weight) X`, one triangle of tiles.

tensor | dtype            | shape                   | layout
-------|------------------|-------------------------|------------------------------------------
x      | fp32, bf16, fp16 | [B, T, C]               | any strides; `panels` are its descriptors
weight | fp32             | [B, T]                  | contiguous, optional
out    | fp32             | [B, N, N]               | contiguous, symmetric; N = C, or C + 1 with
       |                  |                         | a virtual column of ones
part   | fp32             | [P, S, M, N of tile]    | tiles whose tokens S programs share
tiles  | i32              | [tiles of a matrix]     | row of the tile << 16 | column of the tile

A program owns one tile on or below the diagonal, walks all tokens, and stores the tile and its
mirror image. Where the tiles do not fill the GPU a whole number of times, the last ones are shared:
several programs take some of the tokens each, and a second stage adds up. 16-bit inputs go to the
matrix units as they are: their products are exact in the fp32 accumulator.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# Tiles of this many rows of tiles run next to each other, so that the panels they share are still
# in the L2 cache.
GROUP = 16

# Fewer tokens than this a split are not worth a second stage, and what that costs, in tokens.
MIN_SPLIT_TOKENS, SPLIT_COST = 1024, 512

WEIGHT_NONE, WEIGHT_MASK, WEIGHT_ANY = 0, 1, 2

# Matrix units drop bits whenever they add to their accumulator: after this many tokens it is added
# to an ordinary sum and starts again. On an H200 16384 tokens in one accumulator left sums short by
# 6e-5 of the largest, 4096 by 1.2e-5.
CHUNK = 4096
# Where tiles have no registers for a second sum, a launch takes no more tokens than this.
LAUNCH_TOKENS = 16384

# Sides from which tiles of 128 x 256 fill the GPU. H200, 16384 tokens, against cuBLAS's whole bf16
# product: 1.70 times as fast with 4096 columns, 1.88 with 8192; tiles of 128 x 128 with second sums
# 1.54 and 1.49, by ordinary instead of bulk copies 1.20 and 1.07.
WIDE_SIDE = 3072

_WIDE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "CHUNK": 0, "PART": 32}
_LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "CHUNK": CHUNK, "PART": 16}
_SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "CHUNK": 0, "PART": 32}


@triton.jit
def _load_columns(x_ptrs, live, cols, C, ONES: tl.constexpr):
    """`[BLOCK_K, BLOCK]` of x at the live tokens, the virtual column of ones included."""
    x = tl.load(x_ptrs, mask=live[:, None] & (cols < C)[None, :], other=0.0)
    if ONES:
        x = tl.where(live[:, None] & (cols == C)[None, :], 1.0, x).to(x.dtype)
    return x


@triton.jit
def _store_mirrored(out_ptr, acc, row, col, N):
    """Adds the tile at (row, col) to the lower triangle and copies it to its mirror image. What the
    tile holds above the diagonal is dropped: both halves come from one value, so they are equal
    bits."""
    M: tl.constexpr = acc.shape[0]
    W: tl.constexpr = acc.shape[1]
    m, n = tl.arange(0, M)[:, None], tl.arange(0, W)[None, :]
    # Where a tile starts takes 64 bits; inside it 32 do.
    lower = out_ptr + row.to(tl.int64) * N + col + (m * N + n)
    upper = out_ptr + col.to(tl.int64) * N + row + (n * N + m)
    if (row >= col + W) & (row + M <= N):
        acc += tl.load(lower)
        tl.store(lower, acc)
        tl.store(upper, acc)
    else:
        keep = (row + m >= col + n) & (row + m < N) & (col + n < N)
        acc += tl.load(lower, mask=keep, other=0.0)
        tl.store(lower, acc, mask=keep)
        tl.store(upper, acc, mask=keep & (row + m > col + n))


@triton.jit
def _store_in_parts(out_ptr, acc, row, col, N, WIDTH: tl.constexpr):
    """`_store_mirrored`, WIDTH columns at a time: the old values of a whole tile do not fit in the
    registers beside the new ones."""
    if acc.shape[1] <= WIDTH:
        _store_mirrored(out_ptr, acc, row, col, N)
    else:
        HALF: tl.constexpr = acc.shape[1] // 2
        halves = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1)
        left, right = tl.split(halves)
        _store_in_parts(out_ptr, left, row, col, N, WIDTH)
        _store_in_parts(out_ptr, right, row, col + HALF, N, WIDTH)


@triton.jit
def _locate_tile(tiles_ptr, tile, tiles):
    """Matrix of the batch, row tile and column tile of `tile`."""
    place = tl.load(tiles_ptr + tile % tiles)
    return tile // tiles, place >> 16, place & 0xFFFF


@triton.jit
def _sum_tokens(
    x_ptr,
    panels_m,
    panels_n,
    weight_ptr,
    batch,
    row,
    col,
    first,
    last,
    T,
    C,
    stride_b,
    stride_t,
    stride_c,
    DESCRIPTORS: tl.constexpr,
    ONES: tl.constexpr,
    WEIGHT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile at (row, col) of X^T diag(weight) X, over the tokens [first, last)."""
    if not DESCRIPTORS:
        # Where a tile starts takes 64 bits; inside it 32 do (`indexable` sees to that).
        x_ptr += batch.to(tl.int64) * stride_b + first.to(tl.int64) * stride_t
        weight_ptr += batch.to(tl.int64) * T + first
        k, rows_m, cols_n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        a_ptrs = x_ptr + row.to(tl.int64) * stride_c
        b_ptrs = x_ptr + col.to(tl.int64) * stride_c
        a_ptrs += k[:, None] * stride_t + rows_m[None, :] * stride_c
        b_ptrs += k[:, None] * stride_t + cols_n[None, :] * stride_c
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for t in range(first, last, BLOCK_K):
        if DESCRIPTORS:
            a = panels_m.load([batch, t, row]).reshape(BLOCK_K, BLOCK_M)
            b = panels_n.load([batch, t, col]).reshape(BLOCK_K, BLOCK_N)
        else:
            live = k < last - t
            if WEIGHT != 0:
                w = tl.load(weight_ptr + k, mask=live, other=0.0)
                live = live & (w != 0.0)
                weight_ptr += BLOCK_K
            a = _load_columns(a_ptrs, live, row + rows_m, C, ONES)
            b = _load_columns(b_ptrs, live, col + cols_n, C, ONES)
            a_ptrs += BLOCK_K * stride_t
            b_ptrs += BLOCK_K * stride_t
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if WEIGHT == 2:
            a = a * w[:, None]
        # Full fp32 products: "tf32x3", on the matrix units, loses their last two or three bits.
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    return acc


# Counts that differ with every shape: code of their own for multiples of 16 would gain nothing.
_COUNTS = ["tiles", "whole", "splits"]


@triton.jit(do_not_specialize=_COUNTS)
def _gram_kernel(
    x_ptr,
    panels_m,
    panels_n,
    weight_ptr,
    out_ptr,
    part_ptr,
    tiles_ptr,
    T,
    C,
    N,
    stride_b,
    stride_t,
    stride_c,
    tiles,
    whole,
    splits,
    tokens_per_split,
    DESCRIPTORS: tl.constexpr,
    ONES: tl.constexpr,
    WEIGHT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    work = tl.program_id(0)
    # The first `whole` programs take all tokens of a tile, the others a share of them each.
    shared = tl.maximum(work - whole, 0)
    first, last = (shared % splits) * tokens_per_split, T
    if work >= whole:
        last = tl.minimum(first + tokens_per_split, T)
    tile = tl.minimum(work, whole) + shared // splits
    batch, tile_m, tile_n = _locate_tile(tiles_ptr, tile, tiles)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    if CHUNK == 0:
        acc = _sum_tokens(
            x_ptr, panels_m, panels_n, weight_ptr, batch, row, col, first, last, T, C, stride_b,
            stride_t, stride_c, DESCRIPTORS, ONES, WEIGHT, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for i in range(tl.cdiv(last - first, CHUNK)):
            start = first + i * CHUNK
            acc += _sum_tokens(
                x_ptr, panels_m, panels_n, weight_ptr, batch, row, col, start,
                tl.minimum(start + CHUNK, last), T, C, stride_b, stride_t, stride_c, DESCRIPTORS,
                ONES, WEIGHT, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if work < whole:
        _store_in_parts(out_ptr + batch.to(tl.int64) * N * N, acc, row, col, N, PART)
    else:
        m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        slot = part_ptr + shared.to(tl.int64) * (BLOCK_M * BLOCK_N)
        tl.store(slot + (m * BLOCK_N + n), acc)


@triton.jit(do_not_specialize=_COUNTS)
def _gram_reduce_kernel(
    part_ptr,
    out_ptr,
    tiles_ptr,
    N,
    tiles,
    whole,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Second stage: sums ROWS rows of a tile over the splits in order, adds and mirrors them."""
    shared = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    batch, tile_m, tile_n = _locate_tile(tiles_ptr, whole + shared, tiles)
    m, n = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_N)[None, :]
    part_ptr += shared.to(tl.int64) * splits * (BLOCK_M * BLOCK_N) + first * BLOCK_N
    acc = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for _ in range(splits):
        acc += tl.load(part_ptr + (m * BLOCK_N + n))
        part_ptr += BLOCK_M * BLOCK_N
    _store_mirrored(
        out_ptr + batch.to(tl.int64) * N * N, acc, tile_m * BLOCK_M + first, tile_n * BLOCK_N, N
    )


def _is_interpreted() -> bool:
    return not isinstance(_gram_kernel, triton.JITFunction)


def large_stages(capability: int) -> int:
    """Steps of a tile of 128 x 128 and more that are under way, by the compute capability's first
    number: as many as its shared memory has room for."""
    return 4 if capability in (9, 10) else 3


def _blocks(x: torch.Tensor, upcast: bool, described: bool) -> dict[str, int]:
    """Tile sides and launch options. 16-bit: two warpgroups of 64 rows each feed the matrix units;
    fp32 runs on the ordinary multipliers and wants smaller tiles."""
    if _is_interpreted():
        small = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "CHUNK": 256, "PART": 16}
        return small | {"num_warps": 4, "num_stages": 1}
    if x.dtype == torch.float32 or upcast:
        return _SMALL | {"num_warps": 4, "num_stages": 3}
    stages = large_stages(torch.cuda.get_device_capability(x.device)[0])
    wide = described and x.shape[2] >= WIDE_SIDE
    return (_WIDE if wide else _LARGE) | {"num_warps": 8, "num_stages": stages}


@functools.lru_cache(maxsize=64)
def _tiles(side: int, block_m: int, block_n: int, device: torch.device) -> torch.Tensor:
    """The tiles with a part on or below the diagonal, int32 `row tile << 16 | column tile`, in the
    order in which programs take them: GROUP rows of tiles, column by column, then the next ones."""
    down, across = triton.cdiv(side, block_m), triton.cdiv(side, block_n)
    row, col = torch.arange(down)[:, None], torch.arange(across)
    order = ((row // GROUP * across + col) * GROUP + row % GROUP).flatten().argsort()
    below = ((row + 1) * block_m > col * block_n).flatten()[order]
    return (row << 16 | col).flatten()[order][below].int().to(device)


def _weight_mode(weight: torch.Tensor | None) -> int:
    """A mask of zeros and ones leaves 16-bit inputs as they are; other weights need fp32 products.
    Telling them apart waits for the device once a call."""
    if weight is None:
        return WEIGHT_NONE
    return WEIGHT_MASK if bool(((weight == 0) | (weight == 1)).all()) else WEIGHT_ANY


def _splits(tiles: int, slots: int, tokens: int) -> int:
    """Into how many shares the tokens of `tiles` tiles are cut, to keep all of `slots` programs
    that run at a time busy: the number that takes the fewest tokens one after the other."""

    def steps(splits: int) -> float:
        overhead = 0 if splits == 1 else SPLIT_COST
        return triton.cdiv(tiles * splits, slots) * (tokens / splits + overhead)

    return min(range(1, max(1, tokens // MIN_SPLIT_TOKENS) + 1), key=steps)


def _slots(x: torch.Tensor, num_warps: int) -> int:
    """How many programs run at a time: eight warps fill a multiprocessor's registers."""
    if x.device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(x.device).multi_processor_count * 8 // num_warps


def _describable(x: torch.Tensor) -> bool:
    """Whether Hopper's bulk copy engine (or the interpreter in its place) can read `x` `[B, T, C]`:
    its rows are contiguous and all start at multiples of 16 bytes."""
    engine = _is_interpreted() or torch.cuda.get_device_capability(x.device)[0] == 9
    steps = [x.stride(dim) for dim in (0, 1) if x.shape[dim] > 1]
    aligned = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    return engine and x.stride(2) == 1 and x.data_ptr() % 16 == 0 and aligned


def _descriptor(x: torch.Tensor, block_k: int, block: int) -> TensorDescriptor:
    # A dimension of one element takes any stride; what it has may not be a multiple of 16 bytes.
    row = triton.cdiv(x.shape[2], 8) * 8
    step_t = x.stride(1) if x.shape[1] > 1 else row
    step_b = x.stride(0) if x.shape[0] > 1 else step_t
    return TensorDescriptor(x, list(x.shape), [step_b, step_t, 1], [1, block_k, block])


def indexable(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if its strides are so large that an offset inside a tile needs over 32 bits."""
    return x if max(x.stride(-1), x.stride(-2)) * 256 < 2**31 else x.contiguous()


def gram_triton(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None) -> None:
    target = out.contiguous().view(-1, *out.shape[-2:])
    x = indexable(x if x.dim() == 3 else x[None])
    w = None if weight is None else weight.float().view(x.shape[:2])
    mode = _weight_mode(w)
    describable = target.shape[-1] == x.shape[2] and x.element_size() == 2 and _describable(x)
    if w is not None and mode == WEIGHT_MASK and describable and len(x) == 1:
        # Copying the tokens that count costs a tenth of telling them apart in every tile.
        x, w, mode = x[:, w[0] != 0], None, WEIGHT_NONE
    described = describable and mode == WEIGHT_NONE
    blocks = _blocks(x, mode == WEIGHT_ANY, described)
    if target.shape[-1] > x.shape[2]:  # the column of ones leaves too few registers for another sum
        blocks = blocks | {"CHUNK": 0}
    tokens = x.shape[1]
    most = LAUNCH_TOKENS if x.element_size() == 2 and blocks["CHUNK"] == 0 else max(tokens, 1)
    for first in range(0, tokens, most):
        span = slice(first, first + most)
        part = None if w is None else w[:, span].contiguous()
        _accumulate(target, x[:, span], part, mode, described, blocks)
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view_as(out))


def _accumulate(
    target: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mode: int,
    described: bool,
    blocks: dict[str, int],
) -> None:
    batch, tokens, columns = x.shape
    side = target.shape[-1]
    tile_m, tile_n, block_k = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
    places = _tiles(side, tile_m, tile_n, x.device)
    tiles = batch * len(places)
    # All tokens of a tile to one program, as long as that keeps all of them busy.
    slots = _slots(x, blocks["num_warps"])
    whole = tiles // slots * slots
    splits = _splits(tiles - whole, slots, tokens)
    span = triton.cdiv(triton.cdiv(tokens, splits), block_k) * block_k
    splits = triton.cdiv(tokens, span)
    if splits == 1:
        whole = tiles
    shared = tiles - whole
    part = target
    if shared:
        shape = (shared, splits, tile_m, tile_n)
        part = torch.empty(shape, dtype=torch.float32, device=x.device)
    _gram_kernel[(whole + shared * splits,)](
        x,
        _descriptor(x, block_k, tile_m) if described else None,
        _descriptor(x, block_k, tile_n) if described else None,
        x if weight is None else weight,
        target,
        part,
        places,
        tokens,
        columns,
        side,
        *x.stride(),
        len(places),
        whole,
        splits,
        span,
        DESCRIPTORS=described,
        ONES=side > columns,
        WEIGHT=mode,
        UPCAST=_is_interpreted() or mode == WEIGHT_ANY,
        **blocks,
        enable_fp_fusion=True,
    )
    if shared:
        rows = min(16, tile_m)
        _gram_reduce_kernel[(shared, tile_m // rows)](
            part,
            target,
            places,
            side,
            len(places),
            whole,
            splits,
            BLOCK_M=tile_m,
            BLOCK_N=tile_n,
            ROWS=rows,
            enable_fp_fusion=True,
        )


def _aot(dtype: str, label: str, blocks: dict[str, int], warps: int, **flags) -> dict:
    sizes = ["T", "C", "N", "stride_b", "stride_t", "tiles", "whole", "splits", "tokens_per_split"]
    panels = {
        f"panels_{side.lower()}": f"tensordesc<{dtype}[1, {blocks['BLOCK_K']}, {blocks[name]}]>"
        for side, name in (("m", "BLOCK_M"), ("n", "BLOCK_N"))
    }
    fixed = {"DESCRIPTORS": False, "ONES": False, "WEIGHT": 0, "UPCAST": False, "stride_c": 1}
    if not flags.get("DESCRIPTORS", False):
        fixed |= dict.fromkeys(panels)
    pointers = ["weight_ptr", "out_ptr", "part_ptr"]
    return {
        "kernel": _gram_kernel,
        **({"targets": ["sm_90"]} if flags.get("DESCRIPTORS", False) else {}),
        "signature": {"x_ptr": f"*{dtype}", **panels, "tiles_ptr": "*i32"}
        | dict.fromkeys(pointers, "*fp32")
        | dict.fromkeys(sizes, "i32"),
        "constexprs": fixed | blocks | flags,
        "num_warps": warps,
        "num_stages": large_stages if warps == 8 else 3,
        # Launches find these out by themselves; without them no load is wide enough to be
        # asynchronous.
        "aligned": ["T", "C", "N", "stride_b", "stride_t", "tokens_per_split"],
        "label": label,
    }


AOT = [
    _aot("bf16", "bf16 128x256x64 bulk copies", _WIDE, 8, DESCRIPTORS=True),
    _aot("bf16", "bf16 128x128x64 bulk copies", _LARGE, 8, DESCRIPTORS=True),
    _aot("bf16", "bf16 128x128x64", _LARGE, 8),
    _aot("fp16", "fp16 128x128x64 masked", _LARGE, 8, WEIGHT=WEIGHT_MASK),
    _aot("bf16", "bf16 128x128x64 ones column", _LARGE | {"CHUNK": 0}, 8, ONES=True),
    _aot("bf16", "bf16 64x64x32 weighted", _SMALL, 4, WEIGHT=WEIGHT_ANY, UPCAST=True),
    _aot("fp32", "fp32 64x64x32", _SMALL, 4),
    *(
        {
            "kernel": _gram_reduce_kernel,
            "signature": {
                "part_ptr": "*fp32",
                "out_ptr": "*fp32",
                "tiles_ptr": "*i32",
                **dict.fromkeys(["N", "tiles", "whole", "splits"], "i32"),
            },
            "constexprs": {"BLOCK_M": 128, "BLOCK_N": width, "ROWS": 16},
            "num_warps": 4,
            "num_stages": 3,
            "aligned": ["N"],
            "label": f"fp32 16x{width} of a tile",
        }
        for width in (128, 256)
    ),
]
