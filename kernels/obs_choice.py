"""Which keys of a matrix are kept when the smallest go: a radix select for the OBS sweep's blocks.

tensor    | dtype | shape          | layout
----------|-------|----------------|------------------------------------------------------------
keys      | i32   | [B, N]         | contiguous; scores as order-preserving integers
state     | i64   | [B, L + 1, 2]  | contiguous; prefix of the key sought and its rank, a level each
histogram | i32   | [B, L, BINS]   | contiguous; counts of a level's digit
ties      | i32   | [B, blocks]    | contiguous; keys of a block that equal the one sought
kept      | u8    | [B, N]         | contiguous; 1 = kept

L = 4 levels, a digit of 8 bits each. Nothing waits for the host: each launch reads what the one
before it counted.
"""

import torch
import triton
import triton.language as tl

# Radix select, digit by digit from the top. 256 bins: a histogram's cost grows with its bins.
BINS = 256
SHIFTS = (24, 16, 8, 0)
KEYS_PER_PROGRAM = 4096


@triton.jit
def _next_digit(state_ptr, histogram_ptr, BINS: tl.constexpr):
    """Of the state `(prefix, wanted)` before a digit and the counts of that digit among the keys
    with this prefix: the state after it. The wanted-th smallest key has the new prefix, and is the
    new wanted-th among the keys that have it."""
    prefix, wanted = tl.load(state_ptr), tl.load(state_ptr + 1)
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins)
    running = tl.cumsum(counts, 0)
    digit = tl.sum((running < wanted).to(tl.int32), 0)
    before = tl.sum(tl.where(bins < digit, counts, 0), 0)
    return prefix * BINS + digit, wanted - before


@triton.jit
def _digit_histogram_kernel(
    keys_ptr,
    state_ptr,
    histogram_ptr,
    N,
    LEVEL: tl.constexpr,
    SHIFT: tl.constexpr,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the digit at SHIFT of the keys whose digits above it are those of the key sought.

    Keys are taken up by one, so that the lowest is 0: they reach 2^31. `state` is int64
    `[B, LEVELS + 1, 2]`, `histogram` int32 `[B, LEVELS, BINS]`: each level reads what the one
    before it left there.
    """
    batch = tl.program_id(1).to(tl.int64)
    state_ptr += batch * (LEVELS + 1) * 2
    histogram_ptr += batch * LEVELS * BINS + LEVEL * BINS
    prefix = tl.zeros([], dtype=tl.int64)
    if LEVEL > 0:
        prefix, wanted = _next_digit(state_ptr + (LEVEL - 1) * 2, histogram_ptr - BINS, BINS)
        if tl.program_id(0) == 0:
            tl.store(state_ptr + LEVEL * 2, prefix)
            tl.store(state_ptr + LEVEL * 2 + 1, wanted)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + batch * N + i, mask=i < N, other=0).to(tl.int64) + 1
    counted = (i < N) & ((key >> SHIFT) // BINS == prefix)
    digit = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
    counts = tl.histogram(digit, BINS, mask=counted)
    # Integer additions: the order of the programs does not show in the sums.
    tl.atomic_add(histogram_ptr + tl.arange(0, BINS), counts, mask=counts > 0)


@triton.jit
def _count_ties_kernel(
    keys_ptr,
    state_ptr,
    histogram_ptr,
    ties_ptr,
    N,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys of each block equal the one sought, int32 `[B, blocks]`."""
    batch = tl.program_id(1).to(tl.int64)
    state_ptr += batch * (LEVELS + 1) * 2 + (LEVELS - 1) * 2
    histogram_ptr += batch * LEVELS * BINS + (LEVELS - 1) * BINS
    sought, wanted = _next_digit(state_ptr, histogram_ptr, BINS)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + 2, sought)
        tl.store(state_ptr + 3, wanted)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + batch * N + i, mask=i < N, other=-2).to(tl.int64) + 1
    ties = tl.sum((key == sought).to(tl.int32), 0)
    tl.store(ties_ptr + batch * tl.num_programs(0) + tl.program_id(0), ties)


