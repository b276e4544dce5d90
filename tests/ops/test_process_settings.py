"""What a process sets for itself (precision of products, autocast, default dtype, threads) changes
no op."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune import ops
from pyprune.ops import linear_backward
from pyprune.ops._precision import full_precision

BACKENDS = torch.backends
OPS = ["gram", "fisher_accumulate", "obs_factor", "obs_sweep", "obs_reconstruct", "obs_greedy",
       "kron_quadratic", "kron_remove", "kron_pcg"]  # fmt: skip
LINEAR = ["linear_dense", "linear_24", "linear_bitmap", "linear_coded", "linear_int8",
          "linear_24_int8", "linear_bitmap_int8"]  # fmt: skip
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"}


def settings():
    return BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision


def reset_precision():
    torch.set_float32_matmul_precision("highest")
    for part in (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul):
        part.fp32_precision = "none"


@pytest.fixture(params=["everything", "legacy"])
def reduced(request):
    """Reduced products, asked for in either of PyTorch's ways; the settings that this makes."""
    if request.param == "everything":
        BACKENDS.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("medium")
    yield settings()
    reset_precision()


class Products(TorchDispatchMode):
    """Notes the settings that PyTorch's products run under."""

    def __init__(self):
        super().__init__()
        self.seen, self.full = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.seen.append(settings())
        elif name == "full_product":  # not looked into from here
            self.full += 1
        return func(*args, **(kwargs or {}))


def problem(rows=5, cols=48):
    gen = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, cols, generator=gen) for n in (rows, 3 * cols))
    h = ops.gram(x)
    return w, x, h, ops.obs_factor(h)


def calls():
    """The arguments of an op, as its implementations take them, by name."""
    w, x, h, factor = problem()
    rows, cols = w.shape
    mask = ops.mask_nm(w, 2, 4)
    g = ops.gram(torch.randn(3 * rows, rows, generator=torch.Generator().manual_seed(1)))
    index = torch.arange(3)
    inverses = (factor.u.mT @ factor.u, torch.linalg.inv(g))
    shift = (0.01 * h.diagonal().mean()).expand(1, cols)
    return {
        "gram": (torch.zeros(cols, cols), x, None),
        "fisher_accumulate": (torch.zeros(cols, cols), x, x, 1, 1.0),
        "obs_factor": (torch.eye(140), 0.01, 1.0),  # more than one leaf of the recursion
        "obs_sweep": (w[None], factor.u[None], None, mask[None], None, 0, 0, 16, False),
        "obs_reconstruct": (w[None], h[None], shift, factor.u[None], mask[None], None, 1e-3, 9),
        "obs_greedy": (w, inverses[0], None, 8, 0, 0),
        "kron_quadratic": (w, h),
        "kron_remove": (w, index, index, *inverses),
        "kron_pcg": (w, mask, h, g, 9, 1e-2),
    }


@pytest.mark.parametrize("op", OPS)
def test_products_inside_an_op_take_all_bits(op, reduced):
    """Whatever the model around it runs in. cuBLAS heeds the first setting, oneDNN the second."""
    made = 0
    for impl in ops.registry.IMPLS[op].values():
        arguments, function = calls()[op], impl.resolve()
        with Products() as products:
            function(*arguments)
        assert not {"tf32", "bf16"} & {value for pair in products.seen for value in pair}
        made += len(products.seen)
        assert settings() == reduced
    assert made > 0


def linear_calls():
    """The arguments of the linear ops, as their references take them."""
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 64, generator=gen), torch.randn(24, 64, generator=gen)
    bias, scales = torch.randn(24, generator=gen), torch.rand(24, generator=gen) + 0.5
    pruned = w * ops.mask_nm(w, 2, 4)
    packed = {"": (w,), "_24": ops.pack_24(pruned), "_bitmap": ops.pack_bitmap(pruned)}
    found = {"linear_dense": (x, w, bias), "linear_coded": (x, *ops.pack_coded(w.bfloat16()), bias)}
    for format, (values, *rest) in packed.items():
        codes = (values * 20).round().clamp(-127, 127).to(torch.int8)
        found[f"linear{format}"] = (x, values, *rest, bias)
        found[f"linear{format}_int8"] = (x, codes, *rest, scales, bias)
    return found


