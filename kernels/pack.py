"""Packing to 2:4 and bitmap layouts and back. Weights travel as integers of their width, so that
every bit pattern survives.

tensor      | dtype          | shape            | layout
------------|----------------|------------------|---------------------------------------
w           | int16 or int32 | [R, C]           | any strides when packing
mask        | int8 (0 or 1)  | [R, C]           | contiguous, optional
values      | w's            | [R, C/2] / [nnz] | contiguous
meta        | uint8          | [R, C/8]         | contiguous
bitmap      | uint8          | [R, ceil(C/8)]   | contiguous
row_offsets | int64          | [R + 1]          | contiguous
"""

import torch
import triton
import triton.language as tl

# Columns that one program's loop step takes: 16 elements a thread.
BLOCK = 2048


@triton.jit
def _pack_24_kernel(
    w_ptr,
    mask_ptr,
    values_ptr,
    meta_ptr,
    overfull_ptr,
    BYTES,
    C,
    stride_r,
    stride_c,
    SIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A metadata byte is two groups of four columns.
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = 2 * tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, 2 * BLOCK)
    index = tl.arange(0, 4)
    there = group < 2 * tl.cast(BYTES, tl.int64)
    valid = there[:, None] & (index >= 0)[None, :]
    flat = 4 * group[:, None] + index[None, :]
    w = tl.load(w_ptr + flat // C * stride_r + flat % C * stride_c, mask=valid, other=0)
    padding = (10 + index) % 4 + 8
    order = padding[None, :] + tl.zeros_like(w).to(tl.int32)
    if HAS_MASK:
        keep = tl.load(mask_ptr + flat, mask=valid, other=0) != 0
        w = tl.where(keep, w, 0)
    else:
        keep = (w & ~SIGN) != 0
        order = tl.where(w == SIGN, 4 + index[None, :], order)
    order = tl.where(keep, index[None, :], order)
    earlier = (order[:, None, :] < order[:, :, None]).to(tl.int32)
    stored = (tl.sum(earlier, axis=2) < 2).to(tl.int32)
    before = (index[None, :] < index[:, None]).to(tl.int32)
    slot = tl.sum(stored[:, None, :] * before[None, :, :], axis=2)
    tl.store(values_ptr + 2 * group[:, None] + slot, w, mask=valid & (stored > 0))
    nibble = tl.sum(stored * (index[None, :] << (2 * slot)), axis=1)
    low, high = tl.split(tl.reshape(nibble, [BLOCK, 2]))
    tl.store(meta_ptr + byte, (low | (high << 4)).to(tl.uint8), mask=byte < BYTES)
    crowded = (tl.sum(keep.to(tl.int32), axis=1) > 2) & there
    first = tl.min(tl.where(crowded, group, 0x7FFFFFFFFFFFFFFF), axis=0)
    tl.store(overfull_ptr + tl.program_id(0), first)


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def pack_24_triton(
    w: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, cols = w.shape
    values = torch.empty(rows, cols // 2, dtype=w.dtype, device=w.device)
    meta = torch.empty(rows, cols // 8, dtype=torch.uint8, device=w.device)
    block = 256
    programs = triton.cdiv(meta.numel(), block)
    overfull = torch.empty(programs, dtype=torch.int64, device=w.device)
    kept = None if mask is None else mask.contiguous().view(torch.int8)
    _pack_24_kernel[(programs,)](
        _bits(w),
        w if kept is None else kept,
        _bits(values),
        meta,
        overfull,
        meta.numel(),
        cols,
        w.stride(0),
        w.stride(1),
        SIGN=-(1 << (8 * w.element_size() - 1)),
        HAS_MASK=kept is not None,
        BLOCK=block,
        enable_fp_fusion=True,
    )
    first = overfull.min().view(1)
    return values, meta, torch.where(first < 2 * meta.numel(), first, -1)


@triton.jit
def _unpack_24_kernel(values_ptr, meta_ptr, w_ptr, NUMEL, BLOCK: tl.constexpr):
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = flat < NUMEL
    group, index = flat // 4, (flat % 4).to(tl.int32)
    meta = tl.load(meta_ptr + group // 2, mask=valid, other=0).to(tl.int32)
    nibble = (meta >> (4 * (group % 2)).to(tl.int32)) & 15
    second = (index == (nibble >> 2)).to(tl.int32)
    stored = (index == (nibble & 3)) | (second > 0)
    value = tl.load(values_ptr + 2 * group + second, mask=valid & stored, other=0)
    tl.store(w_ptr + flat, value, mask=valid)


def unpack_24_triton(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    rows, half = values.shape
    w = torch.empty(rows, 2 * half, dtype=values.dtype, device=values.device)
    _unpack_24_kernel[(triton.cdiv(w.numel(), BLOCK),)](
        _bits(values.contiguous()),
        meta.contiguous(),
        _bits(w),
        w.numel(),
        BLOCK=BLOCK,
        enable_fp_fusion=True,
    )
    return w


@triton.jit
def _bitmap_rows_kernel(
    w_ptr,
    mask_ptr,
    bitmap_ptr,
    counts_ptr,
    C,
    BYTES,
    stride_r,
    stride_c,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    bit = tl.arange(0, 8)
    kept = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, BYTES, BLOCK):
        byte = start + tl.arange(0, BLOCK)
        col = 8 * byte[:, None] + bit[None, :]
        valid = col < C
        if HAS_MASK:
            x = tl.load(mask_ptr + row * C + col, mask=valid, other=0)
        else:
            x = tl.load(w_ptr + row * stride_r + col.to(tl.int64) * stride_c, mask=valid, other=0)
        keep = (x != 0).to(tl.int32)
        packed = tl.sum(keep << bit[None, :], axis=1)
        tl.store(bitmap_ptr + row * BYTES + byte, packed.to(tl.uint8), mask=byte < BYTES)
        kept += tl.sum(keep, axis=1)
    tl.store(counts_ptr + row, tl.sum(kept, axis=0).to(tl.int64))


@triton.jit
def _bitmap_values_kernel(
    w_ptr,
    values_ptr,
    bitmap_ptr,
    row_offsets_ptr,
    C,
    BYTES,
    COUNT,
    stride_r,
    stride_c,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(row_offsets_ptr + row)
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        valid = col < C
        byte = tl.load(bitmap_ptr + row * BYTES + col // 8, mask=valid, other=0).to(tl.int32)
        keep = ((byte >> (col % 8)) & 1) * valid.to(tl.int32)
        place = begin + tl.cumsum(keep, axis=0) - keep
        at = w_ptr + row * stride_r + col.to(tl.int64) * stride_c
        if PACK:
            tl.store(values_ptr + place, tl.load(at, mask=keep > 0, other=0), mask=keep > 0)
        else:
            # Inside the values, whatever the offsets say.
            place = tl.minimum(tl.maximum(place, 0), COUNT - 1)
            tl.store(at, tl.load(values_ptr + place, mask=keep > 0, other=0), mask=valid)
        begin += tl.sum(keep, axis=0)


def pack_bitmap_triton(
    w: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, cols = w.shape
    width = (cols + 7) // 8
    bitmap = torch.empty(rows, width, dtype=torch.uint8, device=w.device)
    counts = torch.empty(rows, dtype=torch.int64, device=w.device)
    bits = _bits(w)
    kept = None if mask is None else mask.contiguous().view(torch.int8)
    _bitmap_rows_kernel[(rows,)](
        bits, bits if kept is None else kept, bitmap, counts, cols, width, *w.stride(),
        HAS_MASK=kept is not None, BLOCK=BLOCK // 8, enable_fp_fusion=True,
    )  # fmt: skip
    row_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    values = torch.empty(int(row_offsets[-1]), dtype=w.dtype, device=w.device)
    _bitmap_values_kernel[(rows,)](
        bits,
        _bits(values),
        bitmap,
        row_offsets,
        cols,
        width,
        values.numel(),
        *w.stride(),
        PACK=True,
        BLOCK=BLOCK,
        enable_fp_fusion=True,
    )
    return values, bitmap, row_offsets


def unpack_bitmap_triton(
    values: torch.Tensor, bitmap: torch.Tensor, row_offsets: torch.Tensor, cols: int
) -> torch.Tensor:
    rows, width = bitmap.shape
    if values.numel() == 0:
        return values.new_zeros(rows, cols)
    w = torch.empty(rows, cols, dtype=values.dtype, device=values.device)
    _bitmap_values_kernel[(rows,)](
        _bits(w), _bits(values.contiguous()), bitmap.contiguous(), row_offsets.contiguous(), cols,
        width, values.numel(), *w.stride(), PACK=False, BLOCK=BLOCK, enable_fp_fusion=True,
    )  # fmt: skip
    return w


def _aot(kernel, pointers: str, ints: str, label: str, **constexprs) -> list[dict]:
    types = {"mask_ptr": "*i8", "meta_ptr": "*u8", "bitmap_ptr": "*u8", "counts_ptr": "*i64",
             "row_offsets_ptr": "*i64", "overfull_ptr": "*i64"}  # fmt: skip
    return [
        {
            "kernel": kernel,
            "signature": {
                **{p: types.get(p, f"*i{8 * width}") for p in pointers.split()},
                **{i: "i64" if i in ("NUMEL", "COUNT") else "i32" for i in ints.split()},
            },
            "constexprs": {
                k: (-(1 << (8 * width - 1)) if k == "SIGN" else v) for k, v in constexprs.items()
            },
            "aligned": ("C", "BYTES", "NUMEL", "stride_r"),
            "num_warps": 4,
            "label": f"{width} bytes {label}",
        }
        for width in (2, 4)
    ]


_PACK = "w_ptr mask_ptr values_ptr meta_ptr overfull_ptr"
_ROWS = "w_ptr mask_ptr bitmap_ptr counts_ptr"
_MOVE = "w_ptr values_ptr bitmap_ptr row_offsets_ptr"
AOT = [
    *_aot(_pack_24_kernel, _PACK, "BYTES C stride_r", "mask",
          SIGN=None, HAS_MASK=True, BLOCK=256, stride_c=1),
    *_aot(_pack_24_kernel, _PACK, "BYTES C stride_r", "",
          SIGN=None, HAS_MASK=False, BLOCK=256, stride_c=1),
    *_aot(_unpack_24_kernel, "values_ptr meta_ptr w_ptr", "NUMEL", "", BLOCK=BLOCK),
    *_aot(_bitmap_rows_kernel, _ROWS, "C BYTES stride_r", "mask",
          HAS_MASK=True, BLOCK=BLOCK // 8, stride_c=1),
    *_aot(_bitmap_rows_kernel, _ROWS, "C BYTES stride_r", "",
          HAS_MASK=False, BLOCK=BLOCK // 8, stride_c=1),
    *_aot(_bitmap_values_kernel, _MOVE, "C BYTES COUNT stride_r", "pack",
          PACK=True, BLOCK=BLOCK, stride_c=1),
    *_aot(_bitmap_values_kernel, _MOVE, "C BYTES COUNT stride_r", "unpack",
          PACK=False, BLOCK=BLOCK, stride_c=1),
]  # fmt: skip