@triton.jit(do_not_specialize=["count_stride"])
def _keep_kernel(
    keys_ptr,
    count_ptr,
    state_ptr,
    ties_ptr,
    kept_ptr,
    N,
    count_stride,
    LEVELS: tl.constexpr,
    ALL_TIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keeps what is above the key sought, and of those equal to it all but the first wanted ones
    (none if ALL_TIES)."""
    batch = tl.program_id(1).to(tl.int64)
    state_ptr += batch * (LEVELS + 1) * 2 + LEVELS * 2
    sought, wanted = tl.load(state_ptr), tl.load(state_ptr + 1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + batch * N + i, mask=i < N, other=0).to(tl.int64) + 1
    pruned = key <= sought
    if not ALL_TIES:
        ties_ptr += batch * tl.num_programs(0)
        before = tl.zeros([BLOCK], dtype=tl.int32)
        for first in range(0, tl.program_id(0), BLOCK):
            block = first + tl.arange(0, BLOCK)
            before += tl.load(ties_ptr + block, mask=block < tl.program_id(0), other=0)
        tie = key == sought
        rank = tl.sum(before, 0) + tl.cumsum(tie.to(tl.int32), 0)
        pruned = pruned & ((rank <= wanted) | (key < sought))
        pruned = pruned & (tl.load(count_ptr + batch * count_stride) > 0)
    # Key 0 is what must stay pruned.
    tl.store(kept_ptr + batch * N + i, (~pruned & (key > 0)).to(tl.uint8), mask=i < N)


def keep_but_smallest(keys: torch.Tensor, count: torch.Tensor, all_ties: bool) -> torch.Tensor:
    """Which of `keys` `[B, N]` are kept when the `count[b]` smallest go, the lower index first
    among equal ones. No host synchronisation, six launches."""
    batch, n = keys.shape
    blocks, levels = triton.cdiv(n, KEYS_PER_PROGRAM), len(SHIFTS)
    state = torch.zeros(batch, levels + 1, 2, dtype=torch.int64, device=keys.device)
    state[:, 0, 1] = count.clamp(min=1)
    histogram = torch.zeros(batch, levels, BINS, dtype=torch.int32, device=keys.device)
    ties = torch.empty(batch, blocks, dtype=torch.int32, device=keys.device)
    kept = torch.empty(keys.shape, dtype=torch.bool, device=keys.device)
    sizes = {"LEVELS": levels, "BLOCK": KEYS_PER_PROGRAM}
    grid = (blocks, batch)
    for level, shift in enumerate(SHIFTS):
        _digit_histogram_kernel[grid](
            keys,
            state,
            histogram,
            n,
            LEVEL=level,
            SHIFT=shift,
            BINS=BINS,
            **sizes,
            enable_fp_fusion=True,
        )
    _count_ties_kernel[grid](
        keys, state, histogram, ties, n, BINS=BINS, **sizes, enable_fp_fusion=True
    )
    _keep_kernel[grid](
        keys,
        count,
        state,
        ties,
        kept.view(torch.uint8),
        n,
        count.stride(0),
        ALL_TIES=all_ties,
        **sizes,
        enable_fp_fusion=True,
    )
    return kept


_SELECT = {
    "keys_ptr": "*i32",
    "count_ptr": "*i32",
    "state_ptr": "*i64",
    "histogram_ptr": "*i32",
    "ties_ptr": "*i32",
    "kept_ptr": "*u8",
    "N": "i32",
    "count_stride": "i32",
}
_SELECT_SIZES = {"LEVELS": len(SHIFTS), "BLOCK": KEYS_PER_PROGRAM}

AOT = [
    *(
        {
            "kernel": _digit_histogram_kernel,
            "label": f"radix digit at bit {shift}",
            "signature": _SELECT,
            "constexprs": {"LEVEL": level, "SHIFT": shift, "BINS": BINS, **_SELECT_SIZES},
            "num_warps": 4,
            "num_stages": 3,
            "aligned": ["N"],
        }
        for level, shift in enumerate(SHIFTS)
    ),
    {
        "kernel": _count_ties_kernel,
        "signature": _SELECT,
        "constexprs": {"BINS": BINS, **_SELECT_SIZES},
        "num_warps": 4,
        "num_stages": 3,
        "aligned": ["N"],
    },
    {
        "kernel": _keep_kernel,
        "signature": _SELECT,
        "constexprs": {"ALL_TIES": False, **_SELECT_SIZES},
        "num_warps": 4,
        "num_stages": 3,
        "aligned": ["N"],
    },
]
