"""2:4 products on CUDA devices: which kernel serves how many rows of x.

rows of x     | kernel
--------------|----------------------------------------------------------------------------
up to 64      | `csrc/cuda/linear_24.cu`: sparse tensor cores on W as it is stored
above, large  | cuSPARSELt through PyTorch, with bf16 its algorithm searched once a shape of W and
              | power of two of rows
above, else   | the expanded matrix, made anew by `unpack_24`, and a dense product

That is for 16-bit x and values of one dtype and a multiple of 64 columns. Others go to Triton
(`kernels/sparse_linear.py`), whose backend expands the matrix from 17 rows on.

Up to 64 rows the product is a matter of reading W. Above, arithmetic decides, and the library is
the better tool, but PyTorch makes a new plan of its at every call: about half a millisecond of the
host's time, whatever the size (H200: a model of 224 products took 126 ms for 256 tokens and for
1,024, launched from Python). So the library serves a product that takes the device longer than
that (`LIBRARY_FLOPS`), and smaller ones in a CUDA graph, whose launches cost the host nothing, if
W was prepared for it (`prepare_library`, or a larger product before). Its compressed copy of W is
kept while `values` lives, which costs another 9/16 of the dense bytes.

Speed as a multiple of cuBLAS's on the dense matrix, bf16, H200, CUDA graphs, W out of memory:

rows of x | 4096 x 4096 | 4096 x 14336 | 14336 x 4096 | 28672 x 8192 | cuSPARSELt on these
----------|-------------|--------------|--------------|--------------|--------------------
        1 |        2.1  |         1.9  |         1.7  |         1.7  |
        8 |        2.0  |         1.7  |         1.6  |         1.7  |
       16 |        1.7  |         1.4  |         1.6  |         1.6  | 0.6 to 0.7
       32 |        0.9  |         0.9  |         1.0  |         1.1  | 0.6 to 0.7
       64 |        0.5  |         0.6  |         0.9  |         0.9  | 0.5 to 0.8
     4096 |             |              |              |              | 1.4 to 1.6

With 17 to 64 rows neither is worth it for every shape; the format then saves memory alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyprune import _native
from pyprune.ops._expanded import multiply_dense

ROWS = 64  # of x that the kernel takes
WORD = 64  # columns that a warp reads at once: C must be a multiple

# What cuSPARSELt asks of 16-bit operands: the rows of x are padded to the first, R and C must be
# multiples of the second.
LIBRARY_TOKENS = 8
LIBRARY_ALIGNMENT = 16
# Multiplications and additions of a dense product from which on the library gains more than its
# plan costs: 0.55 ms in cuBLAS and the expansion before it, H200.
LIBRARY_FLOPS = 4e11


@dataclass
class _LibraryWeight:
    """W in cuSPARSELt's layout, for one state of `values` and `meta`. Holds the memory that these
    had: until they are converted anew no other tensor has its addresses."""

    packed: Tensor
    state: tuple[int, ...]
    memory: tuple[Tensor, Tensor]


_library_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()

# cuSPARSELt's algorithm by what it may depend on. Searching takes 25 to 80 ms (H200), so layers of
# one shape share it, and so do numbers of tokens up to the same power of two: prompts come in any.
_algorithms: dict[tuple[object, ...], int] = {}


# What is passed for the algorithm where none was searched: the library's own choice.
DEFAULT_ALGORITHM = 0


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


def _version(t: Tensor) -> int:
    """How often `t` was written to; inference tensors do not count, and are taken not to change.
    Writes to `t.data` are not counted either."""
    return 0 if t.is_inference() else t._version


def linear_24_cuda(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows = values.shape[0]
    if flat.shape[0] <= ROWS:
        y = _few_rows(_native.aligned(flat), _native.aligned(values), _native.aligned(meta), bias)
    elif library_serves(rows, flat.shape[1]) and _library_pays(flat, values, meta, bias):
        y = _library(flat, values, meta, bias)
    else:
        return expand_and_multiply(x, values, meta, bias)
    return y.reshape(*x.shape[:-1], rows)


def expand_and_multiply(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """The product by way of the dense matrix, for all dtypes but fp64 and on any device."""
    if not len(values):
        return x.new_empty((*x.shape[:-1], 0))
    # The op, not the public function: validating would wait for the device at every call.
    return multiply_dense(x, torch.ops.pyprune.unpack_24(values, meta), bias)


def _few_rows(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape[0], values.shape[0])
    if y.numel() == 0:
        return y
    if bias is not None:
        bias = bias.float().contiguous()
    extra = _native.optional_capsule(bias)
    _native.launch("linear_24_cuda", x.device, y, x, values, meta, extra)
    return y


def _library_pays(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> bool:
    rows = values.shape[0]
    if not torch.cuda.is_current_stream_capturing():
        return 2.0 * x.shape[0] * x.shape[1] * rows >= LIBRARY_FLOPS
    # Neither the search nor the conversion of W may be recorded.
    searched = x.dtype == torch.float16 or algorithm_key(x, rows, bias) in _algorithms
    return searched and _known(values, meta) is not None


def prepare_library(
    values: Tensor, meta: Tensor, tokens: int, *, bias: Tensor | None = None
) -> bool:
    """Converts W for cuSPARSELt and searches the algorithm for as many rows of x as `tokens`, so
    that a CUDA graph captured later multiplies with it. False where the library gets no such
    product."""
    rows, cols = values.shape[0], 2 * values.shape[1]
    x = values.new_zeros(tokens, cols)
    if tokens <= ROWS or limits(x, values) or not library_serves(rows, cols):
        return False
    _library(x, values, meta, bias)
    return True


def _known(values: Tensor, meta: Tensor) -> Tensor | None:
    """The library's copy of W, if it was made from what the two hold now."""
    weight: _LibraryWeight | None = _library_weights.get(values)  # type: ignore[no-untyped-call]
    return weight.packed if weight is not None and weight.state == _state(values, meta) else None