@pytest.mark.parametrize("op", LINEAR)
def test_the_references_of_linear_ops_take_all_bits(op, reduced):
    """They are what the kernels are held against."""
    with Products() as products:
        ops.registry.IMPLS[op]["reference"].resolve()(*linear_calls()[op])
    assert products.seen
    assert not {"tf32", "bf16"} & {value for pair in products.seen for value in pair}
    assert settings() == reduced


@pytest.mark.parametrize("op", LINEAR[1:])
def test_products_with_expanded_weights_take_all_bits(op, reduced):
    """What a GPU does with more rows of x than its kernels take, here as on fp32 activations."""
    x, *rest = linear_calls()[op]
    with Products() as products:
        ops.registry.IMPLS[op]["triton"].resolve()(x.repeat(5, 1), *rest)
    assert products.seen
    assert not {"tf32", "bf16"} & {value for pair in products.seen for value in pair}
    assert settings() == reduced


@pytest.mark.parametrize("op", LINEAR)
def test_autocast_does_not_change_the_references_of_linear_ops(op):
    arguments, function = linear_calls()[op], ops.registry.IMPLS[op]["reference"].resolve()
    want = function(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(*arguments)
    assert got.dtype == want.dtype and torch.equal(got, want)


def test_full_products_take_all_bits(reduced):
    with Products() as products:
        linear_backward._full_product(torch.ones(3, 4), torch.ones(4, 5))
    assert len(products.seen) == 1
    assert not {"tf32", "bf16"} & set(products.seen[0])


def backward_of(op, compiled=False):
    """Gradients for fp32 x (and a dense weight, and the bias), and what products were made on the
    way back."""
    x, *weight, bias = linear_calls()[op]
    wanted = [x.requires_grad_(), bias.requires_grad_()]
    if op == "linear_dense":
        wanted.append(weight[0].requires_grad_())
    call = getattr(torch.ops.pyprune, op)
    if compiled:  # a graph back that is of PyTorch's operators
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    y = call(x, *weight, bias)
    with Products() as products:
        found = torch.autograd.grad(y.square().sum(), wanted)
    return found, products


@pytest.mark.parametrize(
    ("op", "compiled"), [*((op, False) for op in LINEAR), ("linear_dense", True)]
)
def test_gradients_of_linear_ops_take_all_bits(op, compiled):
    """As the products forward do: all are full ones, in a compiled graph too."""
    _, products = backward_of(op, compiled)
    assert products.full == (2 if op == "linear_dense" else 1) and not products.seen


@pytest.mark.parametrize("op", LINEAR)
def test_autocast_does_not_change_the_gradients_of_linear_ops(op):
    want, _ = backward_of(op)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = backward_of(op)
    assert all(map(torch.equal, got, want))


def test_calls_in_several_threads_share_the_setting(reduced):
    first, second = full_precision(), full_precision()
    with first:
        second.__enter__()
    assert not {"tf32", "bf16"} & set(settings())
    second.__exit__(None, None, None)
    assert settings() == reduced


def test_a_setting_that_was_inherited_is_inherited_again():
    BACKENDS.fp32_precision = "tf32"
    try:
        with full_precision():
            pass
        BACKENDS.fp32_precision = "none"
        assert settings() == ("none", "none")
    finally:
        reset_precision()


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_default_dtype_does_not_matter(op, default_dtype):
    """transformers sets it while a model is loaded."""
    torch.set_default_dtype(torch.float32)
    arguments = calls()[op]
    impls = ops.registry.IMPLS[op]
    for impl in [impls[name] for name in impls if name != "triton"]:  # its interpreter is slow
        torch.set_default_dtype(torch.float32)
        want = impl.resolve()(*clones(arguments))
        torch.set_default_dtype(default_dtype)
        got = impl.resolve()(*clones(arguments))
        for a, b in zip(tensors(got), tensors(want), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_autocast_does_not_matter(op):
    impls = ops.registry.IMPLS[op]
    for impl in [impls[name] for name in impls if name != "triton"]:
        arguments, function = calls()[op], impl.resolve()
        want, got = clones(arguments), clones(arguments)
        results = function(*want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(*got)
        for a, b in zip(tensors(found) + got, tensors(results) + want, strict=True):
            if isinstance(a, torch.Tensor):  # of the arguments some are written to
                assert a.dtype == b.dtype and torch.equal(a, b)


def clones(arguments):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def tensors(result):
    if result is None:
        return []
    return [result] if isinstance(result, torch.Tensor) else list(result)


# --- threads -------------------------------------------------------------------------------------


def everything(seed, threads):
    """Every native op of pruning on a problem of several strips and blocks, one after the other."""
    torch.set_num_threads(threads)
    gen = torch.Generator().manual_seed(seed)
    w, g = torch.randn(130, 256, generator=gen), torch.randn(300, 130, generator=gen)
    x = torch.randn(300, 256, generator=gen)
    h = ops.gram(x, weight=torch.rand(300, generator=gen))
    factor = ops.obs_factor(h)
    swept = [ops.obs_sweep(w, factor.u, **rule) for rule in RULES]
    solved = ops.obs_reconstruct(w, h, swept[0].mask, start=swept[0].weight, factor=factor)
    pruned = w * ops.mask_nm(w, 2, 4)
    found = {
        "statistics": (h, ops.column_norms(x), ops.fisher_accumulate(torch.zeros(130, 256), g, x)),
        "factor": (factor.u, ops.kron_quadratic(w, h)),
        "sweeps": [t for result in swept for t in result],
        "reconstruct": solved[:3],
        "greedy": ops.obs_greedy(w[:9], ops.gram(factor.u), steps=40),
        "masks": (ops.mask_nm(w, 4, 8), ops.mask_topk(w, 100), *ops.mask_global([w, x], 30_000)),
        "packed": (*ops.pack_24(pruned), *ops.pack_bitmap(pruned)),
    }
    values, meta, *bitmap = found["packed"]
    found["unpacked"] = (ops.unpack_24(values, meta), ops.unpack_bitmap(*bitmap, 256))
    return {name: list(tensors) for name, tensors in found.items()}


def check(found, want):
    """Bit for bit, but for what is prepared by PyTorch's own products, which know threads."""
    for name, tensors in want.items():
        for got, expected in zip(found[name], tensors, strict=True):
            close = 1e-3 if name == "reconstruct" else 0
            torch.testing.assert_close(got, expected, rtol=close, atol=close * 1e-2, msg=name)


RULES = [{"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"nm": (2, 4)}]


@pytest.fixture
def one_thread_again():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_python_threads_do_not_disturb_one_another(one_thread_again):
    """Kernels run without the interpreter's lock, and keep scratch memory from call to call."""
    seeds = [0, 1, 2]
    want = [everything(seed, threads=1) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        for _ in range(2):
            for found, expected in zip(pool.map(everything, seeds, [2, 1, 3]), want, strict=True):
                check(found, expected)


def test_a_team_smaller_than_asked_for(one_thread_again, tmp_path):
    """OpenMP may give fewer threads than asked for; strips are dealt out to those there are."""
    saved = tmp_path / "found.pt"
    code = (
        "import runpy, torch; "
        f"everything = runpy.run_path({__file__!r})['everything']; "
        f"torch.save(everything(0, threads=5), {str(saved)!r})"
    )
    limited = os.environ | {"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=limited)
    check(torch.load(saved), everything(0, threads=1))
