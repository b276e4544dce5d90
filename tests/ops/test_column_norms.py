import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isa import AVAILABLE, restricted

from pyprune import ops

OP = "column_norms"
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}

# One row, one column, sizes that divide no tile, more than one Triton program along the tokens.
SHAPES = [(1, 1), (1, 200), (7, 3), (33, 129), (300, 65), (1030, 40)]


def expected(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    w = torch.ones(len(x)) if weight is None else weight.cpu()
    return (x.cpu().double().square() * w.double()[:, None]).sum(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_float64(backend, device, use_backend, shape, dtype, weighted):
    use_backend(backend, OP, device, dtype)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=gen).to(dtype).to(device)
    weight = torch.rand(shape[0], generator=gen).to(device) if weighted else None
    got = ops.column_norms(x, weight=weight)
    want = expected(x, weight)
    torch.testing.assert_close(got.cpu().double(), want, rtol=TOLERANCE[dtype], atol=1e-30)


def test_accumulates_in_place_and_batches_add_up(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    x = torch.randn(50, 17, generator=torch.Generator().manual_seed(1)).to(device)
    out = torch.full((17,), 2.0, device=device)
    assert ops.column_norms(x[:20], out=out) is out
    ops.column_norms(x[20:], out=out)
    torch.testing.assert_close(out.cpu().double(), 2 + expected(x, None), rtol=1e-6, atol=0)


def test_strided_input(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    big = torch.randn(40, 90, generator=torch.Generator().manual_seed(2)).to(device)
    for x in (big[::2, 5:70], big.T[3:80], big[:, ::3]):
        torch.testing.assert_close(
            ops.column_norms(x).cpu().double(), expected(x, None), rtol=1e-6, atol=0
        )


def test_infinity_and_nan_stay_in_their_column(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    x = torch.ones(4, 6, device=device)
    x[1, 2], x[2, 4] = float("inf"), float("nan")
    got = ops.column_norms(x).cpu()
    assert got[2] == float("inf") and got[4].isnan()
    assert torch.equal(got[[0, 1, 3, 5]], torch.full((4,), 4.0))


def test_weight_zero_drops_infinities_and_nan(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    x = torch.ones(5, 70, device=device)
    x[1], x[3] = float("inf"), float("nan")
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5], device=device)
    assert torch.equal(ops.column_norms(x, weight=weight).cpu(), torch.full((70,), 3.5))


def test_no_tokens_leaves_the_accumulator(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    out = torch.arange(3.0, device=device)
    assert torch.equal(ops.column_norms(torch.empty(0, 3, device=device), out=out).cpu(),
                       torch.arange(3.0))  # fmt: skip


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, use_isa):
    use_isa(isa)
    x = torch.randn(61, 133, generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.testing.assert_close(
            ops.column_norms(x.to(dtype)).double(), expected(x.to(dtype), None), rtol=1e-6, atol=0
        )


def test_independent_of_thread_count():
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(4))
    threads = torch.get_num_threads()
    want = ops.column_norms(x)
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.column_norms(x), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.zeros(3)}, "x: expected 2 or 3 dimensions"),
        ({"x": torch.zeros(4, 3, 2), "weight": torch.zeros(3)}, "weight: expected shape"),
        ({"x": torch.zeros(4, 3, 2), "out": torch.zeros(2)}, "out: expected shape"),
        ({"x": torch.zeros(3, 2, dtype=torch.int32)}, "x: expected bf16, fp16, fp32 or fp64"),
        ({"x": torch.zeros(3, 2), "weight": torch.zeros(2)}, "weight: expected shape"),
        ({"x": torch.zeros(3, 2), "out": torch.zeros(3)}, "out: expected shape"),
        ({"x": torch.zeros(3, 2), "out": torch.zeros(2).double()}, "out: expected torch.float32"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.column_norms(kwargs.pop("x"), **kwargs)


def test_a_stack_is_its_matrices(backend, device, use_backend):
    use_backend(backend, OP, device)
    x, weight = torch.randn(3, 9, 20, device=device), torch.rand(3, 9, device=device)
    out = torch.ones(3, 20, device=device)
    want = [1 + ops.column_norms(one, weight=w) for one, w in zip(x, weight, strict=True)]
    got = ops.column_norms(x, weight=weight, out=out)
    assert got is out
    torch.testing.assert_close(got, torch.stack(want))
    strided = torch.zeros(20, 3, device=device).T
    ops.column_norms(x, out=strided)
    torch.testing.assert_close(strided, x.square().sum(1))


def test_opcheck():
    x = torch.randn(5, 7)
    for weight in (None, torch.rand(5)):
        torch.library.opcheck(torch.ops.pyprune.column_norms, (torch.zeros(7), x, weight))
    x, weight = torch.randn(3, 5, 7), torch.rand(3, 5)
    torch.library.opcheck(torch.ops.pyprune.column_norms, (torch.zeros(3, 7), x, weight))


def test_compiles_without_graph_breaks():
    def f(x):
        return ops.column_norms(x).sqrt()

    x = torch.randn(9, 11)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, f(x))


# In a process of its own: TorchInductor imports setuptools, which refuses where something has
# imported the standard library's distutils before.
COMPILED = """
import torch
from pyprune import ops
compiled = torch.compile(ops.column_norms, fullgraph=True, dynamic=True)
for tokens in (12, 13):
    x = torch.randn(3, tokens, 5)
    torch.testing.assert_close(compiled(x), x.square().sum(1))
"""


def test_compiled_stacks_of_several_lengths():
    """Written by one op: TorchInductor adds to the wrong matrices where slices are written."""
    alone = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # starts no processes to compile in
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=alone, check=False, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 400),
    columns=st.integers(1, 130),
    dtype=st.sampled_from([d for d in TOLERANCE if d != torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    kept=st.sampled_from([None, 0.0, 0.5, 1.0]),
    step=st.integers(1, 3),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 999),
)
def test_fuzz_native_against_float64(tokens, columns, dtype, scale, kept, step, isa, seed):
    gen = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, columns * step, generator=gen) * scale).to(dtype)[:, ::step]
    weight = None if kept is None else (torch.rand(tokens, generator=gen) < kept).float()
    with restricted(isa):
        got = ops.column_norms(x, weight=weight)
    torch.testing.assert_close(got.double(), expected(x, weight), rtol=2e-6, atol=1e-30)
