"""Products with coded bf16 weights for few rows of x.

tensor      | dtype            | shape
------------|------------------|----------------------------------------------
x           | fp32, bf16, fp16 | [M, C], M <= 16; widened to fp32
low         | uint8            | [R, C], mantissa and sign
codes       | uint8            | [R, 3 ceil(C/8)], three bits an element
bases       | uint8            | [R]
escapes     | uint8            | [n], exponents, row after row
row_offsets | int64            | [R + 1]
bias        | any float        | [R], optional
y           | x's              | [M, R]

All contiguous; `pyprune.ops.coded` describes the layout. As in sparse_linear a program owns BLOCK_R
rows of W, walks along the columns once, and takes the sums over the lanes at the end. A lane is a
group of eight columns, whose codes are three bytes. With more rows of x some rows of W at a time
are unpacked and multiplied by the library.
"""

import triton
import triton.language as tl

from pyprune.kernels import sparse_linear
from pyprune.kernels.sparse_linear import store_sums
from pyprune.ops._expanded import multiply_in_parts
from pyprune.ops.coded import unpacked_rows
from pyprune.ops.sparse_linear import has_many_rows

# Elements of W that are unpacked at a time: the steps in between take some 12 bytes each.
UNPACKED_ELEMENTS = 1 << 24


@triton.jit
def _escapes_of_group(word):
    # A bit for each of eight codes of three ones, and their number.
    ones = word & (word >> 1) & (word >> 2) & 0x249249
    twos = (ones + (ones >> 3)) & 0x0C30C3
    fours = (twos + (twos >> 6)) & 0x007007
    return (fours + (fours >> 12)) & 0xF


@triton.jit
def _linear_coded_kernel(
    x_ptr,
    low_ptr,
    codes_ptr,
    bases_ptr,
    escapes_ptr,
    offsets_ptr,
    bias_ptr,
    y_ptr,
    M,
    R,
    C,
    COUNT,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    groups = (C + 7) // 8
    x_rows = x_ptr + m[:, None].to(tl.int64) * C
    low_rows = low_ptr + rows.to(tl.int64)[:, None] * C
    codes_rows = codes_ptr + rows.to(tl.int64)[:, None] * (3 * groups)
    base = tl.load(bases_ptr + rows, mask=rows < R, other=0).to(tl.int32)[:, None]
    # Inside the escapes, whatever the offsets say; within a row they are counted in 32 bits.
    first = tl.load(offsets_ptr + rows, mask=rows < R, other=0)
    first = tl.minimum(tl.maximum(first, 0), COUNT)
    end = tl.minimum(tl.load(offsets_ptr + rows + 1, mask=rows < R, other=0), COUNT)
    length = tl.minimum(end - first, C).to(tl.int32)[:, None]
    escapes_rows = escapes_ptr + first[:, None]
    seen = tl.zeros([BLOCK_R], dtype=tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_R, BLOCK_G], dtype=tl.float32)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        inside = (rows < R)[:, None] & (g < groups)[None, :]
        word = tl.load(codes_rows + (3 * g)[None, :], mask=inside, other=0).to(tl.int32)
        for k in tl.static_range(1, 3):
            byte = tl.load(codes_rows + (3 * g + k)[None, :], mask=inside, other=0).to(tl.int32)
            word = word | (byte << (8 * k))
        count = _escapes_of_group(word)
        # Where each group's escapes start: those before it in this row.
        at = seen[:, None] + (tl.cumsum(count, axis=1) - count)
        seen += tl.sum(count, axis=1)
        for k in tl.static_range(8):
            c = 8 * g + k
            code = (word >> (3 * k)) & 7
            escaped = code == 7
            # Inside the row's own escapes, whatever the codes say.
            other = tl.load(escapes_rows + at, mask=escaped & (at < length), other=0)
            at += escaped.to(tl.int32)
            exponent = tl.where(escaped, other.to(tl.int32), (base + code) & 0xFF)
            w_mask = inside & (c < C)[None, :]
            low = tl.load(low_rows + c[None, :], mask=w_mask, other=0).to(tl.int32)
            bits = (low << 31) | (exponent << 23) | ((low >> 1) << 16)
            # Past the last column this is a power of two, and x is zero.
            w = bits.to(tl.float32, bitcast=True)
            x_mask = (m < M)[:, None] & (c < C)[None, :]
            x = tl.load(x_rows + c[None, :], mask=x_mask, other=0.0).to(tl.float32)
            acc += w[None, :, :] * x[:, None, :]
    store_sums(acc, y_ptr, bias_ptr, rows, M, R, BLOCK_M, HAS_BIAS)


def linear_coded_triton(x, low, codes, bases, escapes, row_offsets, bias):
    if has_many_rows(x):
        weight = (low, codes, bases, escapes, row_offsets)
        return multiply_in_parts(
            x, low.shape, lambda rows: unpacked_rows(*weight, rows), None, bias, UNPACKED_ELEMENTS
        )
    return sparse_linear.launch(
        _linear_coded_kernel, x, low.shape[0], bias, "BLOCK_G",
        low, codes, bases, escapes, row_offsets, more=(escapes.numel(),),
    )  # fmt: skip


_WEIGHT = {
    "low_ptr": "*u8", "codes_ptr": "*u8", "bases_ptr": "*u8", "escapes_ptr": "*u8",
    "offsets_ptr": "*i64",
}  # fmt: skip

AOT = [
    sparse_linear.aot(_linear_coded_kernel, _WEIGHT, {"COUNT": "i32"}, "BLOCK_G", block_m)
    for block_m in (1, 2, 4, 8, 16)
]
