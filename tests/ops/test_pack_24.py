import pytest
import selection
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from pyprune import ops
from pyprune.ops import registry

OP = "pack_24"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATTERN = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    view = PATTERN[a.element_size()]
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(view), b.view(view))


def sparse(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """2:4 sparse, at most two kept a group, with special values among the kept ones."""
    w = selection.weights("special", rows, cols, dtype, seed)
    gen = torch.Generator().manual_seed(seed + 1)
    order = torch.rand(rows, cols // 4, 4, generator=gen).argsort(2)
    few = torch.randint(0, 3, (rows, cols // 4, 1), generator=gen)
    return torch.where((order < few).view(rows, cols), w, torch.zeros((), dtype=dtype))


def random_mask(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return sparse(rows, cols, torch.float32, seed).view(torch.int32) != 0


def brute_force(w: torch.Tensor, mask: torch.Tensor | None):
    """Values and metadata by the rules of the docstring, one group after another."""
    values, meta = [], []
    for i, row in enumerate(w.tolist()):
        nibbles = []
        for c in range(0, len(row), 4):
            group = row[c : c + 4]
            keep = [x != 0 for x in group] if mask is None else mask[i, c : c + 4].tolist()
            order = [j for j in range(4) if keep[j]]
            if mask is None:
                signs = torch.signbit(w[i, c : c + 4]).tolist()
                order += [j for j in range(4) if not keep[j] and signs[j]]
            order += [j for j in (2, 3, 0, 1) if j not in order]
            low, high = sorted(order[:2])
            values += [
                w[i, c + j] if mask is None or keep[j] else w.new_zeros(()) for j in (low, high)
            ]
            nibbles.append(low | high << 2)
        meta.append([a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True)])
    return torch.stack(values).view(len(w), -1), torch.tensor(meta, dtype=torch.uint8)


@pytest.mark.parametrize("cols", [8, 40, 64, 136])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_brute_force_and_restores(backend, device, use_backend, dtype, cols, masked):
    use_backend(backend, OP, device, dtype)
    w = sparse(3, cols, dtype)
    mask = random_mask(3, cols) if masked else None
    if masked:
        w = selection.weights("special", 3, cols, dtype)
    values, meta = ops.pack_24(w.to(device), None if mask is None else mask.to(device))
    want_values, want_meta = brute_force(w, mask)
    assert same_bits(values, want_values) and torch.equal(meta.cpu(), want_meta)
    restored = ops.unpack_24(values, meta)
    zero = torch.zeros((), dtype=dtype)
    assert same_bits(restored, w if mask is None else torch.where(mask, w, zero))
    if mask is None:
        again = ops.pack_24(restored)
        assert same_bits(again[0], values) and torch.equal(again[1], meta)


def test_negative_zeros_survive_where_there_is_room(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = torch.tensor([[-0.0, 0, 0, -0.0, 5, -0.0, -0.0, 0, -0.0, -0.0, -0.0, 1, 0, 0, 0, 0]])
    want = torch.tensor([[-0.0, 0, 0, -0.0, 5, -0.0, 0, 0, -0.0, 0, 0, 1, 0, 0, 0, 0]])
    got = ops.unpack_24(*ops.pack_24(w.to(device)))
    assert same_bits(got, want)
    # A mask decides alone: a kept negative zero stays, a dropped weight does not.
    mask = torch.tensor([[True, False, False, False] * 4])
    got = ops.unpack_24(*ops.pack_24(w.to(device), mask.to(device)))
    assert same_bits(got, torch.where(mask, w, torch.zeros(())))


def test_padding_of_a_mask_is_plus_zero(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = torch.full((1, 8), -7.0, device=device)
    values, meta = ops.pack_24(w, torch.zeros(1, 8, dtype=torch.bool, device=device))
    assert same_bits(values, torch.zeros(1, 4)) and meta.item() == 0b1110_1110


def test_nan_payloads_survive(backend, device, use_backend):
    use_backend(backend, OP, device, torch.bfloat16)
    bits = torch.tensor([[0x7F81, 0, -1, 0, 0, 0x7FC1, 0, -0x7F]], dtype=torch.int16)
    w = bits.view(torch.bfloat16).to(device)
    assert same_bits(ops.unpack_24(*ops.pack_24(w)), w)


def test_strided_input(backend, device, use_backend):
    use_backend(backend, OP, device)
    big = sparse(16, 48, torch.float32).to(device)
    for w in (big[::2, 8:40], big.T.contiguous().T):
        assert same_bits(ops.unpack_24(*ops.pack_24(w)), w)
        mask = random_mask(*w.shape).to(device).T.contiguous().T
        want = torch.where(mask, w, torch.zeros((), device=device))
        assert same_bits(ops.unpack_24(*ops.pack_24(w, mask)), want)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rows_that_start_anywhere(backend, device, use_backend, dtype):
    use_backend(backend, OP, device, dtype)
    w, mask = sparse(4, 40, dtype).to(device), random_mask(4, 40).to(device)
    want = ops.pack.pack_24_reference(w, mask)[:2]
    for start in (1, 3, 8):
        moved, moved_mask = (t.new_zeros(5, 48)[1:, start : start + 40] for t in (w, mask))
        values, meta = ops.pack_24(moved.copy_(w), moved_mask.copy_(mask))
        assert same_bits(values, want[0]) and torch.equal(meta.cpu(), want[1].cpu())
        later = values.new_zeros(start + 80)[start:].view(4, 20).copy_(values)
        later_meta = meta.new_zeros(start + 20)[start:].view(4, 5).copy_(meta)
        assert same_bits(ops.unpack_24(later, later_meta), ops.unpack_24(values, meta))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_every_instruction_set(isa, use_isa, dtype):
    use_isa(isa)
    for cols in (56, 64, 200):
        w = sparse(5, cols, dtype)
        full = torch.where(w == 0, torch.ones((), dtype=dtype), w)
        for dense, mask in ((w, None), (full, random_mask(5, cols)), (full, ops.mask_nm(w, 2, 4))):
            values, meta = ops.pack_24(dense, mask)
            want = ops.pack.pack_24_reference(dense, mask)[:2]
            assert same_bits(values, want[0]) and torch.equal(meta, want[1])
            want = ops.pack.unpack_24_reference(values, meta)
            assert same_bits(ops.unpack_24(values, meta), want)


def test_too_many_kept(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = torch.zeros(3, 72, device=device)
    w[2, 1:4] = 1.0
    w[1, 64:68] = 1.0
    with pytest.raises(ValueError, match="row 1, columns 64 to 67"):
        ops.pack_24(w)
    mask = torch.zeros(3, 72, dtype=torch.bool, device=device)
    mask[2, 4:7] = True
    with pytest.raises(ValueError, match="row 2, columns 4 to 7"):
        ops.pack_24(w, mask)
    # The op itself only says where, so that nothing has to wait for it.
    assert torch.ops.pyprune.pack_24(w, None)[2].tolist() == [(72 + 64) // 4]
    assert torch.ops.pyprune.pack_24(w.clamp(max=0), None)[2].tolist() == [-1]


def test_empty(backend, device, use_backend):
    use_backend(backend, OP, device)
    for shape in ((0, 8), (3, 0)):
        values, meta = ops.pack_24(torch.empty(shape, device=device))
        assert values.shape == (shape[0], shape[1] // 2)
        assert ops.unpack_24(values, meta).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_agrees_with_torch_semi_structured(dtype):
    for rows, cols in ((32, 64), (96, 192)):
        w = torch.nan_to_num(sparse(rows, cols, dtype), nan=3.0) + 0.0  # no negative zeros
        packed, reordered = ops.to_torch_sparse_24(*ops.pack_24(w))
        want_packed, want_reordered = sparse_semi_structured_from_dense_cutlass(w)
        assert same_bits(packed, want_packed) and torch.equal(reordered, want_reordered)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, reordered), w)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((16, 64), torch.bfloat16, "32n rows"),
        ((32, 32), torch.bfloat16, "64n columns"),
        ((32, 64), torch.float32, "bf16 or fp16"),
    ],
)
def test_sizes_that_torch_has_no_layout_for(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        ops.to_torch_sparse_24(*ops.pack_24(sparse(*shape, dtype)))


def test_broken_metadata_is_refused():
    values, meta = ops.pack_24(sparse(4, 32, torch.float32))
    for nibble in (0b0000, 0b0001, 0b0110, 0b1111):
        for shift in (0, 4):
            bad = meta.clone()
            bad[2, 3] = (int(meta[2, 3]) & (0xF0 >> shift)) | nibble << shift
            with pytest.raises(ValueError, match=r"meta: expected two ascending .* row 2, byte 3"):
                ops.unpack_24(values, bad)
    ops.validate_24(values, meta)


def test_every_byte_of_metadata_is_judged():
    for byte in range(256):
        first, second, third, fourth = (byte >> shift & 3 for shift in (0, 2, 4, 6))
        meta = torch.full((2, 3), 0x44, dtype=torch.uint8)
        meta[1, 2] = byte
        if first < second and third < fourth:
            ops.validate_24(torch.zeros(2, 12), meta)
        else:
            with pytest.raises(ValueError, match=rf"nibble, got {byte} in row 1, byte 2"):
                ops.validate_24(torch.zeros(2, 12), meta)


@pytest.mark.parametrize(
    ("values", "meta", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 2), "meta: expected torch.uint8"),
        (torch.zeros(2, 8), torch.zeros(2, 3, dtype=torch.uint8), "meta: expected shape"),
        (torch.zeros(2, 6), torch.zeros(2, 1, dtype=torch.uint8), "values: expected a multiple"),
        (torch.zeros(2), torch.zeros(2, 1, dtype=torch.uint8), "values: expected 2 dim"),
    ],
)
def test_bad_packed_arguments(values, meta, message):
    with pytest.raises(ValueError, match=message):
        ops.unpack_24(values, meta)


@pytest.mark.parametrize(
    ("w", "mask", "message"),
    [
        (torch.zeros(2, 12), None, "w: expected a multiple of 8 columns, got 12"),
        (torch.zeros(8), None, "w: expected 2 dimensions"),
        (torch.zeros(2, 8), torch.ones(2, 8), "mask: expected torch.bool"),
        (torch.zeros(2, 8), torch.ones(8).bool(), "mask: expected shape"),
    ],
)
def test_bad_dense_arguments(w, mask, message):
    with pytest.raises(ValueError, match=message):
        ops.pack_24(w, mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.sampled_from(DTYPES), st.integers(0, 99))
def test_fuzz(rows, bytes_, dtype, seed):
    w = sparse(rows, 8 * bytes_, dtype, seed)
    values, meta = ops.pack_24(w)
    want_values, want_meta = brute_force(w, None)
    assert same_bits(values, want_values) and torch.equal(meta, want_meta)
    assert same_bits(ops.unpack_24(values, meta), w)


def test_independent_of_thread_count():
    w = sparse(50, 200, torch.bfloat16)
    threads = torch.get_num_threads()
    want = ops.pack_24(w)
    try:
        torch.set_num_threads(1)
        got = ops.pack_24(w)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(got[0], want[0]) and torch.equal(got[1], want[1])


def test_opcheck():
    w = sparse(4, 16, torch.float32).nan_to_num(1.0)
    torch.library.opcheck(torch.ops.pyprune.pack_24, (w, None))
    torch.library.opcheck(torch.ops.pyprune.unpack_24, ops.pack_24(w))


def test_backends_of_both_directions_agree():
    assert set(registry.IMPLS["pack_24"]) == set(registry.IMPLS["unpack_24"])


def test_twice_the_bytes_of_metadata_may_not_fit_in_32_bits(device):
    # The Triton kernel's first program, told that it packs 2^33 weights, as a stack of experts has.
    from pyprune.kernels.pack import _pack_24_kernel

    w = sparse(256, 8, torch.bfloat16).to(device)
    want_values, want_meta, _ = ops.pack.pack_24_reference(w, None)
    values, meta = torch.zeros_like(want_values), torch.zeros_like(want_meta)
    overfull = torch.zeros(1, dtype=torch.int64, device=device)
    _pack_24_kernel[(1,)](
        w.view(torch.int16), w, values.view(torch.int16), meta, overfull, 2**30, 8, 8, 1,
        SIGN=-(2**15), HAS_MASK=False, BLOCK=256,
    )  # fmt: skip
    assert same_bits(values, want_values) and torch.equal(meta, want_meta)
