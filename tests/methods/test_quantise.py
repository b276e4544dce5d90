"""SparseGPT with the kept weights on a grid, from the method and through the whole model."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

from pyprune import ops
from pyprune.config import PruneConfig
from pyprune.errors import UserError
from pyprune.methods import METHODS, LayerInputs, MethodOptions
from pyprune.methods.sparsegpt import SparseGptOptions
from pyprune.models.adapter import Adapter
from pyprune.patterns import NM, Unstructured
from pyprune.prune import prune

SOLVE = METHODS["sparsegpt"].solve


def example(rows=10, columns=24, tokens=90):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=gen, dtype=torch.float64)
    x[:, 1:] += 0.6 * x[:, :-1]
    w = torch.randn(rows, columns, generator=gen, dtype=torch.float64)
    return w, x


def on_grid(weight, w, bits):
    level = weight / ops.row_grid(w, bits).step[:, None]
    return float((level - level.round()).abs().max()) < 1e-9


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.3, "row")])
def test_kept_weights_are_on_the_dense_rows_grid(bits, pattern):
    w, x = example()
    x[:, 3] = 0  # its kept weights have their value back, rounded
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    options = MethodOptions(own=SparseGptOptions(bits))
    solution = SOLVE(w, inputs, pattern, options, None, None)
    assert on_grid(solution.weight, w, bits)
    assert not bool(solution.weight[~solution.mask].any())
    kept = solution.mask[:, 3]
    rounded = ops.round_to_grid(w, ops.row_grid(w, bits))[:, 3]
    assert torch.equal(solution.weight[kept, 3], rounded[kept])


def test_a_given_mask_is_quantised_too():
    w, x = example()
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(7)) > 0.5
    options = MethodOptions(own=SparseGptOptions(4))
    solution = SOLVE(w, inputs, Unstructured(0.5, "global"), options, None, mask)
    assert torch.equal(solution.mask, mask) and on_grid(solution.weight, w, 4)


def test_less_error_than_rounding_afterwards():
    w, x = example()
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    joint = SOLVE(w, inputs, NM(2, 4), MethodOptions(own=SparseGptOptions(3)), None, None)
    plain = SOLVE(w, inputs, NM(2, 4), MethodOptions(), None, None)
    after = ops.round_to_grid(plain.weight, ops.row_grid(w, 3))
    assert ((joint.weight - w) @ x.T).norm() < ((after - w) @ x.T).norm()


@pytest.mark.parametrize("target", [{"pattern": "2:4"}, {"sparsity": 0.5, "scope": "global"}])
def test_whole_model(target):
    model, dense = tiny_model("llama"), tiny_model("llama")
    options = {"method_options": {"quantise_bits": 4}, **target}
    report = prune(model, [tiny_tokens(8, 32, 0)], method="sparsegpt", **options)
    refs = zip(Adapter.of(model).linears(0), Adapter.of(dense).linears(0), strict=True)
    for new, old in refs:
        assert max(len(row.unique()) for row in new.weight()) <= 16
        level = new.weight() / ops.row_grid(old.weight(), 4).step[:, None]
        assert float((level - level.round()).abs().max()) < 1e-3
    plain = prune(tiny_model("llama"), [tiny_tokens(8, 32, 0)], method="sparsegpt", **target)
    # Rounding costs, and a kept weight may become zero.
    assert report.layers[0].relative_error_after > plain.layers[0].relative_error_after
    assert report.layers[0].zeros >= plain.layers[0].zeros


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method_options": {"quantise_bits": 1}}, "quantise_bits: expected 0 .off. or 2 to 8"),
        ({"method_options": {"quantise_bits": 9}}, "quantise_bits: expected 0 .off. or 2 to 8"),
        ({"method_options": {"quantise_bits": 4.0}}, "quantise_bits: expected a whole number"),
        (
            {"method_options": {"quantise_bits": 4}, "reconstruct": True},
            "reconstruct: expected off with quantise_bits",
        ),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        PruneConfig(sparsity=0.5, **options)
