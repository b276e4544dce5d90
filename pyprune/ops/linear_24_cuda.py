"""2:4 products on CUDA devices: which kernel serves how many rows of x.

rows of x     | kernel
--------------|----------------------------------------------------------------------------
up to 64      | `csrc/cuda/linear_24.cu`: sparse tensor cores on W as it is stored
above         | cuSPARSELt through PyTorch, its algorithm searched once a shape of W and power of
              | two of rows; where PyTorch was built without it, the expanded matrix and a dense
              | product

Up to 64 rows the product is a matter of reading W. Above, arithmetic decides, and the library is
the better tool; its compressed copy of W is made at the first such product and kept while `values`
lives, which costs another 9/16 of the dense bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyprune import _native
from pyprune.ops.pack import unpack_24

ROWS = 64  # of x that the kernel takes
WORD = 64  # columns that a warp reads at once: C must be a multiple
ALIGNMENT = 16  # bytes of a load

# What cuSPARSELt asks of 16-bit operands: the rows of x are padded to the first, R and C must be
# multiples of the second.
LIBRARY_TOKENS = 8
LIBRARY_ALIGNMENT = 16


@dataclass
class _LibraryWeight:
    """W in cuSPARSELt's layout, for one state of `values` and `meta`."""

    packed: Tensor
    state: tuple[int, int, int]


_library_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()

# cuSPARSELt's algorithm by what it may depend on. Searching takes 25 to 80 ms (H200), so layers of
# one shape share it, and so do numbers of tokens up to the same power of two: prompts come in any.
_algorithms: dict[tuple[object, ...], int] = {}


def algorithm_key(x: Tensor, rows: int, bias: Tensor | None) -> tuple[object, ...]:
    """What products share an algorithm: device, dtype, shape, rows of x up to a power of two."""
    tokens = 1 << (x.shape[0] - 1).bit_length()
    return x.device, x.dtype, rows, x.shape[1], tokens, bias is not None


def limits(x: Tensor, values: Tensor, *rest: Tensor | None) -> str:
    """Why the CUDA implementation cannot serve these arguments; empty if it can."""
    if x.dtype not in (torch.bfloat16, torch.float16) or values.dtype != x.dtype:
        return f"it takes x and values both bf16 or both fp16, got {x.dtype} and {values.dtype}"
    if x.shape[-1] % WORD:
        return f"it takes a multiple of {WORD} columns, got {x.shape[-1]}"
    return ""


def library_serves(rows: int, cols: int) -> bool:
    """Whether cuSPARSELt takes a W of this shape here."""
    fits = rows % LIBRARY_ALIGNMENT == 0 and cols % LIBRARY_ALIGNMENT == 0
    return fits and torch.backends.cusparselt.is_available()


def _aligned(t: Tensor) -> Tensor:
    """`t`, contiguous and from an address that the kernel's 16-byte loads can start at: a slice of
    a flat buffer may begin anywhere."""
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()


def _version(t: Tensor) -> int:
    """How often `t` was written to; inference tensors do not count, and are taken not to change."""
    return 0 if t.is_inference() else t._version


def linear_24_cuda(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows = values.shape[0]
    if flat.shape[0] <= ROWS:
        y = _few_rows(_aligned(flat), _aligned(values), _aligned(meta), bias)
    elif library_serves(rows, flat.shape[1]):
        y = _library(flat, values, meta, bias)
    else:
        weight = unpack_24(values, meta)
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], rows)


def _few_rows(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape[0], values.shape[0])
    if y.numel() == 0:
        return y
    if bias is not None:
        bias = bias.float().contiguous()
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with torch.cuda.device(x.device):
        _native.call("linear_24_cuda", y, x, values, meta, _native.optional_capsule(bias), stream)
    return y


def _library(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    state = (_version(values), id(meta), _version(meta))
    weight: _LibraryWeight | None = _library_weights.get(values)  # type: ignore[no-untyped-call]
    if weight is None or weight.state != state:
        weight = _LibraryWeight(torch._cslt_compress(unpack_24(values, meta)), state)
        _library_weights[values] = weight
    m = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -m % LIBRARY_TOKENS))
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    key = algorithm_key(padded, values.shape[0], bias)
    if key not in _algorithms:
        _algorithms[key] = torch._cslt_sparse_mm_search(
            weight.packed, padded.T, bias=bias, transpose_result=True
        )
    y = torch._cslt_sparse_mm(
        weight.packed, padded.T, bias=bias, transpose_result=True, alg_id=_algorithms[key]
    )
    return y[:m]
