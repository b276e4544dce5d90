import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isa import AVAILABLE, restricted

from pyprune import ops

OP = "fisher_accumulate"
# Sums of bf16 pairs are chains of 1,024 products, twice as long as others.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-6, torch.float16: 2e-6, torch.float64: 1e-13}

# Tokens, out features, in features: one of each, sizes that divide no tile, more tokens than a
# packed chunk, several tiles each way.
SHAPES = [(1, 1, 1), (1, 5, 70), (7, 3, 2), (33, 129, 20), (600, 40, 65), (130, 100, 150)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(g: torch.Tensor, x: torch.Tensor, power: int, scale: float) -> torch.Tensor:
    gradients = scale * (g.cpu().double().mT @ x.cpu().double())
    magnitudes = gradients.abs() ** power
    return magnitudes if magnitudes.dim() == 2 else magnitudes.sum(0)


def assert_fisher(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype] * want.abs().max().item()
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=tolerance)


def zeros(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.zeros(g.shape[-1], x.shape[-1], dtype=dtype, device=x.device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_matches_float64(backend, device, use_backend, shape, dtype, power):
    use_backend(backend, OP, device, dtype)
    tokens, rows, columns = shape
    g = randn(tokens, rows).to(dtype).to(device)
    x = randn(tokens, columns, seed=1).to(dtype).to(device)
    acc = zeros(g, x)
    assert ops.fisher_accumulate(acc, g, x, power=power, scale=0.25) is acc
    assert_fisher(acc, expected(g, x, power, 0.25), dtype)


@pytest.mark.parametrize("power", [1, 2])
def test_sequences_count_separately(backend, device, use_backend, power):
    """The sum of magnitudes, not the magnitude of the sum; equal to one call a sequence."""
    use_backend(backend, OP, device)
    g, x = randn(4, 30, 50).to(device), randn(4, 30, 41, seed=1).to(device)
    acc = ops.fisher_accumulate(torch.full((50, 41), 3.0, device=device), g, x, power=power)
    assert_fisher(acc, 3 + expected(g, x, power, 1.0), torch.float32)
    one_by_one = torch.full((50, 41), 3.0, device=device)
    for g_n, x_n in zip(g, x, strict=True):
        ops.fisher_accumulate(one_by_one, g_n, x_n, power=power)
    torch.testing.assert_close(acc, one_by_one, rtol=1e-6, atol=0)


def test_opposite_sequences_do_not_cancel(backend, device, use_backend):
    use_backend(backend, OP, device)
    g, x = torch.ones(2, 3, 4, device=device), torch.ones(2, 3, 5, device=device)
    g[1] = -1
    acc = ops.fisher_accumulate(torch.zeros(4, 5, device=device), g, x)
    assert torch.equal(acc.cpu(), torch.full((4, 5), 6.0))


def test_equals_autograd(backend, device, use_backend):
    """Per-sequence weight gradients of a linear layer, from torch."""
    use_backend(backend, OP, device)
    layer = torch.nn.Linear(9, 6, bias=False, device=device)
    want = torch.zeros(6, 9, device=device)
    inputs, gradients = [], []
    for seed in range(3):
        x = randn(11, 9, seed=seed).to(device)
        y = layer(x)
        y.retain_grad()
        layer.zero_grad()
        y.square().mean().backward()
        want += layer.weight.grad.square()
        inputs.append(x)
        gradients.append(y.grad)
    acc = ops.fisher_accumulate(
        torch.zeros_like(want), torch.stack(gradients), torch.stack(inputs), power=2
    )
    torch.testing.assert_close(acc, want, rtol=1e-5, atol=1e-9)


def test_strided_inputs_and_accumulator(backend, device, use_backend):
    use_backend(backend, OP, device)
    g, x = randn(60, 80).to(device), randn(60, 90, seed=1).to(device)
    for g_s, x_s in ((g[::2, 3:], x[::2, :50]), (g[:40].T[:60], x), (g, x[:, ::3])):
        acc = torch.zeros(g_s.shape[1], 2 * x_s.shape[1], device=device)[:, ::2]
        ops.fisher_accumulate(acc, g_s, x_s)
        assert_fisher(acc, expected(g_s, x_s, 1, 1.0), torch.float32)
    g_n, x_n = randn(30, 2, 20).to(device).transpose(0, 1), randn(2, 30, 10, seed=1).to(device)
    acc = ops.fisher_accumulate(torch.zeros(20, 10, device=device), g_n, x_n)
    assert_fisher(acc, expected(g_n, x_n, 1, 1.0), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy under the interpreter
def test_infinity_and_nan_propagate(backend, device, use_backend):
    use_backend(backend, OP, device)
    g, x = torch.ones(4, 3, device=device), torch.ones(4, 5, device=device)
    g[1, 2], x[2, 4] = float("nan"), float("-inf")
    acc = ops.fisher_accumulate(torch.zeros(3, 5, device=device), g, x).cpu()
    assert acc[2].isnan().all()
    assert (acc[:2, 4] == float("inf")).all()
    assert torch.equal(acc[:2, :4], torch.full((2, 4), 4.0))


def test_nothing_to_add(backend, device, use_backend):
    use_backend(backend, OP, device)
    for tokens in ((0,), (2, 0), (0, 3)):
        acc = torch.ones(4, 5, device=device)
        g = torch.empty(*tokens, 4, device=device) if len(tokens) > 1 else torch.empty(0, 4)
        g, x = g.to(device), torch.empty(*g.shape[:-1], 5, device=device)
        assert torch.equal(ops.fisher_accumulate(acc, g, x).cpu(), torch.ones(4, 5))
    empty = torch.zeros(0, 5, device=device)
    g, x = torch.empty(3, 0, device=device), torch.ones(3, 5, device=device)
    assert ops.fisher_accumulate(empty, g, x) is empty


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("columns", [1, 24, 25, 47, 49, 100])
def test_every_instruction_set(isa, use_isa, columns):
    use_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for power in (1, 2):
            g, x = randn(1061, 51).to(dtype), randn(1061, columns, seed=1).to(dtype)
            for tokens in (530, 1061):
                part = g[:tokens], x[:tokens]
                acc = ops.fisher_accumulate(zeros(g, x), *part, power=power)
                assert_fisher(acc, expected(*part, power, 1.0), dtype)


def small_integers(*shape: int, seed: int) -> torch.Tensor:
    """Values whose sums of products are exact in fp32, so that results compare to the bit."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_native_takes_several_parts_and_sequences(use_backend):
    """A weight larger than the part (2304 columns) that the native kernel works on at a time."""
    use_backend("native", OP, "cpu")
    g, x = small_integers(2, 3, 100, seed=0), small_integers(2, 3, 2500, seed=1)
    for a, b in ((g, x), (x, g)):
        for dtype in (torch.float32, torch.bfloat16):
            acc = torch.zeros(a.shape[-1], b.shape[-1])
            ops.fisher_accumulate(acc, a.to(dtype), b.to(dtype))
            assert torch.equal(acc, (a.mT @ b).abs().sum(0))


def test_native_takes_several_rounds(use_backend):
    """More tokens of both operands than the native kernel packs at a time, the last round short."""
    use_backend("native", OP, "cpu")
    g, x = small_integers(2, 6000, 30, seed=0), small_integers(2, 6000, 150, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        acc = ops.fisher_accumulate(torch.zeros(30, 150), g.to(dtype), x.to(dtype))
        assert torch.equal(acc, (g.mT @ x).abs().sum(0))


def test_triton_groups_tiles(use_backend, monkeypatch):
    """Fewer tile rows than a group, exactly one group, and a last group that is not full."""
    from pyprune.kernels import fisher_accumulate as kernel

    use_backend("triton", OP, "cpu")
    monkeypatch.setattr(kernel, "GROUP", 2)
    for rows in (20, 64, 90):
        g, x = randn(20, rows), randn(20, 70, seed=1)
        acc = ops.fisher_accumulate(zeros(g, x), g, x)
        assert_fisher(acc, expected(g, x, 1, 1.0), torch.float32)


def test_independent_of_thread_count():
    g, x = randn(2, 300, 200), randn(2, 300, 170, seed=1)
    threads = torch.get_num_threads()
    want = ops.fisher_accumulate(torch.zeros(200, 170), g, x)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.fisher_accumulate(torch.zeros(200, 170), g, x), want)
    finally:
        torch.set_num_threads(threads)


Z = torch.zeros


@pytest.mark.parametrize(
    ("args", "power", "message"),
    [
        ((Z(2, 4), Z(3), Z(3, 4)), 1, "g: expected 2 or 3 dimensions"),
        ((Z(2, 4), Z(3, 2).int(), Z(3, 4)), 1, "g: expected bf16, fp16, fp32 or fp64"),
        ((Z(2, 4), Z(5, 2), Z(3, 4)), 1, r"g: expected shape \(3, 2\)"),
        ((Z(2, 4), Z(1, 3, 2), Z(3, 4)), 1, r"g: expected shape \(3, 2\)"),
        ((Z(2, 4), Z(3, 2).double(), Z(3, 4)), 1, "g: expected torch.float32 as x has"),
        ((Z(4, 2), Z(3, 2), Z(3, 4)), 1, r"acc: expected shape \(2, 4\)"),
        ((Z(2, 4).double(), Z(3, 2), Z(3, 4)), 1, "acc: expected torch.float32"),
        ((Z(2, 4, device="meta"), Z(3, 2), Z(3, 4)), 1, "on one device"),
        ((Z(2, 4), Z(3, 2), Z(3, 4)), 3, "power: expected 1 or 2, got 3"),
    ],
)
def test_bad_arguments(args, power, message):
    with pytest.raises(ValueError, match=message):
        ops.fisher_accumulate(*args, power=power)


def test_opcheck():
    for shape in ((5,), (2, 5)):
        g, x = randn(*shape, 7), randn(*shape, 4)
        torch.library.opcheck(
            torch.ops.pyprune.fisher_accumulate, (torch.zeros(7, 4), g, x, 2, 0.5)
        )


def test_compiles_without_graph_breaks():
    def f(g, x):
        return ops.fisher_accumulate(torch.zeros(7, 4), g, x).sqrt()

    g, x = randn(5, 7), randn(5, 4, seed=1)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(g, x)
    torch.testing.assert_close(got, f(g, x))


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.integers(1, 3),
    tokens=st.integers(1, 600),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    dtype=st.sampled_from([d for d in TOLERANCE if d != torch.float64]),
    power=st.sampled_from([1, 2]),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 999),
)
def test_fuzz_native_against_float64(
    sequences, tokens, rows, columns, dtype, power, scale, isa, seed
):
    g = randn(sequences, tokens, rows, seed=seed).to(dtype)
    x = randn(sequences, tokens, columns, seed=seed + 1).to(dtype)
    with restricted(isa):
        got = ops.fisher_accumulate(zeros(g, x), g, x, power=power, scale=scale)
    want = expected(g, x, power, scale)
    # A sum near zero is rounded as the large terms that cancel in it are.
    size = (scale * (g.double().abs().mT @ x.double().abs())) ** power
    assert bool(((got.double() - want).abs() <= 1e-5 * size.sum(0)).all())
