"""Products of sums of bf16 matrices, against fp64."""

import pytest
import torch

from pyprune.layer_pruner import _output_energy
from pyprune.methods import LayerInputs
from pyprune.ops import masked_cg
from pyprune.ops.split_matrix import SplitMatrix, parts_of


def operands(device, rows=5, inner=37, columns=11):
    gen = torch.Generator().manual_seed(0)
    p, h = (torch.randn(*shape, generator=gen) for shape in ((rows, inner), (inner, columns)))
    scale = 10.0 ** torch.randint(-6, 7, (inner,), generator=gen)
    return (p / scale).to(device), (h * scale[:, None]).to(device)


def test_three_parts_are_the_number_itself(device):
    p, _ = operands(device)
    p[0, :3] = torch.tensor([0.0, -0.0, 1e30])
    assert torch.equal(sum(part.double() for part in parts_of(p, 3)), p.double())


@pytest.mark.parametrize("parts", [2, 3])
def test_products(device, parts):
    p, h = operands(device)
    h = h.T.contiguous().T  # strides of any kind
    bound = p.double().abs() @ h.double().abs()
    out = torch.full((len(p), h.shape[1]), 7.0, device=device)
    got = SplitMatrix(h, parts).times(p, out)
    assert got is out and torch.equal(SplitMatrix(h, parts).times(p), out)
    left_out = 2.0**-16 if parts == 3 else 3 * 2.0**-16
    assert bool(((got - p.double() @ h.double()).abs() <= 1.1 * left_out * bound).all())


def test_a_matrix_of_sixteen_bits_is_exact(device):
    p, h = (t.bfloat16().float() for t in operands(device))
    wanted = (p.double() @ h.double()).float()
    torch.testing.assert_close(SplitMatrix(h, 2).times(p), wanted, rtol=1e-6, atol=1e-6)


def test_output_energy(device):
    """Of a difference much smaller than the weights, where little is left of what the inputs have
    in common."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=gen) + 10
    d = torch.randn(16, 64, generator=gen)
    d -= d.mean(1, keepdim=True)
    gram = (x.double().T @ x.double()).float().to(device)
    got = _output_energy(LayerInputs(gram.diagonal(), 256, gram))(d.to(device))
    wanted = float((d.double() @ x.double().T).square().sum())
    assert got == pytest.approx(wanted, rel=1e-3)


def test_what_the_conjugate_gradients_multiply_with():
    """fp64 is never split, and on the CPU nothing is."""
    p, h = operands("cpu")
    for dtype in (torch.float32, torch.float64):
        a, b = p.to(dtype), h.to(dtype)
        out = a.new_empty(len(a), b.shape[1])
        assert torch.equal(masked_cg.product_with(b)(a, out), a @ b)
