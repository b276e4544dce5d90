"""bf16 matrices with coded exponents, lossless, and products with them.

The exponents of a weight matrix are few: in each row seven neighbouring ones hold all but a few per
cent of the elements. Three bits say which of the seven, or that the exponent is written elsewhere.
Rotated left by one bit, a bf16 is a byte of exponent and a byte of mantissa and sign.

tensor      | dtype, shape                | what
------------|-----------------------------|--------------------------------------------------------
low         | uint8 `[R, C]`              | mantissa and sign: the low byte of the rotated pattern
codes       | uint8 `[R, 3 ceil(C/8)]`    | three bits an element, the lower first: columns 8 j to
            |                             | 8 j + 7 are bytes 3 j to 3 j + 2, a little-endian
            |                             | number; bits past C zero. 0 to 6: the exponent less the
            |                             | row's base; 7: an escape
bases       | uint8 `[R]`                 | at most 249
escapes     | uint8 `[n]`                 | the exponents of the escapes, row after row, in column
            |                             | order
row_offsets | int64 `[R + 1]`             | where each row's escapes start

11 bits an element, 8 more for an escape, and 9 bytes a row: about 11.4 bits a weight, 0.71 of bf16.
Every pattern is kept, infinities, NaNs, subnormals and negative zeros too. bf16 alone: of fp16's
five exponent bits a code saves two, hardly a tenth with the escapes; fp32 is mostly mantissa.

On the CPU rows are decoded in registers (AVX-512 with VBMI2) or a first-level cache. At one row of
x, where the memory decides, a product takes about 0.7 of the dense bf16 kernel's time. Where
decoding decides it takes longer than that kernel: 1.1 to 1.4 times as long at twelve to sixteen
rows, and with AVX2 alone 1.5 to 1.8 times at one to four rows on a core that has the memory to
itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyprune import _native
from pyprune.ops import _transforms, registry
from pyprune.ops._checks import (
    accumulation_dtype,
    check_array,
    check_same_device,
    check_shape,
    check_tensor,
)
from pyprune.ops._precision import full_precision
from pyprune.ops.sparse_linear import check_activations, native_linear
from pyprune.ops.storage import row_blocks

WINDOW = 7  # exponents that have a code of their own
ESCAPE = 7
LARGEST_BASE = 255 - (WINDOW - 1)
GROUP = 8  # columns that share GROUP_BYTES of codes
GROUP_BYTES = 3
LARGEST_INT32 = torch.iinfo(torch.int32).max
# Elements that are unpacked at a time where that takes several whole-matrix steps of int64.
_BLOCK_ELEMENTS = 1 << 21


def _row_blocks(rows: int, cols: int) -> list[slice]:
    return row_blocks((rows, max(256, cols)), _BLOCK_ELEMENTS)  # packing counts 256 a row


def _code_bytes(cols: int) -> int:
    return GROUP_BYTES * -(-cols // GROUP)


def _split(w: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents and low bytes, uint8."""
    bits = w.contiguous().view(torch.int16).int() & 0xFFFF
    return (bits >> 7 & 0xFF).to(torch.uint8), (bits << 1 & 0xFE | bits >> 15).to(torch.uint8)


def _joined(exponents: Tensor, low: Tensor) -> Tensor:
    high = exponents.short() << 7 | low.short() >> 1  # 15 bits
    return torch.where((low & 1).bool(), high | -0x8000, high).view(torch.bfloat16)


