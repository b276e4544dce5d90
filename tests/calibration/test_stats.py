import pytest
import torch

from pyprune.calibration.stats import GramStatistic, NormStatistic

KINDS = [NormStatistic, GramStatistic]


def sums(statistic):
    return statistic.gram if isinstance(statistic, GramStatistic) else statistic.sum_squares


def expected(kind, x):
    gram = x.double().T @ x.double()
    return gram if kind is GramStatistic else gram.diagonal()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adds_up_over_updates(kind, dtype):
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    s = kind(12)
    s.update(x[:20])
    s.update(x[20:])
    assert sums(s).dtype == torch.float32 and s.tokens == 50
    torch.testing.assert_close(sums(s).double(), expected(kind, x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        s.column_norms().double(), expected(NormStatistic, x), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_finite(kind, bad):
    x = torch.ones(4, 3)
    s = kind(3)
    assert s.finite()
    s.update(x)
    assert s.finite()
    x[2, 1] = bad
    s.update(x)
    assert not s.finite()
