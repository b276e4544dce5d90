import pytest
import torch

from pyprune.calibration.stats import GramStatistic, NormStatistic

KINDS = [NormStatistic, GramStatistic]


def sums(statistic):
    return statistic.gram if isinstance(statistic, GramStatistic) else statistic.sum_squares


def expected(kind, x, weight=None):
    x = x.double()
    w = torch.ones(len(x)).double() if weight is None else weight.double()
    gram = x.T @ (x * w[:, None])
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
def test_token_weights(kind):
    gen = torch.Generator().manual_seed(1)
    x, weight = torch.randn(30, 7, generator=gen), torch.rand(30, generator=gen)
    s = kind(7)
    s.update(x, weight)
    torch.testing.assert_close(sums(s).double(), expected(kind, x, weight), rtol=1e-5, atol=1e-4)
    assert s.tokens == pytest.approx(float(weight.sum()))
    ones = kind(7)
    ones.update(x, (weight > 0.5).float())
    picked = kind(7)
    picked.update(x[weight > 0.5])
    torch.testing.assert_close(sums(ones), sums(picked))
    assert ones.tokens == picked.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_statistic_of_both_parts(kind):
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    a, b, both = kind(5), kind(5), kind(5)
    a.update(x[:11])
    b.update(x[11:])
    both.update(x)
    a.merge(b)
    torch.testing.assert_close(sums(a), sums(both))
    assert a.tokens == both.tokens == 40
    with pytest.raises(ValueError, match="expected a statistic of 5 columns, got 6"):
        a.merge(kind(6))


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
