import pytest
import selection
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops
from pyprune.ops import registry

OP = "pack_bitmap"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATTERN = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    view = PATTERN[a.element_size()]
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(view), b.view(view))


def sparse(rows: int, cols: int, dtype: torch.dtype, density: float = 0.5, seed: int = 0):
    w = selection.weights("special", rows, cols, dtype, seed)
    gen = torch.Generator().manual_seed(seed + 1)
    zero = torch.zeros((), dtype=dtype)
    return torch.where(torch.rand(rows, cols, generator=gen) < density, w, zero)


def brute_force(w: torch.Tensor, mask: torch.Tensor):
    bitmap = torch.zeros(len(w), (w.shape[1] + 7) // 8, dtype=torch.uint8)
    values, offsets = [], [0]
    for i in range(len(w)):
        for j in range(w.shape[1]):
            if mask[i, j]:
                values.append(w[i, j])
                bitmap[i, j // 8] |= 1 << (j % 8)
        offsets.append(len(values))
    return torch.stack(values) if values else w.new_zeros(0), bitmap, torch.tensor(offsets)


def kept(w: torch.Tensor) -> torch.Tensor:
    return w.contiguous().view(PATTERN[w.element_size()]) != 0


def check(packed, want):
    assert same_bits(packed[0], want[0])
    assert torch.equal(packed[1].cpu(), want[1]) and torch.equal(packed[2].cpu(), want[2])


@pytest.mark.parametrize("cols", [1, 7, 64, 131])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_brute_force_and_restores(backend, device, use_backend, dtype, cols, masked):
    use_backend(backend, OP, device, dtype)
    w = sparse(4, cols, dtype)
    w[2] = 0
    mask = torch.rand(4, cols, generator=torch.Generator().manual_seed(7)) < 0.4
    packed = ops.pack_bitmap(w.to(device), mask.to(device) if masked else None)
    check(packed, brute_force(w, mask if masked else kept(w)))
    zero = torch.zeros((), dtype=dtype)
    restored = ops.unpack_bitmap(*packed, cols)
    assert same_bits(restored, torch.where(mask, w, zero) if masked else w)
    if not masked:
        check(ops.pack_bitmap(restored), brute_force(w, kept(w)))


def test_more_columns_than_a_step_takes(backend, device, use_backend):
    use_backend(backend, OP, device, torch.bfloat16)
    w = sparse(2, 4500, torch.bfloat16).to(device)
    packed = ops.pack_bitmap(w)
    check(packed, [t.cpu() for t in ops.pack.pack_bitmap_reference(w, None)])
    assert same_bits(ops.unpack_bitmap(*packed, 4500), w)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_or_everything_kept(backend, device, use_backend, density):
    use_backend(backend, OP, device)
    w = torch.full((3, 70), -2.0, device=device) * density + 0.0
    packed = ops.pack_bitmap(w)
    assert packed[0].numel() == int(210 * density)
    assert same_bits(ops.unpack_bitmap(*packed, 70), w)


def test_negative_zero_is_kept(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = torch.tensor([[-0.0, 0.0, 1.0]], device=device)
    assert ops.pack_bitmap(w)[0].numel() == 2
    assert same_bits(ops.unpack_bitmap(*ops.pack_bitmap(w), 3), w)
    assert ops.pack_bitmap(w, w != 0)[0].numel() == 1


def test_strided_input(backend, device, use_backend):
    use_backend(backend, OP, device)
    big = sparse(20, 90, torch.float32).to(device)
    for w in (big[::2, 5:80], big.T[3:9], big[:, ::3]):
        assert same_bits(ops.unpack_bitmap(*ops.pack_bitmap(w), w.shape[1]), w)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_every_instruction_set(isa, use_isa, dtype, density):
    use_isa(isa)
    for cols in (63, 64, 193):
        w = sparse(5, cols, dtype, density)
        for mask in (None, torch.rand(5, cols) < density):
            packed = ops.pack_bitmap(w, mask)
            check(packed, ops.pack.pack_bitmap_reference(w, mask))
            want = ops.pack.unpack_bitmap_reference(*packed, cols)
            assert same_bits(ops.unpack_bitmap(*packed, cols), want)


def test_empty(backend, device, use_backend):
    use_backend(backend, OP, device)
    for shape in ((0, 9), (3, 0)):
        packed = ops.pack_bitmap(torch.empty(shape, device=device))
        assert packed[2].tolist() == [0] * (shape[0] + 1)
        assert ops.unpack_bitmap(*packed, shape[1]).shape == shape


def broken(change):
    w = torch.ones(3, 12)
    w[1, 3:] = 0
    values, bitmap, offsets = ops.pack_bitmap(w)
    return change(values, bitmap.clone(), offsets.clone())


def set_item(t, index, value):
    t[index] = value
    return t


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, b, o: (v[:-1], b, o), "row_offsets: expected to run from 0 to 26"),
        (lambda v, b, o: (v, b, set_item(o, 0, 1)), "row_offsets: expected to run from 0"),
        (lambda v, b, o: (v, b, set_item(o, 1, 20)), "row_offsets: expected to be monotone"),
        (lambda v, b, o: (v, b, set_item(o, 1, 11)), "11 values in row 0"),
        (lambda v, b, o: (v, set_item(b, (1, 0), 15), o), "4 bits and 3 values in row 1"),
        (lambda v, b, o: (v, set_item(b, (0, 1), 0b11111), o), "13 bits and 12 values in row 0"),
        (lambda v, b, o: (v, set_item(b, (0, 1), 0b11110), o), "no bits past column 11"),
        (lambda v, b, o: (v, b, o.int()), "row_offsets: expected torch.int64"),
        (lambda v, b, o: (v, b, o[:-1]), "row_offsets: expected shape"),
        (lambda v, b, o: (v, b[:, :1], o), "bitmap: expected shape"),
        (lambda v, b, o: (v, b.int(), o), "bitmap: expected a uint8 matrix"),
        (lambda v, b, o: (v[None], b, o), "values: expected 1 dimension"),
        (lambda v, b, o: (v.int(), b, o), "values: expected bf16"),
    ],
)
def test_broken_metadata_is_refused(backend, device, use_backend, change, message):
    """In the same words, whether the kernel compares bits with offsets or is spared it."""
    use_backend(backend, OP, device)
    packed = [t.to(device) for t in broken(change)]
    for check in (ops.unpack_bitmap, ops.validate_bitmap):
        with pytest.raises(ValueError, match=message):
            check(*packed, 12)