def _windows(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """The base of each row, whose window has the most of its elements (the least where equal), and
    how many are outside."""
    rows, cols = exponents.shape
    counts = torch.zeros(rows, 256, dtype=torch.int32, device=exponents.device)
    ones = torch.ones((), dtype=torch.int32, device=exponents.device).expand(exponents.shape)
    counts.scatter_add_(1, exponents.long(), ones)
    inside = counts.unfold(1, WINDOW, 1).sum(2)
    most, bases = inside.max(1)
    bases = (inside == most[:, None]).int().argmax(1)
    return bases.to(torch.uint8), cols - most.long()


def _pack_codes(codes: Tensor) -> Tensor:
    rows, cols = codes.shape
    padded = torch.nn.functional.pad(codes.int(), (0, -cols % GROUP)).view(rows, -1, GROUP)
    shifts = 3 * torch.arange(GROUP, device=codes.device, dtype=torch.int32)
    words = (padded << shifts).sum(2, dtype=torch.int32)
    parts = [words >> 8 * k & 0xFF for k in range(GROUP_BYTES)]
    return torch.stack(parts, 2).view(rows, -1).to(torch.uint8)


def _unpack_codes(codes: Tensor, cols: int) -> Tensor:
    rows = codes.shape[0]
    parts = codes.view(rows, -1, GROUP_BYTES).int()
    words = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    shifts = 3 * torch.arange(GROUP, device=codes.device, dtype=torch.int32)
    return (words[..., None] >> shifts & 7).view(rows, -1)[:, :cols].to(torch.uint8)


def _check_matrix(w: Tensor) -> None:
    check_tensor("w", w)
    if w.dim() != 2 or w.dtype != torch.bfloat16:
        raise ValueError(f"w: expected a bf16 matrix, got {tuple(w.shape)} of {w.dtype}")


def count_escapes(w: Tensor) -> int:
    """How many escapes `pack_coded` makes of `w`: all that its size depends on."""
    _check_matrix(w)
    blocks = _row_blocks(*w.shape) if w.numel() else []
    return sum(int(_windows(_split(w[rows])[0])[1].sum()) for rows in blocks)


def pack_coded(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A bf16 matrix with its exponents coded; `unpack_coded` restores it bit for bit.

    Args:
        w: `[R, C]`, bf16; any strides, any patterns.

    Returns:
        low, codes, bases, escapes and row_offsets as in the module's docstring, the base of each
        row such that the fewest of its exponents escape (the least one of several).

    Raises:
        ValueError: w is no bf16 matrix.
    """
    _check_matrix(w)
    rows, cols = w.shape
    low = w.new_empty(rows, cols, dtype=torch.uint8)
    codes = w.new_empty(rows, _code_bytes(cols), dtype=torch.uint8)
    bases = w.new_zeros(rows, dtype=torch.uint8)
    counts = w.new_zeros(rows, dtype=torch.int64)
    escapes = [low.new_empty(0)]
    for block in _row_blocks(rows, cols) if w.numel() else []:
        exponents, low[block] = _split(w[block])
        bases[block], counts[block] = _windows(exponents)
        above = exponents.short() - bases[block].short()[:, None]
        escaped = (above < 0) | (above >= WINDOW)
        codes[block] = _pack_codes(above.masked_fill_(escaped, ESCAPE))
        escapes.append(exponents[escaped])
    row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return low, codes, bases, torch.cat(escapes), row_offsets


def _check_coded(
    low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor
) -> None:
    for name, t, dims in (
        ("low", low, 2), ("codes", codes, 2), ("bases", bases, 1), ("escapes", escapes, 1),
    ):  # fmt: skip
        if t.dtype != torch.uint8 or t.dim() != dims:
            raise ValueError(
                f"{name}: expected {dims} dimensions of torch.uint8, got {t.dim()} of {t.dtype}"
            )
    rows, cols = low.shape
    check_shape("codes", codes, (rows, _code_bytes(cols)))
    check_shape("bases", bases, (rows,))
    check_array("row_offsets", row_offsets, torch.int64, (rows + 1,))
    check_same_device(low, codes, bases, escapes, row_offsets)


def validate_coded(
    low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor
) -> None:
    """Raises ValueError unless these describe a matrix: shapes and dtypes agree, offsets rise from
    0 to the number of escapes, each row has as many escape codes as escapes, no base is so large
    that a code would pass 255, and no bit of a code lies past the last column."""
    _check_coded(low, codes, bases, escapes, row_offsets)
    rows, cols = low.shape
    ends = row_offsets[[0, -1]].tolist()
    if ends != [0, escapes.numel()]:
        raise ValueError(f"row_offsets: expected to run from 0 to {escapes.numel()}, got {ends}")
    counts = row_offsets.diff()
    if (counts < 0).any():
        row = int((counts < 0).nonzero()[0])
        raise ValueError(f"row_offsets: expected to be monotone, fall after row {row}")
    if (bases > LARGEST_BASE).any():
        row = int((bases > LARGEST_BASE).nonzero()[0])
        raise ValueError(
            f"bases: expected at most {LARGEST_BASE}, got {int(bases[row])} in row {row}"
        )
    if not low.numel():
        return
    wide = GROUP * (codes.shape[1] // GROUP_BYTES)
    for block in _row_blocks(rows, wide):
        found = _unpack_codes(codes[block], wide)
        if found[:, cols:].any():
            raise ValueError(f"codes: expected no bits past column {cols - 1}")
        escaped = (found == ESCAPE).sum(1)
        if not torch.equal(escaped, counts[block]):
            at = int((escaped != counts[block]).nonzero()[0])
            raise ValueError(
                f"codes: expected as many escapes in each row as row_offsets have, got "
                f"{int(escaped[at])} and {int(counts[block][at])} in row {block.start + at}"
            )


def _unpack_rows(
    low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, first: Tensor
) -> Tensor:
    """Rows whose tensors are given, and where the escapes of each start: `first [n]`."""
    found = _unpack_codes(codes, low.shape[1])
    exponents = found + bases[:, None]
    if escapes.numel():
        escaped, last = found == ESCAPE, len(escapes) - 1
        # On a GPU places were most of the bytes that unpacking moves: not twice as wide as needed.
        kind = torch.int32 if last + low.shape[1] <= LARGEST_INT32 else torch.int64
        at = escaped.cumsum(1, dtype=kind)
        at += first.sub(1).clamp_(-1, last)[:, None].to(kind)
        at.clamp_(0, last)  # inside, whatever the offsets say
        # Not `escapes[at]`, which widens to int64.
        others = escapes.index_select(0, at.flatten()).view_as(at)
        exponents = torch.where(escaped, others, exponents)
    return _joined(exponents, low)


def unpacked_rows(
    low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor,
    rows: slice | Tensor,
) -> Tensor:  # fmt: skip
    """bf16: those of `rows`, without a look at what they hold."""
    parts = (low[rows], codes[rows], bases[rows], escapes)
    return _unpack_rows(*parts, row_offsets[:-1][rows])


def unpack_coded_reference(
    low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor,
    rows: Tensor | None,
) -> Tensor:  # fmt: skip
    # On a GPU indexing itself asserts; to look here would be to wait, which no graph may.
    if rows is not None and rows.numel() and rows.device.type == "cpu":
        least, most = (int(end) for end in rows.aminmax())
        if least < 0 or most >= len(low):
            wrong = least if least < 0 else most
            raise IndexError(f"rows: expected numbers from 0 to {len(low) - 1}, got {wrong}")
    n = len(low) if rows is None else len(rows)
    w = low.new_empty(n, low.shape[1], dtype=torch.bfloat16)
    for block in _row_blocks(n, low.shape[1]):
        chosen = block if rows is None else rows[block]
        w[block] = unpacked_rows(low, codes, bases, escapes, row_offsets, chosen)
    return w


def _unpack_coded_fake(
    low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor,
    rows: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_coded(low, codes, bases, escapes, row_offsets)
    n = low.shape[0] if rows is None else rows.shape[0]
    return low.new_empty(n, low.shape[1], dtype=torch.bfloat16)


def _unpack_coded_native(
    low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor,
    rows: Tensor | None,
) -> Tensor:  # fmt: skip
    n = low.shape[0] if rows is None else rows.shape[0]
    w = low.new_empty(n, low.shape[1], dtype=torch.bfloat16)
    if w.numel():
        chosen = None if rows is None else _native.capsule(rows.contiguous())
        parts = (low, codes, bases, escapes, row_offsets)
        _native.call("unpack_coded", w, chosen, *(t.contiguous() for t in parts))
    return w


registry.register(
    "unpack_coded(Tensor low, Tensor codes, Tensor bases, Tensor escapes, Tensor row_offsets,"
    " Tensor? rows) -> Tensor",
    fake=_unpack_coded_fake,
    impls={
        "reference": registry.Impl(unpack_coded_reference, (torch.uint8,)),
        "native": registry.Impl(_unpack_coded_native, (torch.uint8,)),
    },
)


def unpack_coded(
    low: Tensor,
    codes: Tensor,
    bases: Tensor,
    escapes: Tensor,
    row_offsets: Tensor,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """Rows of a coded matrix, bit for bit those that were packed.

    Args:
        low, codes, bases, escapes, row_offsets: as in the module's docstring.
        rows: int64 `[n]`, which ones; None: all.

    Returns:
        bf16 `[n, C]`.

    Raises:
        ValueError: a shape, dtype or device does not match, or (on the CPU) a row's codes and
            offsets disagree. `validate_coded` makes that check for all of them anywhere.
        IndexError: a row that is not there.
    """
    _check_coded(low, codes, bases, escapes, row_offsets)
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows: expected [n] of int64, got {tuple(rows.shape)} of {rows.dtype}")
    check_same_device(low, rows)
    w: Tensor = torch.ops.pyprune.unpack_coded(low, codes, bases, escapes, row_offsets, rows)
    return w


def _check_linear_coded(
    x: Tensor, low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor,
    bias: Tensor | None,
) -> None:  # fmt: skip
    _check_coded(low, codes, bases, escapes, row_offsets)
    check_activations(x, bias, low.shape[0])
    check_shape("low", low, (low.shape[0], x.shape[-1]))
    check_same_device(x, low, bias)


@full_precision()
def linear_coded_reference(
    x: Tensor, low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    wide = accumulation_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(wide)
    y = flat.new_empty(len(flat), len(low))
    # Some rows of W at a time: a head is by far the largest matrix of a model.
    for block in _row_blocks(*low.shape):
        part = unpacked_rows(low, codes, bases, escapes, row_offsets, block)
        y[:, block] = flat @ part.to(wide).T
    if bias is not None:
        y += bias.to(wide)
    return y.to(x.dtype).view(*x.shape[:-1], len(low))


def _linear_coded_fake(
    x: Tensor, low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check_linear_coded(x, low, codes, bases, escapes, row_offsets, bias)
    return x.new_empty((*x.shape[:-1], low.shape[0]))


def _linear_coded_native(
    x: Tensor, low: Tensor, codes: Tensor, bases: Tensor, escapes: Tensor, row_offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    weight = (low, codes, bases, escapes, row_offsets)
    return native_linear("linear_coded", x, low.shape[0], bias, *weight)


registry.register(
    "linear_coded(Tensor x, Tensor low, Tensor codes, Tensor bases, Tensor escapes,"
    " Tensor row_offsets, Tensor? bias) -> Tensor",
    fake=_linear_coded_fake,
    gradient=True,
    impls={
        "reference": registry.Impl(linear_coded_reference),
        "native": registry.Impl(_linear_coded_native, registry.HALF_OR_SINGLE),
        "triton": registry.Impl(
            "pyprune.kernels.linear_coded:linear_coded_triton",
            registry.HALF_OR_SINGLE,
        ),
    },
)


def linear_coded(
    x: Tensor,
    low: Tensor,
    codes: Tensor,
    bases: Tensor,
    escapes: Tensor,
    row_offsets: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """`y = x @ W^T + bias` for a coded `W [R, C]`.

    Args:
        x: activations `[..., C]`, bf16, fp16, fp32 or fp64; any strides.
        low, codes, bases, escapes, row_offsets: W as in the module's docstring.
        bias: `[R]` or None.

    Returns:
        `[..., R]` in x's dtype, products summed in fp32 and rounded once (fp64 x: computed in
        fp64). Processors that multiply bf16 natively take subnormal bf16 numbers for zero.

    On CUDA devices a Triton kernel takes up to 16 rows; for more of them some rows of W at a time
    are unpacked and multiplied densely: on tensor cores if x is bf16, else in fp32.

    Raises:
        ValueError: a shape, dtype or device does not match, or (on the CPU) a row's codes and
            offsets disagree. On a GPU nothing waits for such a check: `SparseLinear` makes it once,
            when a layer is loaded; `validate_coded` makes it for tensors from elsewhere.
    """
    _check_linear_coded(x, low, codes, bases, escapes, row_offsets, bias)
    return _transforms.call("linear_coded", x, low, codes, bases, escapes, row_offsets, bias)
