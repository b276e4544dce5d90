"""The functions that llm-compressor's modifiers are given, and the giving."""

import importlib
import sys

import pytest
import torch
from bench_obs import algorithm
from torch import nn

from pyprune.errors import UserError
from pyprune.integrations import llmcompressor as own

SPARSEGPT = """
def accumulate_hessian(inp, module, H, num_samples): raise NotImplementedError
def sparsify_weight(module, hessians_dict, sparsity, prune_n, prune_m, block_size,
                    dampening_frac, preserve_sparsity_mask): raise NotImplementedError
"""
WANDA = """
def accumulate_row_scalars(inp, module, row_scalars, num_samples): raise NotImplementedError
def sparsify_weight(module, row_scalars_dict, sparsity, prune_n, prune_m{more}):
    raise NotImplementedError
"""
HOMES = [f"llmcompressor.modifiers.pruning.{m}.base" for m in ("sparsegpt", "wanda")]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the names and arguments of llm-compressor 0.14, and nothing behind them. It
    stands before the real one where that is installed."""

    def make(more=""):
        folder = tmp_path / "llmcompressor"
        for name, text in (("sparsegpt", SPARSEGPT), ("wanda", WANDA.format(more=more))):
            (folder / "modifiers" / "pruning" / name).mkdir(parents=True)
            (folder / "modifiers" / "pruning" / name / "base.py").write_text(text)
        for inner in ("", "modifiers", "modifiers/pruning"):  # or the real one would be found first
            (folder / inner / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        return lambda: [importlib.import_module(home) for home in HOMES]

    def take_out():
        names = [name for name in sys.modules if name.split(".")[0] == "llmcompressor"]
        return {name: sys.modules.pop(name) for name in names}

    real = take_out()
    yield make
    own._originals.clear()
    take_out()
    sys.modules.update(real)


def test_functions_are_replaced_and_put_back(package):
    sparsegpt, wanda = package()()
    theirs = sparsegpt.sparsify_weight, wanda.accumulate_row_scalars
    with own.accelerated():
        assert sparsegpt.accumulate_hessian is own.accumulate_hessian
        assert sparsegpt.sparsify_weight is own.sparsegpt_weight
        assert wanda.accumulate_row_scalars is own.accumulate_row_scalars
        assert wanda.sparsify_weight is own.wanda_weight
        with own.accelerated():
            pass
        assert wanda.sparsify_weight is own.wanda_weight
    assert (sparsegpt.sparsify_weight, wanda.accumulate_row_scalars) == theirs
    own.install()
    own.install()
    with own.accelerated():
        pass
    assert wanda.sparsify_weight is own.wanda_weight
    own.uninstall()
    assert (sparsegpt.sparsify_weight, wanda.accumulate_row_scalars) == theirs


def test_an_unknown_release_is_left_alone(package):
    sparsegpt, _ = package(more=", group=0")()
    theirs = sparsegpt.sparsify_weight
    with pytest.raises(UserError, match=r"wanda.base.sparsify_weight: expected the arguments"):
        own.install()
    assert sparsegpt.sparsify_weight is theirs


@pytest.mark.parametrize("rule", [{"nm": (2, 4)}, {"nm": (3, 4)}, {"sparsity": 0.5}], ids=str)
def test_sparsegpt(rule):
    torch.manual_seed(0)
    layer = nn.Linear(64, 16, bias=False)
    hessian, samples = torch.zeros(64, 64), 0
    batches = torch.randn(4, 40, 64).split(3)
    for x in batches:
        hessian, samples = own.accumulate_hessian(x, layer, hessian, samples)
    rows = torch.cat(batches).flatten(0, 1).double()
    want = rows.T @ rows * 2 / 4
    assert samples == 4
    torch.testing.assert_close(hessian, want.float(), rtol=1e-5, atol=1e-4)
    n, m = rule.get("nm", (0, 0))
    hessians = {layer: hessian}
    loss, weight = own.sparsegpt_weight(
        layer, hessians, rule.get("sparsity", 0.0), m - n, m, 32, 0.01, False
    )
    assert not hessians and loss > 0
    expected, kept = algorithm(layer.weight.detach().double(), want, rule)
    if m:
        torch.testing.assert_close(weight, expected.float(), rtol=0, atol=1e-4)
    else:  # in blocks of 32 here, of 128 there
        assert int((weight == 0).sum()) == 16 * 64 // 2 + 2
        assert int((~kept).sum()) == 16 * 64 // 2 + 1


@pytest.mark.parametrize(
    ("sparsity", "n", "m"), [(0.5, 0, 0), (0.25, 3, 4), (0.5, 2, 4)], ids=["half", "3:4", "2:4"]
)
def test_zeros_that_are_preserved_count(sparsity, n, m):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 16, bias=False), torch.randn(160, 64)
    layer.weight.data[:, ::8] = 0
    hessians = {layer: x.T @ x}
    loss, weight = own.sparsegpt_weight(layer, hessians, sparsity, m - n, m, 32, 0.01, True)
    assert not hessians and loss > 0
    assert not weight[:, ::8].any()
    assert int((weight == 0).sum()) == round(16 * 64 * sparsity)


def test_more_zeros_than_asked_for_cannot_be_preserved():
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data[:, :6] = 0
    with pytest.raises(ValueError, match=r"0\.75"):
        own.sparsegpt_weight(layer, {layer: torch.eye(8)}, 0.5, 0, 0, 8, 0.01, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 16, bias=False, dtype=dtype)
    x = torch.randn(3, 40, 64).to(dtype)
    scalars, samples = own.accumulate_row_scalars(x, layer, torch.zeros(64), 0)
    assert samples == 3
    torch.testing.assert_close(scalars, x.float().square().sum((0, 1)) / 3)
    score = layer.weight.detach().float().abs() * scalars.sqrt()
    for sparsity, n, m in ((0.3, 0, 0), (0.0, 2, 4)):
        found = {layer: scalars}
        weight = own.wanda_weight(layer, found, sparsity, n, m)
        assert not found and weight.dtype == dtype
        groups = score if not m else score.reshape(-1, m)
        pruned = torch.zeros_like(groups, dtype=torch.bool)
        count = int(64 * sparsity) if not m else n
        pruned.scatter_(1, groups.sort(dim=1, stable=True).indices[:, :count], True)
        want = layer.weight.detach().masked_fill(pruned.reshape(16, 64), 0)
        assert torch.equal(weight, want)