def test_offsets_of_no_rows_begin_and_end_with_zero(backend, device, use_backend):
    use_backend(backend, OP, device)
    bitmap = torch.zeros(0, 2, dtype=torch.uint8, device=device)
    for values in (torch.zeros(0, device=device), torch.zeros(5, device=device)):
        offsets = torch.tensor([5], device=device)
        with pytest.raises(ValueError, match=rf"from 0 to {len(values)}, got \[5, 5\]"):
            ops.unpack_bitmap(values, bitmap, offsets, 12)
    assert ops.unpack_bitmap(values[:0], bitmap, offsets - 5, 12).shape == (0, 12)


def test_the_kernel_does_not_trust_its_caller():
    values, bitmap, offsets = ops.pack_bitmap(torch.ones(3, 12))
    for bad in (offsets + 1, offsets.flip(0), offsets * 1000):
        with pytest.raises(ValueError, match="row_offsets: disagree with the bitmap"):
            torch.ops.pyprune.unpack_bitmap(values, bitmap, bad, 12)
    overflowing = torch.tensor([2**63 - 4, 8 - 2**63])  # their difference modulo 2^64 is 12
    with pytest.raises(ValueError, match="row_offsets: disagree with the bitmap"):
        torch.ops.pyprune.unpack_bitmap(values[:12], bitmap[:1], overflowing, 12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 200), st.floats(0, 1), st.sampled_from(DTYPES),
    st.integers(0, 99),
)  # fmt: skip
def test_fuzz(rows, cols, density, dtype, seed):
    w = sparse(rows, cols, dtype, density, seed)
    packed = ops.pack_bitmap(w)
    check(packed, ops.pack.pack_bitmap_reference(w, None))
    assert same_bits(ops.unpack_bitmap(*packed, cols), w)


def test_independent_of_thread_count():
    w = sparse(50, 199, torch.bfloat16)
    threads = torch.get_num_threads()
    want = ops.pack_bitmap(w)
    try:
        torch.set_num_threads(1)
        check(ops.pack_bitmap(w), want)
    finally:
        torch.set_num_threads(threads)


def test_opcheck():
    w = sparse(4, 21, torch.float32).nan_to_num(1.0)
    # A fake cannot know how many values there are: the comparison with real shapes is left out.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pyprune.pack_bitmap, (w, None), test_utils=tests)
    torch.library.opcheck(torch.ops.pyprune.unpack_bitmap, (*ops.pack_bitmap(w), 21))


def test_backends_of_both_directions_agree():
    assert set(registry.IMPLS["pack_bitmap"]) == set(registry.IMPLS["unpack_bitmap"])


@pytest.mark.parametrize("trusted", ["triton", "cuda"])
def test_sanitized_offsets_lead_to_no_values_behind_the_last(trusted, device, use_backend):
    """On a GPU they are not compared with the bitmap."""
    if trusted == "cuda" and torch.device(device).type == "cpu":
        pytest.skip("a CUDA kernel")
    use_backend(trusted, "unpack_bitmap", device)
    held = torch.full((300,), 777.0, device=device)
    values = held[:200].fill_(1.0)
    bitmap = torch.full((5, 5), 255, dtype=torch.uint8, device=device)
    for start in (0, 120, 190, 250, 2**40, -3, -(2**40)):
        offsets = torch.tensor([0, 40, 80, start, 160, 200], device=device)
        got = torch.ops.pyprune.unpack_bitmap(values, bitmap, offsets, 40)
        assert not (got == 777).any(), start
        assert got[[0, 1, 2, 4]].eq(1).all(), start
    got = torch.ops.pyprune.unpack_bitmap(values[:0], bitmap, torch.zeros_like(offsets), 40)
    assert not got.any()