def _state(values: Tensor, meta: Tensor) -> tuple[int, ...]:
    """Changes when one of them is replaced, written to or given other memory (`.data`)."""
    return tuple(n for t in (values, meta) for n in (t.data_ptr(), _version(t)))


def _library(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    packed = _known(values, meta)
    if packed is None:
        # The state first: what another thread writes meanwhile must not pass for converted.
        memory = values.detach(), meta.detach()
        state = _state(*memory)
        packed = torch._cslt_compress(torch.ops.pyprune.unpack_24(*memory))
        _library_weights[values] = _LibraryWeight(packed, state, memory)
    m = x.shape[0]
    # Without anything to pad it would still copy x: a tenth of the product's time.
    missing = -m % LIBRARY_TOKENS
    padded = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    algorithm = _algorithm(packed, padded, values.shape[0], bias)
    y = torch._cslt_sparse_mm(packed, padded.T, bias=bias, transpose_result=True, alg_id=algorithm)
    return y[:m]


def _algorithm(packed: Tensor, x: Tensor, rows: int, bias: Tensor | None) -> int:
    if x.dtype == torch.float16:
        # With cuSPARSELt 0.8.0 on an H200 every search among fp16 algorithms failed (64 x 64 and
        # 4096 x 4096, "internal error"), and what is worse, one of the kernels that it tried ended
        # in an illegal instruction, after which the process can use the device no more.
        return DEFAULT_ALGORITHM
    key = algorithm_key(x, rows, bias)
    if key not in _algorithms:
        _algorithms[key] = _search(packed, x.T, bias)
    return _algorithms[key]


def _search(packed: Tensor, xt: Tensor, bias: Tensor | None) -> int:
    """cuSPARSELt's fastest algorithm, by PyTorch's new function where it has it: the old one warns
    of its removal."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is not None:
        # Takes bias, alpha, dtype, whether to transpose the result; yields the algorithm and more.
        found: int = search(packed, xt, bias, None, None, True)[0]
        return found
    return torch._cslt_sparse_mm_search(packed, xt, bias=bias, transpose_result=True)
