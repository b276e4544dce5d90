import pytest
import selection
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import ops

OP = "mask_global"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(3, 70), (0, 5), (1, 1), (40, 33), (2, 0), (1, 500)]
LISTS = {
    "column_scale": "column_scales",
    "row_scale": "row_scales",
    "addend": "addends",
    "preserve": "preserves",
}


def problem(kind, dtype, device, names=(), shapes=SHAPES, seed=0):
    ws = [selection.weights(kind, *s, dtype, seed=seed + i) for i, s in enumerate(shapes)]
    made = [selection.terms(names, *s, device, seed=seed + i) for i, s in enumerate(shapes)]
    given = {LISTS[name]: [m[name] for m in made] for name in names}
    return [w.to(device) for w in ws], given


def brute_force(ws, pruned, given):
    ranked = []
    for i, w in enumerate(ws):
        terms = {name: given[LISTS[name]][i] for name in LISTS if LISTS[name] in given}
        ranked += [r for row in selection.scores(w, **terms) for r in row]
    mask = torch.tensor(selection.brute_force(ranked, pruned), dtype=torch.bool)
    parts = mask.split([w.numel() for w in ws])
    return [part.view(w.shape) for part, w in zip(parts, ws, strict=True)]


def check(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and torch.equal(g.cpu(), w.cpu())


@pytest.mark.parametrize("kind", selection.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_brute_force(backend, device, use_backend, dtype, kind):
    use_backend(backend, OP, device, dtype)
    ws, _ = problem(kind, dtype, device)
    total = sum(w.numel() for w in ws)
    counts = (0, 1, total // 2, total - 1, total)
    if backend == "triton" and device == "cpu" and dtype != torch.float32:
        counts = (1, total // 2)  # of the interpreter; every dtype becomes the same keys
    for pruned in counts:
        check(ops.mask_global(ws, pruned), brute_force(ws, pruned, {}))


@pytest.mark.parametrize("names", selection.TERMS.values(), ids=selection.TERMS)
def test_score_terms(backend, device, use_backend, names):
    use_backend(backend, OP, device, torch.bfloat16)
    ws, given = problem("ties", torch.bfloat16, device, names)
    check(ops.mask_global(ws, 900, **given), brute_force(ws, 900, given))


def test_ties_go_by_tensor_then_index(backend, device, use_backend):
    use_backend(backend, OP, device)
    ws = [torch.ones(2, 3, device=device), torch.ones(2, 2, device=device)]
    first, second = ops.mask_global(ws, 7)
    assert not first.any() and second.cpu().tolist() == [[False, True], [True, True]]


def test_strided_input(backend, device, use_backend):
    use_backend(backend, OP, device)
    big = selection.weights("ties", 40, 90, torch.float32).to(device)
    ws = [big[::2, 5:70], big.T[3:20], big[:, ::3]]
    check(ops.mask_global(ws, 1500), brute_force(ws, 1500, {}))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_large_lists_and_every_instruction_set(isa, use_isa, dtype):
    """Large enough for the sampled bracket; kinds that make it miss; ties across work items."""
    use_isa(isa)
    shapes = [(300, 700), (2, 70_000), (5, 0), (1000, 33)]
    for kind in selection.KINDS:
        ws, given = problem(kind, dtype, "cpu", ("column_scale",), shapes)
        total = sum(w.numel() for w in ws)
        for pruned in (3, total // 2, total - 5):
            for lists in ({}, given):
                columns = lists.get("column_scales")
                want = ops.select.mask_global_reference(ws, pruned, columns, None, None, None)
                check(ops.mask_global(ws, pruned, **lists), want)


def test_sorted_weights_mislead_the_sample():
    # Small weights in the places that the sample does not see, large ones where it looks.
    w = torch.ones(1, 1 << 19)
    w[0, ::97] = torch.rand(w[0, ::97].shape, generator=torch.Generator().manual_seed(1))
    ramp = torch.arange(1 << 19, dtype=torch.float32)[None]
    for ws in ([w], [ramp], [ramp.flip(1), w]):
        for pruned in (1, 1000, 5402, 300_000):
            want = ops.select.mask_global_reference(ws, pruned, *[None] * 4)
            check(ops.mask_global(ws, pruned), want)


def test_independent_of_thread_count():
    ws, _ = problem("ties", torch.bfloat16, "cpu", shapes=[(200, 900), (3, 50_000)])
    threads = torch.get_num_threads()
    want = ops.mask_global(ws, 100_000)
    try:
        torch.set_num_threads(1)
        check(ops.mask_global(ws, 100_000), want)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_fuzz(data):
    shapes = data.draw(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), min_size=1, max_size=4)
    )
    kind = data.draw(st.sampled_from(selection.KINDS))
    dtype = data.draw(st.sampled_from(DTYPES))
    names = data.draw(st.sampled_from(list(selection.TERMS.values())))
    ws, given = problem(kind, dtype, "cpu", names, shapes, seed=data.draw(st.integers(0, 99)))
    pruned = data.draw(st.integers(0, sum(w.numel() for w in ws)))
    check(ops.mask_global(ws, pruned, **given), brute_force(ws, pruned, given))


@pytest.mark.parametrize(
    ("ws", "kwargs", "message"),
    [
        ([], {}, "ws: expected at least one"),
        (torch.zeros(2, 2), {}, r"ws\[0\]: expected 2 dimensions"),
        ([torch.zeros(1, 2, 2)], {}, r"ws\[0\]: expected 2 dimensions"),
        ([torch.zeros(2, 2), torch.zeros(2, 2).half()], {}, r"ws\[1\]: expected torch.float32"),
        ([torch.zeros(2, 2)], {"column_scales": []}, "column_scales: expected 1 tensors"),
        ([torch.zeros(2, 2)], {"row_scales": [torch.zeros(3)]}, "row_scale: expected shape"),
        ([torch.zeros(2, 2)], {"pruned": 5}, "pruned: expected 0 to 4"),
    ],
)
def test_bad_arguments(ws, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.mask_global(ws, kwargs.pop("pruned", 1), **kwargs)


def test_opcheck():
    ws = [torch.randn(5, 12), torch.randn(2, 3)]
    scales = [torch.rand(12), torch.rand(3)]
    for columns in (None, scales):
        torch.library.opcheck(torch.ops.pyprune.mask_global, (ws, 9, columns, None, None, None))


def test_compiles_without_graph_breaks():
    def f(a, b):
        return ops.mask_global([a, b], 9)

    ws = torch.randn(5, 12), torch.randn(2, 3)
    check(torch.compile(f, fullgraph=True, backend="aot_eager")(*ws), f(*ws))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_in_a_graph_on_a_gpu(use_backend, name):
    # Everything happens on the device: nothing comes from the host, nothing is read back.
    use_backend(name, OP, "cuda")
    static, given = problem("normal", torch.float32, "cuda", ("column_scale",))
    ops.mask_global(static, 900, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = ops.mask_global(static, 900, **given)
    ws, _ = problem("normal", torch.float32, "cuda", seed=7)
    for held, w in zip(static, ws, strict=True):
        held.copy_(w)
    graph.replay()
    check(masks, brute_force(ws, 900, given))


def test_triton_narrows_without_a_look_at_the_numbers():
    """A tensor without data has none: PyTorch raises where one is asked for, as a graph would."""
    from pyprune.kernels.select_global import _narrow

    state, counts = (torch.zeros(n, dtype=torch.int64, device="meta") for n in (2, 256))
    _narrow(state, counts)
    state, counts = torch.tensor([3, 9]), torch.zeros(256, dtype=torch.int64)
    counts[[0, 4, 5, 255]] = torch.tensor([2, 6, 4, 1])
    _narrow(state, counts)
    assert state.tolist() == [3 * 256 + 5, 1]
    state[1] = 2
    _narrow(state, counts)
    assert state.tolist() == [(3 * 256 + 5) * 256, 2]
