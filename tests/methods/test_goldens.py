import pytest
import torch
from methods.golden import SEQUENCES, damped, exact_reconstruction, golden, hessian, quadratic, show

from pyprune.methods import METHODS, LayerInputs, MethodOptions
from pyprune.patterns import NM, Unstructured

HALF = Unstructured(0.5)


def solve(method, pattern, **options):
    w, x = golden()
    inputs = LayerInputs(x.square().sum(0), len(x), x.T @ x)
    options = MethodOptions(**options)
    METHODS[method].check(pattern, options)
    return METHODS[method].solve(w, inputs, pattern, options, None, None)


@pytest.mark.parametrize(
    ("method", "pattern", "options", "mask"),
    [
        ("magnitude", HALF, {}, ".1.1.1.. / 11..1..1 / 11....11 / ...11111"),
        (
            "magnitude",
            HALF,
            {"reference_count": True},
            ".1.1.11. / 11..1..1 / 11....11 / ...11111",
        ),
        ("magnitude", Unstructured(0.5, "row"), {}, ".1.1.11. / 11..1..1 / 11....11 / ....1111"),
        ("wanda", HALF, {}, ".1...111 / 11..1..1 / 11....11 / ....1111"),
        ("wanda", NM(2, 4), {}, ".11..11. / 11..1..1 / 11....11 / .11...11"),
    ],
)
def test_scores(method, pattern, options, mask):
    solution = solve(method, pattern, **options)
    assert show(solution.mask) == mask
    w, _ = golden()
    assert torch.equal(solution.weight, w * solution.mask)
    assert solution.damping is None and solution.loss is None


@pytest.mark.parametrize(
    ("pattern", "update", "loss"),
    [
        (HALF, "none", 14.326415945907),
        (NM(2, 4), "none", 58.805605262443),
        (HALF, "sequential", 10.566825969003),
    ],
)
def test_wanda_loss(pattern, update, loss):
    w, x = golden()
    solution = solve("wanda", pattern, update=update)
    assert quadratic(solution.weight - w, hessian(x)) == pytest.approx(loss, rel=1e-12)


def test_wanda_with_update_keeps_wandas_mask():
    solution = solve("wanda", HALF, update="sequential")
    assert torch.equal(solution.mask, solve("wanda", HALF).mask)
    assert torch.equal(solution.weight != 0, solution.mask)


# mask, loss with the damped H, loss with H itself, exact reconstruction of the same mask
SPARSEGPT = [
    (
        HALF,
        {"block_size": 8, "reference_count": True},
        "11...1.. / 111.1... / 111...11 / 111..11.",
        (7.154940449291, 3.647423537403, 5.390852659210),
        (0, [0, 0, -0.737524, 0.449357, 0.520511, 0, -1.188724, 1.532699]),
    ),
    (
        HALF,
        {"block_size": 4, "reference_count": True},
        "11....1. / 11..1..1 / 11....11 / 111.1111",
        (5.275559764693, 2.852104390097, 3.401075179463),
        None,
    ),
    (
        NM(2, 4),
        {},
        "11..1.1. / 11..1..1 / 11....11 / 11..11..",
        (6.347007395917, 4.116068904676, 3.185990270647),
        (0, [0, 0, -0.737524, 0.449357, 0, -0.466518, 0, 1.119958]),
    ),
    (
        HALF,
        {"block_size": 8},
        "11...1.. / 11..1... / 111...11 / 111..11.",
        (7.035837749862, 3.841934283667, 4.827631193513),
        (3, [0, 0, 0, -0.517655, -0.046939, 0, 0, 0.141728]),
    ),
    (
        HALF,
        {"block_size": 4},
        "11..1.1. / 11..1..1 / 11...111 / 11...1..",
        (7.210664753279, 4.943516555209, 3.399078516779),
        (3, [0, 0, 0.665228, -0.742024, 0.534049, 0, 0.334119, -0.395206]),
    ),
]


@pytest.mark.parametrize(("pattern", "options", "mask", "losses", "row"), SPARSEGPT)
def test_sparsegpt(pattern, options, mask, losses, row):
    w, x = golden()
    h = hessian(x)
    solution = solve("sparsegpt", pattern, **options)
    assert show(solution.mask) == mask
    change = solution.weight - w
    assert quadratic(change, damped(h)) == pytest.approx(losses[0], rel=1e-11)
    assert quadratic(change, h) == pytest.approx(losses[1], rel=1e-11)
    exact = exact_reconstruction(w, solution.mask, damped(h))
    assert quadratic(exact - w, damped(h)) == pytest.approx(losses[2], rel=1e-11)
    if row is not None:
        assert solution.weight[row[0]].tolist() == pytest.approx(row[1], abs=1e-6)


@pytest.mark.parametrize(("pattern", "options", "mask", "losses", "row"), SPARSEGPT)
def test_sparsegpt_reports_the_damped_loss_per_token(pattern, options, mask, losses, row):
    _, x = golden()
    solution = solve("sparsegpt", pattern, **options)
    # The golden losses are means over sequences with SparseGPT's factor of two.
    assert solution.loss * len(x) * 2 / SEQUENCES == pytest.approx(losses[0], rel=1e-11)
    assert solution.damping == 0.01
